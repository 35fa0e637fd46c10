"""Writes the snapshot of the nodes' schemas that shared workflows rely on, and tells what would break them.

    python -m tools.schemas [--check]

Workflows are shared as files. One that was stored by the front end gives the values of a node's widgets by their places, and
links by the places of outputs; one for the API gives inputs by their names and may leave out those that are optional. So both
open for good if inputs, outputs and options of a list are only ever appended, and new inputs are optional. tests/schemas.json
holds the schemas as they were last written; a change that breaks this rule is not written.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

from tools import comfy, places

SNAPSHOT = places.ROOT / "tests" / "schemas.json"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FROM_FILES = {("STEMLoadInversion", "file"), ("STEMLoadBasis", "file")}  # options are the files of the user's folders
OF_FRONT_END = ("control_after_generate", "forceInput", "socketless", "widgetType", "multiselect")  # these move widgets' places

Node = dict[str, Any]  # {"inputs": [{"id": .., "type": .., ..}], "outputs": [{"name": .., "type": ..}]}


def schemas() -> list:
    """The schemas of all nodes of the pack, as ComfyUI asks for them."""

    async def ask() -> list:
        extension = await comfy.start().comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    return asyncio.run(ask())


def described(found: Iterable) -> dict[str, Node]:
    """Schemas without their texts, by node id.

    Args:
        found: io.Schema of each node.
    Returns:
        For each node its inputs (id, type, and what the front end is told of them: default, min, max, step, options, optional,
        advanced) and its outputs (name, type), in their order.
    """
    return {
        schema.node_id: {
            "inputs": [_input(schema.node_id, given) for given in schema.inputs],
            "outputs": [{"name": given.display_name, "type": given.get_io_type()} for given in schema.outputs],
        }
        for schema in found
    }


def _input(node: str, given: Any) -> dict[str, Any]:
    """An input of a schema, without its texts and without what differs from one machine to the next."""
    left_out = {"tooltip", "display_name", "placeholder"}
    if (node, given.id) in FROM_FILES:
        left_out |= {"options", "default"}
    left_out |= {name for name in ("optional", "multiselect") if not given.as_dict().get(name)}
    return {
        "id": given.id,
        "type": given.get_io_type(),
        **{name: value for name, value in given.as_dict().items() if name not in left_out},
    }


# ----------------------------------------------------------------------------------------------- what would break


def broken(old: dict[str, Node], new: dict[str, Node]) -> list[str]:
    """What of a workflow that was stored with the old schemas would fail or change with the new ones, a line for each."""
    lines = []
    for name, node in old.items():
        if name not in new:
            lines.append(f"{name} is gone")
            continue
        lines += [f"{name}: {line}" for line in _broken_inputs(node["inputs"], new[name]["inputs"])]
        lines += [f"{name}: {line}" for line in _broken_outputs(node["outputs"], new[name]["outputs"])]
    return lines


def _broken_inputs(old: list[dict], new: list[dict]) -> list[str]:
    lines = []
    known, found = {given["id"]: given for given in old}, {given["id"]: given for given in new}
    for name, given in known.items():
        if name in found:
            lines += [f"input {name}: {line}" for line in _broken_input(given, found[name])]
        else:
            lines.append(f"input {name} is gone")
    for name, given in found.items():
        if name not in known and not given.get("optional"):
            lines.append(f"input {name} is new and not optional")
    for kind, chosen in (("widgets", True), ("sockets", False)):
        before, after = ([given["id"] for given in inputs if (given["type"] in WIDGETS) is chosen] for inputs in (old, new))
        if set(before) <= set(after) and after[: len(before)] != before:
            lines.append(f"{kind} are in another order, or a new one is not behind all others: {', '.join(after)}")
    return lines


def _broken_input(old: dict, new: dict) -> list[str]:
    if old["type"] != new["type"]:
        return [f"type {old['type']} is now {new['type']}"]
    lines = []
    if old.get("optional") and not new.get("optional"):
        lines.append("it was optional")
    if old.get("optional") and old.get("default") != new.get("default"):
        lines.append(f"default {old.get('default')!r} is now {new.get('default')!r}, and graphs may leave it out")
    if new.get("min", -inf) > old.get("min", -inf) or new.get("max", inf) < old.get("max", inf):
        lines.append(f"range {_range(old)} is now {_range(new)}")
    if (before := _step(old)) != (after := _step(new)) and not (before and after and _multiple(before, after)):
        lines.append(f"step {before} is now {after}, and the front end rounds to it")
    options = new.get("options", [])
    if options[: len(old.get("options", []))] != old.get("options", []):
        lines.append(f"options {', '.join(map(str, old['options']))} are now {', '.join(map(str, options)) or 'none'}")
    for part in OF_FRONT_END:
        if old.get(part) != new.get(part):
            lines.append(f"{part} {old.get(part)} is now {new.get(part)}")
    return lines


def _broken_outputs(old: list[dict], new: list[dict]) -> list[str]:
    if new[: len(old)] == old:
        return []
    before, after = (", ".join(f"{given['name']} {given['type']}" for given in outputs) for outputs in (old, new))
    return [f"outputs {before} are now {after or 'none'}"]


def _range(given: dict) -> str:
    return f"{given.get('min', 'any')} to {given.get('max', 'any')}"


def _step(given: dict) -> float | None:
    return given.get("step", 1 if given["type"] == "INT" else None)


def _multiple(number: float, of: float) -> bool:
    return abs(number / of - round(number / of)) < 1e-6


# -------------------------------------------------------------------------------------------------- the snapshot


def text(found: dict[str, Node]) -> str:
    """The snapshot as it is stored: a line for each input and output, so that a change of one is a change of one line."""
    parts = []
    for name, node in found.items():
        lists = []
        for rank in ("inputs", "outputs"):
            lines = ",".join(f"\n      {json.dumps(given, ensure_ascii=False)}" for given in node[rank])
            lists.append(f'    "{rank}": [{lines}' + ("\n    ]" if lines else "]"))
        parts.append(f'  "{name}": {{\n' + ",\n".join(lists) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def stored() -> dict[str, Node]:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether the snapshot agrees")
    options = parser.parse_args(arguments)
    found = described(schemas())
    if lines := broken(stored(), found):
        print("Workflows that were shared would break:", *lines, sep="\n* ", file=sys.stderr)
        return 1
    if options.check:
        if not SNAPSHOT.is_file() or SNAPSHOT.read_text(encoding="utf-8") != text(found):
            print(f"{SNAPSHOT} is not up to date. Run python -m tools.schemas.", file=sys.stderr)
            return 1
        return 0
    SNAPSHOT.write_text(text(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
