"""Plain values as JSON, with the tensors in them put apart: how a host's own structures are stored."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .strict_json import quoted

DEPTH_LIMIT = 16


def pack(value: Any, place: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """A plain value (None, truth, number, text, list, tuple or dictionary of such) as JSON, its tensors put apart.

    Args:
        value: To be stored.
        place: Of it, in words of the host: 'conditioning.0.1.mask'.
        tensors: Takes up those that are in the value, named by their places.

    Raises:
        ValueError: It is something else.
    """
    kind = type(value)
    if depth > DEPTH_LIMIT:
        raise ValueError(f"{place[:80]} is nested too deeply to be stored.")
    if value is None or kind in (bool, str) or (kind is int and abs(value) < 2**64):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Tensor) and type(value) in (Tensor, Parameter):
        while place in tensors:
            place += "_"
        tensors[place] = value
        return {"tensor": place}
    if kind is dict and all(type(name) is str for name in value):
        return {"dict": {name: pack(each, f"{place}.{name}", tensors, depth + 1) for name, each in value.items()}}
    if kind in (list, tuple):
        found = [pack(each, f"{place}.{i}", tensors, depth + 1) for i, each in enumerate(value)]
        return found if kind is list else {"tuple": found}
    raise ValueError(f"{place[:80]} is {value if kind is float else f'a {kind.__name__}'}, which cannot be stored in a file.")


def unpack(document: Any, tensor: Callable[[str], Any], depth: int = 0) -> Any:
    """The value that `pack` made the document from.

    Args:
        tensor: Called with the name of each tensor in it.

    Raises:
        ValueError: It is no such document.
    """
    if depth > DEPTH_LIMIT:
        raise ValueError("plain values are nested too deeply.")
    if isinstance(document, list):
        return [unpack(each, tensor, depth + 1) for each in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1:
        ((kind, inside),) = document.items()
        if kind == "tensor" and isinstance(inside, str):
            return tensor(inside)
        if kind == "tuple" and isinstance(inside, list):
            return tuple(unpack(each, tensor, depth + 1) for each in inside)
        if kind == "dict" and isinstance(inside, dict):
            return {name: unpack(each, tensor, depth + 1) for name, each in inside.items()}
    raise ValueError(f"{quoted(next(iter(document), ''))} is no kind of plain value.")
