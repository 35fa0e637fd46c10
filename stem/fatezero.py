"""FateZero: attention of the source, fused into that of the edit.

Maps A of the edit and B of the source are replaced or mixed; since both are multiplied with values that follow, nothing here
holds a map of self-attention: softmax(q k^T) of the source applied to the edit's values is attention again, and a choice
of columns is a change of the values. Cross-attention maps are held where a mask is made of them.

Source: Qi et al., "FateZero: Fusing Attentions for Zero-shot Text-based Video Editing" (ICCV 2023, arXiv 2303.09535) as its
official code does it; alignment of prompts from Hertz et al., "Prompt-to-Prompt" (arXiv 2208.01626).
"""

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

LENGTH = 77  # tokens of a prompt, padded


class Alignment(NamedTuple):
    """How a column (token) of the edit's cross-attention comes about: B @ from_source + A * own."""

    from_source: Tensor  # (n, n), row: token of the source, column: token of the target
    own: Tensor  # (n,) 0 where the source's map takes the place of the edit's own


def align_refine(source: Sequence[Hashable], target: Sequence[Hashable], length: int = LENGTH) -> Alignment:
    """Tokens that both prompts have, in order, take the source's map; the target's other tokens keep their own.

    Needleman-Wunsch with a score of 1 for a match, -1 for a mismatch and 0 for a gap. Of ways that score the same, read from
    the end: leave out a token of the target, else one of the source, else match.

    Args:
        source, target: Tokens of the prompts with start and end, without padding.
        length: Of the padded prompts. Padding takes the source's map of the same place.
    """
    score = torch.zeros(len(source) + 1, len(target) + 1, dtype=torch.int64)
    for i, s in enumerate(source, 1):
        for j, t in enumerate(target, 1):
            score[i, j] = max(score[i, j - 1], score[i - 1, j], score[i - 1, j - 1] + (1 if s == t else -1))
    from_source, own = torch.zeros(length, length), torch.zeros(length)
    i, j = len(source), len(target)
    while i > 0 or j > 0:
        if j > 0 and score[i, j] == score[i, j - 1]:
            j -= 1
            own[j] = 1
        elif i > 0 and score[i, j] == score[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            from_source[i, j] = 1
    for place in range(len(target), length):
        from_source[place, place] = 1
    return Alignment(from_source, own)


def align_replace(source: Sequence[int], target: Sequence[int], replaced: Sequence[bool], length: int = LENGTH) -> Alignment:
    """Every word of the target takes the map of the source's word in the same place.

    The tokens of a replaced word are taken one for one where both have as many; else every token of the source's word is
    spread evenly over those of the target's. Past the last replaced word everything stays in its place; the official code
    leaves the last columns, of padding, zero where the source is the longer one.

    Args:
        source, target: Number of tokens of each word.
        replaced: Whether the word is another one.
        length: Of the padded prompts.

    Raises:
        ValueError: Prompts with different numbers of words.
    """
    if len(source) != len(target):
        raise ValueError(f"replace needs prompts of as many words; the source has {len(source)}, the target {len(target)}.")
    matrix = torch.zeros(length, length)
    i = j = 0  # the start
    last = max((place for place, other in enumerate(replaced) if other), default=-1)
    spans = [(1, 1), *zip(source, target, strict=True)][: last + 2]
    for s, t in spans:
        if s != t:
            matrix[i : i + s, j : j + t] = 1 / t
        else:
            matrix[torch.arange(i, i + s), torch.arange(j, j + t)] = 1
        i, j = i + s, j + t
    for place in range(j, length):
        matrix[place, place] = 1
    return Alignment(matrix, torch.zeros(length))


def reweighted(alignment: Alignment, weights: Tensor) -> Alignment:
    """The same with every column multiplied by its weight (n,); rows are not normalised again, as in the official code."""
    return Alignment(alignment.from_source * weights, alignment.own * weights)


def fused_values(alignment: Alignment, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values (..., n, c) of the edit to multiply with the source's map, and with the edit's own (None: nothing of it is left).

    Since (B @ from_source + A * own) V = B (from_source V) + A (own V).
    """
    from_source, own = (part.to(values) for part in alignment)
    return from_source @ values, own[:, None] * values if own.any() else None


def replaced_steps(steps: int, until: float, kind: Literal["self", "cross"]) -> int:
    """How many steps, from the noisiest, take the source's maps: floor(t s) of self-, floor((t + 1) c) of cross-attention."""
    return min(steps, int((steps + (kind == "cross")) * until + 1e-9))


def latent_blend_acts(step: int, steps: int) -> bool:
    """Whether the latents are blended after step 0, 1, ..: strictly between a fifth and four fifths of all."""
    return int(0.2 * steps) < step + 1 < int(0.8 * steps)


def context_frames(frames: int, context: Literal["mid", "previous_first"]) -> list[list[int]]:
    """Which frames each frame attends to."""
    if context == "mid":
        return [[(frames - 1) // 2]] * frames
    return [[max(frame - 1, 0), 0] for frame in range(frames)]


def word_map(probabilities: Tensor, tokens: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Where some words are looked at: (f, height, width) from cross-attention maps (f, h, n, 77), mean over heads."""
    total = probabilities[..., list(tokens)].sum(-1).mean(1)
    return rearrange(total, "f (y x) -> f y x", y=size[0], x=size[1])


def blend_mask(words: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """1 where the clip is to be edited, else 0.

    Args:
        words: (f, y, x), the mean of `word_map` over layers.
        threshold: Of the maximum of each frame, which counts as 1.
        size: Height and width of the mask; nearest neighbours.

    Returns:
        (f, height, width).
    """
    grown = F.max_pool2d(words[:, None], 3, stride=1, padding=1)
    resized = F.interpolate(grown, size=size, mode="nearest")
    return (resized / resized.amax((2, 3), keepdim=True) > threshold).to(words.dtype)[:, 0]
