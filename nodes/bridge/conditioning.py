"""Conditionings of which each frame has its own part, cut down to some of the frames."""

import copy
from typing import Any

import torch


def select_frames(conditioning: list, ids: list[int], frames: int) -> list:
    """The same conditioning for some frames of a clip.

    Tensors with one entry for every frame (prompts that change, masks, ControlNet hints along the chain) keep those of
    the chosen frames; everything else is passed on as it is, and nothing is changed in place.

    Args:
        conditioning: Core's list of [tensor, options].
        ids: Frames to keep.
        frames: Length of the clip.
    """
    return [
        [_select(tensor, ids, frames), {name: _select(value, ids, frames) for name, value in options.items()}]
        for tensor, options in conditioning
    ]


def _select(value: Any, ids: list[int], frames: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[ids] if value.ndim > 1 and len(value) == frames > 1 else value
    if hasattr(value, "cond_hint_original"):  # a ControlNet: `copy` keeps its hint and settings, and shares its weights
        chosen = value.copy()
        chosen.cond_hint_original = _select_hints(value.cond_hint_original, ids)
        chosen.extra_concat_orig = [_select_hints(extra, ids) for extra in value.extra_concat_orig]
        if value.previous_controlnet is not None:
            chosen.set_previous_controlnet(_select(value.previous_controlnet, ids, frames))
        return chosen
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def _select_hints(hints: torch.Tensor | None, ids: list[int]) -> torch.Tensor | None:
    """Hints of the chosen frames; core repeats hints that are fewer than the frames."""
    return hints if hints is None or len(hints) == 1 else hints[[i % len(hints) for i in ids]]
