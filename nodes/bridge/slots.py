"""Core's places for replaced attention, one for self- and one for cross-attention of every transformer."""

from collections.abc import Callable, Iterable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from .layout import slot_of

LEAVE_OUT = "Leave this block out of `blocks`"
"""The remedy where nothing else of a node needs the block."""

KINDS = {"attn1": "self-attention", "attn2": "cross-attention"}  # core's names


def placed(model: ModelPatcher | CFGGuider, kind: str) -> dict[tuple, object]:
    """The attention replacements on a model, or on that of a run, by core's keys."""
    return model.model_options["transformer_options"].get("patches_replace", {}).get(kind, {})


def refuse_others(
    model: ModelPatcher, kind: str, slots: Iterable[tuple], remedy: str, allowed: Callable[[object], bool] = lambda _: False
) -> None:
    """Raises a ValueError that says the remedy where another patch than an allowed one sits in one of the slots."""
    for slot in slots:
        for key, other in placed(model, kind).items():
            if key[:2] == slot and not allowed(other):
                raise ValueError(
                    f"the {KINDS[kind]} of block {slot[0]}_{slot[1]} is already replaced by {_origin(other)}, and ComfyUI has "
                    f"one place for it. {remedy}, or take the other node off this model."
                )


def place_cross_attention(model: ModelPatcher, blocks: Iterable[str], patch: Callable, remedy: str) -> None:
    """Puts one patch into the cross-attention of some blocks of a model that has been cloned already.

    Raises:
        ValueError: Another patch sits on one of them; says the remedy.
    """
    slots = sorted({slot_of(block) for block in blocks})
    refuse_others(model, "attn2", slots, remedy)
    for slot in slots:
        model.set_model_attn2_replace(patch, *slot)


def guard_attention(model: ModelPatcher, patches: Iterable[Callable], node: str, remedies: dict[str, str]) -> None:
    """Refuses to sample where a later node has taken slots of patches that do not act alone.

    What replaces attention for a call of its own while a sampler runs (PAG) is left alone.

    Args:
        model: A clone, on which the patches have been placed.
        patches: In slots of self-attention or cross-attention.
        node: To name in the error.
        remedies: What to do beside taking the other node off, by kind.
    """
    slots = {
        (kind, slot): patch
        for kind in KINDS
        for slot, patch in placed(model, kind).items()
        if any(patch is ours for ours in patches)
    }

    def outer_sample(executor: Callable, *args: Any, **kwargs: Any) -> Tensor:
        for kind, name in KINDS.items():
            for key, other in placed(executor.class_obj, kind).items():
                if slots.get((kind, key[:2]), other) is not other:
                    raise ValueError(
                        f"{node}: {_origin(other)} comes after it and replaces the {name} of block {key[0]}_{key[1]}, where "
                        f"ComfyUI has one place. {remedies[kind]}, or take that node off this model."
                    )
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{node} attention", outer_sample)


def _origin(patch: object) -> str:
    owner = getattr(getattr(patch, "__self__", patch), "owner", "")  # of a method, its object's
    if owner:
        return owner
    kind = patch if hasattr(patch, "__qualname__") else type(patch)
    return f"{kind.__qualname__} of {kind.__module__}"
