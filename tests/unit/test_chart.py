"""Charts: round numbers, and lines where their values are."""

import pytest
import torch

from stem.chart import WIDTH, Line, Panel, draw_chart, ticks, value_range

BLUE = torch.tensor([0, 0x72, 0xB2]) / 255


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.0, 15.0, [0.0, 5.0, 10.0, 15.0]),
        (30.2, 44.9, [35.0, 40.0]),
        (-0.3, 1.05, [0.0, 0.5, 1.0]),
        (0.0, 0.04, [0.0, 0.01, 0.02, 0.03, 0.04]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def panel(*values: float, **changes) -> Panel:
    line = Line("", torch.tensor(values), "#0072b2")
    return Panel("title", "label", torch.arange(len(values)), (line,), **changes)


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.0, 0.0), (float("inf"), 2.0), (float("nan"), float("nan")), (5.0,)])
def test_odd_values_can_be_drawn(values):
    low, high = value_range(panel(*values))
    assert low < high
    chart = draw_chart(("head",), [panel(*values)])
    assert chart.shape[0] == 1 and chart.shape[2:] == (WIDTH, 3) and 0 <= chart.min() < chart.max() <= 1


def blue(chart: torch.Tensor) -> torch.Tensor:
    """Rows and columns of what is blue, (n, 2)."""
    return ((chart[0] - BLUE).abs().amax(-1) < 0.02).nonzero()


def test_a_rising_line_rises():
    found = blue(draw_chart((), [panel(0.0, 1.0, 2.0)]))
    at = [found[(found[:, 1] - column).abs() < 8, 0].float().mean() for column in (140, 552, 965)]
    assert at[0] > at[1] > at[2]
    assert at[0] - at[1] == pytest.approx(at[1] - at[2], abs=4)


def test_a_gap_is_left_where_a_value_is_missing():
    whole, gap = (blue(draw_chart((), [panel(1.0, 1.0, v, 1.0, 1.0, low=0.0, high=2.0)])) for v in (1.0, float("nan")))
    middle = (WIDTH + 132 - 28) / 2
    assert ((whole[:, 1] - middle).abs() < 150).any() and not ((gap[:, 1] - middle).abs() < 150).any()


def test_bars_are_as_high_as_they_are_long():
    bars = torch.tensor([4.0, 2.0]), BLUE.expand(2, 3)
    found = blue(draw_chart((), [Panel("", "", torch.arange(2), bars=bars, low=0.0, high=4.0)]))
    left, right = (found[side, 0] for side in (found[:, 1] < 500, found[:, 1] > 600))
    assert (left.max() - left.min() + 1) / (right.max() - right.min() + 1) == pytest.approx(2.0, abs=0.05)
