"""The workflow templates as the template browser finds them, and what they would run."""

import io
import json

import pytest
import tomllib
from PIL import Image

from tools import places
from tools.demo import load_graph
from tools.templates import FOLDER, TEMPLATES

NOTES = ("Note", "MarkdownNote")


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


def test_a_template_runs_what_its_graph_says(server, name, stored):
    """The front end's own way from the canvas to the API, written out: links first, then widgets in the order of the node."""
    info, found = server.object_info(), {}
    sources = {number: [source, slot] for number, source, slot, *_ in stored["links"]}
    for node in stored["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = iter(node["widgets_values"]), {}
        kind = info[node["type"]]
        linked = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        for section in ("required", "optional"):
            for key in kind["input_order"].get(section, []):
                type_, options = (*kind["input"][section][key], {})[:2]
                if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"):
                    inputs[key] = next(values)
                    if options.get("control_after_generate", key in ("seed", "noise_seed")):
                        assert next(values) == "fixed"
                if key in linked:
                    inputs[key] = linked[key]
        assert next(values, None) is None
        found[node["id"]] = {"class_type": node["type"], "inputs": inputs}
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


def test_a_missing_pack_can_be_found_and_nothing_overlaps(stored):
    version = tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for node in stored["nodes"]:
        if node["type"].startswith("STEM"):
            assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == ("stem-video-inversion", version)
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in stored["nodes"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
