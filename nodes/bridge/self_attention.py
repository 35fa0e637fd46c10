"""The attn1 replace patch: every frame of a call reads a context that may come from other frames, or from bases."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.attention import all_frames, basis_context, first_previous, pool_tokens
from ...stem.basis import Basis, BasisSettings, bases_at
from ...stem.em import derive_seed, estimate_basis, initial_bases, revive_bases
from .attend import attend
from .frames import frames_of_call
from .layout import Layout, block_of_call, slot_of
from .naming import named_by
from .record import RECORD
from .slots import GUARD, LEAVE_OUT, guard_attention, placed, refuse_others

PERCENT_RANGE = (0.0, 1.0)

BLOCK_MEMORY = "stem_block_memory"
"""Key in `transformer_options`, where the `BlockMemory` of a run is."""


class Call(NamedTuple):
    """One conditioning's part of one self-attention call."""

    block: str
    heads: int
    sigma: float
    frames: list[int]
    uuid: object  # of the conditioning
    options: dict  # core's extra_options


class Context(NamedTuple):
    """What a run of consecutive frames attends to: one context for all of them (1, m, c), or one each (f, m, c)."""

    frames: int
    k: Tensor
    v: Tensor


ContextChoice = Callable[[Tensor, Tensor, Call], Iterable[Context]]  # of keys and values (f, n, c)


def first_and_previous_frame(k: Tensor, v: Tensor, call: Call) -> Iterator[Context]:
    """Naive spatio-temporal attention: the first frame and the one before."""
    yield Context(len(k), first_previous(k), first_previous(v))


def every_frame(k: Tensor, v: Tensor, call: Call) -> Iterator[Context]:
    """Inflated attention: all frames of the call."""
    yield Context(len(k), all_frames(k)[:1], all_frames(v)[:1])


@dataclass(frozen=True, eq=False)
class EstimatedBases:
    """STEM: bases estimated in the call itself, over all its frames or over groups of them."""

    settings: BasisSettings

    def __call__(self, k: Tensor, v: Tensor, call: Call) -> Iterator[Context]:
        group = self.settings.frames_per_em or len(k)
        for start in range(0, len(k), group):
            keys, values = (pool_tokens(w[start : start + group], call.heads) for w in (k, v))
            mu, nu = self.estimate(keys, values, call, start)
            record = call.options.get(RECORD)
            if record is not None:
                record.add(call.block, call.sigma, call.uuid, call.frames[start], mu, nu)
            yield Context(min(group, len(k) - start), basis_context(mu, 1), basis_context(nu, 1))

    def estimate(self, keys: Tensor, values: Tensor, call: Call, start: int) -> tuple[Tensor, Tensor]:
        """Bases of the group of frames that begins at row `start` of the call."""
        settings, seed = self.settings, self.seed(call, start)
        record, memory = call.options.get(RECORD), call.options.get(BLOCK_MEMORY)
        frames = call.frames[start : start + (settings.frames_per_em or len(call.frames))]
        initial, iterations = None, settings.iterations
        warm = settings.warm_iterations and record is not None
        if warm and (before := record.latest(call.block, call.sigma, call.uuid, frames)) is not None:
            initial = revive_bases(before.to(keys.device), initial_bases(keys, settings.num_bases, seed, memory))
            iterations = settings.warm_iterations
        mu, nu = estimate_basis(
            keys,
            values,
            num_bases=settings.num_bases,
            iterations=iterations,
            temperature=settings.temperature,
            initial=initial,
            seed=seed,
            check=throw_exception_if_processing_interrupted,
            memory=memory,
        )
        if warm:
            record.keep_latest(call.block, call.sigma, call.uuid, frames, mu)
        return mu, nu

    def seed(self, call: Call, start: int) -> int:
        """Of the initial bases of the group of frames that begins at row `start` of the call."""
        return derive_seed(self.settings.seed, call.block, f"{call.sigma:.5g}", call.frames[start])


@dataclass(frozen=True, eq=False)
class FixedBases:
    """STEM with bases from before: every frame is treated alone, so that it does not matter which share a call."""

    basis: Basis

    def __call__(self, k: Tensor, v: Tensor, call: Call) -> Iterator[Context]:
        bases = bases_at(self.basis, call.block, call.sigma)
        if not all(w.isfinite().all() for w in bases):
            raise ValueError(f"the basis of block {call.block} is no finite number. Estimate it again.")
        mu, nu = (w.to(k) for w in bases)
        yield Context(len(k), basis_context(mu, 1), basis_context(nu, 1))


