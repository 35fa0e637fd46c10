"""Contexts and attention against loops over frames, heads and tokens."""

import pytest
import torch

from stem.attention import (
    all_frames,
    attention,
    basis_attention,
    basis_context,
    first_previous,
    own_frame,
    pool_tokens,
)

F, H, N, D, M = 5, 2, 6, 4, 7


@pytest.fixture
def qkv():
    return torch.randn(3, F, N, H * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


@pytest.fixture
def bases():
    return torch.randn(2, H, M, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()


def softmax_average(query, keys, values):
    """One query (d,) over keys and values (tokens, d)."""
    weights = torch.tensor([torch.dot(query, key) / D**0.5 for key in keys], dtype=torch.float64).exp()
    return sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum()


def attention_by_loops(q, k, v, frames_of):
    """Every frame f over the tokens of the frames `frames_of(f)`; channel c belongs to head c // d."""
    out = torch.zeros_like(q)
    for f in range(F):
        for h in range(H):
            channels = slice(h * D, (h + 1) * D)
            keys, values = ([x[g, n, channels] for g in frames_of(f) for n in range(N)] for x in (k, v))
            for n in range(N):
                out[f, n, channels] = softmax_average(q[f, n, channels], keys, values)
    return out


@pytest.mark.parametrize(
    "context, frames_of",
    [
        (own_frame, lambda f: [f]),
        (first_previous, lambda f: [0, max(f - 1, 0)]),
        (all_frames, lambda f: range(F)),
    ],
)
def test_every_frame_attends_to_the_frames_of_its_context(qkv, context, frames_of):
    q, k, v = qkv
    found = attention(q, context(k), context(v), heads=H)
    torch.testing.assert_close(found, attention_by_loops(q, k, v, frames_of))


def test_first_frame_comes_before_the_previous_one():
    x = torch.arange(4.0)[:, None, None]
    assert first_previous(x)[..., 0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("context", [own_frame, first_previous, all_frames])
def test_a_single_frame_attends_to_itself_in_every_context(qkv, context):
    q, k, v = (x[:1] for x in qkv)
    torch.testing.assert_close(attention(q, context(k), context(v), H), attention(q, k, v, H))


def test_every_frame_reads_the_bases(qkv, bases):
    q, (keys, values) = qkv[0], bases
    expected = torch.zeros_like(q)
    for f in range(F):
        for h in range(H):
            for n in range(N):
                channels = slice(h * D, (h + 1) * D)
                expected[f, n, channels] = softmax_average(q[f, n, channels], keys[h], values[h])
    merged = attention(q, basis_context(keys, F), basis_context(values, F), heads=H)
    torch.testing.assert_close(merged, expected)
    split = basis_attention(q.unflatten(-1, (H, D)).transpose(1, 2), keys, values)
    torch.testing.assert_close(split.transpose(1, 2).flatten(2), expected)


def test_a_dead_basis_is_a_sink_that_shrinks_the_output(bases):
    """Three keys of score 0: the two live values count for a third each, the dead one for nothing."""
    q = torch.tensor([[[[1.0, 0.0]]]])
    keys = torch.tensor([[[0.0, 5.0], [0.0, -5.0], [0.0, 0.0]]])
    values = torch.tensor([[[3.0, 0.0], [0.0, 6.0], [0.0, 0.0]]])
    torch.testing.assert_close(basis_attention(q, keys, values), torch.tensor([[[[1.0, 2.0]]]]))


def test_tokens_of_all_frames_are_pooled_by_head(qkv):
    pooled = pool_tokens(qkv[1], heads=H)
    assert pooled.shape == (H, F * N, D)
    for f, h, n in ((0, 0, 0), (3, 1, 2), (4, 0, 5)):
        assert pooled[h, f * N + n].equal(qkv[1][f, n, h * D : (h + 1) * D])


def test_shared_contexts_are_not_copied_for_every_frame(qkv, bases):
    for context in (all_frames(qkv[1]), basis_context(bases[0], 1000)):
        assert context.stride(0) == 0
    assert all_frames(qkv[1]).data_ptr() == pool_tokens(qkv[1], H).data_ptr() == qkv[1].data_ptr()
