"""How many frames go through the model at once, so that an inversion's memory need not grow with its clip."""

import logging
from collections.abc import Callable, Sequence

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .conditioning import hints_of_frames, select_prepared
from .frames import frame_ids
from .memory import announce_memory, frames_that_fit
from .self_attention import SelfAttentionPatch
from .slots import placed

KEY = "stem_batches"
"""Of the wrappers."""

USE_A_BASIS = "connect a basis from STEM Basis Estimate, with which every frame is inverted on its own"
"""What to do where all frames go together and that is too many."""


class Batches:
    """Splits the model calls of one run by frames; made anew for each. Where memory runs out, batches become smaller."""

    def __init__(self, size: int, together: int, asked: bool = False):
        """
        Args:
            size: Frames in a call.
            together: Of how many frames a batch has to be a multiple; 0 where calls cannot be split.
            asked: Whether the user has chosen the size.
        """
        self.size, self.together, self.asked = size, together, asked

    def place(self, model: ModelPatcher, memory: Callable[[ModelPatcher, int], int]) -> None:
        """Puts the wrappers on a model that has been cloned already.

        Args:
            memory: Bytes that a call of so many frames needs beside what core knows of; `announce_memory` says more.
        """

        def needed(model: ModelPatcher, frames: int) -> tuple[int, int]:
            most = min(frames, self.size)
            return most, memory(model, most)

        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.model_call)
        announce_memory(model, KEY, needed)

    def model_call(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs) -> list[Tensor]:
        """CALC_COND_BATCH wrapper."""
        options, frames = model_options.get("transformer_options", {}), len(x_in)
        ids = frame_ids(frames, options)
        whole = self.size >= frames or bool(options.get("ad_params"))
        if not whole and len(ids) != frames:
            raise ValueError(f"a call of {frames} frames does not fit the {len(ids)} of its context window.")
        if options.get("ad_params") and self.asked and self.size < frames:
            raise ValueError(
                f"frames_per_batch is {self.size}, and AnimateDiff's motion modules need their neighbours: set it to 0, and "
                "use AnimateDiff's own context options for a long clip."
            )
        if whole:
            try:
                return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
            except Exception as error:
                if not self._halve(error, frames, model_options):
                    raise
            management.soft_empty_cache()  # here the error, and with it all that its frames hold, is gone
        outs, start = [], 0
        while start < frames:
            management.throw_exception_if_processing_interrupted()
            rows = list(range(start, min(start + self.size, frames)))
            window = options.get("context_window")
            # Told as AnimateDiff tells it, which is what other packs read.
            told = {name: value for name, value in options.items() if name != "context_window"}
            told["ad_params"] = {
                "sub_idxs": [ids[row] for row in rows],
                "full_length": getattr(window, "total_frames", frames),
                "context_length": len(rows),
            }
            chosen = [select_prepared(role, rows, frames) for role in conds]
            try:
                with hints_of_frames(chosen, rows):
                    call = x_in[rows], timestep[rows], {**model_options, "transformer_options": told}
                    outs.append(executor(model, chosen, *call, *args, **kwargs))
                start += len(rows)
                continue
            except Exception as error:
                if not self._halve(error, len(rows), model_options):
                    raise
            management.soft_empty_cache()
        return [torch.cat(parts) for parts in zip(*outs, strict=True)]

    def _halve(self, error: Exception, tried: int, model_options: dict) -> bool:
        """Whether a call of so many frames failed for want of memory, and can be made smaller."""
        smaller = max(self.together, tried // 2 // max(1, self.together) * self.together)
        if not management.is_oom(error) or not self.together or smaller >= tried:
            return False
        if model_options.get("transformer_options", {}).get("ad_params") or "multigpu_clones" in model_options:
            return False  # motion modules need all frames; other devices' results of the failed call are still to come
        self.size = smaller
        logging.warning(f"STEM: memory ran out with {tried} frames at once; going on with {smaller}.")
        return True


def plan_batches(model: ModelPatcher, shape: Sequence[int], asked: int, together: int, remedy: str = USE_A_BASIS) -> Batches:
    """The batches for latents (f, c, height, width).

    Args:
        model: That is to be called.
        shape: Of the latents of the clip.
        asked: Frames in a batch that the user wants; 0 leaves it to the memory that is free.
        together: How many frames, from the first on, need to be in one call: 1 where each is treated alone, 0 for all.
        remedy: What to do where all frames need to be in one call, and are too many.

    Raises:
        ValueError: A size that would part frames that belong together.
    """
    frames = shape[0]
    if 0 < asked < frames:
        if not together:
            raise ValueError(
                f"frames_per_batch is {asked}, but this method looks at all {frames} frames at once. Set it to 0, or {remedy}."
            )
        if asked % together:
            raise ValueError(
                f"frames_per_batch is {asked}, and {together} frames share their bases (frames_per_em). Choose a multiple of "
                f"{together}, or 0."
            )
        return Batches(asked, together, asked=True)
    if others_mix_frames(model):
        together = 0
    if model.model_options.get("context_handler") is not None:  # core's windows: as many frames as they have
        return Batches(frames, together)
    fit = frames_that_fit(model, shape)
    if fit >= frames or frames == 1:
        return Batches(frames, together)
    if not 0 < together < frames:
        logging.warning(
            f"STEM: {frames} frames go through the model at once, and by ComfyUI's estimate {fit} fit into the free memory. If "
            f"it runs out, {remedy}."
        )
        return Batches(frames, together)
    size = max(together, fit // together * together)
    logging.info(f"STEM: {size} of {frames} frames at once: by ComfyUI's estimate {fit} fit into the free memory.")
    return Batches(size, together)


def others_mix_frames(model: ModelPatcher) -> bool:
    """Whether other nodes' patches of self-attention are on a model: they may look at all frames of a call."""
    options = model.model_options["transformer_options"]
    replaced = placed(model, "attn1").values()
    return bool(options.get("patches", {}).get("attn1_patch")) or not all(isinstance(p, SelfAttentionPatch) for p in replaced)
