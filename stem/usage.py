"""How a clip's tokens use the bases of one attention head, and how expectation maximisation came to them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from .em import block_bytes, estimate_basis, scores


class Usage(NamedTuple):
    """Of the bases of one head by n tokens."""

    chosen: Tensor  # (n,) the basis that explains each token best
    responsibility: Tensor  # (n,) of that basis for the token, 0..1
    mass: Tensor  # (m,) sums of responsibilities: how many tokens each basis stands for


class Convergence(NamedTuple):
    """Of EM on the keys of one head."""

    fit: Tensor  # (rounds + 1,) of the bases that it starts from, and after each round
    bases: Tensor  # (m, d) after as many rounds as were asked for


def read_usage(keys: Tensor, bases: Tensor, temperature: float, check: Callable[[], None] | None = None) -> Usage:
    """What an E-step finds.

    Args:
        keys: (n, d) of one head.
        bases: (m, d).
        temperature: Of the softmax over the bases.
        check: Called now and then, so that a host can raise from it to cancel.
    """
    chosen, responsibility, mass = [], [], keys.new_zeros(len(bases), dtype=torch.float32)
    for _, score in _score_blocks(keys, bases, temperature, check):
        z = torch.softmax(score, dim=-1)
        mass += reduce(z, "n m -> m", "sum")
        best = z.max(dim=-1)
        chosen.append(best.indices)
        responsibility.append(best.values)
    return Usage(torch.cat(chosen), torch.cat(responsibility), mass)


def effective_number(mass: Tensor) -> float:
    """How many bases of equal mass would be used as evenly as these (m,): exp of the entropy, 1 to m."""
    share = mass.double() / mass.double().sum()
    return float(torch.special.entr(share).sum().exp())


def fit(keys: Tensor, bases: Tensor, temperature: float, check: Callable[[], None] | None = None) -> float:
    """What EM maximises, as a share of what it could at most be.

        sum_n temperature (log sum_m exp(<mu / (|mu| + 1e-4), k_n> / temperature) - log m)  /  sum_n |k_n|

    That is the log-likelihood of the tokens, up to constants: every round of EM raises it. It is 1 where every key has the
    direction of all bases, and about the mean cosine of keys and their bases at low temperatures, less temperature * log m.

    Args: as for `read_usage`.
    """
    total, length = 0.0, 0.0
    for block, score in _score_blocks(keys, bases, temperature, check):
        gain = torch.logsumexp(score, dim=-1) - torch.tensor(float(len(bases))).log()
        total += temperature * float(gain.double().sum())
        length += float(block.norm(dim=-1).double().sum())
    return total / length if length else 0.0


def convergence(
    keys: Tensor, initial: Tensor, rounds: int, more: int, temperature: float, check: Callable[[], None] | None = None
) -> Convergence:
    """Runs EM again and measures it.

    Args:
        keys: (n, d) of one head.
        initial: (m, d) bases to start from.
        rounds: Of EM, after which the bases are kept.
        more: Rounds beyond, to see what they would still gain.
        temperature, check: As for `read_usage`.
    """
    keys, bases, kept = keys.float()[None], initial.float(), initial
    fits = [fit(keys[0], bases, temperature, check)]
    for done in range(1, rounds + more + 1):
        bases, _ = estimate_basis(
            keys, keys, len(bases), iterations=1, temperature=temperature, initial=bases[None], check=check
        )
        bases = bases[0]
        fits.append(fit(keys[0], bases, temperature, check))
        kept = bases if done == rounds else kept
    return Convergence(torch.tensor(fits), kept)


def _score_blocks(
    keys: Tensor, bases: Tensor, temperature: float, check: Callable[[], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the tokens (n, d) with their scores (n, m), in float32."""
    size = max(1, block_bytes(keys.device) // torch.float32.itemsize // len(bases))
    bases = bases.to(keys.device, torch.float32)[None]
    for block in keys.split(size):
        if check is not None:
            check()
        block = block.float()
        yield block, scores(block[None], bases, temperature)[0]
