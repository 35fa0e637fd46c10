"""How many frames go through the model at once, so that an inversion's memory need not grow with its clip."""

import logging
import math
from collections.abc import Sequence

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...stem.em import block_bytes
from .companion import noise_shape_with_room
from .conditioning import hints_of_frames, select_prepared
from .frames import PART
from .layout import Layout, activation_size, block_scales, slot_of
from .self_attention import EstimatedBases, first_and_previous_frame

KEY = "stem_batches"
"""Of the wrappers."""

MARGIN = 1.5
"""Core puts prompts together where this many times their estimated memory is free; we do so with frames."""


class Batches:
    """Splits the model calls of one run by frames; made anew for each. Where memory runs out, batches become smaller."""

    def __init__(self, frames: int, size: int, together: int, asked: bool):
        """
        Args:
            frames: Of the clip.
            size: Frames in a call.
            together: Of how many frames a batch has to be a multiple.
            asked: Whether the user has chosen the size.
        """
        self.frames, self.size, self.together, self.asked = frames, size, together, asked

    def model_call(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """CALC_COND_BATCH wrapper."""
        options = model_options.get("transformer_options", {})
        if self.size < len(x_in) and options.get("ad_params"):
            self._refuse_motion_modules()
        outs, start = [], 0
        while start < len(x_in):
            management.throw_exception_if_processing_interrupted()
            rows = list(range(start, min(start + self.size, len(x_in))))
            try:
                if len(rows) == len(x_in):
                    return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
                told = {**model_options, "transformer_options": {**options, PART: rows}}
                chosen = [select_prepared(role, rows, len(x_in)) for role in conds]
                with hints_of_frames(chosen, rows):
                    outs.append(executor(model, chosen, x_in[rows], timestep[rows], told, *args, **kwargs))
                start += len(rows)
                continue
            except Exception as error:
                if not management.is_oom(error) or not self._halve(len(rows)):
                    raise
            management.soft_empty_cache()  # here the error, and with it all that its frames hold, is gone
        return [torch.cat(parts) for parts in zip(*outs, strict=True)]

    def prepare(self, executor, model, noise_shape, *args, kept: int, **kwargs):
        """PREPARE_SAMPLING wrapper: the memory that a call needs, and `kept` bytes beside it."""
        return executor(model, noise_shape_with_room(model, noise_shape, self.size, kept), *args, **kwargs)

    def place(self, model: ModelPatcher, kept: int) -> None:
        """Puts the wrappers on a model that has been cloned already."""
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.model_call)

        def prepare(*args, **kwargs):
            return self.prepare(*args, kept=kept, **kwargs)

        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)

    def _halve(self, tried: int) -> bool:
        """Whether a call of so many frames can be made smaller."""
        smaller = max(self.together, tried // 2 // max(1, self.together) * self.together)
        if not self.together or smaller >= tried:
            return False
        self.size = smaller
        logging.warning(f"STEM: memory ran out with {tried} frames at once; going on with {smaller}.")
        return True

    def _refuse_motion_modules(self) -> None:
        if self.asked:
            raise ValueError(
                f"frames_per_batch is {self.size}, and AnimateDiff's motion modules need their neighbours: set it to 0, and "
                "use AnimateDiff's own context options for a long clip."
            )
        self.size = self.frames


def plan_batches(model: ModelPatcher, shape: Sequence[int], asked: int, together: int) -> Batches:
    """The batches for latents (f, c, height, width).

    Args:
        model: That is to be called.
        shape: Of the latents of the clip.
        asked: Frames in a batch that the user wants; 0 leaves it to the memory that is free.
        together: How many frames, from the first on, need to be in one call: 1 where each is treated alone, 0 for all.

    Raises:
        ValueError: A size that would part frames that belong together.
    """
    frames = shape[0]
    if asked >= frames:
        return Batches(frames, frames, together, asked=False)
    if asked and not together:
        raise ValueError(
            f"frames_per_batch is {asked}, but this method looks at all {frames} frames at once. Set it to 0, or connect a "
            "basis from STEM Basis Estimate, with which every frame is inverted on its own."
        )
    if asked % max(1, together):
        raise ValueError(
            f"frames_per_batch is {asked}, and {together} frames share their bases (frames_per_em). Choose a multiple of "
            f"{together}, or 0."
        )
    if asked:
        return Batches(frames, asked, together, asked=True)
    fit = frames_that_fit(model, shape)
    if fit >= frames:
        return Batches(frames, frames, together, asked=False)
    if not 0 < together < frames:
        logging.warning(
            f"STEM: {frames} frames go through the model at once, and by ComfyUI's estimate {fit} fit into the free memory. "
            "If it runs out, connect a basis from STEM Basis Estimate: then batches of frames are enough."
        )
        return Batches(frames, frames, together, asked=False)
    size = max(together, fit // together * together)
    logging.info(f"STEM: {size} of {frames} frames at once, by the memory that is free.")
    return Batches(frames, size, together, asked=False)


def frames_that_fit(model: ModelPatcher, shape: Sequence[int]) -> int:
    """By core's estimate, in what is free or could be made so by unloading other models; 0 for none."""
    device = model.load_device
    free = management.get_free_memory(device)
    if device.type != "cpu":  # where weights are in what is counted already
        free += sum(m.model_loaded_memory() for m in management.current_loaded_models if m.device == device)
        free -= model.model_size()
    return max(0, int(free // (MARGIN * model.model.memory_required([1, *shape[1:]]))))


def context_memory(model: ModelPatcher, layout: Layout, blocks: Sequence[str], choice: object, shape: Sequence[int]) -> int:
    """Bytes of copies of keys and values in the largest block of one call, and of what bases are estimated with.

    Args:
        model, layout: Of the run.
        blocks: Names of those that attend as chosen.
        choice: What they attend to.
        shape: Latents (f, c, height, width) of a call.
    """
    copies = 1 if isinstance(choice, EstimatedBases) else 2 if choice is first_and_previous_frame else 0
    if not copies:
        return 0
    scales, itemsize = block_scales(model.model.diffusion_model), model.model.get_dtype_inference().itemsize
    chosen = [block for block in layout.model.blocks if block.name in blocks]
    numbers = (
        math.prod(activation_size(shape[2:], scales[slot_of(block.name)])) * block.heads * block.head_dim for block in chosen
    )
    found = 2 * copies * shape[0] * max(numbers) * itemsize
    if isinstance(choice, EstimatedBases):
        found += max(block_bytes(block.head_dim, choice.settings.num_bases, model.load_device) for block in chosen)
    return found
