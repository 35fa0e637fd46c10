"""Expectation maximisation over the tokens of a video: a few bases that stand for all keys and values.

Source: "A Video is Worth 256 Bases" (STEM inversion, CVPR 2024, arXiv 2312.05856) as its official code does
it. EM runs for every head apart, on the projected keys; only the bases are normalised, not the keys. A basis
that no token chooses becomes zero (on a CPU nearly so) and stays so: in the attention it is a sink of score 0 and value 0, kept
because the official code keeps it.
"""

import math
from collections.abc import Callable
from hashlib import blake2b
from threading import Lock
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

EPSILON = 1e-4
"""Added to norms and to the mass of a basis, as in the official code: a dead basis is zero instead of NaN."""

CPU_BLOCK = 2**20
"""Numbers in a block of keys, values and responsibilities, 4 MiB in float32, that stay in the cache of a CPU."""

ACCELERATOR_BLOCK = 2**26
"""On other devices large blocks save kernel launches: 256 MiB."""


LEAST_BLOCK = 64
"""Tokens that a block is not made smaller than where memory runs out."""


class BlockMemory:
    """How much smaller than usual the blocks of tokens of some estimates have to be, as memory ran out in one of them.

    Of all estimates of a run, on one thread or on several.
    """

    def __init__(
        self,
        is_oom: Callable[[Exception], bool] = lambda error: isinstance(error, torch.OutOfMemoryError),
        tell: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            is_oom: Tells whether an error is that of memory running out.
            tell: Called once, when blocks are made smaller for the first time.
        """
        self.halvings, self._is_oom, self._tell, self._lock = 0, is_oom, tell, Lock()

    def run(self, work: Callable[[int], tuple[Tensor, ...]], block_tokens: int) -> tuple[Tensor, ...]:
        """The work with blocks of at most so many tokens, with half of them as often as memory runs out."""
        while True:
            halvings = self.halvings
            size = max(min(LEAST_BLOCK, block_tokens), block_tokens >> halvings)
            try:
                return work(size)
            except Exception as error:
                if size <= LEAST_BLOCK or not self._is_oom(error):
                    raise
            with self._lock:
                first, self.halvings = self.halvings == 0, max(self.halvings, halvings + 1)
            if first:
                self._tell()


def estimate_basis(
    keys: Tensor,
    values: Tensor,
    num_bases: int = 256,
    iterations: int = 5,
    temperature: float = 0.01,
    initial: Tensor | None = None,
    seed: int = 0,
    method: Literal["auto", "dense", "blockwise", "fused"] = "auto",
    block_tokens: int | None = None,
    check: Callable[[], None] | None = None,
    memory: BlockMemory | None = None,
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
        method: how an iteration is computed. "dense" holds the responsibilities of all tokens at once, (h, n, m);
            "blockwise" those of one block of tokens at a time, and adds up its sums; "fused" is attention of the bases
            over the tokens, and holds a float32 copy of keys and values; "auto" is blockwise. They differ in
            rounding alone, fused by about the last digits of a float32 score. At low temperatures later iterations
            enlarge that difference wherever two bases contend for a token.
        block_tokens: tokens in a block; None takes a size that suits the device.
        check: called before every block, so that a host can raise from it to cancel.
        memory: makes blocks smaller where memory runs out; None begins with the usual size. Not for "dense", which has none.

    Returns:
        Bases of the keys mu and of the values nu, (h, m, d) each, in the dtype of the keys. Half precision is
        worked on in float32 and rounded at the end (the official code rounds every step to half precision).

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or input that is not finite.

    Source: the EM of the self-attention layers in the official code, from which we differ in precision only.
    """
    _check_arguments(keys, values, num_bases, iterations, temperature, initial, method, block_tokens)
    heads, _, channels = keys.shape
    iterate = {"dense": _dense, "fused": _fused}.get(method, _blockwise)
    if block_tokens is None:
        columns = heads * (num_bases + 2 * channels)
        block_tokens = max(1, block_bytes(keys.device) // torch.float32.itemsize // columns)
    memory = memory or BlockMemory()

    def iteration(*tokens: Tensor) -> tuple[Tensor, ...]:
        """Of those tokens, from the bases that are there."""
        if iterate is _dense:
            return _dense(mu, tokens, temperature, check)
        return memory.run(lambda size: iterate(mu, tokens, temperature, size, check), min(block_tokens, keys.shape[1]))

    with torch.no_grad():
        if initial is None:
            mu = initial_bases(keys, num_bases, seed, memory)
        else:
            mu = initial.to(keys.device, _working_dtype(keys))
        for _ in range(iterations - 1):
            (mu,) = iteration(keys)
        mu, nu = iteration(keys, values)
    # One token that is not finite spoils the sums of every basis, so a look at the few bases suffices.
    if not (mu.isfinite().all() and nu.isfinite().all()):
        raise ValueError(_not_finite(keys=keys, values=values, initial=initial))
    return mu.to(keys.dtype), nu.to(keys.dtype)


def block_bytes(device: torch.device) -> int:
    """Bytes of a block that an estimate works on; it does not grow with the tokens."""
    return (CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK) * torch.float32.itemsize


def initial_bases(keys: Tensor, num_bases: int, seed: int, memory: BlockMemory | None = None) -> Tensor:
    """Random bases around the mean key, mean + std * g per head and channel, g ~ N(0, 1).

    They are drawn on the CPU, the same for every device and precision.

    Args:
        keys: (h, n, d).
        num_bases: number of bases m.
        seed: 0 to 2**64 - 1.
        memory: as in `estimate_basis`.

    Returns:
        (h, m, d) on the device of the keys, float32, or float64 for float64 keys. The std is that of a sample
        (n - 1); the std of a single token is 0.
    """
    heads, _, channels = keys.shape
    generator, work = torch.Generator("cpu").manual_seed(seed), _working_dtype(keys)
    g = torch.randn(heads, num_bases, channels, generator=generator, device="cpu", dtype=torch.float32)
    mean, std = (memory or BlockMemory()).run(lambda size: _moments(keys, size), _moment_block(keys))
    return mean + std * g.to(keys.device, work)


def scores(keys: Tensor, bases: Tensor, temperature: float) -> Tensor:
    """<mu / (|mu| + 1e-4), k> / temperature, (h, n, m) of keys (h, n, d) and bases (h, m, d): the E-step is their softmax."""
    return torch.bmm(keys, _directions(bases, temperature))


def alive(bases: Tensor) -> Tensor:
    """Which of the bases (h, m, d) stand for any token at all, (h, m); the others are zero, or nearly so."""
    norm = bases.norm(dim=-1)
    return norm > EPSILON * norm.amax(dim=1, keepdim=True)


def revive_bases(bases: Tensor, fresh: Tensor) -> Tensor:
    """Bases of an earlier estimate to start another one from: where they are dead, the fresh ones take their place.

    Args:
        bases: (h, m, d), from `estimate_basis` at a near noise level.
        fresh: (h, m, d), from `initial_bases`.
    """
    bases = bases.to(fresh)
    return torch.where(rearrange(alive(bases), "h m -> h m 1"), bases, fresh)


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


def _dense(mu: Tensor, tokens: tuple[Tensor, ...], temperature: float, check: Callable | None) -> tuple[Tensor, ...]:
    """One E and one M step as the equations have them: weighted means of each of `tokens`, the first of which are the keys."""
    if check is not None:
        check()
    tokens = [x.to(mu.dtype) for x in tokens]
    z = torch.softmax(scores(tokens[0], mu, temperature), dim=-1)
    mass = rearrange(reduce(z, "h n m -> h m", "sum") + EPSILON, "h m -> h m 1")
    z = rearrange(z, "h n m -> h m n")
    return tuple(torch.bmm(z, x) / mass for x in tokens)


def _blockwise(
    mu: Tensor, tokens: tuple[Tensor, ...], temperature: float, block_tokens: int, check: Callable | None
) -> tuple[Tensor, ...]:
    """The same, block by block of tokens, in memory that is used again."""
    heads, bases, channels = mu.shape
    directions, mass = _directions(mu, temperature), mu.new_zeros(heads, 1, bases)
    # With the long side last these products are faster on a CPU than as (h, m, d).
    sums = [mu.new_zeros(heads, channels, bases) for _ in tokens]
    memory = mu.new_empty(heads * block_tokens * bases)
    for block in zip(*(x.split(block_tokens, dim=1) for x in tokens), strict=True):
        if check is not None:
            check()
        block = [x.to(mu.dtype) for x in block]
        size = block[0].shape[1]
        z = memory[: heads * size * bases].view(heads, size, bases)
        torch.bmm(block[0], directions, out=z)
        _softmax_(z)
        mass += reduce(z, "h n m -> h 1 m", "sum")
        for total, x in zip(sums, block, strict=True):
            total.baddbmm_(rearrange(x, "h n d -> h d n"), z)
    return tuple(rearrange(total / (mass + EPSILON), "h d m -> h m d").contiguous() for total in sums)


def _softmax_(z: Tensor) -> None:
    """Softmax over the last dimension, in place.

    On a CPU what would come out too small for a normal float is made the least that is one (about 1e-37): the smaller ones
    take twice the time, and many are, where scores span hundreds. In all sums they count for nothing either way.
    """
    if z.device.type == "cpu":
        least = math.log(torch.finfo(z.dtype).tiny * z.shape[-1]) + 1
        torch.maximum(z, z.amax(dim=-1, keepdim=True) + least, out=z)
    torch.softmax(z, dim=-1, out=z)


def _fused(
    mu: Tensor, tokens: tuple[Tensor, ...], temperature: float, block_tokens: int, check: Callable | None
) -> tuple[Tensor, ...]:
    """The same as attention of bases over tokens, by PyTorch's kernel: z = exp(score - lse), lse over the bases of a token.

    -lse goes in as one more channel of the keys, which the bases have as 1. Softmax divides by the sum of z; one more token
    of weight 1e-4 and value 0 makes that the mass of the equations.
    """
    channels = mu.shape[-1]
    directions = _directions(mu, temperature)
    keys, *others = (pad(x.to(mu.dtype), (0, 1, 0, 1)) for x in tokens)  # one more channel, one more token
    keys[:, -1, -1] = math.log(EPSILON)
    for block in keys[:, :-1].split(block_tokens, dim=1):
        if check is not None:
            check()
        block[..., -1] = -torch.logsumexp(torch.bmm(block[..., :-1], directions), dim=-1)
    queries = pad(rearrange(directions, "h d m -> 1 h m d"), (0, 1), value=1.0)
    keys, *others = (rearrange(x, "h n d -> 1 h n d") for x in (keys, *others))
    means = (scaled_dot_product_attention(queries, keys, x, scale=1.0) for x in (keys, *others))
    return tuple(rearrange(x[..., :channels], "1 h m d -> h m d").contiguous() for x in means)


def _directions(mu: Tensor, temperature: float) -> Tensor:
    """What keys are multiplied with to have scores: mu / (|mu| + 1e-4) / temperature, (h, d, m)."""
    directions = mu / (mu.norm(dim=-1, keepdim=True) + EPSILON)
    return rearrange(directions / temperature, "h m d -> h d m").contiguous()


def _moment_block(keys: Tensor) -> int:
    """Tokens of which two copies, those of `_moments`, fill a block."""
    heads, _, channels = keys.shape
    return max(1, block_bytes(keys.device) // torch.float32.itemsize // (2 * heads * channels))


def _moments(keys: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per head and channel, (h, 1, d) each, in two passes over blocks of tokens."""
    tokens, work = keys.shape[1], _working_dtype(keys)
    blocks = keys.split(block_tokens, dim=1)
    mean = sum(reduce(x.to(work), "h n d -> h 1 d", "sum") for x in blocks) / tokens
    squares = sum(reduce((x.to(work) - mean).square_(), "h n d -> h 1 d", "sum") for x in blocks)
    return mean, (squares / max(1, tokens - 1)).sqrt()


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
    if method not in ("auto", "dense", "blockwise", "fused"):
        raise ValueError(f'method is "{method}"; give "auto", "dense", "blockwise" or "fused".')


def _not_finite(**tensors: Tensor | None) -> str:
    spoilt = [name for name, x in tensors.items() if x is not None and not x.isfinite().all()]
    if spoilt:
        return f"{' and '.join(spoilt)} hold NaN or infinity; give finite numbers (does the model overflow?)."
    return "keys or values are so large that their sums overflow; scale them down."