def together(choice: ContextChoice | None) -> int:
    """How many frames, from the first on, have to share a call for their contexts: 1 for each alone, 0 for all."""
    if choice is None or isinstance(choice, FixedBases):
        return 1
    return choice.settings.frames_per_em if isinstance(choice, EstimatedBases) else 0


@dataclass(frozen=True, eq=False)
class SelfAttentionPatch:
    """The object in core's slot: the same one in every clone and run, so it holds nothing that changes."""

    choice: ContextChoice
    heads: dict[str, int]  # of the blocks that are patched
    start_sigma: float
    end_sigma: float
    owner: str = ""  # the node to name in an error while some sampler runs
    earlier: "SelfAttentionPatch | None" = None  # acts on the blocks of the slot that this one leaves alone

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        with named_by(self.owner) if self.owner else nullcontext():
            return self._attend(q, k, v, extra_options)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        block = block_of_call(extra_options)
        sigma = float(extra_options["sigmas"][0])
        if block not in self.heads and self.earlier is not None:
            return self.earlier._attend(q, k, v, extra_options)
        if block not in self.heads or not self.end_sigma <= sigma <= self.start_sigma:
            return attend(q, k, v, extra_options)
        chunks, frames = frames_of_call(q, k, extra_options)
        uuids = extra_options.get("uuids") or [None] * chunks
        out = []
        for q_, k_, v_, uuid in zip(q.chunk(chunks), k.chunk(chunks), v.chunk(chunks), uuids, strict=True):
            start = 0
            for context in self.choice(k_, v_, Call(block, self.heads[block], sigma, frames, uuid, extra_options)):
                out.append(attend(q_[start : start + context.frames], context.k, context.v, extra_options))
                start += context.frames
        return out[0] if len(out) == 1 else torch.cat(out)


def patch_self_attention(
    model: ModelPatcher,
    layout: Layout,
    blocks: tuple[str, ...],
    choice: ContextChoice,
    percent: tuple[float, float] = PERCENT_RANGE,
    owner: str = "",
) -> ModelPatcher:
    """A clone of the model whose blocks attend as chosen.

    Args:
        model: Left as it is; an earlier patch of this pack on the same blocks is replaced in the clone.
        layout: Of the model.
        blocks: Names of the blocks to patch.
        choice: What they attend to.
        percent: Part of the sampling during which the patch acts.
        owner: The node to name in errors while a sampler runs.

    Raises:
        ValueError: Another node's patch sits on one of the blocks: core has one place for each, and would drop one of the two.
            Where it comes later, the sampler says so.
    """
    heads = {block.name: block.heads for block in layout.model.blocks if block.name in blocks}
    sampling = model.get_model_object("model_sampling")
    start, end = (float(sampling.percent_to_sigma(p)) for p in percent)
    model = place_self_attention(model, layout, blocks, SelfAttentionPatch(choice, heads, start, end, owner))
    if owner:
        guard_attention(model, _is_ours, owner, {"attn1": LEAVE_OUT})
    return model


def place_self_attention(
    model: ModelPatcher,
    layout: Layout,
    blocks: tuple[str, ...],
    patch: Callable,
    remedy: str = LEAVE_OUT,
) -> ModelPatcher:
    """A clone of the model with one patch in the slots of some blocks.

    Args:
        model, layout, blocks, patch: As for `patch_self_attention`.
        remedy: What to do where another patch sits on a block, beside taking it off.

    Raises:
        ValueError: Another patch sits on one of them; a `SelfAttentionPatch` may take the place of another one.
    """
    model = model.clone()
    slots = [slot for slot in layout.slots if slot in map(slot_of, blocks)]
    refuse_others(model, "attn1", slots, remedy, lambda other: _is_ours(patch) and _is_ours(other))
    for slot in slots:
        left = any(slot_of(block.name) == slot and block.name not in blocks for block in layout.model.blocks)
        earlier = placed(model, "attn1").get(slot) if left else None
        model.set_model_attn1_replace(patch if earlier is None else replace(patch, earlier=earlier), *slot)
    return model


def without_own_patches(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model without what `patch_self_attention` placed on it."""
    model = model.clone()
    patches = placed(model, "attn1")
    for key in [key for key, patch in patches.items() if _is_ours(patch)]:
        del patches[key]
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, GUARD)
    return model


def _is_ours(patch: object) -> bool:
    return isinstance(patch, SelfAttentionPatch)
