"""TokenFlow: edited features of a few keyframes, carried to all frames along the source's own nearest neighbours.

Source: Geyer et al., "TokenFlow: Consistent Diffusion Features for Consistent Video Editing" (ICLR 2024, arXiv 2307.10373)
as its official code does it: the keyframe of the group and that of the group before, never the next one.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from .em import derive_seed

SIMILARITY_BLOCK = 2**24
"""Numbers in a block of similarities, 64 MiB in float32: at 64 x 64 tokens those of one frame to one keyframe."""


def groups_of_frames(frames: int, every: int) -> list[range]:
    """Consecutive groups of `every` frames, the last one possibly shorter."""
    return [range(start, min(start + every, frames)) for start in range(0, frames, every)]


def draw_keyframes(frames: int, every: int, seed: int, sigma: float) -> list[int]:
    """One random frame of each group, drawn anew at every noise level, as the official code does."""
    g = torch.Generator("cpu").manual_seed(derive_seed(seed, "keyframes", f"{sigma:.5g}"))
    return [group[int(torch.randint(len(group), (1,), generator=g))] for group in groups_of_frames(frames, every)]


def middle_keyframes(frames: int, every: int) -> list[int]:
    """The middle frame of each group, the same at every noise level."""
    return [group[len(group) // 2] for group in groups_of_frames(frames, every)]


def nearest_tokens(tokens: Tensor, keyframe: Tensor, block: int | None = None) -> Tensor:
    """Index of the keyframe's token with the greatest cosine to each token.

    Args:
        tokens: (f, n, c).
        keyframe: (m, c).
        block: Tokens compared at a time; None bounds the similarities to `SIMILARITY_BLOCK` numbers.

    Returns:
        (f, n), the first of equals. Compared in float32 (the official code rounds cosines to half precision, where near
        ties are frequent and go to the lowest index).
    """
    # Neither the length of the token nor an epsilon changes which cosine is the greatest.
    directions = torch.nn.functional.normalize(keyframe.float(), dim=-1).T
    block = block or max(1, SIMILARITY_BLOCK // len(keyframe))
    rows = rearrange(tokens, "f n c -> (f n) c")
    nearest = torch.cat([(part.float() @ directions).argmax(-1) for part in rows.split(block)])
    return rearrange(nearest, "(f n) -> f n", f=len(tokens))


def current_weight(
    frame: int, group: int, every: int, keyframes: list[int], blend: Literal["official", "distance"] = "official"
) -> float:
    """How much of a frame of group i comes from keyframe i; the rest comes from keyframe i - 1.

    Args:
        frame: Number in the clip.
        group: i; of the first group everything is its own keyframe's.
        every: Frames in a group.
        keyframes: One of each group.
        blend: "official": sigmoid(d2 / (d1 + d2)) with the distances d1, d2 to where keyframes i and i - 1 would be in the
            middle of their groups, so 0.62 to 0.73. "distance": d2 / (d1 + d2) with the true distances, 1 at the keyframe.
    """
    if group == 0:
        return 1.0
    if blend == "official":
        here, before = (i * every + every // 2 for i in (group, group - 1))
    else:
        here, before = keyframes[group], keyframes[group - 1]
    d1, d2 = abs(frame - here), abs(frame - before)
    share = d2 / (d1 + d2)
    return float(torch.sigmoid(torch.tensor(share))) if blend == "official" else share


def propagate(kept: Tensor, before: Tensor | None, nearest: Tensor, nearest_before: Tensor | None, weights: Tensor) -> Tensor:
    """Features of all frames of a group, gathered from its keyframe and the one before.

    Args:
        kept: Edited features of the group's keyframe, (m, c).
        before: Those of the keyframe before, or None in the first group.
        nearest, nearest_before: (f, n) from `nearest_tokens`.
        weights: (f,) from `current_weight`.

    Returns:
        (f, n, c).
    """
    here = kept[nearest]
    if before is None:
        return here
    w = rearrange(weights, "f -> f 1 1").to(here)
    return w * here + (1 - w) * before[nearest_before]


def extended_context(x: Tensor) -> Tensor:
    """Every keyframe attends to all keyframes of its stream: keys or values (k, n, c) as one context (1, k n, c)."""
    return rearrange(x, "k n c -> 1 (k n) c")


def lowest_level(levels: Tensor, until: float) -> float:
    """The lowest sigma at which an injection acts that lasts for the first `until` of the steps from the noisiest level.

    Args:
        levels: Of the inversion, ascending, the clean one first: (t+1,).
        until: 0 to 1. The first floor(t * until) steps inject; infinity is returned where that is none.
    """
    steps = len(levels) - 1
    count = int(steps * until + 1e-9)
    return float(levels[steps + 1 - count]) if count else float("inf")
