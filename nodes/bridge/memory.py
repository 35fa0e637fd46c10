"""What a run needs of the device's memory, by core's estimates and our own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...stem.em import block_bytes
from .layout import Layout, activation_size, block_scales, slot_of
from .self_attention import EstimatedBases, first_and_previous_frame

MARGIN = 1.5
"""Core puts prompts together where this many times their estimated memory is free; we do so with frames."""


def announce_memory(model: ModelPatcher, key: str, needed: Callable[[ModelPatcher, int], tuple[int, int]]) -> None:
    """Lets core know before a run of a model, which has been cloned already, what it is going to need.

    Args:
        key: Of the wrapper.
        needed: From the model that runs and the frames of the clip (of a window, with core's context windows): how many of them
            go through the UNet at once, and how many bytes are needed beside. It must not hold the model: a model that holds
            itself stays in core's list of loaded ones.
    """

    def prepare(executor: Callable, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        frames, beside = needed(model, noise_shape[0])
        one = model.model.memory_required([2, *noise_shape[1:]])  # core counts every frame twice
        rows = frames + (math.ceil(beside / one) if one else 0)
        return executor(model, [rows, *noise_shape[1:]], *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, prepare)


def frames_that_fit(model: ModelPatcher, shape: Sequence[int]) -> int:
    """By core's estimate, in what is free or could be made so by unloading other models; 0 for none.

    The model's own weights have up to half of that; core streams the rest of them.
    """
    device = model.load_device
    free = management.get_free_memory(device)
    if device.type != "cpu":  # where weights are in what is counted already
        loaded = (m for m in management.current_loaded_models if m.device == device and m.model is not None)
        free += sum(m.model_loaded_memory() for m in loaded)
        free -= min(model.model_size(), free / 2)
    one = model.model.memory_required([1, *shape[1:]])
    return max(0, int(free // (MARGIN * one))) if one else shape[0]


def context_memory(model: ModelPatcher, layout: Layout, blocks: Sequence[str], choice: object, shape: Sequence[int]) -> int:
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
