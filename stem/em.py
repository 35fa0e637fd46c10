"""Expectation maximisation over the tokens of a video: a few bases that stand for all keys and values.

Source: "A Video is Worth 256 Bases" (STEM inversion, CVPR 2024, arXiv 2312.05856) as its official code does
it. EM runs for every head apart, on the projected keys; only the bases are normalised, not the keys. A basis
that no token chooses becomes zero and stays so: in the attention it is a sink of score 0 and value 0, kept
because the official code keeps it.
"""

from collections.abc import Callable
from hashlib import blake2b
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor

EPSILON = 1e-4
"""Added to norms and to the mass of a basis, as in the official code: a dead basis is zero instead of NaN."""

CPU_BLOCK = 2**20
"""Numbers in the responsibilities of a block, 4 MiB in float32, that stay in the cache of a CPU. Two such arrays are alive."""

ACCELERATOR_BLOCK = 2**25
"""On other devices large blocks save kernel launches: 128 MiB."""


def estimate_basis(
    keys: Tensor,
    values: Tensor,
    num_bases: int = 256,
    iterations: int = 5,
    temperature: float = 0.01,
    initial: Tensor | None = None,
    seed: int = 0,
    method: Literal["auto", "dense", "blockwise"] = "auto",
    block_tokens: int | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Bases of the keys by expectation maximisation, and the values that belong to them.

        z  = softmax over m of <mu / (|mu| + 1e-4), k> / temperature
        mu = sum_n z k / (sum_n z + 1e-4)                              `iterations` times
        nu = sum_n z v / (sum_n z + 1e-4)                              with the last z

    Args:
        keys: tokens of all frames together, (h, n, d); n may be smaller than `num_bases`.
        values: (h, n, d).
        num_bases: number of bases m.
        iterations: number of E and M steps.
        temperature: of the softmax over the bases.
        initial: the bases to start from, (h, m, d); None draws them with `initial_bases`.
        seed: of that draw.
        method: "dense" holds the responsibilities of all tokens at once, (h, n, m); "blockwise" those of one
            block of tokens at a time, and adds up its sums; "auto" is blockwise. They differ in the order of
            summation alone. At low temperatures later iterations enlarge that difference, as any rounding,
            wherever two bases contend for a token.
        block_tokens: tokens in a block; None takes a size that suits the device.
        check: called before every block, so that a host can raise from it to cancel.

    Returns:
        Bases of the keys mu and of the values nu, (h, m, d) each, in the dtype of the keys. Half precision is
        worked on in float32 and rounded at the end (the official code rounds every step to half precision).

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or input that is not finite.

    Source: the EM of the self-attention layers in the official code, from which we differ in precision only.
    """
    _check_arguments(keys, values, num_bases, iterations, temperature, initial, method, block_tokens)
    heads, tokens, _ = keys.shape
    if method == "dense":
        block_tokens = tokens
    elif block_tokens is None:
        numbers = CPU_BLOCK if keys.device.type == "cpu" else ACCELERATOR_BLOCK
        block_tokens = max(1, numbers // (heads * num_bases))
    with torch.no_grad():
        if initial is None:
            mu = initial_bases(keys, num_bases, seed)
        else:
            mu = initial.to(keys.device, _working_dtype(keys))
        for _ in range(iterations - 1):
            (mu,) = _iterate(mu, (keys,), temperature, block_tokens, check)
        mu, nu = _iterate(mu, (keys, values), temperature, block_tokens, check)
    # One token that is not finite spoils the sums of every basis, so a look at the few bases suffices.
    if not (mu.isfinite().all() and nu.isfinite().all()):
        raise ValueError(_not_finite(keys=keys, values=values, initial=initial))
    return mu.to(keys.dtype), nu.to(keys.dtype)


def initial_bases(keys: Tensor, num_bases: int, seed: int) -> Tensor:
    """Random bases around the mean key: mean + std * g, per head and channel.

    g ~ N(0, 1) is drawn on the CPU in float32, the same for every device and precision.

    Args:
        keys: (h, n, d).
        num_bases: number of bases m.
        seed: 0 to 2**64 - 1.

    Returns:
        (h, m, d) on the device of the keys, float32, or float64 for float64 keys. The std is that of a sample
        (n - 1); the std of a single token is 0.
    """
    heads, tokens, channels = keys.shape
    generator = torch.Generator("cpu").manual_seed(seed)
    g = torch.randn(heads, num_bases, channels, generator=generator, device="cpu", dtype=torch.float32)
    work, correction = _working_dtype(keys), min(1, tokens - 1)
    # Head by head, so that of half-precision keys no more than one head is copied to float32 at a time.
    moments = [torch.std_mean(k.to(work), dim=0, correction=correction) for k in keys]
    std, mean = (rearrange(list(moment), "h d -> h 1 d") for moment in zip(*moments, strict=True))
    return mean + std * g.to(keys.device, work)


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed of its own for every block, noise level and window, the same in every process.

    Args:
        seed: the user's seed.
        parts: what tells the draws apart, e.g. block name, sigma, first frame.

    Returns:
        0 to 2**63 - 1.
    """
    text = repr([(type(part).__name__, str(part)) for part in (seed, *parts)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _iterate(
    mu: Tensor, tokens: tuple[Tensor, ...], temperature: float, block_tokens: int, check: Callable | None
) -> tuple[Tensor, ...]:
    """One E and one M step: weighted means of each of `tokens`, the first of which are the keys."""
    directions = mu / (mu.norm(dim=-1, keepdim=True) + EPSILON)
    directions = rearrange(directions / temperature, "h m d -> h d m").contiguous()
    mass, sums = mu.new_zeros(mu.shape[:2]), [torch.zeros_like(mu) for _ in tokens]
    for block in zip(*(x.split(block_tokens, dim=1) for x in tokens), strict=True):
        if check is not None:
            check()
        block = [x.to(mu.dtype) for x in block]
        z = torch.softmax(torch.bmm(block[0], directions), dim=-1)
        mass += reduce(z, "h n m -> h m", "sum")
        z = rearrange(z, "h n m -> h m n")
        for total, x in zip(sums, block, strict=True):
            total.baddbmm_(z, x)
    mass = rearrange(mass, "h m -> h m 1") + EPSILON
    return tuple(total / mass for total in sums)


def _working_dtype(keys: Tensor) -> torch.dtype:
    return torch.promote_types(keys.dtype, torch.float32)


def _check_arguments(keys, values, num_bases, iterations, temperature, initial, method, block_tokens) -> None:
    if keys.ndim != 3 or 0 in keys.shape:
        raise ValueError(f"keys have the shape {tuple(keys.shape)}; give (heads, tokens, channels), none of them 0.")
    if values.shape != keys.shape:
        raise ValueError(f"values have the shape {tuple(values.shape)}; give that of the keys, {tuple(keys.shape)}.")
    if not keys.is_floating_point() or values.dtype != keys.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}; give both in one floating-point dtype.")
    for name, number in (
        ("num_bases", num_bases),
        ("iterations", iterations),
        ("block_tokens", block_tokens),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; give at least 1.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a number above 0 (the official code uses 0.01).")
    needed = (keys.shape[0], num_bases, keys.shape[2])
    if initial is not None and tuple(initial.shape) != needed:
        raise ValueError(f"initial has the shape {tuple(initial.shape)}; give (heads, bases, channels) = {needed}.")
    if method not in ("auto", "dense", "blockwise"):
        raise ValueError(f'method is "{method}"; give "auto", "dense" or "blockwise".')


def _not_finite(**tensors: Tensor | None) -> str:
    spoilt = [name for name, x in tensors.items() if x is not None and not x.isfinite().all()]
    if spoilt:
        return f"{' and '.join(spoilt)} hold NaN or infinity; give finite numbers (does the model overflow?)."
    return "keys or values are so large that their sums overflow; scale them down."
