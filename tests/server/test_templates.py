"""The workflow templates as the template browser finds them, and what they would run."""

import io
import json
from itertools import pairwise

import pytest
import tomllib
from PIL import Image

from tools import places
from tools.demo import load_graph
from tools.templates import FOLDER, TEMPLATES

NOTES = ("Note", "MarkdownNote")
TITLE_BAR = 30


@pytest.fixture(params=sorted(TEMPLATES))
def name(request):
    return request.param


@pytest.fixture
def stored(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_browser_lists_every_template_with_its_picture(server):
    listed = server.get("/api/workflow_templates")
    ours = [folder for folder, names in listed.items() if set(names) == set(TEMPLATES)]
    assert ours and {path.stem for path in FOLDER.iterdir()} == set(TEMPLATES)
    for name in TEMPLATES:
        path = f"/api/workflow_templates/{ours[0]}/{name}".replace(" ", "%20")
        assert server.get(f"{path}.json") == json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        with Image.open(io.BytesIO(server.get(f"{path}.jpg"))) as picture:
            assert picture.format == "JPEG" and min(picture.size) >= 200


def test_a_template_runs_what_its_graph_says(server, to_api, name, stored):
    info = server.object_info()
    sources = {number: [source, slot] for number, source, slot, *_ in stored["links"]}
    found = to_api([node for node in stored["nodes"] if node["type"] not in NOTES], sources)
    graph = load_graph(TEMPLATES[name].graph)
    numbers = dict(zip(graph, (node["id"] for node in stored["nodes"]), strict=False))
    for node_id, node in graph.items():
        wanted = {k: [numbers[v[0]], v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
        made = found.pop(numbers[node_id])
        for key in made["inputs"].keys() - wanted.keys():  # a graph may leave an optional input at its default
            _, options = info[node["class_type"]]["input"]["optional"][key]
            wanted[key] = options["default"] if "default" in options else options["options"][0]
        assert made == {"class_type": node["class_type"], "inputs": wanted}
    assert not found


def test_links_are_told_at_both_ends(stored):
    nodes = {node["id"]: node for node in stored["nodes"]}
    for number, source, slot, target, place, type_ in stored["links"]:
        assert number in nodes[source]["outputs"][slot]["links"] and nodes[source]["outputs"][slot]["type"] == type_
        assert nodes[target]["inputs"][place]["link"] == number
    assert sum(len(output["links"]) for node in nodes.values() for output in node["outputs"]) == len(stored["links"])


def test_a_missing_pack_can_be_found(stored):
    version = tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for node in stored["nodes"]:
        if node["type"].startswith("STEM"):
            assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == ("stem-video-inversion", version)


def test_only_core_and_this_pack_are_needed(server, stored):
    info = server.object_info()
    for node in stored["nodes"]:
        if node["type"] not in NOTES and not node["type"].startswith("STEM"):
            assert info[node["type"]]["python_module"].split(".")[0] in ("nodes", "comfy_extras")


def test_no_two_nodes_look_alike(stored):
    called = [node.get("title", node["type"]) for node in stored["nodes"]]
    assert len(set(called)) == len(called)


def test_a_clip_runs_from_left_to_right_through_the_groups(stored):
    left = {node["id"]: node["pos"][0] for node in stored["nodes"]}
    assert all(left[source] <= left[target] for _, source, _, target, *_ in stored["links"])
    frames = [group["bounding"] for group in stored["groups"]]
    titles = [group["title"] for group in stored["groups"]]
    assert titles == [f"{number}. {title[3:]}" for number, title in enumerate(titles, 1)]
    assert all(a[0] + a[2] < b[0] for a, b in pairwise(frames))
    for node in stored["nodes"]:
        x, y, right, lower = box(node)
        within = [f for f in frames if f[0] <= x and f[1] <= y and right <= f[0] + f[2] and lower <= f[1] + f[3]]
        assert len(within) == (node["type"] not in NOTES)


def test_nothing_overlaps(stored):
    boxes = [box(node) for node in stored["nodes"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def box(node: dict) -> tuple[float, float, float, float]:
    """Left, upper, right and lower end of a node; its title bar lies above its place."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height
