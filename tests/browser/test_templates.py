"""Every template of the pack, opened from the template browser, changed, saved and run on the page."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
from front_end import FrontEnd, Message

from tools.templates import FOLDER

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
QUICK = {"steps": 4, "frames": 4, "size": 64, "keyframes": 3, "keyframe_every": 2}  # widgets, wherever they are
BLANK = 8  # standard deviation of an area of the page, of 255: a picture has more, an empty node hardly any
CORE = [  # what the console tells without the pack too: text, address, reason
    (r"404", r"/user\.css$|/api/userdata", "files that a new user does not have"),
    (r"ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED|Failed to fetch", r"https://", "nothing here reaches the internet"),
    (r"graph accessed before initialization", r"/assets/", "core's settings are read before its graph is made"),
]


def ours(errors: list[Message]) -> list[Message]:
    return [m for m in errors if not any(re.search(text, m.text) and re.search(url, m.url) for text, url, _ in CORE)]


def stored(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def missing(front_end: FrontEnd) -> list[str]:
    """Types of nodes that the page does not know, and nodes that it marks as faulty."""
    return front_end.ask(
        "() => app.graph.nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))"
        ".map(node => node.type)"
    )


def deviation(area: np.ndarray) -> float:
    """Of the middle of an area: neither frames of nodes nor the controls of a video count."""
    height, width = area.shape[0] // 4, area.shape[1] // 4
    return area[height:-height, width:-width].std(axis=(0, 1)).max()


def overlapping(boxes: list[tuple]) -> list[tuple[str, str]]:
    return [
        (a[0], b[0])
        for a, b in combinations(boxes, 2)
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4]
    ]


@pytest.mark.parametrize("rendering", ["classic", "modern"])
@pytest.mark.parametrize("name", NAMES)
def test_template_opens_from_the_browser(front_end, name, rendering):
    front_end.render(modern=rendering == "modern")
    front_end.browse_templates()
    card = front_end.card(name)
    card.locator("img").wait_for()
    front_end.wait("image => image.naturalWidth >= 200", card.locator("img").element_handle())
    assert name in card.inner_text()
    front_end.open_template(name, [node["type"] for node in stored(name)["nodes"]])
    front_end.render(modern=rendering == "modern")
    front_end.show_all()
    front_end.screenshot(f"{name} {rendering}")
    assert not missing(front_end)
    assert not front_end.find("error-overlay").is_visible()
    assert not ours(front_end.errors)
    assert not overlapping(front_end.boxes())


def test_a_node_that_is_missing_would_be_seen(front_end):
    workflow = stored(NAMES[0])
    workflow["nodes"][0]["type"] = "STEMNoSuchNode"
    front_end.load(workflow)
    assert missing(front_end) == ["STEMNoSuchNode"]
    front_end.find("error-overlay").wait_for()


@pytest.mark.parametrize("name", NAMES)
def test_values_survive_saving_and_loading(front_end, name):
    workflow = stored(name)
    front_end.load(workflow)
    shown = front_end.widgets()
    for node in workflow["nodes"]:
        assert [value for _, value in shown.get(str(node["id"]), [])] == node["widgets_values"], node["type"]
    for values in ({}, QUICK):
        front_end.set_widgets(values)
        changed, sent, saved = front_end.widgets(), front_end.prompt(), front_end.save()
        assert not values or changed != shown
        front_end.load(json.loads(json.dumps(saved)))
        assert (front_end.widgets(), front_end.prompt()) == (changed, sent)


@pytest.mark.parametrize("name", NAMES)
def test_template_runs_and_its_result_is_seen(front_end, server, written, name):
    kinds = server.object_info()
    wanted = {node["id"] for node in stored(name)["nodes"] if kinds.get(node["type"], {}).get("output_node")}
    front_end.load(stored(name))
    front_end.set_widgets(QUICK)
    entry = server.wait(front_end.run(), timeout=280)
    outputs = {int(node): output for node, output in entry["outputs"].items()}
    shown = [node for node in sorted(wanted) if "images" in outputs[node]]
    written += [file for node in shown for file in outputs[node]["images"] if file["type"] == "output"]
    assert shown
    for modern in (False, True):
        front_end.render(modern)
        for node in shown:
            assert deviation(front_end.picture(node)) > BLANK
        front_end.show_all()
        front_end.screenshot(f"{name} result {'modern' if modern else 'classic'}")
    assert not front_end.find("error-overlay").is_visible()
    assert not ours(front_end.errors)


def test_a_preview_without_a_picture_is_blank(front_end):
    number, workflow = 1000, stored(NAMES[0])  # of a node that has never run on this page
    workflow["nodes"] = [next(n | {"id": number, "inputs": []} for n in workflow["nodes"] if n["type"] == "PreviewImage")]
    front_end.load(workflow | {"links": [], "groups": [], "last_node_id": number})
    front_end.show(number)
    assert deviation(front_end.body(number)) < BLANK
