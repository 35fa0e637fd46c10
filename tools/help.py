"""Writes the tables of inputs and outputs into the help pages of the nodes, from their schemas.

    python -m tools.help [--check]

A page of web/docs takes the place of the table that the front end would make by itself, so it has one of its own, between
two markers. All else on the pages is written by hand; `tools/help_pictures.py` makes their pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import places
from tools.schemas import FROM_FILES, schemas

FOLDER = places.ROOT / "web" / "docs"
BEGIN = "<!-- The tables are written by python -m tools.help -->"
END = "<!-- End of the tables -->"


def page_of(node: str) -> Path:
    return FOLDER / f"{node}.md"


def tables(schema: Any) -> str:
    """Inputs and outputs of a node (io.Schema) as Markdown."""
    parts = []
    if schema.inputs:
        rows = [_input_row(schema.node_id, given) for given in schema.inputs]
        parts.append(_table("### Inputs", ("input", "what it is", "type", "default", "range"), rows))
    rows = [(f"`{given.display_name}`", _plain(given.tooltip), given.get_io_type()) for given in schema.outputs]
    parts.append(_table("### Outputs", ("output", "what it is", "type"), rows))
    return "\n\n".join(parts)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _input_row(node: str, given: Any) -> tuple[str, ...]:
    told = given.as_dict()
    marks = [mark for mark in ("optional", "advanced") if told.get(mark)]
    name = f"`{given.id}`" + (f" ({', '.join(marks)})" if marks else "")
    range_ = _range(told, (node, given.id) in FROM_FILES)
    return name, _plain(told.get("tooltip", "")), given.get_io_type(), _default(told), range_


def _default(told: dict[str, Any]) -> str:
    if "default" not in told:
        return ""
    value = told["default"]
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if value != "" else "empty"


def _range(told: dict[str, Any], from_files: bool) -> str:
    if from_files:
        return "the files that there are"
    if "options" in told:
        return ", ".join(f"`{option}`" for option in told["options"])
    if "min" not in told:
        return ""
    step = f", in steps of {told['step']:g}" if "step" in told else ""
    return f"{told['min']} to {told['max']}{step}"


def _plain(sentence: str) -> str:
    """A text with nothing in it that Markdown or HTML would take for its own."""
    for sign in ("\\", "|", "*", "<", "["):
        sentence = sentence.replace(sign, f"\\{sign}")
    return sentence


def with_tables(page: str, schema: Any) -> str:
    """A page with the tables of its node between the markers.

    Raises:
        ValueError: the markers are not there, once each and in their order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"The page of {schema.node_id} needs one line {BEGIN!r}, and after it one line {END!r}.")
    return f"{page.partition(BEGIN)[0]}{BEGIN}\n\n{tables(schema)}\n\n{END}{page.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell which pages do not agree")
    options = parser.parse_args(arguments)
    wrong = []
    for schema in schemas():
        path = page_of(schema.node_id)
        if not path.is_file():
            wrong.append(f"{path} is missing.")
            continue
        page = path.read_text(encoding="utf-8")
        try:
            made = with_tables(page, schema)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if options.check and made != page:
            wrong.append(f"{path} has other tables than the schema. Run python -m tools.help.")
        elif made != page:
            path.write_text(made, encoding="utf-8")
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
