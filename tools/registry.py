"""Writes node_list.json: the nodes of the pack for ComfyUI-Manager, which does not find V3 nodes in the sources.

python -m tools.registry [--check]
"""

import argparse
import json
import sys
from collections.abc import Iterable

from tools import comfy, places

FILE = places.ROOT / "node_list.json"


def node_list(schemas: Iterable) -> str:
    """The text of the file: a description for every node id.

    Args:
        schemas: Of the nodes, `io.Schema`.
    """
    return json.dumps({schema.node_id: schema.description for schema in schemas}, indent=2) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    listed = node_list(node.define_schema() for node in comfy.start().nodes.NODES)
    if not args.check:
        FILE.write_text(listed, encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != listed:
        sys.exit("node_list.json differs from the nodes; run python -m tools.registry")


if __name__ == "__main__":
    main()
