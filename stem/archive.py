"""Safetensors files that are written whole or not at all, and read only as far as their header holds true.

Eight bytes with the header's length, a JSON header that names type, shape and place of every tensor, then their bytes: what a
header claims is checked against the size of the file before any memory is taken for it. Tensors are written and read one by
one, large ones by their first dimension, and nothing stays mapped.
"""

import json
import math
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from .strict_json import parse_json, quoted

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
METADATA = "__metadata__"
HEADER_LIMIT = 16 * 2**20  # bytes; a workflow is in there too
TENSOR_LIMIT, RANK_LIMIT, SIZE_LIMIT = 10_000, 8, 2**48
LEFT_OVER = 3600.0  # seconds after which a half file belongs to no writer any more
PART = re.compile(r"\..+\.safetensors\.[0-9a-f]{32}\.part")

UNCUT = "Copy the file again, or save it anew."


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte of the file that it starts at


class Archive(NamedTuple):
    """A file whose header holds true."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    stamp: tuple[int, int]  # its size in bytes, and the time of its last change in ns


class ArchivedLevels:
    """Latents (t+1, f, c, height, width) that stay in a file. Indexed as a tensor is by its first dimension."""

    def __init__(self, archive: Archive, name: str):
        self.archive, self.entry = archive, archive.entries[name]
        self.shape, self.dtype = torch.Size(self.entry.shape), self.entry.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, level: int) -> Tensor:
        """(f, c, height, width) on the CPU.

        Raises:
            ValueError: The file is gone, or is another than it was.
        """
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        begin = self.entry.begin + range(len(self))[level] * size
        return _read(self.archive, Entry(self.dtype, tuple(self.shape[1:]), begin))

    def __deepcopy__(self, _: dict) -> "ArchivedLevels":
        return self  # it never changes


def open_archive(path: Path) -> Archive:
    """Reads and checks the header of a file.

    Raises:
        ValueError: It cannot be read, is no safetensors file, is cut off or damaged, or is beyond the limits of this module.
    """
    with _telling(path):
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise ValueError("it is no ordinary file. Choose a saved one.")
        with open(path, "rb") as file:
            stamp = _stamp(file.fileno())
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= HEADER_LIMIT:
                raise ValueError("it is no safetensors file that these nodes wrote. Choose a saved one.")
            if 8 + length > stamp[0]:
                raise ValueError(f"it is cut off or damaged: its header ends after the file. {UNCUT}")
            header = parse_json(file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError(f"it is damaged: its header is no JSON object. {UNCUT}")
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"it is damaged: its metadata are not texts. {UNCUT}")
        return Archive(path, metadata, _entries(header, 8 + length, stamp[0]), stamp)


def read_tensor(archive: Archive, name: str) -> Tensor:
    """A tensor of the file, on the CPU.

    Raises:
        ValueError: The file is gone, or is another than it was when its header was read.
    """
    return _read(archive, archive.entries[name])


def plan_archive(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> tuple[bytes, dict[str, Entry]]:
    """What a file of these tensors starts with, and where it will have each of them.

    Args:
        metadata: Texts.
        tensors: Of any device and layout, or levels that are indexed like one.

    Raises:
        ValueError: A tensor of a type that is not stored, or a header beyond the limit.
    """
    names, places, header = {dtype: name for name, dtype in DTYPES.items()}, {}, {METADATA: dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):  # keeps them aligned
        if tensor.dtype not in names or (isinstance(tensor, Tensor) and tensor.layout is not torch.strided):
            raise ValueError(f"{quoted(name)} is a tensor of {tensor.dtype}, which is not stored. Use another type.")
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        places[name] = Entry(tensor.dtype, tuple(tensor.shape), begin)
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header takes {len(text)} bytes, at most {HEADER_LIMIT} are written. Save a smaller workflow.")
    start = 8 + len(text)
    entries = {name: entry._replace(begin=entry.begin + start) for name, entry in places.items()}
    return struct.pack("<Q", len(text)) + text, entries


def write_archive(
    paths: Iterable[Path], metadata: Mapping[str, str], tensors: Mapping[str, Any], pause: Callable[[int], None]
) -> Path:
    """Writes a new file, whole or not at all. A file that is there already is never touched.

    Args:
        paths: Names in one folder, which is there: the first that is free when all is written is taken, so that writers do
            not meet. Half files that a writer left behind in that folder an hour ago and longer are removed.
        metadata, tensors: As of `plan_archive`.
        pause: Called with the bytes written so far before each part of a tensor; what it raises ends the writing.

    Returns:
        Name of the file.

    Raises:
        ValueError: As `plan_archive`.
        OSError: The disk refuses it.
    """
    start, entries = plan_archive(metadata, tensors)
    paths = iter(paths)
    path = target = next(paths)
    _remove_left_over(path.parent)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    written = len(start)
    try:
        with open(part, "xb") as file:
            file.write(start)
            for name, entry in entries.items():
                for values in _parts(tensors[name]):
                    pause(written)
                    written += file.write(_bytes(values.detach().to("cpu", entry.dtype).contiguous()))
            file.flush()
            os.fsync(file.fileno())
        if written != len(start) + sum(math.prod(e.shape) * e.dtype.itemsize for e in entries.values()):
            raise ValueError("tensors changed their size while they were written. Queue the workflow again.")
        while not _named(part, path):
            if (path := next(paths, None)) is None:
                raise FileExistsError("every name is taken")
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{target} cannot be written: {error}. Free space there, or choose another name.") from error
        raise
    _sync_folder(path.parent)
    return path


def _named(part: Path, path: Path) -> bool:
    """Gives a file its name, unless another has it."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        if path.exists():
            return False
        part.rename(path)
    else:
        part.unlink()
    return True


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """Checks where the tensors are: side by side, from the end of the header to the end of the file."""
    if len(header) > TENSOR_LIMIT:
        raise ValueError(f"it has {len(header)} tensors, at most {TENSOR_LIMIT} are read. Choose a saved one.")
    found = {}
    for name, info in header.items():
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"it is damaged: its tensor {quoted(name)} has no dtype, shape and data_offsets. {UNCUT}")
        kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(f"its tensor {quoted(name)} has the type {quoted(kind)}, which these nodes do not write.")
        if not _naturals(shape) or len(shape) > RANK_LIMIT or math.prod(max(n, 1) for n in shape) > SIZE_LIMIT:
            raise ValueError(f"it is damaged: its tensor {quoted(name)} has no possible shape. {UNCUT}")
        if not _naturals(offsets) or len(offsets) != 2:
            raise ValueError(f"it is damaged: its tensor {quoted(name)} has no place. {UNCUT}")
        found[name] = Entry(DTYPES[kind], tuple(shape), start + offsets[0]), start + offsets[1]
    end = start
    for name, (entry, its_end) in sorted(found.items(), key=lambda item: (item[1][0].begin, item[1][1])):
        if entry.begin != end or its_end - entry.begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(f"it is damaged: the place of its tensor {quoted(name)} does not fit. {UNCUT}")
        end = its_end
    if end != size:
        raise ValueError(f"it is cut off or damaged: {end} bytes are needed, it has {size}. {UNCUT}")
    return {name: entry for name, (entry, _) in found.items()}


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _read(archive: Archive, entry: Entry) -> Tensor:
    with _telling(archive.path), open(archive.path, "rb") as file:
        if _stamp(file.fileno()) != archive.stamp:
            raise ValueError("it was changed after it had been loaded. Queue the workflow again.")
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        file.seek(entry.begin)
        place = _bytes(tensor)
        if file.readinto(place) != len(place):
            raise ValueError(f"it is cut off. {UNCUT}")
    if entry.dtype is torch.bool and (tensor.view(torch.uint8) > 1).any():
        raise ValueError(f"{archive.path.name}: it is damaged: a boolean is neither true nor false. {UNCUT}")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _parts(tensor: Any) -> Iterator[Tensor]:
    yield from (tensor[i] for i in range(len(tensor))) if len(tensor.shape) > 1 else (tensor,)


def _stamp(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path.name}: it cannot be read ({error.strerror or error}). Save it again, or choose another."
        ) from error
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: it is damaged: its header is no text. {UNCUT}") from None
    except json.JSONDecodeError:
        raise ValueError(f"{path.name}: it is damaged: its header is no JSON. {UNCUT}") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(".*.part"):
        with suppress(OSError):  # another writer may remove it first
            if PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFT_OVER:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network disks refuse it
            os.fsync(handle)
        os.close(handle)
