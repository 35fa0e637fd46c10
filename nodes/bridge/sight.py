"""One look into a model on the way of an inversion: the keys of one self-attention block at one noise level."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...stem.basis import Basis
from ...stem.ddim import inversion_input
from ...stem.trajectory import Trajectory, latents_at
from .batches import plan_batches
from .companion import editor_on, without_regions
from .inversion import without_guidance
from .layout import Layout
from .memory import context_memory, withdraw
from .self_attention import Call, Context, FixedBases, patch_self_attention, without_own_patches

SIGHT = "stem_sight"
"""Key in `transformer_options`, where the `Sight` of a run is."""


class Sight:
    """The keys of one head of one block, as a run's calls bring them; of several conditionings those of the first."""

    def __init__(self, block: str, head: int, uuids: list):
        self.block, self.head = block, head
        self.rank = {uuid: rank for rank, uuid in enumerate(uuids)}
        self.found: dict[int, tuple[int, Tensor]] = {}  # by frame
        self._lock = Lock()  # core samples conditionings on several devices at a time

    def add(self, k: Tensor, call: Call) -> None:
        size, rank = k.shape[-1] // call.heads, self.rank.get(call.uuid, 0)
        seen = k[..., self.head * size : (self.head + 1) * size].cpu()
        with self._lock:
            for frame, keys in zip(call.frames, seen, strict=True):
                if frame not in self.found or rank < self.found[frame][0]:
                    self.found[frame] = rank, keys

    def keys(self, frames: int) -> Tensor:
        """(f, n, d), n tokens of every frame.

        Raises:
            ValueError: The block was not called for all frames.
        """
        missing = [frame for frame in range(frames) if frame not in self.found]
        if missing:
            raise ValueError(
                f"block {self.block} was not called for frame {missing[0]}. Another node on this model skips or replaces it: "
                "take that node off, or choose another block."
            )
        return torch.stack([self.found[frame][1] for frame in range(frames)])


@dataclass(frozen=True, eq=False)
class WatchedBases(FixedBases):
    """Fixed bases, read under the eyes of the run's `Sight`."""

    def __call__(self, k: Tensor, v: Tensor, call: Call) -> Iterator[Context]:
        sight = call.options.get(SIGHT)
        if sight is not None and sight.block == call.block:
            sight.add(k, call)
        yield from super().__call__(k, v, call)


def keys_at(
    model: ModelPatcher, layout: Layout, basis: Basis, trajectory: Trajectory, block: str, head: int, level: int
) -> Tensor:
    """The keys (f, n, d) of one head on the CPU, as the inversion had them when it entered a level, with this basis.

    Args:
        model: Left as it is.
        layout: Of the model.
        basis: That self-attention reads, in all blocks that it holds.
        trajectory: Of the clip; its own prompt is used, over the whole picture.
        block: One of the basis' blocks.
        head: Of the block.
        level: 1 to t, of the trajectory.

    Raises:
        ValueError: An editor or another patch of self-attention is on the model, or the block was not called.
    """
    if (editor := editor_on(model)) is not None:
        raise ValueError(f"{editor} is on this model, and edits along an inversion. Connect the model from before that node.")
    choice, positive = WatchedBases(basis), without_regions(trajectory.conditioning)
    model = patch_self_attention(without_guidance(without_own_patches(model)), layout, basis.blocks, choice)
    withdraw(model)
    frames, *picture = trajectory.latents.shape[1:]
    batches = plan_batches(model, (frames, *picture), 0, choice, positive)
    batches.place(model, lambda model, frames: context_memory(model, layout, basis.blocks, choice, (frames, *picture)))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    sight = Sight(block, head, [cond["uuid"] for cond in guider.original_conds["positive"]])
    model.model_options["transformer_options"][SIGHT] = sight
    left, entered = trajectory.sigmas[level - 1], trajectory.sigmas[level]
    look_once(guider, inversion_input(latents_at(trajectory, level - 1), left, entered), float(entered))
    return sight.keys(frames)


def look_once(guider: comfy.samplers.CFGGuider, x: Tensor, sigma: float) -> None:
    """Calls a guider's model once, with latents x (f, c, height, width) in the model's scale at a noise level."""
    start = guider.model_patcher.model.process_latent_out(x)
    sigmas = torch.tensor([sigma, 0.0])
    guider.sample(torch.zeros_like(start), start, comfy.samplers.KSAMPLER(_look), sigmas, disable_pbar=True, seed=0)


def _look(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable: bool) -> Tensor:
    """A sampler function (k-diffusion's form) that asks the model once and goes nowhere."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
    return x
