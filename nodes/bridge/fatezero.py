"""FateZero's attention: what the source's pass leaves of it, and how it is fused into that of the edit.

The source's pass leaves its queries and keys, so that no map of self-attention is ever made or stored; of cross-attention only
where the words of the mask look is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ...stem.fatezero import LENGTH, Alignment, blend_mask, context_frames, fused_values, word_map
from .attend import attend
from .companion import Stream, check_frames, name_of, streams_of
from .layout import activation_size, slot_of

NODE = "STEMFateZero"
"""To name in errors."""

PASS = "stem_fatezero_pass"
"""Key in `transformer_options`, where the patches find which pass they are in."""


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
    joint_norm: bool  # whether convolutions are normalised over all frames together
    target: Tensor  # conditioning of the target prompt (1, n, c)


@dataclass(eq=False)
class Source:
    """What the source's pass leaves at one noise level."""

    sigma: float
    queries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # "attn1 input_4" -> q, keys of the context
    words: list[Tensor] = field(default_factory=list)  # where the source's words look: (f, y, x) for each block
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # size -> (f, y, x)


@dataclass(eq=False)
class Pass:
    """One model call."""

    of_source: bool
    source: Source | None = None  # where any of it is needed
    fuse_self: bool = False
    fuse_cross: bool = False
    look: bool = False  # at the source's words
    blend: bool = False  # the latents, after the step
    look_at_target: bool = False
    edited: frozenset = frozenset()  # uuids of the target prompt where it acts
    target_words: list[Tensor] = field(default_factory=list)  # as those of the source


@dataclass(frozen=True, eq=False)
class FateZeroPatch:
    """Its methods are in core's slots; it never changes."""

    owner: ClassVar[str] = NODE  # for other nodes' errors
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
        self.check_clip(check_frames(q, k, options, NODE))
        out = []
        for stream, q_, k_, v_ in _chunks(streams_of(options, now.of_source), q, k, v):
            if block in self.in_context:
                k_, v_ = self._context(k_), self._context(v_)
            fuse = now.fuse_self and block in self.fused
            if now.of_source and fuse:
                now.source.queries[f"attn1 {block}"] = q_, k_
            if not fuse or stream.uuid not in now.edited:
                out.append(attend(q_, k_, v_, options))
                continue
            of_source = attend(*(w.to(q_) for w in now.source.queries[f"attn1 {block}"]), v_, options)
            if not self.settings.source_words:
                out.append(of_source)
                continue
            mask = self._mask(now.source, self.size_of(block)).flatten(1)[..., None].to(q_)
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
            self._check_words(q_, k_)
            k_, v_ = k_[:, :LENGTH], v_[:, :LENGTH]  # core repeats a prompt that shares a call with a longer one
            if block in self.looked_at:
                if now.of_source and now.look:
                    now.source.words.append(self._words(q_, k_, self.settings.source_words, block, options))
                elif not now.of_source and now.look_at_target:
                    now.target_words.append(self._words(q_, k_, self.settings.target_words, block, options))
            if now.of_source and fuse:
                now.source.queries[f"attn2 {block}"] = q_, k_
            if now.of_source or not fuse:
                out.append(attend(q_, k_, v_, options))
                continue
            of_source, of_edit = fused_values(self.settings.alignment, v_)
            fused = attend(*(w.to(q_) for w in now.source.queries[f"attn2 {block}"]), of_source, options)
            out.append(fused if of_edit is None else fused + attend(q_, k_, of_edit, options))
        return torch.cat(out)

    def check_clip(self, frames: Sequence[int]) -> None:
        """Raises a ValueError where a call has not all frames of the clip."""
        if list(frames) != list(range(self.shape[0])):
            raise ValueError(
                f"{NODE}: the model is called with {len(frames)} frames, and it needs all {self.shape[0]} at once. Take the "
                "context windows off this model, of core or of AnimateDiff."
            )

    def _check_words(self, q: Tensor, k: Tensor) -> None:
        if len(q) != self.shape[0] or k.shape[1] % LENGTH:
            raise ValueError(
                f"{NODE}: cross-attention has queries {tuple(q.shape)} and keys {tuple(k.shape)} for {self.shape[0]} frames "
                f"and prompts of {LENGTH} tokens: another node changes its rows or tokens. Take that node off this model."
            )

    def names_of_queries(self, now: Pass) -> set[str]:
        """What a source's pass has to leave in `Source.queries`."""
        kinds = [kind for kind, fuse in (("attn1", now.fuse_self), ("attn2", now.fuse_cross)) if fuse]
        return {f"{kind} {block}" for kind in kinds for block in self.fused}

    def _context(self, x: Tensor) -> Tensor:
        """Keys or values (f, n, c) of the frames that each frame attends to: (f, m n, c), or (1, n, c) for all."""
        frames = context_frames(len(x), self.settings.context)
        if self.settings.context == "mid":
            return x[frames[0]]
        return rearrange(x[torch.tensor(frames)], "f m n c -> f (m n) c")

    def _words(self, q: Tensor, k: Tensor, tokens: tuple[int, ...], block: str, options: dict) -> Tensor:
        heads = options["n_heads"]
        q, k = (rearrange(w.float(), "f n (h d) -> f h n d", h=heads) for w in (q, k))
        maps = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return word_map(maps, tokens, self.size_of(block))

    def _mask(self, source: Source, size: tuple[int, int]) -> Tensor:
        if size not in source.masks:
            source.masks[size] = blend_mask(mean_over_blocks(source.words), self.settings.threshold, size)
        return source.masks[size]

    def size_of(self, block: str) -> tuple[int, int]:
        """Height and width of a block's activations."""
        return activation_size(self.shape[1:], self.scales[slot_of(block)])


def mean_over_blocks(words: list[Tensor]) -> Tensor:
    """Of maps (f, y, x), which are all made at one scale."""
    return torch.stack(words).mean(0)


def _chunks(streams: list[Stream], *parts: Tensor):
    return zip(streams, *(part.chunk(len(streams)) for part in parts), strict=True)
