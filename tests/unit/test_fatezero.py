"""Numbers of FateZero's card: alignment of prompts, schedules, masks."""

import pytest
import torch

from stem.fatezero import (
    LENGTH,
    align_refine,
    align_replace,
    blend_mask,
    context_frames,
    fused_values,
    latent_blend_acts,
    replaced_steps,
    reweighted,
    word_map,
)

START, END = "<s>", "</s>"


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(prompt: str) -> list[str]:
    """A word, or a part of one after a dash, is a token."""
    return [START, *prompt.replace("-", " -").split(), END]


# Ten pairs by hand: for every token of the target with start and end, the place in the source or None.
PAIRS = [
    ("a cat", "a cat", [0, 1, 2, 3]),
    ("a cat", "a dog", [0, 1, None, 3]),
    ("a cat", "a black cat", [0, 1, None, 2, 3]),
    ("a black cat", "a cat", [0, 1, 3, 4]),
    ("a cat on grass", "a watercolor of a cat on grass", [0, 1, None, None, None, 2, 3, 4, 5]),
    ("a red circle on sand", "a blue circle on sand", [0, 1, None, 3, 4, 5, 6]),
    ("a jeep", "a por-sche car", [0, 1, None, None, None, 3]),
    ("a man is run-ning", "a won-der woman is run-ning", [0, 1, None, None, None, 3, 4, 5, 6]),
    ("cat dog", "dog cat", [0, 2, None, 3]),
    ("", "a cat", [0, None, None, 1]),
]


@pytest.mark.parametrize(("source", "target", "expected"), PAIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_tokens_are_aligned_as_by_hand(source, target, expected):
    found = align_refine(tokens(source), tokens(target))
    for column, place in enumerate(expected):
        wanted = torch.zeros(LENGTH)
        if place is not None:
            wanted[place] = 1
        assert torch.equal(found.from_source[:, column], wanted), column
        assert found.own[column] == (place is None)
    rest = torch.eye(LENGTH)[:, len(expected) :]
    assert torch.equal(found.from_source[:, len(expected) :], rest) and not found.own[len(expected) :].any()


def test_replaced_words_are_taken_by_place():
    same = align_replace([1, 1, 1], [1, 1, 1], [False, True, False])
    assert torch.equal(same.from_source, torch.eye(LENGTH)) and not same.own.any()
    longer = align_replace([1, 1, 1], [1, 3, 1], [False, True, False]).from_source  # a jeep here -> a por-sch-e here
    assert longer[2, 2:5].tolist() == pytest.approx([1 / 3] * 3) and longer[2].sum() == pytest.approx(1)
    assert torch.equal(longer[:, 5:], torch.eye(LENGTH)[:, 5:]), "past it, the target's places"
    shorter = align_replace([1, 2, 1], [1, 1, 1], [False, True, False]).from_source  # two tokens give all to one
    assert shorter[2:4, 2].tolist() == [1.0, 1.0] and torch.equal(shorter[:, 3:], torch.eye(LENGTH)[:, 3:])
    between = align_replace([2, 1, 1], [1, 1, 2], [True, False, True]).from_source
    assert between[3, 2] == 1 and between[4, 3:5].tolist() == [0.5, 0.5], "an unchanged word between moves along"


def test_a_word_that_grows_by_a_mark_counts_as_replaced_and_is_spread():
    grown = align_replace([1, 1, 1], [1, 2, 1], [False, True, False]).from_source  # a jeep here -> a jeep, here
    assert grown[2, 2:4].tolist() == [0.5, 0.5] and torch.equal(grown[:, 4:], torch.eye(LENGTH)[:, 4:])


def test_replace_needs_as_many_words():
    with pytest.raises(ValueError, match="the source has 2, the target 3"):
        align_replace([1, 1], [1, 1, 1], [False, True, True])


@pytest.mark.parametrize("own", [True, False])
def test_fused_values_are_the_fused_map(own):
    """Against the fused map itself, multiplied with the values."""
    a, b, v = rand(2, 6, LENGTH), rand(2, 6, LENGTH, seed=1), rand(2, LENGTH, 4, seed=2)
    if own:
        alignment = align_refine(tokens("a cat"), tokens("a black dog"))
        columns = [b[..., i] for i in (0, 1)] + [a[..., i] for i in (2, 3)] + [b[..., 3]]
        fused = torch.stack([*columns, *(b[..., i] for i in range(5, LENGTH))], -1)
    else:
        alignment, fused = align_replace([1], [2], [True]), b.clone()
        fused[..., 1:3] = b[..., 1:2] / 2
    weights = torch.ones(LENGTH)
    weights[2] = 10.0
    of_source, of_edit = fused_values(reweighted(alignment, weights), v)
    found = b @ of_source + (a @ of_edit if own else 0)
    assert (of_edit is None) is not own
    assert torch.allclose(found, (fused * weights) @ v, atol=1e-5)


def test_steps_are_those_of_the_official_code():
    assert [replaced_steps(50, s, "self") for s in (0.0, 0.4, 0.5, 0.8, 1.0)] == [0, 20, 25, 40, 50]
    assert [replaced_steps(50, c, "cross") for c in (0.0, 0.3, 0.5, 0.7, 0.8, 1.0)] == [0, 15, 25, 35, 40, 50]
    assert replaced_steps(50, 0.58, "self") == 29, "0.58 x 50 is a little less than 29 in floating point"
    assert replaced_steps(50, 0.59, "cross") == 30 and replaced_steps(50, 0.59, "self") == 29
    acting = [step for step in range(50) if latent_blend_acts(step, 50)]
    assert acting == list(range(10, 39)), "29 of 50"


def test_contexts():
    assert context_frames(8, "mid") == [[3]] * 8 and context_frames(1, "mid") == [[0]]
    assert context_frames(3, "previous_first") == [[0, 0], [0, 0], [1, 0]]


def test_mask_of_a_hand_made_map():
    """One token of four is looked at in one corner of the second frame by one of two heads, weakly in another corner."""
    maps = torch.zeros(2, 2, 16, 4)
    maps[:, :, :, 0] = 1.0
    maps[0, :, 5, 2] = 0.8
    maps[1, 0, 0, 2], maps[1, :, 15, 1] = 0.9, 0.2
    words = word_map(maps, [1, 2], (4, 4))
    assert words[1, 0, 0] == pytest.approx(0.45) and words[1, 3, 3] == pytest.approx(0.2)
    mask = blend_mask(words, 0.3, (8, 8))
    expected = torch.zeros(2, 4, 4)
    expected[0, 0:3, 0:3] = 1
    expected[1, 0:2, 0:2] = expected[1, 2:4, 2:4] = 1  # 0.2 of 0.45 is more than 0.3
    assert torch.equal(mask, expected.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(blend_mask(words, 0.5, (4, 4))[1, 2:4, 2:4], torch.zeros(2, 2))
    assert not blend_mask(words, 2.0, (4, 4)).any(), "a threshold of 2 keeps all of the source"
    assert not blend_mask(torch.zeros(1, 4, 4), 0.3, (4, 4)).any()
