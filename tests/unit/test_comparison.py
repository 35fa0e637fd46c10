"""Clips beside each other: where each stands, and that nothing hides it."""

import pytest
import torch

from stem.chart import font
from stem.comparison import LEAST_BAND, PAPER, compare_clips, letters

PAPER_COLOUR = torch.tensor(PAPER) / 255


def clip(colour: float, frames: int = 2, height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.full((frames, height, width, 3), colour)


def place(image: torch.Tensor, colour: float) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has that colour in (height, width, 3)."""
    rows, columns = torch.where((image - colour).abs().amax(-1) < 1e-3)
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    assert len(rows) == height * width, "nothing covers it"
    return top, left, height, width


def test_a_row_under_a_strip():
    out = compare_clips([clip(0.3), clip(0.6)], ["one", "two"])
    assert out.shape == (2, LEAST_BAND + 40, 122, 3)
    assert place(out[0], 0.3) == (LEAST_BAND, 0, 40, 60)
    assert place(out[0], 0.6) == (LEAST_BAND, 62, 40, 60)
    strip = out[:, :LEAST_BAND]
    for half in (strip[:, :, :60], strip[:, :, 62:]):
        assert half.max() > 0.8, "the label is written"
    torch.testing.assert_close(strip[0], strip[1])


def test_without_labels_there_is_no_strip():
    assert compare_clips([clip(0.3), clip(0.6)], ["", " "]).shape == (2, 40, 122, 3)


def test_an_empty_label_leaves_its_strip_empty():
    strip = compare_clips([clip(0.3), clip(0.6)], ["one", " "])[0, :LEAST_BAND]
    torch.testing.assert_close(strip[:, 60:], PAPER_COLOUR.expand_as(strip[:, 60:]))


def test_four_in_a_square():
    out = compare_clips([clip(c) for c in (0.2, 0.4, 0.6, 0.8)], [""] * 4, columns=2)
    assert out.shape == (2, 82, 122, 3)
    assert [place(out[1], c)[:2] for c in (0.2, 0.4, 0.6, 0.8)] == [(0, 0), (0, 62), (42, 0), (42, 62)]


def test_one_above_the_other_stands_in_the_middle():
    out = compare_clips([clip(0.2), clip(0.4, width=20)], ["", ""], columns=1)
    assert place(out[0], 0.4) == (42, 20, 40, 20)


@pytest.mark.parametrize(("height", "width"), [(41, 61), (40, 63), (17, 9)])
def test_height_and_width_are_even(height, width):
    for labels in (["", ""], ["a", "b"]):
        out = compare_clips([clip(0.2, 1, height, width), clip(0.5, 1, 80, 81)], labels)
        assert out.shape[1] % 2 == out.shape[2] % 2 == 0
        assert place(out[0], 0.2)[2:] == (height, width)


def test_other_sizes_are_scaled_to_the_height_of_the_first():
    out = compare_clips([clip(0.2), clip(0.5, height=80, width=100)], ["", ""])
    assert place(out[0], 0.5)[2:] == (40, 50)


def test_shorter_clips_hold_their_last_frame():
    short = torch.cat([clip(0.3, 1), clip(0.4, 1)])
    out = compare_clips([clip(0.2, 5), short], ["", ""])
    assert len(out) == 5
    for number, colour in enumerate((0.3, 0.4, 0.4, 0.4, 0.4)):
        assert place(out[number], colour)[2:] == (40, 60)


def test_pictures_of_the_first_size_are_left_as_they_are():
    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))
    out = compare_clips([picture, picture], ["", ""])
    assert torch.equal(out[:, :40, :60], picture)


def test_a_long_label_stays_above_its_own_picture():
    out = compare_clips([clip(0.3), clip(0.6)], ["a name that is much too long for so small a clip", ""])
    assert out[0, :LEAST_BAND, :60].max() > 0.8
    beside = out[0, :LEAST_BAND, 60:]
    torch.testing.assert_close(beside, PAPER_COLOUR.expand_as(beside))


def test_letters_of_english_are_pillows_own():
    assert letters("reconstruction 1", 20).getname() == font(20).getname()


def test_an_unknown_letter_is_no_error():
    letters("\U000e0fff", 20)
    compare_clips([clip(0.3), clip(0.6)], ["源", "é"])
