"""FateZero's passes through the UNet: the source's first, then the edit's, into which attention of the source is fused.

The source's pass leaves its queries and keys, so that no map of self-attention is ever made or stored; of cross-attention only
where the words of the mask look is kept. All but that is dropped at the end of the model call.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ...stem.ddim import inversion_input
from ...stem.fatezero import (
    LENGTH,
    Alignment,
    blend_mask,
    context_frames,
    fused_values,
    latent_blend_acts,
    replaced_steps,
    word_map,
)
from ...stem.trajectory import Trajectory, latents_between
from .attend import attend
from .companion import KEY, SourceRun, Stream, acting, add_companion, name_of, noise_shape_with_room, streams_of
from .frames import frames_of_call
from .joint_norm import place_joint_norms
from .latent_blend import Blend, place_latent_blend
from .layout import Layout, activation_size, block_scales, slot_of
from .prompts import same_conditioning
from .self_attention import guard_attention, place_cross_attention, place_self_attention

NODE = "STEMFateZero"
"""To name in errors."""

PASS = "stem_fatezero_pass"
"""Key in `transformer_options`, where the patches find which pass they are in."""

MASK_SCALE = 4
"""Masks are made where activations are so many times smaller than the latents: input 7, 8, output 3, 4, 5 of SD1.x."""

CHANNELS = 320
"""Of SD1.5's widest activations; half the size counts as twice the channels, up to four times."""


class FateZeroSettings(NamedTuple):
    fused: tuple[str, ...]  # names of the blocks whose attention takes over the source's
    cross_until: float
    self_until: float
    alignment: Alignment
    source_words: tuple[int, ...]  # places of the words that say what is edited; none: everywhere
    target_words: tuple[int, ...]
    threshold: float
    blend_latents: bool
    blend_timing: str  # "official" or "matched"
    context: str  # "mid", "previous_first" or "own"
    min_channels: int
    joint_norms: bool  # whether convolutions are normalised over all frames together
    target: Tensor  # conditioning of the target prompt (1, n, c)


@dataclass(eq=False)
class Pass:
    """One model call: what the source's pass leaves for that of the edit."""

    of_source: bool
    fuse_self: bool = False
    fuse_cross: bool = False
    look: bool = False  # at the source's words
    look_at_target: bool = False
    edited: frozenset = frozenset()  # uuids of the target prompt where it acts
    queries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # "attn1 input_4" -> q, keys of the context
    source_words: list[Tensor] = field(default_factory=list)  # (f, y, x) for each block
    target_words: list[Tensor] = field(default_factory=list)
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # size -> (f, y, x)


@dataclass(frozen=True, eq=False)
class InSlot:
    """A patch as core's slot holds it; other nodes' errors name its owner."""

    run: Callable[[Tensor, Tensor, Tensor, dict], Tensor]
    owner: ClassVar[str] = NODE

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        return self.run(q, k, v, extra_options)


