"""What the page tells of our nodes: help, search by other names, errors where they belong."""

import json

import pytest

from tools import places
from tools.templates import FOLDER

HELP = places.ROOT / "web" / "docs" / "STEMInvertLatents.md"


def workflow() -> dict:
    return json.loads((FOLDER / "TokenFlow edit.json").read_text(encoding="utf-8"))


def number_of(type_: str) -> int:
    (number,) = [node["id"] for node in workflow()["nodes"] if node["type"] == type_]
    return number


@pytest.mark.parametrize("alias", ["video inversion", "ddim inversion", "unsampler"])
def test_search_finds_the_inversion_by_other_names(front_end, alias):
    assert "STEM Invert Latents" in search(front_end, alias)


def test_search_finds_the_editor_by_the_name_of_its_paper(front_end):
    assert "STEM TokenFlow" in search(front_end, "tokenflow")


def search(front_end, words: str) -> str:
    """Double click on the empty canvas, type, and read the list."""
    front_end.page.mouse.dblclick(960, 540)
    field = front_end.page.get_by_role("combobox", name="Add a node")
    field.wait_for()
    field.fill(words)
    results = front_end.page.locator("#results-list")
    results.get_by_role("option").filter(has_text="STEM").first.wait_for()
    found = results.inner_text()
    front_end.screenshot(f"search {words}")
    front_end.page.keyboard.press("Escape")
    field.wait_for(state="hidden")
    return found


def test_help_panel_shows_the_page_of_a_node(front_end):
    heading = HELP.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    front_end.load(workflow())
    number = number_of("STEMInvertLatents")
    front_end.show(number)
    front_end.ask("number => app.canvas.selectNode(app.graph.getNodeById(number))", number)
    front_end.find("info-button").click()
    page = front_end.page.locator(".node-help-content .markdown-content")
    page.get_by_role("heading", name=heading, exact=True).wait_for()
    picture = page.locator("img").first.element_handle()
    front_end.wait("image => image.naturalWidth > 0", picture)
    front_end.screenshot("help")


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
