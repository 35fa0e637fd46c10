"""What the page tells of our nodes: help, search by other names, errors where they belong."""

import io
import json
import re

import pytest
from PIL import Image
from playwright.sync_api import Locator

from tools import places
from tools.server import GraphInterrupted
from tools.templates import FOLDER

HELP = places.ROOT / "web" / "docs" / "STEMInvertLatents.md"
BLUEPRINTS = sorted(path.stem for path in (places.ROOT / "subgraphs").glob("*.json"))
CENTRE = (960, 540)  # of the page
KEEP_PICTURES = """() => {  // the front end lets go of a preview as soon as it is on the screen
    window.pictures = {};
    const usual = URL.createObjectURL;
    URL.createObjectURL = picture => {
        const address = usual.call(URL, picture);
        pictures[address] = picture;
        return address;
    };
}"""


def workflow() -> dict:
    return json.loads((FOLDER / "TokenFlow edit.json").read_text(encoding="utf-8"))


def number_of(type_: str) -> int:
    (number,) = [node["id"] for node in workflow()["nodes"] if node["type"] == type_]
    return number


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("video inversion", "STEM Invert Latents"),
        ("ddim inversion", "STEM Invert Latents"),
        ("unsampler", "STEM Invert Latents"),
        ("tokenflow", "STEM TokenFlow"),
    ],
)
def test_search_finds_a_node_by_other_names(front_end, words, title):
    results = search(front_end, words)
    results.filter(has_text=title).wait_for()
    front_end.screenshot(f"search {words}")
    front_end.page.keyboard.press("Escape")
    results.first.wait_for(state="hidden")


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint_is_found_and_placed(front_end, name):
    results = search(front_end, name)
    results.filter(has_text=name).first.click()
    results.first.wait_for(state="hidden")
    front_end.wait("() => app.canvas.state.ghostNodeId != null")  # it follows the pointer until the next click
    front_end.page.mouse.move(CENTRE[0] - 50, CENTRE[1])
    front_end.page.mouse.click(*CENTRE)
    front_end.wait("() => app.graph.nodes.length == 1 && !app.graph.nodes[0].flags.ghost")
    front_end.screenshot(f"blueprint {name}")
    unknown = "() => app.graph.nodes[0].subgraph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).length"
    assert front_end.ask("() => app.graph.nodes[0].title") == name
    assert front_end.ask(unknown) == 0


def search(front_end, words: str) -> Locator:
    """Double click on the empty canvas and type; returns what is listed."""
    front_end.page.mouse.dblclick(*CENTRE)
    field = front_end.page.get_by_role("combobox", name="Add a node")
    field.fill(words)
    return front_end.page.locator("#results-list").get_by_role("option")


def test_help_panel_shows_the_page_of_a_node(front_end):
    heading = HELP.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    front_end.load(workflow())
    number = number_of("STEMInvertLatents")
    front_end.show(number)
    front_end.select(number)
    front_end.find("info-button").click()
    page = front_end.page.locator(".node-help-content .markdown-content")
    page.get_by_role("heading", name=heading, exact=True).wait_for()
    picture = page.locator("img").first.element_handle()
    front_end.wait("image => image.naturalWidth > 0", picture)
    front_end.screenshot("help")


def test_a_running_inversion_shows_the_moving_clip_and_its_level(front_end, server):
    front_end.set("Comfy.Execution.PreviewMethod", "latent2rgb")
    front_end.load(workflow())
    front_end.render(modern=True)
    front_end.set_widgets({"steps": 300, "frames": 10, "size": 64})
    number = number_of("STEMInvertLatents")
    front_end.show(number)
    front_end.ask(KEEP_PICTURES)
    prompt_id = front_end.run()
    try:
        node = front_end.page.locator(f'[data-node-id="{number}"]')
        preview = node.get_by_alt_text("Live sampling preview")
        preview.wait_for()
        node.get_by_text(re.compile(r"level \d+ of 300 \(sigma [\d.]+\), \d+:\d\d left")).wait_for()
        data = bytes(preview.evaluate("async image => [...new Uint8Array(await pictures[image.src].arrayBuffer())]"))
        front_end.screenshot("running")
    finally:
        server.interrupt(prompt_id)
        front_end.set("Comfy.Execution.PreviewMethod", "default")
    with pytest.raises(GraphInterrupted):
        server.wait(prompt_id)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("PNG", 8)


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "modern"])
def test_error_of_a_node_is_shown_at_the_node(front_end, modern):
    front_end.render(modern)
    front_end.load(workflow())
    front_end.render(modern)
    number = number_of("STEMInvertLatents")
    front_end.set_widgets({"blocks": "nonsense", "frames": 4, "size": 64})
    front_end.show(number, scale=0.8)
    before = front_end.red(number)
    front_end.run()
    front_end.find("error-overlay").wait_for()
    front_end.wait("number => app.graph.getNodeById(number).has_errors || app.lastExecutionError?.node_id == number", number)
    front_end.screenshot(f"error {'modern' if modern else 'classic'}")
    assert front_end.red(number) > before + 500
    front_end.find("error-overlay-see-errors").click()
    front_end.find("runtime-error-panel").wait_for()
    front_end.screenshot(f"error panel {'modern' if modern else 'classic'}")
    panel = front_end.page.locator("[data-testid=properties-panel]").inner_text()
    assert "STEM Invert Latents" in panel and '"nonsense", which this model does not have' in panel
