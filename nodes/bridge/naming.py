"""Errors that name the node they belong to."""

from collections.abc import Iterator
from contextlib import contextmanager


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
