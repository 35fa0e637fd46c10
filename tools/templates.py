"""Writes the workflow templates of the pack, with thumbnails of what they make.

    python -m tools.templates [--only NAME] [--pictures]

A template is a graph of tests/graphs as it lies on the canvas: nodes in groups from left to right, and a note. The server is
asked what widgets and sockets each node has. With --pictures the graphs are run, and a row of frames of every clip that they
preview becomes the thumbnail.
"""

import argparse
import json
from typing import Any, NamedTuple

import tomllib

from tools import places
from tools.demo import PATIENCE, load_graph, previews
from tools.pictures import thumbnail
from tools.server import Server

FOLDER = places.ROOT / "workflows"
OWN, CORE = places.PACK, "comfy-core"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
NODE_WIDTH, GAP, MARGIN, TITLE = 330, 40, 20, 70  # pixels of the canvas
ROW, LINES, PICTURE = 26, 90, 240  # height of a socket or widget, of a text field, of a preview
NOTE_HEIGHT = 300
COLOURS = ("#3f789e", "#8A8", "#b58b2a", "#a1309b")


class Template(NamedTuple):
    graph: str  # of tests/graphs
    groups: dict[str, list[list[str]]]  # title -> columns of node ids, from left to right
    note: str  # Markdown


def own_video(prompt: str) -> str:
    """What to swap for a real model and clip; `prompt` says where the clip's prompt goes."""
    return (
        "**Your own video:** put *Load Checkpoint* (SD1.5, SD2.x or SDXL) in place of *STEM Demo Model*, and *Load Video* with "
        f"*Get Video Components* in place of *STEM Demo Clip*; write its prompt into {prompt}, and raise cfg from 3, which "
        "suits the demo model, to 7.5."
    )


TEMPLATES = {
    "TokenFlow edit": Template(
        "tokenflow",
        {
            "1. Clip and model": [["demo", "clip", "source"]],
            "2. Inversion": [["encode", "positive", "invert"]],
            "3. Edit by prompt": [["tokenflow", "edited", "negative"], ["euler", "sample"]],
            "4. Result": [["decode", "edit"], ["video", "save"]],
        },
        "## TokenFlow edit\n\nThe clip is inverted with the prompt that describes it (**2**), and sampled again with the "
        "prompt that describes the edit (**3**). STEM TokenFlow edits a few keyframes together and lets all other frames "
        "follow the motion of the source.\n\n"
        f"{own_video('the text field of step 2')}\n\n"
        "**Nothing changes?** Lower *qk_until* and *conv_until*. **The shape is lost?** Raise them.",
    ),
    "FateZero edit": Template(
        "fatezero",
        {
            "1. Clip and model": [["demo", "clip", "source"]],
            "2. Inversion": [["encode", "positive", "invert"]],
            "3. Edit by prompt": [["fatezero"], ["edited", "negative", "euler", "sample"]],
            "4. Result": [["decode", "edit"], ["video", "save"]],
        },
        "## FateZero edit\n\nThe clip is inverted with the prompt that describes it (**2**). STEM FateZero takes that "
        "prompt and the one of the edit, and keeps the source's attention for all words that did not change (**3**). The "
        "sampler needs the same target prompt. With a real checkpoint *blend_words* can keep the edit where a word is, and "
        "*mask* shows what it found.\n\n"
        f"{own_video('step 2 and into *source_prompt*')}\n\n"
        "**Nothing changes?** Lower *self_until* and *cross_until*, or lower *blend_threshold*. **Too much changes?** Raise "
        "them.",
    ),
}


def workflow(template: Template, info: dict[str, dict], versions: dict[str, str]) -> dict[str, Any]:
    """The template as the front end stores it.

    Args:
        template: What it shows.
        info: Answer of the server's /object_info.
        versions: Of the pack and of ComfyUI, by their names in the registry.
    """
    graph = load_graph(template.graph)
    numbers = {name: i for i, name in enumerate(graph, 1)}
    links, nodes = [], {}
    for name, node in graph.items():
        kind = info[node["class_type"]]
        origin = OWN if kind["python_module"].startswith("custom_nodes.") else CORE
        made = {
            "id": numbers[name],
            "type": node["class_type"],
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": title, "type": type_, "links": []}
                for title, type_ in zip(kind["output_name"], kind["output"], strict=True)
            ],
            "properties": {
                "Node name for S&R": node["class_type"],
                "cnr_id": origin,
                "ver": versions[origin],
            },
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
    for number, source, slot, *_ in links:
        next(node for node in nodes.values() if node["id"] == source)["outputs"][slot]["links"].append(number)
    groups = lay_out(template, nodes)
    nodes["note"] = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "pos": [0, -NOTE_HEIGHT - GAP],
        "size": [2 * NODE_WIDTH, NOTE_HEIGHT],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [template.note],
    }
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


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


def lay_out(template: Template, nodes: dict[str, dict]) -> list[dict]:
    """Gives every node its place and size; returns the groups around them."""
    placed = [name for columns in template.groups.values() for column in columns for name in column]
    if sorted(placed) != sorted(nodes):
        raise ValueError(f"groups of {template.graph} and its graph differ in {set(placed) ^ set(nodes)}")
    left, groups = 0, []
    for (title, columns), colour in zip(template.groups.items(), COLOURS[: len(template.groups)], strict=True):
        start, lowest = left, 0
        for column in columns:
            top = TITLE
            for name in column:
                node = nodes[name]
                rows = max(len([i for i in node["inputs"] if "widget" not in i]), len(node["outputs"]))
                height = ROW * (1 + rows + len(node["widgets_values"])) + LINES * (node["type"] == "CLIPTextEncode")
                height += PICTURE * (node["type"] in ("PreviewImage", "SaveVideo"))
                node["pos"], node["size"] = [left + MARGIN, top], [NODE_WIDTH, height]
                top += height + GAP
            lowest = max(lowest, top)
            left += NODE_WIDTH + GAP
        width = left - start
        groups.append({"title": title, "bounding": [start, 0, width, lowest], "color": colour, "font_size": 24})
        left += GAP
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TEMPLATES, help="one template (default: all)")
    parser.add_argument("--pictures", action="store_true", help="run the graphs and make the thumbnails anew")
    args = parser.parse_args()
    version = tomllib.loads((places.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    FOLDER.mkdir(exist_ok=True)
    with Server() as server:
        info = server.object_info()
        versions = {OWN: version, CORE: server.get("/system_stats")["system"]["comfyui_version"]}
        for name in [args.only] if args.only else TEMPLATES:
            made = workflow(TEMPLATES[name], info, versions)
            (FOLDER / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            if args.pictures:
                clips = previews(server, server.run(load_graph(TEMPLATES[name].graph), timeout=PATIENCE))
                thumbnail(clips).save(FOLDER / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
