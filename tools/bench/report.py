"""Results of a benchmark: kept in a JSON file as they come, averaged over clips, shown as a Markdown table."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

Measures = dict[str, float]  # name of the measure -> value
Clips = dict[str, dict[str, Measures]]  # clip -> method -> measures


class OtherSettingsError(Exception):
    """The file holds results of something else, and they would be lost."""


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report in a file, to go on with, or an empty one.

    Raises:
        OtherSettingsError: the report was made with other settings.
    """
    if not path.exists():
        return {"settings": settings}
    report = json.loads(path.read_text(encoding="utf-8"))
    made = report["settings"]
    if made != settings:
        other = [key for key in {**made, **settings} if made.get(key) != settings.get(key)]
        raise OtherSettingsError(
            f"{path} holds results with another {', '.join(other)}. Delete it, or name another file with --json."
        )
    return report


def save(path: Path, report: dict[str, Any]) -> None:
    """Writes the report, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def mean(clips: Clips) -> dict[str, Measures]:
    """Every method's measures, averaged over the clips that it was measured on."""
    rows: dict[str, list[Measures]] = {}
    for methods in clips.values():
        for name, measures in methods.items():
            rows.setdefault(name, []).append(measures)
    return {name: {key: fmean(row[key] for row in found) for key in found[0]} for name, found in rows.items()}


def table(rows: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str]], first: str) -> str:
    """A Markdown table.

    Args:
        rows: name -> what is known of it; what is missing stays empty.
        columns: key in the row -> heading and number format.
        first: heading of the names.
    """
    lines = [[first, *(heading for heading, _ in columns.values())], ["---", *("---:" for _ in columns)]]
    for name, row in rows.items():
        lines.append([name, *(format(row[key], form) if key in row else "" for key, (_, form) in columns.items())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
