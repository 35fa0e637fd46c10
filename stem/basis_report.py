"""What is told of a basis: how many of its bases are alive, how evenly they are used, how EM came to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .chart import BLUE, INK, ORANGE, Line, Panel, draw_chart
from .usage import Usage, effective_number


class BasisFigures(NamedTuple):
    """Of one head of one block at one noise level."""

    place: str  # "output_8, head 0, noise level 5 of 10 (sigma 1.23)"
    alive: int  # bases that stand for any token
    usage: Usage
    fits: Tensor  # (rounds + 1 + more,) of EM run again
    rounds: int
    fit_of_basis: float  # of the basis itself on the tokens of EM
    start: str  # how the bases of `fits` came about


def gained(fits: Tensor, rounds: int) -> float:
    """Share of what all rounds gain that was gained after so many; 1 where there was nothing to gain."""
    whole = float(fits[-1] - fits[0])
    return float(fits[rounds] - fits[0]) / whole if whole > 0 else 1.0


def basis_text(figures: BasisFigures) -> str:
    """The figures in words."""
    usage, fits, rounds = figures.usage, figures.fits, figures.rounds
    bases, tokens = len(usage.mass), len(usage.chosen)
    chosen = len(usage.chosen.unique())
    share = usage.mass.sort(descending=True).values / usage.mass.sum()
    ten = max(1, bases // 10)
    lines = [
        figures.place,
        f"Alive: {figures.alive} of {bases} bases; {chosen} are the best of some of the {tokens} tokens.",
        f"Use: as even as {effective_number(usage.mass):.1f} bases of equal share (exp of the entropy). The {ten} most used "
        f"explain {float(share[:ten].sum()):.0%} of the tokens.",
        f"Responsibility of the best basis: mean {float(usage.responsibility.mean()):.2f}.",
        f"EM, run again: {figures.start}",
        f"Fit of the start {float(fits[0]):.4f}; after each round "
        + ", ".join(f"{fit:.4f}" for fit in fits[1:].tolist())
        + ".",
        f"{rounds} rounds gain {gained(fits, rounds):.0%} of what {len(fits) - 1} would; the basis itself has fit "
        f"{figures.fit_of_basis:.4f}. (1: every key has the direction of its basis.)",
    ]
    return "\n".join(lines)


def basis_chart(figures: BasisFigures, colours: Tensor) -> Tensor:
    """An image (1, height, width, 3); colours (m, 3) of the bases in sRGB."""
    usage, fits, rounds = figures.usage, figures.fits, figures.rounds
    order = usage.mass.argsort(descending=True, stable=True)
    shares = 100 * usage.mass[order] / usage.mass.sum()
    even = effective_number(usage.mass)
    places = torch.arange(1, len(order) + 1)
    steps = torch.arange(len(fits))
    gone_on = fits.clone()
    gone_on[:rounds] = torch.nan
    until = fits.clone()
    until[rounds + 1 :] = torch.nan
    panels = (
        Panel(
            f"{figures.alive} of {len(order)} bases alive, used like {even:.0f} equal ones",
            "bases by use, in the colours of the picture (height: % of tokens)",
            places,
            bars=(shares, colours[order]),
            low=0.0,
            note=(even, f"{even:.0f}"),
        ),
        Panel(
            f"EM: {rounds} rounds gain {gained(fits, rounds):.0%} of what {len(fits) - 1} would",
            "rounds",
            steps,
            lines=(
                Line("fit", until, BLUE),
                Line("further rounds", gone_on, ORANGE, dashed=True),
                Line("this basis", torch.full_like(fits, figures.fit_of_basis), INK, dashed=True),
            ),
        ),
    )
    return draw_chart((figures.place,), panels)
