"""A graph as it lies on the canvas: nodes in groups from left to right, with widgets, titles and a note.

The server's /object_info tells what widgets and sockets a node has. Sizes are such that nothing is cut off and nothing
overlaps, neither with the classic nodes nor with the modern ones, which are the taller.
"""

import json
import math
from collections.abc import Container
from typing import Any, NamedTuple

import tomllib

from tools import places
from tools.server import Graph, Server

OWN, CORE = places.PACK, "comfy-core"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
NODE_WIDTH, COLUMN_GAP, NODE_GAP, MARGIN, TITLE = 330, 50, 70, 20, 80  # pixels of the canvas
HEADER, SOCKET, WIDGET, BADGE = 20, 22, 32, 24  # heights of a node's parts; the badge names the pack
TEXT, PICTURES, VIDEO, ANY = 110, 330, 330, 160  # more height: of a text field, previewed frames, a video, a text shown
MORE = {"CLIPTextEncode": TEXT, "PreviewImage": PICTURES, "SaveVideo": VIDEO, "PreviewAny": ANY}
CHART = (560, 1000)  # width and height of the preview of a chart
NOTE_WIDTH, LETTERS, LINE = 640, 110, 18  # of a note: letters that a line takes, and its height
COLOURS = ("#3f789e", "#8A8", "#b58b2a", "#a1309b", "#3f789e")


OUTSIDE, OUTSIDE_NUMBER = "outside", -10  # of a subgraph: what leads into it comes from there, by the front end's number


class Canvas(NamedTuple):
    nodes: dict[str, dict]  # by their names in the graph
    links: list[list]  # number, source, its slot, target, its slot, type
    groups: list[dict]


class Registry(NamedTuple):
    """What a server knows of nodes."""

    info: dict[str, dict]  # the answer of /object_info
    versions: dict[str, str]  # of the pack and of ComfyUI, by their names in the registry

    @classmethod
    def of(cls, server: Server) -> "Registry":
        version = tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        core = server.get("/system_stats")["system"]["comfyui_version"]
        return cls(server.object_info(), {OWN: version, CORE: core})

    def origin(self, class_type: str) -> dict[str, str]:
        """What tells the front end which pack a missing node is of."""
        name = OWN if self.info[class_type]["python_module"].startswith("custom_nodes.") else CORE
        return {"cnr_id": name, "ver": self.versions[name]}


def place(
    graph: Graph,
    groups: dict[str, list[list[str]]],
    titles: dict[str, str],
    registry: Registry,
    charts: Container[str] = (),
) -> Canvas:
    """The graph's nodes with their links, in groups.

    Args:
        graph: In API format. In a subgraph, inputs that come from `OUTSIDE` are linked to its border.
        groups: Title -> columns of nodes, from left to right.
        titles: Of nodes that are not called by their display names.
        charts: Previews that show a chart.
    """
    numbers = {OUTSIDE: OUTSIDE_NUMBER, **{name: i for i, name in enumerate(graph, 1)}}
    links, nodes = [], {}
    for name, node in graph.items():
        kind = registry.info[node["class_type"]]
        made = {
            "id": numbers[name],
            "type": node["class_type"],
            **({"title": titles[name]} if name in titles else {}),
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": title, "type": type_, "links": []}
                for title, type_ in zip(kind["output_name"], kind["output"], strict=True)
            ],
            "properties": {"Node name for S&R": node["class_type"], **registry.origin(node["class_type"])},
            "widgets_values": [],
        }
        for key, type_, options in inputs_of(kind):
            value = node["inputs"].get(key)
            linked = isinstance(value, list)
            if is_widget(type_, options):
                shown = default(type_, options) if linked or value is None else value
                refuse_nested(name, key, options, shown)
                made["widgets_values"] += widget_values(key, options, shown)
                if not linked:
                    continue
            entry = {"name": key, "type": type_ if isinstance(type_, str) else "COMBO", "link": None}
            if is_widget(type_, options):
                entry["widget"] = {"name": key}
            if linked:
                entry["link"] = len(links) + 1
                links.append([entry["link"], numbers[value[0]], value[1], made["id"], len(made["inputs"]), entry["type"]])
            made["inputs"].append(entry)
        nodes[name] = made
    for node in nodes.values():
        for slot, output in enumerate(node["outputs"]):
            output["links"] += [number for number, source, place, *_ in links if (source, place) == (node["id"], slot)]
    return Canvas(nodes, links, lay_out(groups, nodes, charts))


