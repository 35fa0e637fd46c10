"""Where a model's self-attention is: read from its blocks, for SD1.x, SD2.x and SDXL alike."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import V_PREDICTION, X0, ModelSamplingDiscrete

from ...stem.basis import BlockLayout, ModelFingerprint
from .naming import shown

SIDES = ("input", "middle", "output")
FITTING = "Use a checkpoint of SD1.x, SD2.x or SDXL."


class Layout(NamedTuple):
    """The self-attention blocks of one model, and what tells it from others."""

    slots: tuple[tuple[str, int], ...]  # ("input", 1): core's key of a transformer, in the order of execution
    model: ModelFingerprint


def read_layout(model: ModelPatcher) -> Layout:
    """Finds the self-attention blocks of a UNet.

    Raises:
        ValueError: The model is no image UNet with such blocks (says what it is), or does not sample over the thousand
            discrete levels of Stable Diffusion.
    """
    unet = model.model.diffusion_model
    family = type(model.model.model_config).__name__
    what = f"{family} ({type(unet).__name__})"
    sides = [getattr(unet, f"{side}_block{'' if side == 'middle' else 's'}", None) for side in SIDES]
    if None in sides:
        raise ValueError(f"this model is of the family {what}, which has no UNet blocks with self-attention. {FITTING}")
    slots, blocks = [], []
    for side, group in zip(SIDES, sides, strict=True):
        for number, stage in enumerate([group] if side == "middle" else group):
            for module in stage:
                if isinstance(module, SpatialVideoTransformer):
                    raise ValueError(f"this model is of the video family {what}, whose frames share attention. {FITTING}")
                if isinstance(module, SpatialTransformer):
                    slots.append((side, number))
                    blocks += _blocks_of(module, side, number)
    if not blocks:
        raise ValueError(f"this model is of the family {what}; none of its blocks has self-attention. {FITTING}")
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingDiscrete) or len(sampling.sigmas) != 1000:
        raise ValueError(
            f"this model samples by {type(sampling).__mro__[1].__name__}, not over a thousand discrete noise levels. Take "
            f"ModelSampling nodes off it. {FITTING}"
        )
    prediction = "v" if isinstance(sampling, V_PREDICTION) else "x0" if isinstance(sampling, X0) else "eps"
    return Layout(tuple(slots), ModelFingerprint(family, prediction, tuple(blocks)))


def block_name(side: str, number: int, index: int) -> str:
    """The name of one self-attention: "input_4", or "input_4_1" for the second one of a deeper transformer."""
    return f"{side}_{number}" + (f"_{index}" if index else "")


def slot_of(block: str) -> tuple[str, int]:
    """Core's key of the transformer that a block belongs to: ("input", 4) of "input_4_1"."""
    side, number, *_ = block.split("_")
    return side, int(number)


def activation_size(latents: Sequence[int], scale: int) -> tuple[int, int]:
    """Height and width of activations that are so many times smaller than the latents (height, width)."""
    height, width = (-(-edge // scale) for edge in latents)
    return height, width


def block_of_call(options: Mapping[str, Any]) -> str:
    """The name of the block that calls a patch, from its `extra_options`.

    Raises:
        ValueError: What core always tells is missing.
    """
    if any(options.get(name) is None for name in ("block", "sigmas", "n_heads")):
        raise ValueError(
            "self-attention was called without its block, noise level or number of heads. Another node on this model calls "
            "it in a way of its own: take that node off."
        )
    return block_name(*options["block"][:2], options.get("block_index", 0))


def block_scales(unet: torch.nn.Module) -> dict[tuple[str, int], int]:
    """How many times smaller than the latents the activations of each block of a UNet are, by core's key of the block."""
    scale, found = 1, {}
    for number, stage in enumerate(unet.input_blocks):
        scale *= 2 if any(isinstance(module, Downsample) for module in stage) else 1
        found["input", number] = scale
    found["middle", 0] = scale
    for number, stage in enumerate(unet.output_blocks):
        found["output", number] = scale
        scale //= 2 if any(isinstance(module, Upsample) for module in stage) else 1
    return found


def choose_blocks(layout: Layout, choice: str) -> tuple[str, ...]:
    """Names of the blocks that a user chose, in the order of execution.

    Args:
        layout: Of the model.
        choice: "all", or names separated by commas: a side ("output"), a block ("output_4"), a range ("output_4-8"), one
            of several in a block ("input_7_2", the first "input_7_0").

    Raises:
        ValueError: A part of the choice names no block of this model.
    """
    names = [block.name for block in layout.model.blocks]
    chosen = set()
    for part in (p.strip() for p in choice.replace(";", ",").split(",") if p.strip()):
        side, _, numbers = part.partition("_")
        low, dash, high = numbers.partition("-")
        if part == "all":
            found = set(names)
        elif not numbers:
            found = {n for n in names if n.startswith(f"{side}_")}
        elif dash and low.isdigit() and high.isdigit():
            found = {n for n in names if n.split("_")[0] == side and int(low) <= int(n.split("_")[1]) <= int(high)}
        else:
            found = {n for n in names if n == part or n.startswith(f"{part}_") or (n.count("_") == 1 and f"{n}_0" == part)}
        if not found:
            raise ValueError(f"blocks names {shown(part)}, which this model does not have. It has: {', '.join(names)}.")
        chosen |= found
    if not chosen:
        raise ValueError('blocks is empty. Write "all", or names such as "output" or "output_4-8".')
    return tuple(n for n in names if n in chosen)


def choose_block(layout: Layout, choice: str) -> BlockLayout:
    """The one block that a user chose, by its name.

    Raises:
        ValueError: The model has no such block, or several of that name.
    """
    names = [block.name for block in layout.model.blocks]
    try:
        chosen = choose_blocks(layout, choice)
    except ValueError:
        chosen = ()
    if len(chosen) != 1:
        found = f"stands for {len(chosen)} blocks" if chosen else "is none of this model's blocks"
        raise ValueError(f"block {shown(choice)} {found}. Choose one of {', '.join(names)}.")
    return layout.model.blocks[names.index(chosen[0])]


def _blocks_of(transformer: SpatialTransformer, side: str, number: int) -> list[BlockLayout]:
    return [
        BlockLayout(block_name(side, number, index), block.attn1.heads, block.attn1.dim_head)
        for index, block in enumerate(transformer.transformer_blocks)
        if not block.disable_self_attn
    ]