@dataclass(frozen=True, eq=False)
class FateZeroPatch:
    """What the slots run; it never changes."""

    settings: FateZeroSettings
    fused: frozenset[str]
    in_context: frozenset[str]  # blocks that attend to the frames of `settings.context`
    looked_at: frozenset[str]  # blocks whose cross-attention makes the masks
    scales: dict[tuple[str, int], int]
    shape: tuple[int, int, int]  # frames of the clip, height and width of its latents

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """attn1 replace."""
        now, block = options.get(PASS), name_of(options, NODE)
        if now is None:
            return attend(q, k, v, options)
        self._check_frames(q, k, options)
        out = []
        for stream, q_, k_, v_ in _chunks(streams_of(options, now.of_source), q, k, v):
            if block in self.in_context:
                k_, v_ = self._context(k_), self._context(v_)
            fuse = now.fuse_self and block in self.fused
            if now.of_source and fuse:
                now.queries[f"attn1 {block}"] = q_, k_
            if not fuse or stream.uuid not in now.edited:
                out.append(attend(q_, k_, v_, options))
                continue
            of_source = attend(*(w.to(q_) for w in now.queries[f"attn1 {block}"]), v_, options)
            if not self.settings.source_words:
                out.append(of_source)
                continue
            mask = self._mask(now, self.size_of(block)).flatten(1)[..., None].to(q_)
            out.append(mask * attend(q_, k_, v_, options) + (1 - mask) * of_source)
        return torch.cat(out)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        """attn2 replace."""
        now, block = options.get(PASS), name_of(options, NODE)
        if now is None:
            return attend(q, k, v, options)
        fuse, out = now.fuse_cross and block in self.fused, []
        for stream, q_, k_, v_ in _chunks(streams_of(options, now.of_source), q, k, v):
            if not now.of_source and stream.uuid not in now.edited:
                out.append(attend(q_, k_, v_, options))
                continue
            k_, v_ = k_[:, :LENGTH], v_[:, :LENGTH]  # core repeats a prompt that shares a call with a longer one
            if block in self.looked_at:
                if now.of_source and now.look:
                    now.source_words.append(self._words(q_, k_, self.settings.source_words, block, options))
                elif not now.of_source and now.look_at_target:
                    now.target_words.append(self._words(q_, k_, self.settings.target_words, block, options))
            if now.of_source and fuse:
                now.queries[f"attn2 {block}"] = q_, k_
            if now.of_source or not fuse:
                out.append(attend(q_, k_, v_, options))
                continue
            of_source, of_edit = fused_values(self.settings.alignment, v_)
            fused = attend(*(w.to(q_) for w in now.queries[f"attn2 {block}"]), of_source, options)
            out.append(fused if of_edit is None else fused + attend(q_, k_, of_edit, options))
        return torch.cat(out)

    def model_call(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """CALC_COND_BATCH wrapper: the source's pass where it is needed, then the edit's."""
        options = model_options.get("transformer_options", {})
        run: SourceRun | None = options.get(KEY)
        if run is None:
            return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
        self._check_clip(range(len(x_in)))
        sigma = float(timestep[0])
        now = self._plan(run, sigma, conds)
        source = run.latents(sigma, x_in)
        told = {**model_options, "transformer_options": {**options, PASS: now}}
        if now.fuse_self or now.fuse_cross or now.look:
            seen = seen_by_the_inversion(run.trajectory, sigma, x_in)
            executor(model, [run.prompt(sigma)], seen, timestep, told, *args, **kwargs)
        now.of_source = False
        outs = executor(model, conds, run.keep(x_in, source), timestep, told, *args, **kwargs)
        if now.target_words:
            run.kept.add(sigma, mean_over_blocks(now.source_words) if now.look else None, mean_over_blocks(now.target_words))
        clean = None if run.mask is None else run.clean(x_in)
        return outs if clean is None else [run.keep(out, clean) for out in outs]

    def _plan(self, run: SourceRun, sigma: float, conds: list[list[dict] | None]) -> Pass:
        targets = [cond for cond in run.edits if self._is_target(cond)]
        if not targets:
            raise ValueError(
                f"{NODE}: none of the sampler's prompts is its target_prompt. Give the sampler the same words, encoded by the "
                "same CLIP."
            )
        if run.kept is None:
            run.kept = Blend()
        called = {cond["uuid"] for role in conds for cond in role or []}
        edited = called.intersection(cond["uuid"] for cond in acting(targets, sigma))
        if not edited:  # other nodes ask for the negative prompt alone
            return Pass(of_source=False)
        steps = len(run.trajectory.sigmas) - 1
        step = int((run.trajectory.sigmas > sigma * 1.001).sum())
        fuse_self, fuse_cross = (
            step < replaced_steps(steps, until, kind)
            for until, kind in ((self.settings.self_until, "self"), (self.settings.cross_until, "cross"))
        )
        blend = self.settings.blend_latents and latent_blend_acts(step, steps)
        return Pass(
            of_source=True,
            fuse_self=fuse_self,
            fuse_cross=fuse_cross,
            look=bool(self.settings.source_words) and (fuse_self or blend),
            look_at_target=self.settings.blend_latents and any(latent_blend_acts(s, steps) for s in range(step, steps)),
            edited=frozenset(edited),
        )

    def _check_frames(self, q: Tensor, k: Tensor, options: dict) -> None:
        try:
            _, frames = frames_of_call(q, k, options)
        except ValueError as error:
            raise ValueError(f"{NODE}: {error}") from error
        self._check_clip(frames)

    def _check_clip(self, frames: Sequence[int]) -> None:
        if list(frames) != list(range(self.shape[0])):
            raise ValueError(
                f"{NODE}: the model is called with {len(frames)} frames, and it needs all {self.shape[0]} at once. Take the "
                "context windows off this model, of core or of AnimateDiff."
            )

    def _context(self, x: Tensor) -> Tensor:
        """Keys or values (f, n, c) of the frames that each frame attends to: (f, m n, c), or (1, n, c) for all."""
        frames = context_frames(len(x), self.settings.context)
        if self.settings.context == "mid":
            return x[frames[0]]
        return rearrange(x[torch.tensor(frames)], "f m n c -> f (m n) c")

    def _is_target(self, cond: dict) -> bool:
        return cond.get("cross_attn") is not None and same_conditioning(cond["cross_attn"], self.settings.target)

    def _words(self, q: Tensor, k: Tensor, tokens: tuple[int, ...], block: str, options: dict) -> Tensor:
        heads = options["n_heads"]
        q, k = (rearrange(w.float(), "f n (h d) -> f h n d", h=heads) for w in (q, k))
        maps = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return word_map(maps, tokens, self.size_of(block))

    def _mask(self, now: Pass, size: tuple[int, int]) -> Tensor:
        if size not in now.masks:
            now.masks[size] = blend_mask(mean_over_blocks(now.source_words), self.settings.threshold, size)
        return now.masks[size]

    def size_of(self, block: str) -> tuple[int, int]:
        """Height and width of a block's activations."""
        return activation_size(self.shape[1:], self.scales[slot_of(block)])


def reserve(executor, model, noise_shape, *args, kept: int, **kwargs):
    """PREPARE_SAMPLING wrapper: memory for what the source's pass leaves, in bytes."""
    return executor(model, noise_shape_with_room(model, noise_shape, noise_shape[0], kept), *args, **kwargs)


def seen_by_the_inversion(trajectory: Trajectory, sigma: float, like: Tensor) -> Tensor:
    """What the model was shown when the inversion entered this level: the latents of the level below."""
    below = trajectory.sigmas[trajectory.sigmas < sigma * 0.999]
    left = float(below[-1]) if len(below) else float(trajectory.sigmas[0])
    return inversion_input(latents_between(trajectory, left), left, sigma).to(like)


def mean_over_blocks(words: list[Tensor]) -> Tensor:
    """Of maps (f, y, x), which take the size of the first."""
    size = words[0].shape[-2:]
    return torch.stack([F.interpolate(w[:, None], size=size, mode="nearest")[:, 0] for w in words]).mean(0)


def source_memory(layout: Layout, patch: FateZeroPatch, itemsize: int) -> int:
    """Bytes of what the source's pass leaves in one model call: queries of self- and cross-attention, and their keys."""
    frames, numbers = patch.shape[0], 0
    contexts = {"mid": 1, "previous_first": 2 * frames, "own": frames}
    for block in layout.model.blocks:
        if block.name in patch.fused:
            tokens = math.prod(patch.size_of(block.name))
            keys = contexts[patch.settings.context] if block.name in patch.in_context else frames
            numbers += ((2 * frames + keys) * tokens + frames * LENGTH) * block.heads * block.head_dim
    return numbers * itemsize


def patch_fatezero(model: ModelPatcher, layout: Layout, trajectory: Trajectory, settings: FateZeroSettings) -> ModelPatcher:
    """A clone of the model that edits along a trajectory.

    Args:
        model, layout: Left as they are.
        trajectory: Of the source clip.
        settings: Of the edit.

    Raises:
        ValueError: The trajectory is of another model, or another node's patch is in the way.
    """
    model = model.clone()
    add_companion(model, layout, trajectory, NODE)
    model, patch = place_fatezero(model, layout, trajectory, settings)
    kept = source_memory(layout, patch, model.model.get_dtype_inference().itemsize)
    logging.info(f"{NODE}: queries and keys of {patch.shape[0]} frames of the source take {kept / 2**20:.0f} MiB.")
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, patch.model_call)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, partial(reserve, kept=kept))
    if settings.blend_latents:
        place_latent_blend(model, settings.threshold, settings.blend_timing, NODE)
    return model


