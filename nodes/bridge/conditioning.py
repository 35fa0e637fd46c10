"""Conditionings of which each frame has its own part, cut down to some of the frames."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.conds import CONDConstant, CONDRegular
from comfy.controlnet import ControlBase
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher

CYCLIC = ("pooled_output", "mask")
"""Options of which core takes one row for each frame, beside the prompt itself."""


def check_prompt(positive: list, model: ModelPatcher) -> None:
    """Whether a model can read a prompt.

    Raises:
        ValueError: It is empty, or has tokens of another width than the model's cross-attention reads.
    """
    if not positive:
        raise ValueError("positive is an empty conditioning. Connect the prompt that describes the source clip.")
    blocks = (each for each in model.model.diffusion_model.modules() if isinstance(each, BasicTransformerBlock))
    width = next(block.attn2.to_k.in_features for block in blocks if block.attn2 is not None)
    for text, _ in positive:
        if text.ndim != 3 or 0 in text.shape or text.shape[-1] != width:
            raise ValueError(
                f"positive has the shape {tuple(text.shape)}, this model reads tokens of {width} numbers (1, tokens, {width}). "
                "Encode the prompt with the CLIP of this checkpoint."
            )


def select_frames(conditioning: list, ids: list[int], frames: int) -> list:
    """The same conditioning for some frames of a clip.

    Prompts, masks and ControlNet hints (along the chain) that change from frame to frame keep what core would show the chosen
    frames: it goes around where there are fewer than frames (with masks where their number divides the frames). Of other
    tensors only those with one entry for every frame are cut down. Everything else is passed on as it is, and nothing is
    changed in place.

    Args:
        conditioning: Core's list of [tensor, options].
        ids: Frames to keep.
        frames: Length of the clip.
    """
    if ids == list(range(frames)):
        return conditioning
    controls = {}  # one copy of each, as core runs prompts together that share a ControlNet

    def select(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _select_tensor(name, value, ids, frames)
        if hasattr(value, "cond_hint_original"):
            return _select_control(value, ids, controls)
        return copy.copy(value) if isinstance(value, (list, dict)) else value

    return [
        [_select_rows(tensor, ids), {name: select(name, value) for name, value in options.items()}]
        for tensor, options in conditioning
    ]


def _select_control(control: ControlBase, ids: list[int], done: dict[int, ControlBase]) -> ControlBase:
    """A copy of a ControlNet, and of those before it, with the hints of some frames; the weights are shared."""
    if id(control) not in done:
        chosen = done[id(control)] = control.copy()
        chosen.cond_hint_original = _select_rows(control.cond_hint_original, ids)
        chosen.extra_concat_orig = [_select_rows(extra, ids) for extra in control.extra_concat_orig]
        if control.previous_controlnet is not None:
            chosen.set_previous_controlnet(_select_control(control.previous_controlnet, ids, done))
    return done[id(control)]


def _select_tensor(name: str, value: torch.Tensor, ids: list[int], frames: int) -> torch.Tensor:
    one_for_all = name == "mask" and value.ndim == 2
    cyclic = name in CYCLIC or (value.ndim > 1 and len(value) == frames)
    return _select_rows(value, ids) if cyclic and not one_for_all else value


def _select_rows(x: torch.Tensor | None, ids: list[int]) -> torch.Tensor | None:
    """Rows of the chosen frames, as core repeats rows that are fewer than the frames; a single one stands for all."""
    return x if x is None or len(x) == 1 else x[[i % len(x) for i in ids]]


def select_prepared(conds: list[dict] | None, ids: list[int], frames: int) -> list[dict] | None:
    """The same for conditionings as core has prepared them for a run; their ControlNets are left as they are."""
    if conds is None:
        return None
    return [{name: _select_prepared(name, value, ids, frames) for name, value in cond.items()} for cond in conds]


@contextmanager
def hints_of_frames(conds: list[list[dict] | None], ids: list[int]) -> Iterator[None]:
    """Lets the ControlNets of prepared conditionings show the hints of some frames, for the calls inside."""
    seen, before = {}, []
    for control in (cond.get("control") for role in conds for cond in role or []):
        while control is not None:
            for each in (control, *control.multigpu_clones.values()):
                seen[id(each)] = each
            control = control.previous_controlnet
    for control in seen.values():
        changed = {}
        if not hasattr(control, "sub_idxs"):  # of Advanced-ControlNet, which picks its hints itself, by `ad_params`
            extra = [_select_rows(x, ids) for x in control.extra_concat_orig]
            changed = {"cond_hint_original": _select_rows(control.cond_hint_original, ids), "extra_concat_orig": extra}
        before.append((control, {name: getattr(control, name) for name in changed}))
        _assign(control, changed)
    try:
        yield
    finally:
        for control, values in before:
            _assign(control, values)


def _assign(control: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(control, name, value)
    control.cond_hint = None  # made from the original at the next call


def _select_prepared(name: str, value: Any, ids: list[int], frames: int) -> Any:
    if name == "model_conds":
        return {each: _select_cond(part, ids) for each, part in value.items()}
    return _select_tensor(name, value, ids, frames) if isinstance(value, torch.Tensor) else value


def _select_cond(cond: Any, ids: list[int]) -> Any:
    """Of what core hands to the UNet: a tensor of which it takes one row for each frame; the rest is for all frames."""
    cut = isinstance(cond, CONDRegular) and not isinstance(cond, CONDConstant) and isinstance(cond.cond, torch.Tensor)
    return cond._copy_with(_select_rows(cond.cond, ids)) if cut else cond
