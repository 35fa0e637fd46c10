"""How many frames go through the model at once, so that an inversion's memory need not grow with its clip."""

import logging
from collections.abc import Callable, Sequence

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.em import block_bytes
from .conditioning import hints_of_frames, select_prepared
from .frames import frame_ids
from .memory import announce_memory, control_memory, frames_that_fit
from .self_attention import ContextChoice, EstimatedBases, SelfAttentionPatch, together
from .slots import placed

KEY = "stem_batches"
"""Of the wrapper."""

ANIMATEDIFF = "ADE"
"""Of the wrappers of AnimateDiff-Evolved."""

USE_A_BASIS = "connect a basis from STEM Basis Estimate, with which every frame is inverted on its own"
"""What to do where all frames go together and that is too many."""


class Batches:
    """Splits the model calls of one run by frames; made anew for each. Where memory runs out, batches become smaller."""

    def __init__(self, size: int, together: int):
        """
        Args:
            size: Frames in a call.
            together: Of how many frames a batch has to be a multiple; 0 where calls cannot be split.
        """
        self.size, self.together = size, together
        self.follow: Callable[[Sequence[int], int], None] = lambda ids, frames: None  # told of parts of calls
        self.ran_out = 0  # frames with which memory ran out since the last call that went well

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
        outs, start = [], 0
        while start < frames:
            management.throw_exception_if_processing_interrupted()
            size = frames if options.get("ad_params") else self.size  # motion modules need all frames of a call
            rows = list(range(start, min(start + size, frames)))
            try:
                if len(rows) == frames:
                    outs.append(executor(model, conds, x_in, timestep, model_options, *args, **kwargs))
                else:
                    chosen, now = [select_prepared(role, rows, frames) for role in conds], told(options, rows, frames)
                    self.follow(now["ad_params"]["sub_idxs"], now["ad_params"]["full_length"])
                    with hints_of_frames(chosen, rows):
                        call = x_in[rows], timestep[rows], {**model_options, "transformer_options": now}
                        outs.append(executor(model, chosen, *call, *args, **kwargs))
            except Exception as error:
                if not self._halve(error, len(rows), model_options):
                    raise
            else:
                start += len(rows)
                if self.ran_out:
                    logging.warning(f"STEM: memory ran out with {self.ran_out} frames at once; going on with {self.size}.")
                self.ran_out = 0
                continue
            management.soft_empty_cache()  # here the error, and with it all that its frames hold, is gone
        return outs[0] if len(outs) == 1 else [torch.cat(parts) for parts in zip(*outs, strict=True)]

    def _halve(self, error: Exception, tried: int, model_options: dict) -> bool:
        """Whether a call of so many frames failed for want of memory, and can be made smaller."""
        smaller = max(self.together, tried // 2 // max(1, self.together) * self.together)
        if not management.is_oom(error) or not self.together or smaller >= tried:
            return False
        if model_options.get("transformer_options", {}).get("ad_params") or "multigpu_clones" in model_options:
            return False  # motion modules need all frames; other devices' results of the failed call are still to come
        self.size, self.ran_out = smaller, self.ran_out or tried
        return True


def told(options: dict, rows: list[int], frames: int) -> dict:
    """`transformer_options` of a call with some of its frames, which says so as AnimateDiff does: other packs read that.

    Args:
        options: Of the whole call.
        rows: That are chosen.
        frames: Of the whole call.
    """
    ids, window = frame_ids(frames, options), options.get("context_window")
    if len(ids) != frames:
        raise ValueError(f"a call of {frames} frames does not fit the {len(ids)} of its context window.")
    context = {
        "sub_idxs": [ids[row] for row in rows],
        "full_length": getattr(window, "total_frames", frames),
        "context_length": len(rows),
    }
    return {**{name: value for name, value in options.items() if name != "context_window"}, "ad_params": context}


def plan_batches(
    model: ModelPatcher,
    shape: Sequence[int],
    asked: int,
    choice: ContextChoice | None,
    positive: list,
    remedy: str = USE_A_BASIS,
) -> Batches:
    """The batches for latents (f, c, height, width).

    Args:
        model: That is to be called.
        shape: Of the latents of the clip.
        asked: Frames in a batch that the user wants; 0 leaves it to the memory that is free.
        choice: What self-attention attends to; None for each frame's own tokens.
        positive: Conditioning of the calls.
        remedy: What to do where all frames need to be in one call, and are too many.

    Raises:
        ValueError: A size that would part frames that belong together.
    """
    frames, shared = shape[0], together(choice)
    shared = 0 if shared >= frames > 1 else shared
    animated = ANIMATEDIFF in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    if 0 < asked < frames:
        if animated:
            raise ValueError(
                f"frames_per_batch is {asked}, and AnimateDiff's motion modules need their neighbours: set it to 0, and use "
                "AnimateDiff's own context options for a long clip."
            )
        if not shared:
            raise ValueError(
                f"frames_per_batch is {asked}, but this method looks at all {frames} frames at once. Set it to 0, or {remedy}."
            )
        if asked % shared:
            raise ValueError(
                f"frames_per_batch is {asked}, and {shared} frames share their bases (frames_per_em). Choose a multiple of "
                f"{shared}, or 0."
            )
        return Batches(asked, shared)
    if animated:  # its own contexts decide
        return Batches(frames, 0)
    if asked:
        return Batches(frames, shared)
    if others_mix_frames(model):
        shared = 0
    if model.model_options.get("context_handler") is not None:  # core's windows: as many frames as they have
        return Batches(frames, shared)
    beside = control_memory(model, positive)
    if isinstance(choice, EstimatedBases):
        beside += block_bytes(model.load_device)
    fit = frames_that_fit(model, shape, beside)
    if fit >= frames or frames == 1:
        return Batches(frames, shared)
    if not shared:
        logging.warning(
            f"STEM: {frames} frames go through the model at once, and by ComfyUI's estimate {fit} fit into the free memory. If "
            f"it runs out, {remedy}."
        )
        return Batches(frames, shared)
    size = max(shared, fit // shared * shared)
    logging.info(f"STEM: {size} of {frames} frames at once: by ComfyUI's estimate {fit} fit into the free memory.")
    return Batches(size, shared)


def others_mix_frames(model: ModelPatcher) -> bool:
    """Whether other nodes' patches of self-attention are on a model: they may look at all frames of a call."""
    options = model.model_options["transformer_options"]
    replaced = placed(model, "attn1").values()
    return bool(options.get("patches", {}).get("attn1_patch")) or not all(isinstance(p, SelfAttentionPatch) for p in replaced)