def workflow(canvas: Canvas, note: str) -> dict:
    """What lies on the canvas as the front end stores it, under a note in Markdown."""
    nodes, links, frames = dict(canvas.nodes), canvas.links, canvas.groups
    nodes["note"] = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "pos": [0, -note_height(note) - NODE_GAP],
        "size": [NOTE_WIDTH, note_height(note)],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [note],
    }
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": frames,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def stored(workflow: dict[str, Any]) -> str:
    """The text of a workflow's file."""
    return json.dumps(workflow, indent=1) + "\n"


def inputs_of(kind: dict) -> list[tuple[str, Any, dict]]:
    """Name, type and options of a node's inputs, in the order of the front end."""
    return [
        (key, part[key][0], part[key][1] if len(part[key]) > 1 else {})
        for section in ("required", "optional")
        if (part := kind["input"].get(section))
        for key in kind["input_order"][section]
    ]


def is_widget(type_: Any, options: dict) -> bool:
    return (isinstance(type_, list) or type_ in WIDGETS) and not options.get("forceInput")


def default(type_: Any, options: dict) -> Any:
    choices = type_ if isinstance(type_, list) else options.get("options", [])
    empty = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(type_ if isinstance(type_, str) else "", None)
    return options.get("default", choices[0] if choices else empty)


def refuse_nested(node: str, key: str, options: dict, value: Any) -> None:
    """Some choices of a combo bring widgets of their own, which are not laid out here."""
    for option in options.get("options", []):
        if isinstance(option, dict) and option["key"] == value and any(option["inputs"].values()):
            raise ValueError(f"{node}: {key} {value} has inputs of its own; choose another in the graph.")


def widget_values(key: str, options: dict, value: Any) -> list:
    """A seed is followed by what becomes of it after a run."""
    controlled = options.get("control_after_generate", key in ("seed", "noise_seed"))
    return [value, "fixed"] if controlled else [value]


def lay_out(groups: dict[str, list[list[str]]], nodes: dict[str, dict], charts: Container[str]) -> list[dict]:
    """Gives every node its place and size; returns the frames of the groups."""
    placed = [name for columns in groups.values() for column in columns for name in column]
    if sorted(placed) != sorted(nodes):
        raise ValueError(f"the groups and the graph differ in {set(placed) ^ set(nodes)}")
    left, lowest, frames = 0, 0, []
    for (title, columns), colour in zip(groups.items(), COLOURS, strict=False):
        start = left
        for column in columns:
            top, column_width = TITLE, CHART[0] if any(name in charts for name in column) else NODE_WIDTH
            for name in column:
                node = nodes[name]
                node["pos"] = [left + MARGIN, top]
                node["size"] = [column_width, CHART[1] if name in charts else height(node)]
                top += node["size"][1] + NODE_GAP
            lowest = max(lowest, top)
            left += column_width + COLUMN_GAP
        width = left - start - COLUMN_GAP + 2 * MARGIN
        frames.append({"title": title, "bounding": [start, 0, width], "color": colour, "font_size": 24})
        left = start + width + COLUMN_GAP
    for frame in frames:
        frame["bounding"].append(lowest - NODE_GAP + MARGIN)
    return frames


def height(node: dict) -> int:
    sockets = max(len([entry for entry in node["inputs"] if "widget" not in entry]), len(node["outputs"]))
    badge = BADGE * (node["properties"]["cnr_id"] == OWN)
    return HEADER + SOCKET * sockets + WIDGET * len(node["widgets_values"]) + badge + MORE.get(node["type"], 0)


def note_height(note: str) -> int:
    paragraphs = note.split("\n\n")
    return HEADER + LINE * sum(1 + math.ceil(len(text) / LETTERS) for text in paragraphs)
