"""JSON from a file that may be anybody's, and what of it fits into a message."""

import json
import math
from typing import Any


def parse_json(text: str) -> Any:
    """JSON in which no name comes twice and every number is finite.

    Raises:
        ValueError: It is none, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice.")
        return found

    def short(number: str) -> int:
        if len(number) > 24:
            raise ValueError("a number has too many digits.")
        return int(number)

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{quoted(number)} is no finite number.")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=short, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply.") from None


def quoted(value: Any) -> str:
    """Of what a file says, as much as fits into a message, in one line."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]}..."
