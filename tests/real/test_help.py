"""The help pages: one for each node, and what they show is what there is."""

import re

import pytest

from tools import help as pages
from tools import places
from tools.help_pictures import PICTURES
from tools.schemas import schemas

LARGEST = 150_000  # bytes of a picture
HEADINGS = ["When to use it", "Inputs and outputs", "No effect, noise or blur?", "Related"]
PAPERS = {
    "STEMInvertLatents": ["2312.05856", "2010.02502"],
    "STEMTokenFlow": ["2312.05856", "2307.10373"],
    "STEMFateZero": ["2312.05856", "2303.09535"],
}
TARGETS = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
LATEX = re.compile(r"\$[^$\n]+\$|\\\(|\\frac|\\sum|\\begin")


@pytest.fixture(scope="module")
def found(pack):
    return {schema.node_id: schema for schema in schemas()}


@pytest.fixture(scope="module")
def written():
    return {path.stem: path.read_text(encoding="utf-8") for path in pages.FOLDER.glob("*.md")}


def test_every_node_has_a_page_and_no_page_is_left_over(found, written):
    assert written.keys() == found.keys()


def test_tables_are_those_of_the_schemas(found, written):
    for name, page in written.items():
        assert pages.with_tables(page, found[name]) == page, f"{name}: run python -m tools.help"


def test_a_page_begins_with_its_name_and_says_in_two_sentences_what_the_node_does(found, written):
    for name, page in written.items():
        title, what, picture = page.split("\n\n")[:3]
        assert title == f"# {found[name].display_name}"
        assert len(re.findall(r"[.!?](?=\s|$)", what)) == 2, (name, what)
        assert picture.startswith("![")


def test_sections_are_there_and_filled(written):
    for name, page in written.items():
        _, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
        assert [section.partition("\n")[0] for section in sections] == HEADINGS, name
        assert all(len(section.partition("\n")[2].strip()) > 80 for section in sections), name
        remedies = sections[2]
        assert "blur" in remedies.lower() and remedies.count("\n* **") >= 2, name


def test_pictures_are_there_small_and_made_by_the_script(written):
    for name, page in written.items():
        pictures = [target for mark, target in TARGETS.findall(page) if mark]
        assert len(pictures) == 1 and pictures[0].removesuffix(".webp") in PICTURES, name
        path = pages.FOLDER / pictures[0]
        assert path.is_file() and 0 < path.stat().st_size <= LARGEST, path
        assert path.read_bytes()[8:12] == b"WEBP"
        assert re.search(r"!\[[^\]]{10,}\]", page), "told in words too"


def test_links_lead_to_papers_alone(written):
    """The front end rewrites where pictures are, but not where links lead: one to another page would lead nowhere."""
    for name, page in written.items():
        links = [target for mark, target in TARGETS.findall(page) if not mark]
        for target in links:
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", target), (name, target)
        for paper in PAPERS.get(name, ["2312.05856"]):
            assert any(target.endswith(paper) for target in links), (name, paper)
        assert "href=" not in page and "src=" not in page


def test_nodes_that_a_page_refers_to_exist(found, written):
    names = {schema.display_name for schema in found.values()}
    for name, page in written.items():
        related = page.partition("## Related")[2]
        told = re.findall(r"\*\*(STEM [^*]+)\*\*", related)
        assert told and set(told) <= names - {found[name].display_name}, name


def test_inputs_that_a_page_names_exist(found, written):
    """A name in `code` with an underscore is an input or output of some node of the pack, a block, or core's."""
    known = {"add_noise", "ddim_uniform", "low_threshold", "high_threshold"}  # of core's samplers and Canny
    for schema in found.values():
        known |= {part.display_name for part in schema.outputs}
        for part in schema.inputs:
            known |= {part.id, *(getattr(part, "options", None) or [])}
    for name, page in written.items():
        by_hand = page.partition(pages.BEGIN)[0] + page.partition(pages.END)[2]
        for word in re.findall(r"`([a-z]+_[a-z_]+)`", by_hand):
            assert word in known, (name, word)


def test_no_formulas_that_the_front_end_would_not_show(written):
    for name, page in written.items():
        assert not LATEX.search(page), name
    for formula in ("a $x$ b", r"\(x\)", r"\frac{1}{2}"):
        assert LATEX.search(formula)


# --- the command


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, written):
    for name, page in written.items():
        (tmp_path / f"{name}.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    return tmp_path


def test_the_command_tells_a_wrong_table_and_writes_it_anew(elsewhere, found, written, capsys):
    page = elsewhere / "STEMInvertLatents.md"
    assert pages.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("| `50` |", "| `51` |"), encoding="utf-8")
    assert pages.main(["--check"]) == 1 and "STEMInvertLatents" in capsys.readouterr().err
    assert pages.main([]) == 0 and page.read_text(encoding="utf-8") == written["STEMInvertLatents"]


def test_the_command_tells_what_is_missing(elsewhere, capsys):
    (elsewhere / "STEMPatchModel.md").unlink()
    (elsewhere / "STEMDemoClip.md").write_text("# STEM Demo Clip\n", encoding="utf-8")
    assert pages.main([]) == 1
    told = capsys.readouterr().err
    assert "STEMPatchModel.md is missing" in told and "STEMDemoClip needs one line" in told


def test_tables_tell_all_of_an_input(found):
    rows = pages.tables(found["STEMInvertLatents"]).splitlines()
    steps, method, warm, disk = (
        next(row for row in rows if row.startswith(f"| `{name}`"))
        for name in ("steps", "method", "warm_iterations", "trajectory_on_disk")
    )
    assert steps.startswith("| `steps` | Noise levels to climb.") and steps.endswith(" | INT | `50` | 1 to 999 |")
    assert method.endswith(" | COMBO | `stem` | `stem`, `ddim`, `first_previous`, `all_frames` |")
    assert warm.startswith("| `warm_iterations` (optional, advanced) | Rounds") and warm.endswith(" | INT | `0` | 0 to 100 |")
    assert disk.startswith("| `trajectory_on_disk` (optional, advanced) | Keeps") and disk.endswith(" | BOOLEAN | off |  |")
    assert "| `basis` | The bases that were used (method stem), for STEM Patch Model. | STEM_BASIS |" in rows
    inputs = pages.tables(found["STEMFateZero"]).partition("### Outputs")[0].strip().splitlines()[2:]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in inputs}
    assert cells == {6} and any("\\|" in row for row in inputs), "a sign of tables in a text begins no column"


def test_the_readme_has_every_node_in_its_table(found):
    text = (places.ROOT / "README.md").read_text(encoding="utf-8").partition("## The nodes")[2].partition("\n```")[0]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| STEM")]
    assert sorted(name.strip() for row in rows for name in row.split(",")) == sorted(s.display_name for s in found.values())
