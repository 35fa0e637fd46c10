"""FateZero's passes through the UNet: the source's first, then the edit's, which takes over what it needs.

A level's source is kept until the next level: what asks for the same level again (guidance of other nodes, samplers of higher
order) finds it as it was.
"""

import logging
import math
from dataclasses import dataclass, field

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.ddim import inversion_input
from ...stem.fatezero import LENGTH, latent_blend_acts, replaced_steps
from ...stem.trajectory import Trajectory, latents_between, steps_above
from .companion import KEY, SourceRun, acting, add_companion
from .fatezero import NODE, PASS, FateZeroPatch, FateZeroSettings, Pass, Source, mean_over_blocks
from .joint_norm import place_joint_norms
from .latent_blend import Blend, place_latent_blend
from .layout import Layout, block_scales, slot_of
from .memory import announce_memory
from .naming import named_by
from .prompts import same_conditioning
from .self_attention import place_self_attention
from .slots import LEAVE_OUT, guard_attention, place_cross_attention

MASK_SCALE = 4
"""Masks are made where activations are so many times smaller than the latents: input 7, 8, output 3, 4, 5 of SD1.x."""

CHANNELS = 320
"""Of SD1.5's widest activations; half the size counts as twice the channels, up to four times."""

REMEDIES = {
    "attn1": f"{LEAVE_OUT} and set context to own",
    "attn2": f"{LEAVE_OUT} and blend_words empty",
}
"""Where another node wants the same attention."""


@dataclass(eq=False)
class Kept:
    """What stays from one model call of a run to the next."""

    targets: list[dict]  # prepared conditionings of the target prompt
    source: Source | None = None  # of the last level
    blend: Blend = field(default_factory=Blend)


@dataclass(frozen=True, eq=False)
class Passes:
    """Wrappers around the model calls of a sampler; the object is shared by clones and never changes."""

    patch: FateZeroPatch

    def model_call(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """CALC_COND_BATCH wrapper: the source's pass where it is needed, then the edit's."""
        options = model_options.get("transformer_options", {})
        run: SourceRun | None = options.get(KEY)
        if run is None:
            return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
        self.patch.check_clip(range(len(x_in)))
        if self.patch.settings.joint_norm and "multigpu_clones" in model_options:
            raise ValueError(
                f"{NODE}: joint_norm works on one device, and this model is on several. Switch one of the two off."
            )
        if run.kept is None:
            run.kept = Kept(self._targets(run))
        sigma = float(timestep[0])
        now = self._plan(run, sigma, conds)
        told = {**model_options, "transformer_options": {**options, PASS: now}}
        if now.fuse_self or now.fuse_cross or now.look:
            if run.kept.source is None or run.kept.source.sigma != sigma:
                run.kept.source = None  # before there is another
                now.source = Source(sigma)
                with named_by(NODE):
                    seen = seen_by_the_inversion(run.trajectory, sigma, x_in)
                throw_exception_if_processing_interrupted()
                executor(model, [run.prompt(sigma)], seen, timestep, told, *args, **kwargs)
                self._check_source(now)
                run.kept.source = now.source
            now.source = run.kept.source
        elif now.edited:
            run.kept.source = None
        now.of_source = False
        x = x_in if run.mask is None else run.keep(x_in, run.latents(sigma, x_in))
        throw_exception_if_processing_interrupted()
        outs = executor(model, conds, x, timestep, told, *args, **kwargs)
        if now.target_words:
            words = mean_over_blocks(now.source.words) if now.blend else None
            run.kept.blend.add(sigma, words, mean_over_blocks(now.target_words))
        return run.keep_clean(outs)

    def _targets(self, run: SourceRun) -> list[dict]:
        target = self.patch.settings.target
        found = [c for c in run.edits if c.get("cross_attn") is not None and same_conditioning(c["cross_attn"], target)]
        if not found:
            raise ValueError(
                f"{NODE}: none of the sampler's prompts is its target_prompt. Give the sampler the same words, encoded by the "
                "same CLIP."
            )
        return found

    def _plan(self, run: SourceRun, sigma: float, conds: list[list[dict] | None]) -> Pass:
        settings = self.patch.settings
        called = {cond["uuid"] for role in conds for cond in role or []}
        edited = called.intersection(cond["uuid"] for cond in acting(run.kept.targets, sigma))
        if not edited:  # other nodes ask for the negative prompt alone
            return Pass(of_source=False)
        steps, step = len(run.trajectory.sigmas) - 1, steps_above(run.trajectory, sigma)
        fuse_self, fuse_cross = (
            step < replaced_steps(steps, until, kind)
            for until, kind in ((settings.self_until, "self"), (settings.cross_until, "cross"))
        )
        blend = settings.blend_latents and latent_blend_acts(step, steps)
        return Pass(
            of_source=True,
            fuse_self=fuse_self,
            fuse_cross=fuse_cross,
            look=bool(settings.source_words) and (fuse_self or blend),
            blend=blend,
            look_at_target=settings.blend_latents and any(latent_blend_acts(s, steps) for s in range(step, steps)),
            edited=frozenset(edited),
        )

    def _check_source(self, now: Pass) -> None:
        looked = len(now.source.words) == (len(self.patch.looked_at) if now.look else 0)
        if not looked or now.source.queries.keys() != self.patch.names_of_queries(now):
            raise ValueError(
                f"{NODE}: another node left out the source's pass or some of its blocks, as EasyCache and other caches do. "
                "Take that node off this model."
            )


def seen_by_the_inversion(trajectory: Trajectory, sigma: float, like: Tensor) -> Tensor:
    """What the model was shown when the inversion entered this level: the latents of the level below."""
    below = trajectory.sigmas[trajectory.sigmas < sigma * 0.999]
    left = float(below[-1]) if len(below) else float(trajectory.sigmas[0])
    return inversion_input(latents_between(trajectory, left), left, sigma).to(like)


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
    passes = Passes(patch)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, passes.model_call)
    announce_memory(model, NODE, lambda _, frames: (frames, kept))
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
    own, cross = patch.self_attention, patch.cross_attention
    model = place_self_attention(model, layout, tuple(wide.union(settings.fused)), own, REMEDIES["attn1"])
    place_cross_attention(model, looked_at.union(settings.fused), cross, NODE, REMEDIES["attn2"])
    guard_attention(model, lambda other: other is own or getattr(other, "patch", None) is cross, NODE, REMEDIES)
    if settings.joint_norm:
        place_joint_norms(model, frames)
    return model, patch
