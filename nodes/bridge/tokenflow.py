"""TokenFlow's passes through the UNet, and the patches that tell them apart.

Every model call of the sampler becomes, at its noise level: a pass of the source's keyframes and one of the edited keyframes,
then for each group of frames a pass of the source and one of the edit. In the first two, self-attention is computed (the
edited keyframes attend to one another); in the others it is looked up along the source's nearest neighbours.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.tokenflow import (
    current_weight,
    draw_keyframes,
    extended_context,
    groups_of_frames,
    lowest_level,
    middle_keyframes,
    nearest_tokens,
    propagate,
)
from ...stem.trajectory import Trajectory
from .attend import attend
from .companion import KEY, SourceRun, Stream, add_companion, check_frames, name_of, streams_of
from .conditioning import hints_of_frames, select_prepared
from .layout import Layout, activation_size, block_scales, slot_of
from .memory import announce_memory
from .self_attention import place_self_attention
from .slots import LEAVE_OUT, guard_attention

NODE = "STEMTokenFlow"
"""To name in errors."""

PASS = "stem_tokenflow_pass"
"""Key in `transformer_options`, where the patches find which pass they are in."""

INJECTED = tuple(("output", i) for i in range(4, 12))  # blocks whose queries and keys are the source's
CONVOLUTION = ("output", 4)  # the block whose residual convolutions are the source's


class TokenFlowSettings(NamedTuple):
    mode: str  # "pnp", "sdedit" or "pnp_per_frame"
    keyframe_every: int
    qk_until: float
    conv_until: float
    seed: int
    blend: str  # "official" or "distance"
    keyframes: str  # "random" or "fixed"


@dataclass(eq=False)
class Step:
    """What the passes of one model call leave for one another."""

    keyframes: list[int]
    inject_qk: bool
    inject_conv: bool
    norms: dict[str, Tensor] = field(default_factory=dict)  # block -> tokens of the source's keyframes before attention
    outputs: dict[tuple[str, Stream], Tensor] = field(default_factory=dict)  # attention of the keyframes (k, n, c)


@dataclass(eq=False)
class Pass:
    """One pass of the source and then of the edit over the same frames."""

    step: Step
    of_source: bool
    group: int | None  # None: the keyframes
    weights: Tensor | None  # of the group's own keyframe, one for each frame
    queries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # block -> q, k of the source
    nearest: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # block -> of keyframe i, i - 1
    branch: Tensor | None = None  # the source's residual convolutions


@dataclass(frozen=True, eq=False)
class TokenFlowPatch:
    """The object in core's slots; it never changes."""

    settings: TokenFlowSettings
    blocks: frozenset[str]
    owner: ClassVar[str] = NODE

    def before_attention(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict) -> tuple[Tensor, Tensor, Tensor]:
        """attn1_patch: keeps the source's tokens, or finds where they come from."""
        now, block = extra_options.get(PASS), name_of(extra_options, NODE)
        if now is not None and now.of_source and block in self.blocks:
            check_frames(n, n, extra_options, NODE)
            if now.group is None:
                now.step.norms[block] = n
            else:
                kept = now.step.norms[block]
                before = nearest_tokens(n, kept[now.group - 1]) if now.group else None
                now.nearest[block] = nearest_tokens(n, kept[now.group]), before
        return n, context, value

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        """attn1 replace."""
        now, block = extra_options.get(PASS), name_of(extra_options, NODE)
        if now is None or block not in self.blocks:
            return attend(q, k, v, extra_options)
        check_frames(q, k, extra_options, NODE)
        if now.group is not None and self.settings.mode != "pnp_per_frame":
            return torch.zeros_like(q)  # `after_attention` has the answer
        injected = now.step.inject_qk and tuple(extra_options["block"][:2]) in INJECTED
        if now.of_source:
            if injected:
                now.queries[block] = q, k
            return attend(q, k, v, extra_options)
        out = []
        streams = len(streams_of(extra_options, now.of_source))
        for q_, k_, v_ in zip(q.chunk(streams), k.chunk(streams), v.chunk(streams), strict=True):
            if injected:
                q_, k_ = (x.to(q_) for x in now.queries[block])
            if self.settings.mode != "pnp_per_frame":
                k_, v_ = extended_context(k_), extended_context(v_)
            out.append(attend(q_, k_, v_, extra_options))
        return torch.cat(out)

    def after_attention(self, n: Tensor, extra_options: dict) -> Tensor:
        """attn1_output_patch: keeps the attention of keyframes, or puts together that of other frames from it."""
        now, block = extra_options.get(PASS), name_of(extra_options, NODE)
        if now is None or block not in self.blocks:
            return n
        streams = streams_of(extra_options, now.of_source)
        if now.group is None:
            for stream, part in zip(streams, n.chunk(len(streams)), strict=True):
                now.step.outputs[block, stream] = part
            return n
        here, before = (None if x is None else x.to(n.device) for x in now.nearest[block])
        parts = []
        for stream in streams:
            kept = now.step.outputs[block, stream].to(n.device)
            parts.append(propagate(kept[now.group], kept[now.group - 1] if now.group else None, here, before, now.weights))
        return torch.cat(parts)

    def residual_block(self, layer: ResBlock, x: Tensor, emb: Tensor, _context: Any, options: dict, *_: Any) -> Tensor:
        """forward_timestep_embed_patch: the residual convolutions of one block are the source's."""
        now = options.get(PASS)
        if now is None or not now.step.inject_conv or tuple(options["block"][:2]) != CONVOLUTION:
            return layer(x, emb)
        if not now.of_source:
            skip = layer.skip_connection(x)
            return skip + now.branch.to(skip).repeat(len(skip) // len(now.branch), 1, 1, 1)
        hook = layer.out_layers[-1].register_forward_hook(lambda _module, _args, out: setattr(now, "branch", out))
        try:
            return layer(x, emb)
        finally:
            hook.remove()

    def model_call(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        """CALC_COND_BATCH wrapper: one model call of the sampler becomes the passes of one step."""
        options = model_options.get("transformer_options", {})
        run: SourceRun | None = options.get(KEY)
        if run is None or PASS in options:
            return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)
        if options.get("ad_params"):
            raise ValueError(
                f"{NODE}: it goes through the clip in groups of frames, and AnimateDiff's motion modules need all of "
                "them at once. Take one of the two off this model."
            )
        if options.get("context_window") is not None:
            raise ValueError(
                f"{NODE}: it goes through the clip in groups of frames itself, and context windows would tear its "
                "keyframes apart. Take the context windows off this model; memory grows with the keyframes alone."
            )
        sigma, frames = float(timestep[0]), len(x_in)
        source = run.latents(sigma, x_in)
        x = run.keep(x_in, source)
        step, groups = self._plan(run.trajectory, sigma, frames)

        def go(ids: list[int], group: int | None) -> list[Tensor]:
            weights = None
            if group is not None:
                every, blend = self.settings.keyframe_every, self.settings.blend
                weights = torch.tensor([current_weight(i, group, every, step.keyframes, blend) for i in ids])
            now = Pass(step, True, group, weights)
            # Told as AnimateDiff tells it, which is what other packs read.
            told_frames = {"sub_idxs": ids, "full_length": frames, "context_length": len(ids)}
            told = {**model_options, "transformer_options": {**options, PASS: now, "ad_params": told_frames}}
            passes = [(False, conds, x)]
            if step.inject_qk or step.inject_conv or self.settings.mode != "pnp_per_frame":
                passes.insert(0, (True, [run.prompt(sigma)], source))
            for of_source, roles, latents in passes:
                throw_exception_if_processing_interrupted()
                now.of_source = of_source
                with hints_of_frames(roles, ids):
                    chosen = [select_prepared(role, ids, frames) for role in roles]
                    out = executor(model, chosen, latents[ids], timestep[ids], told, *args, **kwargs)
            return out

        if self.settings.mode != "pnp_per_frame":
            go(step.keyframes, None)
        outs = [torch.empty_like(x_in) for _ in conds]
        for group, ids in enumerate(groups):
            for whole, part in zip(outs, go(list(ids), group), strict=True):
                whole[ids.start : ids.stop] = part
        return run.keep_clean(outs)

    def _plan(self, trajectory: Trajectory, sigma: float, frames: int) -> tuple[Step, list[range]]:
        every = self.settings.keyframe_every
        if self.settings.keyframes == "random":
            keyframes = draw_keyframes(frames, every, self.settings.seed, sigma)
        else:
            keyframes = middle_keyframes(frames, every)
        inject = self.settings.mode != "sdedit"
        qk, conv = (
            inject and sigma >= lowest_level(trajectory.sigmas, until) * 0.999
            for until in (self.settings.qk_until, self.settings.conv_until)
        )
        return Step(keyframes, qk, conv), groups_of_frames(frames, every)


def keyframe_memory(layout: Layout, scales: dict, blocks: tuple[str, ...], frames: int, size: torch.Size, itemsize: int) -> int:
    """Bytes that the features of the keyframes take, at most at once, with one positive and one negative prompt.

    Four times the tokens of every block: the source's own, and the attention of source, cond and uncond. In the blocks of
    `INJECTED` the source's queries and keys besides, until the keyframes are done.

    Args:
        layout, scales: Of the model; `scales` as `block_scales` gives them.
        blocks: Names of those that take part.
        frames: Number of keyframes.
        size: Height and width of the latents.
        itemsize: Bytes of one number.
    """
    numbers = 0
    for block in layout.model.blocks:
        if block.name in blocks:
            slot = slot_of(block.name)
            tokens = math.prod(activation_size(size, scales[slot]))
            copies = 6 if slot in INJECTED else 4
            numbers += copies * tokens * block.heads * block.head_dim
    return frames * numbers * itemsize


def patch_tokenflow(
    model: ModelPatcher, layout: Layout, blocks: tuple[str, ...], trajectory: Trajectory, settings: TokenFlowSettings
) -> ModelPatcher:
    """A clone of the model that edits along a trajectory.

    Raises:
        ValueError: The trajectory is of another model, or another node's patch is in the way.
    """
    model = model.clone()
    add_companion(model, layout, trajectory, NODE)
    frames, size = trajectory.latents.shape[1], trajectory.latents.shape[-2:]
    groups = groups_of_frames(frames, settings.keyframe_every)
    keyframes = 0 if settings.mode == "pnp_per_frame" else len(groups)
    itemsize = model.model.get_dtype_inference().itemsize
    features = keyframe_memory(layout, block_scales(model.model.diffusion_model), blocks, keyframes, size, itemsize)
    patch = TokenFlowPatch(settings, frozenset(blocks))
    model = place_self_attention(model, layout, blocks, patch)
    guard_attention(model, lambda other: other is patch, NODE, {"attn1": LEAVE_OUT})
    others = model.model_options["transformer_options"].get("patches", {}).get("forward_timestep_embed_patch", [])
    if any(issubclass(ResBlock, kind) for kind, _ in others):
        raise ValueError(
            "another node on this model already runs its residual blocks, where core has one place. Take that node off "
            "this model."
        )
    if keyframes:
        logging.info(f"{NODE}: features of {keyframes} keyframes of {frames} frames take {features / 2**20:.0f} MiB.")
        model.set_model_attn1_patch(patch.before_attention)
        model.set_model_attn1_output_patch(patch.after_attention)
    model.set_model_patch((ResBlock, patch.residual_block), "forward_timestep_embed_patch")
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, patch.model_call)
    announce_memory(model, NODE, lambda *_: (max(keyframes, len(groups[0])), features))  # the frames of a pass
    return model
