"""What a run needs of the device's memory, by core's estimates and our own."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...stem.em import BlockMemory, block_bytes
from .layout import Layout, activation_size, block_scales, slot_of
from .self_attention import BLOCK_MEMORY, ContextChoice, EstimatedBases, first_and_previous_frame

KEY = "stem_memory"
"""Of the wrappers."""

MARGIN = 1.5
"""Core puts prompts together where this many times their estimated memory is free; we do so with frames."""

Needed = Callable[[ModelPatcher, int], tuple[int, int]]
"""From the model that runs and the frames of the clip (of a window, with core's context windows): how many of them go through
the UNet at once, and how many bytes are needed beside."""


@dataclass(frozen=True)
class Announcement:
    """What our nodes on one model need, by node: the fewest frames of all, and the bytes of all together."""

    needed: Mapping[str, Needed]

    def prepare(self, executor: Callable, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING wrapper."""
        frames, beside = zip(*(needed(model, noise_shape[0]) for needed in self.needed.values()), strict=True)
        one = model.model.memory_required([2, *noise_shape[1:]])  # core counts every frame twice
        rows = min(frames) + (math.ceil(sum(beside) / one) if one else 0)
        return executor(model, [rows, *noise_shape[1:]], *args, **kwargs)


def announce_memory(model: ModelPatcher, node: str, needed: Needed) -> None:
    """Lets core know before a run of a model, which has been cloned already, what it is going to need.

    Args:
        node: That needs it; what it announced before is replaced.
        needed: It must not hold the model: a model that holds itself stays in core's list of loaded ones.
    """
    known = [wrapper.__self__.needed for wrapper in model.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY)]
    model.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    announcement = Announcement({**(known[0] if known else {}), node: needed})
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, announcement.prepare)


def withdraw(model: ModelPatcher) -> None:
    """Takes off what is announced, and the block memory of patches that are taken off too."""
    for kind in (WrappersMP.PREPARE_SAMPLING, WrappersMP.OUTER_SAMPLE):
        model.remove_wrappers_with_key(kind, KEY)


def block_memory() -> BlockMemory:
    """Of one run: where memory runs out in an estimate of bases, all estimates go on with smaller blocks."""
    return BlockMemory(management.is_oom, _tell)


def keep_block_memory(model: ModelPatcher) -> None:
    """Lets every run of a model, which has been cloned already, have one."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _with_block_memory)


def _with_block_memory(executor: Callable, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper."""
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    options[BLOCK_MEMORY] = block_memory()
    try:
        return executor(*args, **kwargs)
    finally:
        del options[BLOCK_MEMORY]


def _tell() -> None:
    management.soft_empty_cache()
    logging.warning("STEM: memory ran out in the estimate of bases; going on with smaller blocks of tokens.")


def frames_that_fit(model: ModelPatcher, shape: Sequence[int], beside: int = 0) -> int:
    """By core's estimate, in what is free or could be made so by unloading other models; 0 for none.

    The model's own weights have up to half of that; core streams the rest of them.

    Args:
        model: That is to be called.
        shape: Of the latents (f, c, height, width).
        beside: Bytes that are needed in any case.
    """
    device = model.load_device
    free = management.get_free_memory(device) - beside
    if device.type != "cpu":  # where weights are in what is counted already
        loaded = (m for m in management.current_loaded_models if m.device == device and m.model is not None)
        free += sum(m.model_loaded_memory() for m in loaded)
        free -= min(model.model_size(), free / 2)
    one = model.model.memory_required([1, *shape[1:]])
    return max(0, int(free // (MARGIN * one))) if one else shape[0]


def control_memory(model: ModelPatcher, conditioning: list) -> int:
    """Bytes of the ControlNets and other models that a conditioning brings along, on a device where weights are loaded."""
    if model.load_device.type == "cpu":
        return 0
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    models, inference = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
    return int(inference) + sum(each.model_size() for each in models)


def context_memory(
    model: ModelPatcher, layout: Layout, blocks: Sequence[str], choice: ContextChoice | None, shape: Sequence[int]
) -> int:
    """Bytes of the contexts of one call in the largest of the blocks, or of what bases are estimated with.

    Args:
        model, layout: Of the run.
        blocks: Names of those that attend as chosen.
        choice: What they attend to.
        shape: Latents (f, c, height, width) of a call.
    """
    chosen = [block for block in layout.model.blocks if block.name in blocks]
    if isinstance(choice, EstimatedBases) and chosen:
        return block_bytes(model.load_device)
    if choice is not first_and_previous_frame or not chosen:
        return 0
    scales, itemsize = block_scales(model.model.diffusion_model), model.model.get_dtype_inference().itemsize
    tokens = {block.name: math.prod(activation_size(shape[2:], scales[slot_of(block.name)])) for block in chosen}
    numbers = max(tokens[block.name] * block.heads * block.head_dim for block in chosen)
    return 5 * shape[0] * numbers * itemsize  # two frames of keys and of values, and the keys of the one before
