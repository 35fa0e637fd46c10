"""Numbers of TokenFlow's card: groups, keyframes, blend, nearest neighbours, levels of injection."""

import math

import pytest
import torch

from stem.ddim import noise_levels, stable_diffusion_sigmas
from stem.tokenflow import (
    current_weight,
    draw_keyframes,
    extended_context,
    groups_of_frames,
    lowest_level,
    middle_keyframes,
    nearest_tokens,
    propagate,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_groups_cover_the_clip_once():
    assert [list(g) for g in groups_of_frames(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(g) for g in groups_of_frames(3, 8)] == [[0, 1, 2]]


def test_keyframes_lie_in_their_groups_and_change_with_level_and_seed():
    drawn = [draw_keyframes(50, 8, seed, sigma) for seed in range(3) for sigma in (0.5, 1.0, 7.0)]
    for keyframes in drawn:
        assert [k // 8 for k in keyframes] == list(range(7))
    assert len({tuple(k) for k in drawn}) == len(drawn) and drawn[0] == draw_keyframes(50, 8, 0, 0.5)
    assert middle_keyframes(18, 8) == [4, 12, 17] and middle_keyframes(3, 1) == [0, 1, 2]


def test_the_official_blend_is_that_of_the_card():
    expected = [0.6225, 0.6514, 0.6792, 0.7058, 0.7311, 0.7109, 0.6971, 0.6869]
    for group in (1, 3):
        found = [current_weight(8 * group + i, group, 8, [3, 9, 20, 31]) for i in range(8)]
        assert found == pytest.approx(expected, abs=6e-5)
    assert current_weight(5, 0, 8, [3]) == 1.0


def test_the_distance_blend_is_one_at_the_keyframe_and_falls_towards_the_one_before():
    found = [current_weight(f, 1, 4, [2, 6], "distance") for f in (4, 5, 6, 7)]
    assert found == pytest.approx([0.5, 0.75, 1.0, 5 / 6])
    assert current_weight(6, 1, 1, [5, 6], "distance") == 1.0


@pytest.mark.parametrize("block", [None, 1, 5, 1000])
def test_nearest_tokens_have_the_greatest_cosine_in_whatever_blocks(block):
    tokens, keyframe = rand(3, 7, 4), rand(9, 4, seed=1) * 10
    cosine = torch.nn.functional.cosine_similarity(tokens[:, :, None], keyframe[None, None], dim=-1)
    assert torch.equal(nearest_tokens(tokens, keyframe, block), cosine.argmax(-1))
    assert nearest_tokens(keyframe[None], keyframe, block).tolist() == [list(range(9))]


def test_equal_tokens_go_to_the_first():
    assert nearest_tokens(torch.ones(1, 2, 3), torch.ones(4, 3)).tolist() == [[0, 0]]


def test_features_are_gathered_and_blended():
    kept, before = rand(5, 2), rand(5, 2, seed=1)
    here, there = torch.tensor([[0, 4], [1, 1]]), torch.tensor([[2, 2], [3, 0]])
    out = propagate(kept, before, here, there, torch.tensor([0.25, 1.0]))
    assert torch.allclose(out[0, 1], 0.25 * kept[4] + 0.75 * before[2])
    assert torch.allclose(out[1], kept[[1, 1]])
    assert torch.equal(propagate(kept, None, here, None, torch.ones(2)), kept[here])


def test_extended_attention_is_a_softmax_over_all_keyframes():
    """Every token of every keyframe against the concatenated keys, written out."""
    q, k, v = (rand(3, 5, 4, seed=seed) for seed in range(3))
    expected = torch.empty_like(q)
    for frame in range(3):
        for token in range(5):
            scores = torch.tensor([math.exp(float(q[frame, token] @ k[j, m]) / 2) for j in range(3) for m in range(5)])
            values = torch.stack([v[j, m] for j in range(3) for m in range(5)])
            expected[frame, token] = (scores[:, None] * values).sum(0) / scores.sum()
    row = torch.nn.functional.scaled_dot_product_attention(q.flatten(0, 1)[None], extended_context(k), extended_context(v))
    assert torch.allclose(row[0].unflatten(0, (3, 5)), expected, atol=1e-6)


@pytest.mark.parametrize(("until", "timestep"), [(0.5, 501), (0.8, 201), (1.0, 1), (0.02, 981)])
def test_injection_ends_at_the_timestep_of_the_official_code(until, timestep):
    sigmas = stable_diffusion_sigmas()
    assert lowest_level(noise_levels(sigmas, 50), until) == float(sigmas[timestep])
    assert lowest_level(noise_levels(sigmas, 50), 0.0) == math.inf
