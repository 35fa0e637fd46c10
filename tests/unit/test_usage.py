"""How tokens use bases, beside closed forms."""

import math

import pytest
import torch

from stem.em import EPSILON, alive, estimate_basis, initial_bases
from stem.usage import convergence, effective_number, fit, read_usage


def test_tokens_choose_their_basis():
    bases = 2 * torch.eye(4)
    tokens = torch.tensor([3, 0, 0, 2, 0, 1])
    usage = read_usage(torch.eye(4)[tokens], bases, 0.01)
    assert torch.equal(usage.chosen, tokens)
    torch.testing.assert_close(usage.responsibility, torch.ones(6))
    torch.testing.assert_close(usage.mass, torch.tensor([3.0, 1, 1, 1]))


def test_responsibilities_are_those_of_the_softmax():
    cosine, temperature = 2 / (2 + EPSILON), 0.5  # the norm that a basis of length 2 is divided by
    usage = read_usage(torch.tensor([[1.0, 0.0]]), 2 * torch.eye(2), temperature)
    expected = 1 / (1 + math.exp(-cosine / temperature))
    torch.testing.assert_close(usage.mass, torch.tensor([expected, 1 - expected]))
    torch.testing.assert_close(usage.responsibility, torch.tensor([expected]))


@pytest.mark.parametrize(("mass", "number"), [([7.0, 7, 7, 0], 3), ([5.0, 0, 0], 1), ([1.0] * 8, 8)])
def test_equal_shares_count_as_so_many(mass, number):
    assert effective_number(torch.tensor(mass)) == pytest.approx(number)


def test_uneven_shares_count_as_the_perplexity():
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_number(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


def test_fit_of_keys_that_are_their_bases():
    bases, temperature = 3 * torch.eye(4), 0.01
    expected = 3 / (3 + EPSILON) - temperature * math.log(4) / 3  # other bases do not count at this temperature
    assert fit(bases, bases, temperature) == pytest.approx(expected, abs=1e-6)


def test_fit_of_one_basis_is_the_mean_cosine_by_length():
    keys = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert fit(keys, torch.tensor([[5.0, 0.0]]), 0.2) == pytest.approx(5 / (5 + EPSILON) / 4)


def test_fit_does_not_depend_on_the_blocks(monkeypatch):
    keys, bases = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(0)).split(1)
    whole = fit(keys[0], bases[0, :20], 0.1), read_usage(keys[0], bases[0, :20], 0.1)
    monkeypatch.setattr("stem.usage.block_bytes", lambda device: 4 * 20 * 7)  # seven tokens
    assert fit(keys[0], bases[0, :20], 0.1) == pytest.approx(whole[0])
    for one, other in zip(read_usage(keys[0], bases[0, :20], 0.1), whole[1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_every_round_of_em_raises_the_fit(temperature):
    keys = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(4))
    found = convergence(keys[0], initial_bases(keys, 16, 0)[0], 4, 6, temperature)
    assert len(found.fit) == 11
    assert (found.fit.diff() > -1e-5).all() and found.fit[-1] > found.fit[0] + 0.01


def test_its_rounds_are_those_of_the_estimate():
    keys = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(5))
    initial = initial_bases(keys, 12, 3)
    expected, _ = estimate_basis(keys, keys, 12, iterations=3, temperature=0.3, initial=initial)
    found = convergence(keys[0], initial[0], 3, 2, 0.3)
    torch.testing.assert_close(found.bases, expected[0])
    assert float(found.fit[3]) == pytest.approx(fit(keys[0], expected[0], 0.3))


def test_a_basis_that_no_token_chooses_is_not_alive():
    keys = torch.eye(3)[:2].repeat(5, 1)[None]
    initial = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 0]]])
    bases, _ = estimate_basis(keys, keys, 4, iterations=1, temperature=0.001, initial=initial)
    assert alive(bases).tolist() == [[True, True, False, False]]


def test_work_can_be_cancelled():
    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        read_usage(torch.ones(3, 2), torch.eye(2), 0.1, cancel)
    with pytest.raises(InterruptedError):
        convergence(torch.ones(3, 2), torch.eye(2), 1, 0, 0.1, cancel)
