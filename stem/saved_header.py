"""Whether the header of a file describes an inversion or a basis, all of it, before any tensor is read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .archive import Entry
from .basis import BasisSettings, BlockLayout, ModelFingerprint
from .plain import unpack
from .strict_json import parse_json, quoted
from .trajectory import InversionSettings

VERSION = "1"
KIND, FORMAT, LATENTS, TRAJECTORY, BASIS = (f"stem.{name}" for name in ("kind", "version", "latents", "trajectory", "basis"))
"""Names of the texts in a file's metadata. All but the first two are JSON."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 2**31 - 1  # of any whole number but a seed


def check_parts(kind: str, metadata: Mapping[str, str], entries: Mapping[str, Entry], name: str) -> None:
    """Whether a file's texts and tensors, of which only the types and shapes are looked at, are all that is needed, and fit.

    Args:
        kind: "inversion" or "basis".
        metadata, entries: As in the file's header.
        name: Of the file, for the message.

    Raises:
        ValueError: They do not.
    """
    found = metadata.get(KIND)
    try:
        if found != kind:
            what = f"a saved {found}" if found in ("inversion", "basis") else "a file of another kind (a model, a LATENT)"
            raise ValueError(f"it is {what}, not a saved {kind}. Choose one that STEM Save {kind.capitalize()} wrote.")
        if metadata.get(FORMAT) != VERSION:
            raise ValueError(
                f"it has the format version {quoted(metadata.get(FORMAT))}, this pack reads {VERSION}. Update the pack, or "
                "save it anew."
            )
        expected = set()
        if kind == "inversion":
            expected |= _check_inversion(metadata, entries)
        if kind == "basis" or BASIS in metadata:
            expected |= _check_basis(_document(metadata, BASIS), entries)
        if extra := entries.keys() - expected:
            raise ValueError(f"the tensor {quoted(min(extra))} belongs to nothing.")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"its description is not complete ({quoted(str(error))})."
        raise ValueError(f"{name}: {' '.join(said.split())}") from error


def read_model(document: Any) -> ModelFingerprint:
    family, prediction, blocks = document
    if not isinstance(blocks, list) or not 0 < len(blocks) <= 10_000:
        raise ValueError("the model has no blocks.")
    found = [BlockLayout(*block) for block in blocks]
    names = {layout.name for layout in found if isinstance(layout.name, str)}
    sizes = (n for layout in found for n in layout[1:])
    if len(names) < len(found) or not all(type(n) is int and 0 < n <= MOST for n in sizes):
        raise ValueError("the model's blocks have no names, heads and channels.")
    if not isinstance(family, str) or not isinstance(prediction, str):
        raise ValueError("the model has no family and prediction.")
    return ModelFingerprint(family, prediction, tuple(found))


def read_sigmas(document: dict[str, Any]) -> Tensor:
    """(t,), as text that gives every float32 back exactly."""
    given = document["sigmas"]
    if not isinstance(given, list) or not 0 < len(given) <= 1000 or not all(type(sigma) is float for sigma in given):
        raise ValueError("there are not 1 to 1000 noise levels.")
    if not 0 < min(given) <= max(given) < 3e38:
        raise ValueError("the noise levels are not above 0, or beyond float32.")
    sigmas = torch.tensor(given, dtype=torch.float32, device="cpu")
    if not sigmas[0] > 0 or not (sigmas[1:] > sigmas[:-1]).all():
        raise ValueError("the noise levels do not ascend.")
    return sigmas


def read_inversion_settings(document: dict[str, Any]) -> InversionSettings:
    if document.keys() != set(InversionSettings._fields) or not isinstance(document["method"], str):
        raise ValueError("the settings of the inversion are not complete.")
    basis = document["basis"]
    settings = None if basis is None else read_basis_settings(basis)
    return InversionSettings(document["method"], _whole(document, "steps", 1), settings)


def read_basis_settings(document: dict[str, Any]) -> BasisSettings:
    if document.keys() != set(BasisSettings._fields):
        raise ValueError("the settings of the bases are not complete.")
    temperature = document["temperature"]
    if type(temperature) not in (int, float) or not temperature > 0:
        raise ValueError(f"the temperature {quoted(temperature)} is not above 0.")
    lowest = {"num_bases": 1, "iterations": 1, "seed": 0, "frames_per_em": 0, "warm_iterations": 0}
    whole = {name: _whole(document, name, low, 2**64 - 1 if name == "seed" else MOST) for name, low in lowest.items()}
    return BasisSettings(**whole, temperature=temperature)


