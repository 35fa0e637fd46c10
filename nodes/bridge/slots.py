"""Core's places for replaced attention, one for self- and one for cross-attention of every transformer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class CrossAttention:
    """A patch in the slot of one block's cross-attention."""

    patch: Callable
    slot: tuple[str, int]
    owner: str  # the node to name in an error
    remedy: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        return self.patch(q, k, v, extra_options)

    def add(self, *_args: Any, **_kwargs: Any) -> None:
        """What IPAdapter_plus calls where it finds a patch: it takes every one for its own.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.owner}: IPAdapter comes after it and adds to the cross-attention of block {self.slot[0]}_{self.slot[1]}, "
            f"where ComfyUI has one place. {self.remedy}, or take IPAdapter off this model."
        )


def place_cross_attention(model: ModelPatcher, blocks: Iterable[str], patch: Callable, node: str, remedy: str) -> None:
    """Puts one patch into the cross-attention of some blocks of a model that has been cloned already.

    Raises:
        ValueError: Another patch sits on one of them; says the remedy.
    """
    slots = sorted({slot_of(block) for block in blocks})
    refuse_others(model, "attn2", slots, remedy)
    for slot in slots:
        model.set_model_attn2_replace(CrossAttention(patch, slot, node, remedy), *slot)


GUARD = "stem_attention_guard"
"""Key of the wrappers that `guard_attention` adds."""


def guard_attention(model: ModelPatcher, ours: Callable[[object], bool], node: str, remedies: dict[str, str]) -> None:
    """Refuses to sample where a later node has taken slots of ours: core would drop our patch, and say nothing.

    What replaces attention for a call of its own while a sampler runs (PAG) is left alone.

    Args:
        model: A clone, on which the patches have been placed.
        ours: Whether a patch in a slot is one of the node's.
        node: To name in the error.
        remedies: What to do beside taking the other node off, by kind.
    """
    slots = {(kind, slot) for kind in KINDS for slot, patch in placed(model, kind).items() if ours(patch)}

    def outer_sample(executor: Callable, *args: Any, **kwargs: Any) -> Tensor:
        for kind, name in KINDS.items():
            for key, other in placed(executor.class_obj, kind).items():
                if (kind, key[:2]) in slots and not ours(other):
                    raise ValueError(
                        f"{node}: {_origin(other)} comes after it and replaces the {name} of block {key[0]}_{key[1]}, where "
                        f"ComfyUI has one place. {remedies[kind]}, or take that node off this model."
                    )
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, GUARD, outer_sample)


def _origin(patch: object) -> str:
    owner = getattr(getattr(patch, "__self__", patch), "owner", "")  # of a method, its object's
    if owner:
        return owner
    kind = patch if hasattr(patch, "__qualname__") else type(patch)
    return f"{kind.__qualname__} of {kind.__module__}"
