"""The subgraph blueprint as the node library finds it, and the edit that it is."""

import json

import pytest
import tomllib

from tools import places
from tools.demo import load_graph, previews

NAME = "STEM video edit"
STEPS, FRAMES, SIZE = 3, 4, 64
OUTSIDE_IN, OUTSIDE_OUT = -10, -20  # the front end's numbers of a subgraph's inputs and outputs


@pytest.fixture
def stored():
    return json.loads((places.ROOT / "subgraphs" / f"{NAME}.json").read_text(encoding="utf-8"))


@pytest.fixture
def node(stored):
    """The one node on the canvas."""
    (node,) = stored["nodes"]
    return node


@pytest.fixture
def inside(stored):
    (subgraph,) = stored["definitions"]["subgraphs"]
    return subgraph


def test_the_node_library_lists_it(server, stored):
    listed = server.get("/global_subgraphs")
    ((number, entry),) = [(n, entry) for n, entry in listed.items() if entry["source"] == "custom_node"]
    assert entry["name"] == NAME
    assert json.loads(server.get(f"/global_subgraphs/{number}")["data"]) == stored


def test_node_and_subgraph_agree(node, inside):
    version = tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert node["type"] == inside["id"]
    assert node["properties"] == {"cnr_id": "stem-video-inversion", "ver": version}
    for end in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in node[end]] == [(s["name"], s["type"]) for s in inside[end]]
    assert [(s["name"], s["type"]) for s in inside["inputs"]] == [
        ("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"), ("images", "IMAGE"),
        ("source_prompt", "STRING"), ("edit_prompt", "STRING"), ("steps", "INT"), ("cfg", "FLOAT"),
    ]  # fmt: skip
    assert [(s["name"], s["type"]) for s in inside["outputs"]] == [("images", "IMAGE")]
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    assert dict(zip(widgets, node["widgets_values"], strict=True)) == {
        "source_prompt": "", "edit_prompt": "", "steps": 50, "cfg": 7.5
    }  # fmt: skip


def test_links_inside_are_told_at_both_ends(inside):
    nodes = {node["id"]: node for node in inside["nodes"]}
    for link in inside["links"]:
        number, source, target = link["id"], link["origin_id"], link["target_id"]
        if source == OUTSIDE_IN:
            start = inside["inputs"][link["origin_slot"]]
            assert number in start["linkIds"]
        else:
            start = nodes[source]["outputs"][link["origin_slot"]]
            assert number in start["links"]
        if target == OUTSIDE_OUT:
            end = inside["outputs"][link["target_slot"]]
            assert end["linkIds"] == [number]
        else:
            end = nodes[target]["inputs"][link["target_slot"]]
            assert end["link"] == number
        assert start["type"] == end["type"] == link["type"]
    told = [entry["link"] for node in nodes.values() for entry in node["inputs"]]
    told += [number for entry in inside["outputs"] for number in entry["linkIds"]]
    assert sorted(number for number in told if number is not None) == sorted(link["id"] for link in inside["links"])
    numbers = [link["id"] for link in inside["links"]]
    assert len(set(numbers)) == len(numbers) and max(numbers) <= inside["state"]["lastLinkId"]
    assert max(nodes) <= inside["state"]["lastNodeId"]


def test_it_is_the_edit_of_the_template(server, to_api, node, inside):
    """Unfolded between the ends of the demo, as the front end does it, the subgraph gives what the graph of the edit gives."""
    edit = load_graph("edit", STEPS)
    edit["clip"]["inputs"] |= {"frames": FRAMES, "size": SIZE}
    ends = {name: edit[name] for name in ("demo", "clip", "edit")}
    given = {
        "model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2], "images": ["clip", 0], "source_prompt": ["clip", 2],
        "edit_prompt": edit["edited"]["inputs"]["text"], "steps": STEPS, "cfg": edit["sample"]["inputs"]["cfg"],
    }  # fmt: skip
    sources = {}
    for link in inside["links"]:
        slot = link["origin_slot"]
        outer = link["origin_id"] == OUTSIDE_IN
        sources[link["id"]] = given[inside["inputs"][slot]["name"]] if outer else [str(link["origin_id"]), slot]
    made = {str(number): found for number, found in to_api(inside["nodes"], sources).items()}
    (out,) = inside["outputs"][0]["linkIds"]
    shown = {**ends, **made, "edit": {"class_type": "PreviewImage", "inputs": {"images": sources[out]}}}
    found = previews(server, server.run(shown))["edit"]
    assert found.shape == (FRAMES, SIZE, SIZE, 3)
    assert (found == previews(server, server.run(edit))["edit"]).all()
