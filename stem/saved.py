"""An inversion or a basis as texts and tensors of a file, and back, bit by bit.

The host's own structures, a LATENT and a conditioning, are kept as plain values; what is none is refused when it is saved.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .archive import Archive, ArchivedLevels, open_archive, plan_archive, read_tensor, write_archive
from .basis import Basis
from .plain import pack, unpack
from .saved_header import (
    BASIS,
    FORMAT,
    KIND,
    LATENTS,
    TRAJECTORY,
    VERSION,
    check_parts,
    read_basis_settings,
    read_inversion_settings,
    read_model,
    read_sigmas,
)
from .strict_json import parse_json
from .trajectory import Trajectory


class Inversion(NamedTuple):
    """What an inversion yields, as it is saved."""

    latents: dict[str, Any]  # of the host: "samples" (f, c, height, width), inverted, and plain values
    trajectory: Trajectory
    basis: Basis | None


class Parts(NamedTuple):
    """Of a file."""

    metadata: dict[str, str]
    tensors: dict[str, Any]  # Tensor, or Levels


def parts_of_inversion(inversion: Inversion) -> Parts:
    """
    Raises:
        ValueError: Something in it cannot be stored, or does not fit together.
    """
    trajectory, settings = inversion.trajectory, inversion.trajectory.settings
    tensors = {"trajectory.latents": trajectory.latents}
    path = {
        "model": trajectory.model,
        "sigmas": _floats(trajectory.sigmas),
        "settings": {**settings._asdict(), "basis": settings.basis and settings.basis._asdict()},
        "conditioning": pack(trajectory.conditioning, "conditioning", tensors),
    }
    metadata = {KIND: "inversion", FORMAT: VERSION, TRAJECTORY: _text(path)}
    metadata[LATENTS] = _text(pack(inversion.latents, "latents", tensors))
    if inversion.basis is not None:
        of_basis = parts_of_basis(inversion.basis)
        metadata[BASIS] = of_basis.metadata[BASIS]
        tensors |= of_basis.tensors
    return Parts(metadata, tensors)


def parts_of_basis(basis: Basis) -> Parts:
    """
    Raises:
        ValueError: Its noise levels are of another type.
    """
    document = {
        "model": basis.model,
        "sigmas": _floats(basis.sigmas),
        "blocks": basis.blocks,
        "frame_ids": basis.frame_ids,
        "total_frames": basis.total_frames,
        "settings": basis.settings._asdict(),
    }
    tensors = {}
    for block, keys, values in zip(basis.blocks, basis.keys, basis.values, strict=True):
        tensors |= {f"basis.keys.{block}": keys, f"basis.values.{block}": values}
    return Parts({KIND: "basis", FORMAT: VERSION, BASIS: _text(document)}, tensors)


def write_parts(paths: Iterable[Path], parts: Parts, more: Mapping[str, str], pause: Callable[[int], None]) -> Path:
    """Writes a new file that `load_inversion` or `load_basis` reads, whole or not at all.

    Args:
        paths, pause: As of `write_archive`.
        more: Further texts for its metadata.

    Returns:
        Name of the file.

    Raises:
        ValueError: The parts do not fit together.
        OSError: The disk refuses it.
    """
    metadata = {**more, **parts.metadata}
    _, entries = plan_archive(metadata, parts.tensors)
    check_parts(parts.metadata[KIND], metadata, entries, "the new file")
    return write_archive(paths, metadata, parts.tensors, pause)


def load_inversion(path: Path) -> Inversion:
    """What `parts_of_inversion` describes, bit by bit; the trajectory's latents stay in the file.

    Raises:
        ValueError: The file is no saved inversion of this format, or is damaged.
    """
    archive = open_archive(path)
    with_basis = BASIS in archive.metadata
    check_parts("inversion", archive.metadata, archive.entries, path.name)
    document, read = parse_json(archive.metadata[TRAJECTORY]), _reader(archive)
    trajectory = Trajectory(
        ArchivedLevels(archive, "trajectory.latents"),
        read_sigmas(document),
        unpack(document["conditioning"], read),
        read_inversion_settings(document["settings"]),
        read_model(document["model"]),
    )
    latents = unpack(parse_json(archive.metadata[LATENTS]), read)
    return Inversion(latents, trajectory, _basis(archive) if with_basis else None)


def load_basis(path: Path) -> Basis:
    """What `parts_of_basis` describes, bit by bit.

    Raises:
        ValueError: The file is no saved basis of this format, or is damaged.
    """
    archive = open_archive(path)
    check_parts("basis", archive.metadata, archive.entries, path.name)
    return _basis(archive)


def _basis(archive: Archive) -> Basis:
    document, read = parse_json(archive.metadata[BASIS]), _reader(archive)
    blocks = tuple(document["blocks"])
    return Basis(
        tuple(read(f"basis.keys.{block}") for block in blocks),
        tuple(read(f"basis.values.{block}") for block in blocks),
        blocks,
        read_sigmas(document),
        tuple(document["frame_ids"]),
        document["total_frames"],
        read_basis_settings(document["settings"]),
        read_model(document["model"]),
    )


def _reader(archive: Archive) -> Callable[[str], Tensor]:
    return lambda name: read_tensor(archive, name)


def _floats(sigmas: Tensor) -> list[float]:
    if sigmas.dtype != torch.float32:
        raise ValueError(f"noise levels are {sigmas.dtype}, only float32 is stored.")
    return sigmas.tolist()


def _text(document: Any) -> str:
    return json.dumps(document, allow_nan=False)
