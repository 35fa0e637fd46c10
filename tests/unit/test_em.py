"""EM against its equations written with loops, for every block size, precision and shape."""

import subprocess
import sys
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem import em
from stem.em import _softmax_, derive_seed, estimate_basis, initial_bases, revive_bases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
METHODS = ("dense", "blockwise", "fused")


def tolerance(dtype, method):
    """Fused subtracts scores of several hundred after they were rounded to float32, a softmax before its exponential."""
    return 1e-4 if (dtype, method) == (torch.float32, "fused") else TOLERANCE[dtype]


def tokens(heads, n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def clustered(heads=2, n=500, d=16, m=12, seed=0, dtype=torch.float64):
    """Keys around m directions far from each other, and bases near them: no two bases contend for a token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    centres = 3 * torch.linalg.qr(draw(heads, d, d))[0][:, :m]
    keys = centres[:, torch.arange(n) % m] + 0.2 * draw(heads, n, d)
    initial = centres + 0.2 * draw(heads, m, d)
    return [x.to(dtype) for x in (keys, draw(heads, n, d), initial)]


def em_by_the_book(keys, values, mu, iterations, temperature):
    """The equations, token by token and basis by basis, in float64."""
    keys, values, mu = keys.double(), values.double(), mu.double().clone()
    nu = torch.empty_like(mu)
    for head, (k, v) in enumerate(zip(keys, values, strict=True)):
        for _ in range(iterations):
            unit = torch.stack([b / (b.pow(2).sum().sqrt() + 1e-4) for b in mu[head]])
            z = torch.stack([torch.softmax(unit @ token / temperature, dim=0) for token in k])
            for j in range(mu.shape[1]):
                mass = z[:, j].sum() + 1e-4
                mu[head, j] = (z[:, j, None] * k).sum(0) / mass
                nu[head, j] = (z[:, j, None] * v).sum(0) / mass
    return mu, nu


def difference(found, expected):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_defaults_are_the_equations_of_the_paper(method, dtype):
    keys, values, initial = clustered(dtype=dtype)
    found = estimate_basis(keys, values, 12, initial=initial, method=method)
    assert found[0].dtype == found[1].dtype == dtype
    expected = em_by_the_book(keys, values, initial, iterations=5, temperature=0.01)
    assert difference(found, expected) < tolerance(dtype, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_iteration_is_that_of_the_equations(method, dtype):
    keys, values = tokens(2, 150, 8, dtype=dtype)
    initial = initial_bases(keys, 20, seed=3)
    expected = [em_by_the_book(keys, values, initial, i, temperature=0.3) for i in (1, 2, 5, 6)]
    assert min(difference(x, y) for x, y in pairwise(expected)) > 1e-2
    for iterations, numbers in zip((1, 2, 5), expected[:3], strict=True):
        found = estimate_basis(keys, values, 20, iterations, 0.3, initial, method=method, block_tokens=40)
        assert difference(found, numbers) < tolerance(dtype, method)


@pytest.mark.parametrize("method", METHODS)
def test_one_iteration_is_the_equations_where_many_bases_contend_for_a_token(method):
    keys, values = tokens(3, 120, 40)
    initial = initial_bases(keys, 64, seed=3)
    found = estimate_basis(keys, values, 64, 1, 0.01, initial, method=method, block_tokens=50)
    assert difference(found, em_by_the_book(keys, values, initial, 1, 0.01)) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_responsibilities_in_blocks_are_never_subnormal_numbers(dtype):
    scores = torch.linspace(0, 1000, 300, dtype=dtype) + torch.tensor([[-500.0], [0.0], [300.0]], dtype=dtype)
    scores = torch.cat([scores, scores.flip(-1)])[None]
    expected = torch.softmax(scores, dim=-1)
    assert (expected < torch.finfo(torch.float32).tiny).any()
    found = scores.clone()
    _softmax_(found)
    assert found.min() >= torch.finfo(dtype).tiny
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-33)


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.integers(1, 4),
    n=st.integers(1, 200),
    d=st.sampled_from([12, 13, 40]),
    block=st.integers(1, 220),
    seed=st.integers(0, 1000),
)
def test_every_block_size_gives_the_dense_numbers(dtype, heads, n, d, block, seed):
    keys, values, initial = clustered(heads, n, d, 12, seed, dtype)
    dense = estimate_basis(keys, values, 12, 5, initial=initial, method="dense")
    for method in ("blockwise", "fused"):
        found = estimate_basis(keys, values, 12, 5, initial=initial, method=method, block_tokens=block)
        assert difference(found, dense) < tolerance(dtype, method)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", [1, 7, 64, 1000, 4096])
def test_block_sizes_agree_in_one_iteration_on_any_keys(dtype, block):
    keys, values = tokens(2, 1000, 40, dtype=dtype)
    dense = estimate_basis(keys, values, 32, 1, method="dense")
    assert difference(estimate_basis(keys, values, 32, 1, block_tokens=block), dense) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", METHODS)
def test_order_of_tokens_does_not_matter(method):
    keys, values, initial = clustered()
    order = torch.randperm(keys.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = estimate_basis(keys[:, order], values[:, order], 12, initial=initial, method=method, block_tokens=60)
    assert difference(shuffled, estimate_basis(keys, values, 12, initial=initial, method=method)) < 1e-12


def test_heads_are_estimated_apart():
    keys, values, initial = clustered(heads=3)
    together = estimate_basis(keys, values, 12, initial=initial)
    for h in range(3):
        alone = estimate_basis(keys[h : h + 1], values[h : h + 1], 12, initial=initial[h : h + 1])
        assert difference([x[h : h + 1] for x in together], alone) < 1e-12


def test_bases_of_clusters_are_their_means():
    keys, values, initial = clustered(n=600, m=12)
    mu, nu = estimate_basis(keys, values, 12, initial=initial)
    for found, x in ((mu, keys), (nu, values)):
        means = x.unflatten(1, (50, 12)).sum(1) / (50 + 1e-4)
        torch.testing.assert_close(found, means, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_basis_without_tokens_becomes_zero_and_stays_so(method):
    keys, values, initial = clustered(m=11)
    opposite = -initial.sum(1, keepdim=True)
    for iterations in (1, 5):
        mu, nu = estimate_basis(keys, values, 12, iterations, initial=torch.cat([initial, opposite], dim=1), method=method)
        assert mu[:, 11].abs().max() < 1e-12 and nu[:, 11].abs().max() < 1e-12
        assert mu[:, :11].norm(dim=-1).min() > 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_worked_on_in_float32_and_rounded_at_the_end(dtype, method):
    keys, values, initial = clustered(dtype=dtype)
    found = estimate_basis(keys, values, 12, initial=initial, method=method, block_tokens=64)
    exact = em_by_the_book(keys, values, initial, 5, 0.01)
    for x, expected in zip(found, exact, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), expected, rtol=torch.finfo(dtype).eps, atol=tolerance(torch.float32, method))


def test_half_precision_sums_do_not_overflow():
    keys = torch.full((1, 70_000, 1), 2.0, dtype=torch.float16)  # their sum, 140,000, is beyond float16
    mu, nu = estimate_basis(keys, 3 * keys, 1, initial=torch.ones(1, 1, 1))
    assert mu.item() == 2 and nu.item() == 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_tokens_than_bases(n, method):
    keys, values = tokens(2, n, 8)
    initial = initial_bases(keys, 32, seed=0)
    found = estimate_basis(keys, values, 32, method=method)
    assert difference(found, em_by_the_book(keys, values, initial, 5, 0.01)) < 1e-12


def test_constant_keys_give_equal_bases():
    """No spread, no difference between bases: each takes an equal part of the tokens, and their mean."""
    key = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    keys = key.expand(1, 40, 3)
    values = torch.arange(40, dtype=torch.float64)[None, :, None].expand(1, 40, 3)
    mu, nu = estimate_basis(keys, values, 4)
    torch.testing.assert_close(mu, (key * 10 / (10 + 1e-4)).expand(1, 4, 3))
    torch.testing.assert_close(nu, torch.full_like(nu, 19.5 * 10 / (10 + 1e-4)))


def test_first_bases_have_mean_and_spread_of_the_keys():
    keys = 3 * tokens(1, 500, 4)[0] + torch.tensor([5.0, 0, -5, 1])
    bases = initial_bases(keys, 40_000, seed=0)
    torch.testing.assert_close(bases.mean(1), keys.mean(1), rtol=0, atol=0.08)
    torch.testing.assert_close(bases.std(1), keys.std(1), rtol=0.02, atol=0)


def test_spread_is_that_of_a_sample_and_nothing_for_one_token():
    keys = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)  # mean 2, std sqrt(2) with n - 1
    g = torch.randn(1, 6, 1, generator=torch.Generator().manual_seed(9)).double()
    torch.testing.assert_close(initial_bases(keys, 6, seed=9), 2 + 2**0.5 * g)
    assert (initial_bases(keys[:, :1], 6, seed=9) == 1).all()


def test_the_draw_is_the_same_for_every_precision():
    keys = tokens(2, 50, 8, dtype=torch.float16)[0]
    half, single, double = (initial_bases(keys.to(t), 16, 4) for t in (torch.float16, torch.float32, torch.float64))
    assert half.dtype == torch.float32 and half.equal(single)
    torch.testing.assert_close(double.float(), single)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    keys, values = tokens(1, 60, 8)
    before = torch.get_rng_state()
    first, again, other = (estimate_basis(keys, values, 16, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(before)
    assert first.equal(again) and not torch.allclose(first, other)
    assert first.equal(estimate_basis(keys, values, 16, initial=initial_bases(keys, 16, 1))[0])


def test_inputs_are_not_changed_and_may_be_views():
    x = torch.randn(4, 30, 2 * 8, generator=torch.Generator().manual_seed(0))
    keys = x.unflatten(-1, (2, 8)).permute(2, 0, 1, 3).flatten(1, 2)
    before, initial = keys.clone(), initial_bases(keys, 8, 0)
    start = initial.clone()
    estimate_basis(keys, keys, 8, initial=initial, block_tokens=16)
    assert keys.equal(before) and initial.equal(start)


def test_works_in_inference_mode_and_keeps_no_graph():
    keys, values = tokens(1, 40, 8)
    expected = estimate_basis(keys.requires_grad_(), values, 8)
    assert not expected[0].requires_grad
    with torch.inference_mode():
        assert difference(estimate_basis(keys * 1, values * 1, 8), expected) == 0


@pytest.mark.parametrize("method, calls", [("dense", 3), ("blockwise", 3 * 4), ("fused", 3 * 4)])
def test_a_host_is_asked_before_every_block_and_can_stop_it(method, calls):
    keys, values = tokens(1, 31, 8)
    asked = []
    estimate_basis(keys, values, 4, 3, method=method, block_tokens=8, check=lambda: asked.append(1))
    assert len(asked) == calls

    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        estimate_basis(keys, values, 4, method=method, check=cancel)


@pytest.mark.parametrize(
    "method, largest",
    [
        ("dense", lambda n: n * 32),
        ("blockwise", lambda n: 2048 // (32 + 2 * 8) * 32),  # of a block, whatever the length of the clip
        ("fused", lambda n: (n + 1) * 9),  # keys with one more token and channel
    ],
)
@pytest.mark.parametrize("n", [3000, 9000])
def test_only_dense_holds_the_responsibilities_of_the_whole_video(method, largest, n, monkeypatch):
    monkeypatch.setattr("stem.em.CPU_BLOCK", 2048)
    keys, values = tokens(1, n, 8)
    own, sizes = {x.untyped_storage().data_ptr() for x in (keys, values)}, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = (x for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            sizes.extend(x.untyped_storage().nbytes() // 8 for x in found if x.untyped_storage().data_ptr() not in own)
            return out

    with Watch():
        estimate_basis(keys, values, 32, 2, method=method)
    assert max(sizes) == largest(n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["keys", "values", "initial"])
@pytest.mark.parametrize("num_bases", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_input_that_is_not_finite_is_named(bad, which, num_bases, method):
    keys, values = tokens(1, 30, 8)
    tensors = {"keys": keys, "values": values, "initial": initial_bases(keys, num_bases, 0)}
    tensors[which][0, -1, 3] = bad
    with pytest.raises(ValueError, match=f"^{which} hold NaN or infinity"):
        estimate_basis(**tensors, num_bases=num_bases, method=method, block_tokens=7)


def test_sums_that_overflow_are_an_error():
    keys = torch.full((1, 40, 2), 3e38)
    with pytest.raises(ValueError, match="overflow"):
        estimate_basis(keys, keys, 1, initial=torch.ones(1, 1, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.zeros(30, 8)}, r"keys have the shape \(30, 8\)"),
        ({"keys": torch.zeros(2, 0, 8)}, r"none of them 0"),
        ({"values": torch.zeros(2, 29, 8)}, r"values have the shape \(2, 29, 8\).*\(2, 30, 8\)"),
        ({"values": torch.zeros(2, 30, 8, dtype=torch.float16)}, "values torch.float16"),
        ({"keys": torch.zeros(2, 30, 8).int(), "values": torch.zeros(2, 30, 8).int()}, "floating-point"),
        ({"num_bases": 0}, "num_bases is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"initial": torch.zeros(2, 5, 8)}, r"initial has the shape \(2, 5, 8\).*\(2, 4, 8\)"),
        ({"method": "fast"}, 'method is "fast"'),
    ],
)
def test_arguments_that_do_not_fit_are_told(change, message):
    arguments = {"keys": torch.zeros(2, 30, 8), "values": torch.zeros(2, 30, 8), "num_bases": 4}
    with pytest.raises(ValueError, match=message):
        estimate_basis(**(arguments | change))


# ------------------------------------------------------------------------------------------- ways to save work


def test_dead_bases_of_an_earlier_estimate_are_replaced():
    bases = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [1e-9, 0.0], [0.01, 0.0]], [[0.0, 0.0]] * 4])
    fresh = 10 + torch.arange(16.0, dtype=torch.float64).reshape(2, 4, 2)
    revived = revive_bases(bases, fresh)
    assert revived.dtype == torch.float64
    assert revived[0, [0, 3]].float().equal(bases[0, [0, 3]])
    assert revived[0, [1, 2]].equal(fresh[0, [1, 2]]) and revived[1].equal(fresh[1])


def test_an_estimate_goes_on_from_an_earlier_one():
    """Three iterations and two more are five: what a warm start saves where the keys have hardly changed."""
    keys, values, initial = clustered()
    whole = estimate_basis(keys, values, 12, 5, initial=initial)
    part, _ = estimate_basis(keys, values, 12, 3, initial=initial)
    assert difference(estimate_basis(keys, values, 12, 2, initial=revive_bases(part, initial)), whole) < 1e-12


def test_derived_seeds_tell_blocks_levels_and_windows_apart():
    seeds = {
        derive_seed(seed, block, level, window)
        for seed in (0, 1)
        for block in ("input_1", "input_11", "output_1")
        for level in range(12)
        for window in range(3)
    }
    assert len(seeds) == 2 * 3 * 12 * 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, "23"), derive_seed(1, 2, 3)}) == 4


def test_derived_seeds_are_equal_in_every_process():
    code = "from stem.em import derive_seed; print(derive_seed(7, 'output_11', 3, 0))"
    run = lambda salt: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run("1").stdout) == int(run("2").stdout) == derive_seed(7, "output_11", 3, 0)


# ------------------------------------------------------------------------------------------- memory that runs out


def test_blocks_become_smaller_where_memory_runs_out(monkeypatch):
    keys, values = tokens(2, 3000, 8)
    expected, told, tried = estimate_basis(keys, values, 16, 3, block_tokens=1000), Mock(), []
    usual = em._blockwise

    def small_card(mu, parts, temperature, block_tokens, check):
        tried.append(block_tokens)
        if block_tokens > 300:
            raise torch.OutOfMemoryError("Allocation on device")
        return usual(mu, parts, temperature, block_tokens, check)

    monkeypatch.setattr(em, "_blockwise", small_card)
    memory = em.BlockMemory(tell=told)
    found = estimate_basis(keys, values, 16, 3, block_tokens=1000, memory=memory)
    assert tried == [1000, 500, 250, 250, 250] and told.call_count == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    tried.clear()
    estimate_basis(keys, values, 16, 1, block_tokens=800, memory=memory)
    assert tried == [200], "the next estimate of the run begins with a fourth of its own block"


def test_the_first_bases_are_drawn_in_smaller_blocks_too(monkeypatch):
    keys = tokens(2, 3000, 8)[0]
    expected, usual, tried = initial_bases(keys, 16, 0), em._moments, []

    def small_card(keys, block_tokens):
        tried.append(block_tokens)
        if block_tokens > 1000:
            raise MemoryError
        return usual(keys, block_tokens)

    monkeypatch.setattr(em, "_moments", small_card)
    monkeypatch.setattr(em, "CPU_BLOCK", 2000 * 2 * 2 * 8)
    torch.testing.assert_close(initial_bases(keys, 16, 0, em.BlockMemory(lambda e: isinstance(e, MemoryError))), expected)
    assert tried == [2000, 1000]
    with pytest.raises(MemoryError):
        initial_bases(keys, 16, 0)  # by itself it knows of PyTorch's error alone


@pytest.mark.parametrize("method", ["dense", "blockwise"])
def test_memory_that_does_not_suffice_for_the_smallest_block_is_an_error(method, monkeypatch):
    keys, values = tokens(1, 500, 8)

    def no_card(*_):
        raise torch.OutOfMemoryError("Allocation on device")

    monkeypatch.setattr(em, f"_{method}", no_card)
    with pytest.raises(torch.OutOfMemoryError):
        estimate_basis(keys, values, 16, 2, method=method)


@pytest.mark.parametrize("num_bases", [1, 16, 256])
def test_a_block_takes_what_is_announced(num_bases, monkeypatch):
    """Responsibilities, keys and values of a block in float32 together, however many the bases."""
    monkeypatch.setattr(em, "CPU_BLOCK", 2**14)
    keys, values = (x.half() for x in tokens(2, 4000, 40))
    blocks, usual = [], em._softmax_
    monkeypatch.setattr(em, "_softmax_", lambda z: blocks.append(z.shape) or usual(z))
    estimate_basis(keys, values, num_bases, 1)
    heads, size, bases = max(blocks)
    assert (
        4 * heads * size * (bases + 2 * 40) <= em.block_bytes(torch.device("cpu")) < 4 * heads * (size + 1) * (bases + 2 * 40)
    )
