import signal
from pathlib import Path
from typing import Any

import pytest

from tools import processes
from tools.server import Server

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
TEST_MODELS = Path(__file__).parent / "test_models"


@pytest.fixture(scope="session")
def server():
    """A running ComfyUI with the pack, and the nodes that only tests need."""
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    with Server(extra_packs=[TEST_MODELS]) as running:
        yield running


@pytest.fixture
def to_api(server):
    """The front end's own way from the canvas to the API, written out: links first, then widgets in the order of the node.

    The function takes nodes as the front end stores them, and what each link's number leads from: a node's number and
    output, or the value of a widget at the border of a subgraph. It gives nodes in API format by their numbers.
    """
    info = server.object_info()

    def convert(nodes: list[dict], sources: dict[int, Any]) -> dict[int, dict]:
        found = {}
        for node in nodes:
            values, inputs = iter(node["widgets_values"]), {}
            kind = info[node["type"]]
            linked = {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
            for section in ("required", "optional"):
                for key in kind["input_order"].get(section, []):
                    type_, options = (*kind["input"][section][key], {})[:2]
                    if isinstance(type_, list) or type_ in WIDGETS:
                        inputs[key] = next(values)
                        if options.get("control_after_generate", key in ("seed", "noise_seed")):
                            assert next(values) == "fixed"
                    if key in linked:
                        inputs[key] = linked[key]
            assert next(values, None) is None
            found[node["id"]] = {"class_type": node["type"], "inputs": inputs}
        return found

    return convert