def _whole(document: dict[str, Any], name: str, low: int, high: int = MOST) -> int:
    value = document[name]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {quoted(value)}, needed is a whole number from {low} on.")
    return value


def _check_inversion(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> set[str]:
    """Names of the tensors that belong to latents and trajectory."""
    document, used = _document(metadata, TRAJECTORY), {"trajectory.latents"}

    def entry(name: str) -> Entry:
        if name not in entries or name in used:
            raise ValueError(f"the tensor {quoted(name)} is missing or used twice.")
        used.add(name)
        return entries[name]

    read_model(document["model"])
    sigmas, settings = read_sigmas(document), read_inversion_settings(document["settings"])
    if len(sigmas) != settings.steps + 1:
        raise ValueError(f"{settings.steps} steps have {len(sigmas)} noise levels.")
    latents = entries["trajectory.latents"]
    fits = len(latents.shape) == 5 and latents.shape[0] == len(sigmas) and 0 not in latents.shape
    if latents.dtype not in FLOATS or not fits:
        raise ValueError(f"the trajectory has latents {latents.shape} of {latents.dtype} for {len(sigmas)} noise levels.")
    conditioning = unpack(document["conditioning"], entry)
    if not isinstance(conditioning, list) or not conditioning or not all(_is_cond(cond) for cond in conditioning):
        raise ValueError("the conditioning is no list of prompts (frames, tokens, channels) with options.")
    given = unpack(_document(metadata, LATENTS), entry)
    samples = given.get("samples") if isinstance(given, dict) else None
    if not isinstance(samples, Entry) or samples.dtype not in FLOATS or samples.shape != latents.shape[1:]:
        shape = samples.shape if isinstance(samples, Entry) else None
        raise ValueError(
            f"the latents have the shape {shape}, those of the trajectory {latents.shape[1:]}. Connect both from the same STEM "
            "Invert Latents."
        )
    return used


def _is_cond(cond: Any) -> bool:
    if not isinstance(cond, (list, tuple)) or len(cond) != 2:
        return False
    text, options = cond
    if not isinstance(text, Entry) or not isinstance(options, dict):
        return False
    return text.dtype in FLOATS and len(text.shape) == 3 and 0 not in text.shape


def _check_basis(document: dict[str, Any], entries: Mapping[str, Entry]) -> set[str]:
    """Names of the tensors that belong to the basis."""
    sigmas, layouts = read_sigmas(document), {layout.name: layout for layout in read_model(document["model"]).blocks}
    total, ids, blocks = _whole(document, "total_frames", 1), document["frame_ids"], document["blocks"]
    read_basis_settings(document["settings"])
    if not isinstance(ids, list) or not 0 < len(ids) <= total or not all(type(i) is int and 0 <= i < total for i in ids):
        raise ValueError(f"the basis has no frames that are among {total}.")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, str) for block in blocks):
        raise ValueError("the basis has no blocks.")
    if len(set(blocks)) < len(blocks) or set(blocks) - layouts.keys():
        raise ValueError(f"the basis has blocks that its model has not, or one twice: {quoted(', '.join(blocks))}.")
    for block in blocks:
        keys, values = (entries.get(f"basis.{part}.{block}") for part in ("keys", "values"))
        if keys is None or values is None or keys[:2] != values[:2]:
            raise ValueError(f"keys and values of block {quoted(block)} are missing, or are not alike.")
        heads, channels = layouts[block].heads, layouts[block].head_dim
        fits = len(keys.shape) == 4 and keys.shape[2] > 0 and keys.shape == (len(sigmas), heads, keys.shape[2], channels)
        if keys.dtype not in FLOATS or not fits:
            raise ValueError(
                f"keys of block {quoted(block)} have the shape {keys.shape}, needed is ({len(sigmas)}, {heads}, bases, "
                f"{channels})."
            )
    return {f"basis.{part}.{block}" for part in ("keys", "values") for block in blocks}


def _document(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    found = parse_json(metadata[name])
    if name != LATENTS and not isinstance(found, dict):
        raise ValueError(f"{name} is no JSON object.")
    return found