def place_fatezero(
    model: ModelPatcher, layout: Layout, trajectory: Trajectory, settings: FateZeroSettings
) -> tuple[ModelPatcher, FateZeroPatch]:
    """A clone of the model with the patch on its attention, and nothing that calls it by passes yet."""
    scales = block_scales(model.model.diffusion_model)
    wide, looked_at = set(), set()
    for block in layout.model.blocks:
        scale = scales[slot_of(block.name)]
        if settings.context != "own" and CHANNELS * min(scale, 4) >= settings.min_channels:
            wide.add(block.name)
        if settings.source_words and scale == MASK_SCALE and not block.name.startswith("middle"):
            looked_at.add(block.name)
    if settings.source_words and not looked_at:
        raise ValueError("this model has no attention where the mask of blend_words is made. Leave blend_words empty.")
    _, frames, _, height, width = trajectory.latents.shape
    patch = FateZeroPatch(
        settings, frozenset(settings.fused), frozenset(wide), frozenset(looked_at), scales, (frames, height, width)
    )
    own, cross = InSlot(patch.self_attention), InSlot(patch.cross_attention)
    model = place_self_attention(
        model, layout, tuple(wide.union(settings.fused)), own, "Leave this block out of `blocks` and set context to own"
    )
    place_cross_attention(
        model, looked_at.union(settings.fused), cross, "Leave this block out of `blocks` and blend_words empty"
    )
    guard_attention(model, [own, cross], NODE)
    if settings.joint_norms:
        place_joint_norms(model, frames)
    return model, patch


def _chunks(streams: list[Stream], *parts: Tensor):
    return zip(streams, *(part.chunk(len(streams)) for part in parts), strict=True)
