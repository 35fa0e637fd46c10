"""README and doc/: what they link to is there."""

import re

import pytest

from tools import places

DOCUMENTS = sorted([places.ROOT / "README.md", *(places.ROOT / "doc").glob("*.md")])


def anchors(path):
    """Of the headings of a Markdown file, as repositories' pages make them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_rows_of_a_table_have_the_cells_of_its_head(document):
    lines = document.read_text(encoding="utf-8").split("\n")
    for line, before in zip(lines[1:], lines, strict=False):
        if line.startswith("|") and before.startswith("|"):
            assert line.count("|") == before.count("|"), line
