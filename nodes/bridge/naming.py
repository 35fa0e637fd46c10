"""Errors that name the node they belong to."""

from collections.abc import Iterator
from contextlib import contextmanager


def shown(text: str, most: int = 80) -> str:
    """What a user wrote, in quotes and one line, as much as fits into an error."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= most else f'"{line[: most - 3]}..."'


@contextmanager
def naming(widget: str) -> Iterator[None]:
    """Puts the name of an input in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{widget}: {error}") from error


@contextmanager
def named_by(node: str) -> Iterator[None]:
    """Puts a node's id in front of a ValueError, where it is not there already, and of what a disk refuses."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{node}: "):
            raise
        raise ValueError(f"{node}: {error}") from error
    except OSError as error:
        raise OSError(f"{node}: {error}") from error
