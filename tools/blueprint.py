"""The subgraph blueprint of the pack: an edit by prompt as a single node, for the front end's node library.

It is the graph tests/graphs/edit.json without what stands at its ends: the model, the clip and what shows the result.
Written by `python -m tools.templates`.
"""

import uuid
from typing import Any, NamedTuple

from tools import places
from tools.canvas import HEADER, MARGIN, OUTSIDE, OUTSIDE_NUMBER, OWN, SOCKET, WIDGET, Registry, place, stored
from tools.demo import load_graph
from tools.server import Graph

NAME = "STEM video edit"
FOLDER = places.ROOT / "subgraphs"
DESCRIPTION = (
    "Inverts a clip with the prompt that describes it, and samples it again with the prompt that describes the edit. "
    "For SD1.x, SD2.x and SDXL."
)
ALIASES = ["video inversion", "video editing", "video to video", "prompt edit"]
OUTPUT_NUMBER = -20  # of what leads out of a subgraph, by the front end
WIDTH, BORDER, BORDER_GAP = 400, 150, 120  # of the node, of the subgraph's ends, from these to the nodes between
TEXT = 100  # height of a text field
SPACE = uuid.UUID("d0a3f7d5-6c5c-4b80-9a36-2f3e5c1f7b52")  # so that ids stay when the blueprint is written anew


class Socket(NamedTuple):
    """An input of the subgraph."""

    name: str
    type: str
    leads_to: dict[str, str]  # node -> its input
    value: Any = None  # of a widget


INPUTS = (
    Socket("model", "MODEL", {"invert": "model", "patch": "model"}),
    Socket("clip", "CLIP", {"positive": "clip", "edited": "clip", "negative": "clip"}),
    Socket("vae", "VAE", {"encode": "vae", "decode": "vae"}),
    Socket("images", "IMAGE", {"encode": "pixels"}),
    Socket("source_prompt", "STRING", {"positive": "text"}, ""),
    Socket("edit_prompt", "STRING", {"edited": "text"}, ""),
    Socket("steps", "INT", {"invert": "steps"}, 50),
    Socket("cfg", "FLOAT", {"sample": "cfg"}, 7.5),
)
GROUPS = {
    "1. Inversion": [["encode", "positive", "invert"]],
    "2. Edit by prompt": [["edited", "negative"], ["patch", "euler"], ["sample", "decode"]],
}
TITLES = {"positive": "Source Prompt", "edited": "Edit Prompt", "negative": "Negative Prompt (empty)"}


def inner_graph() -> Graph:
    """The nodes within, in API format; what comes from outside is linked to the number of the input."""
    kept = [name for columns in GROUPS.values() for column in columns for name in column]
    graph = {name: node for name, node in load_graph("edit").items() if name in kept}
    for number, socket in enumerate(INPUTS):
        for name, key in socket.leads_to.items():
            graph[name]["inputs"][key] = [OUTSIDE, number]
    return graph


def blueprint(registry: Registry) -> dict[str, Any]:
    """A workflow of one node, which is the subgraph that it defines."""
    nodes, links, groups = place(inner_graph(), GROUPS, TITLES, registry)
    last_link = len(links) + 1
    out = nodes["decode"]
    out["outputs"][0]["links"].append(last_link)
    links.append([last_link, out["id"], 0, OUTPUT_NUMBER, 0, "IMAGE"])
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    right = max(x + width for x, _, width, _ in (group["bounding"] for group in groups))
    subgraph = {
        "id": identity("subgraph"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": last_link, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": NAME,
        "inputNode": {"id": OUTSIDE_NUMBER, "bounding": end_of(-BORDER_GAP - BORDER, len(INPUTS))},
        "outputNode": {"id": OUTPUT_NUMBER, "bounding": end_of(right + BORDER_GAP, 1)},
        "inputs": [
            {
                "id": identity(socket.name),
                "name": socket.name,
                "type": socket.type,
                "linkIds": [link[0] for link in links if link[1:3] == [OUTSIDE_NUMBER, number]],
                "label": label(socket),
                "pos": [-BORDER_GAP - MARGIN, SOCKET * (number + 1)],
            }
            for number, socket in enumerate(INPUTS)
        ],
        "outputs": [
            {
                "id": identity("images out"),
                "name": "images",
                "type": "IMAGE",
                "linkIds": [last_link],
                "pos": [right + BORDER_GAP + MARGIN, SOCKET],
            }
        ],
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": groups,
        "links": [dict(zip(keys, link, strict=True)) for link in links],
        "extra": {},
        "category": "video/STEM",
        "description": DESCRIPTION,
    }
    return {
        "revision": 0,
        "last_node_id": len(nodes) + 1,
        "last_link_id": 0,
        "nodes": [node(len(nodes) + 1, registry)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": DESCRIPTION, "BlueprintSearchAliases": ALIASES},
    }


def node(number: int, registry: Registry) -> dict[str, Any]:
    """The node that stands for the subgraph."""
    widgets = [socket for socket in INPUTS if socket.value is not None]
    inputs = []
    for socket in INPUTS:
        widget = {"widget": {"name": socket.name}} if socket in widgets else {}
        inputs.append({"name": socket.name, "label": label(socket), "type": socket.type, **widget, "link": None})
    texts = sum(socket.type == "STRING" for socket in widgets)
    height = HEADER + SOCKET * (len(INPUTS) - len(widgets)) + WIDGET * len(widgets) + TEXT * texts
    return {
        "id": number,
        "type": identity("subgraph"),
        "title": NAME,
        "pos": [0, 0],
        "size": [WIDTH, height],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": inputs,
        "outputs": [{"name": "images", "type": "IMAGE", "links": []}],
        "properties": {"cnr_id": OWN, "ver": registry.versions[OWN]},
        "widgets_values": [socket.value for socket in widgets],
    }


def label(socket: Socket) -> str:
    return socket.name.replace("_", " ")


def identity(of: str) -> str:
    return str(uuid.uuid5(SPACE, of))


def end_of(left: float, slots: int) -> list[float]:
    """Where the subgraph's inputs or outputs lie."""
    return [left, 0, BORDER, 2 * MARGIN + SOCKET * slots]


def write(registry: Registry) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{NAME}.json").write_text(stored(blueprint(registry)), encoding="utf-8")
