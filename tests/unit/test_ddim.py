"""Noise levels and updates against the abar form of DDIM and against the diffusers schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from stem.ddim import (
    from_ddim,
    inversion_input,
    inversion_update,
    nearest_level,
    noise_levels,
    predicted_noise,
    sampling_update,
    stable_diffusion_sigmas,
    start_latent,
    to_ddim,
)

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def eps_model(z, timestep):
    """A smooth stand-in for a model: the noise it sees in z at a timestep."""
    return 0.5 * torch.sin(z + timestep / 300) + 0.3 * z


def denoised_of(x, timestep, sigma):
    """What a host answers: the model is shown x / sqrt(1 + sigma^2) and sigma eps is taken off x."""
    return x - sigma * eps_model(x / (1 + sigma**2) ** 0.5, timestep)


def invert(z, levels, timesteps):
    x = start_latent(z, levels)
    for a, b, t in zip(levels[:-1], levels[1:], timesteps, strict=True):
        x = inversion_update(x, denoised_of(inversion_input(x, a, b), t, b), a, b)
    return x


def sample(x, levels, timesteps):
    for a, b, t in zip(levels.flip(0)[:-1], levels.flip(0)[1:], timesteps[::-1], strict=True):
        x = sampling_update(x, denoised_of(x, t, a), a, b)
    return to_ddim(x, levels[0])


@pytest.fixture
def z():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def leading(steps):
    return [1 + i * (1000 // steps) for i in range(steps)]


def test_sigmas_are_those_of_stable_diffusion():
    reference = {
        0: 0.999149978,
        1: 0.998296022,
        21: 0.980380654,
        201: 0.752143085,
        501: 0.274998844,
        981: 0.005775496,
        999: 0.004660095,
    }
    sigmas = stable_diffusion_sigmas()
    assert sigmas.shape == (1000,) and sigmas.dtype == torch.float32
    for timestep, alpha_bar in reference.items():
        assert 1 / (1 + sigmas[timestep].double() ** 2) == pytest.approx(alpha_bar, rel=2e-6)
    assert sigmas[0].item() == pytest.approx(0.0291672, rel=1e-5)
    assert sigmas[999].item() == pytest.approx(14.6146, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 10, 30, 50, 143, 500, 999])
def test_levels_are_those_of_the_diffusers_schedule(steps):
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(steps)
    expected = [0, *scheduler.timesteps.tolist()[::-1]]
    assert expected[1:] == leading(steps)
    table = torch.arange(1000.0) + 0.5
    assert noise_levels(table, steps).tolist() == [t + 0.5 for t in expected]


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_steps_out_of_range_are_told(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; choose 1 to 999"):
        noise_levels(stable_diffusion_sigmas(), steps)


def test_a_table_of_the_wrong_shape_is_told():
    with pytest.raises(ValueError, match=r"\(10, 100\)"):
        noise_levels(torch.ones(10, 100), 5)


def test_nearest_level_is_measured_in_the_logarithm():
    sigmas = torch.tensor([0.01, 1.0, 100.0])
    assert [nearest_level(sigmas, s) for s in (0.0, 0.09, 0.11, 9.9, 10.1, 1e9)] == [0, 0, 1, 1, 2, 2]
    assert nearest_level(sigmas, torch.tensor(50.0)) == 2


def test_ddim_and_sampler_latents_convert_into_each_other(z):
    sigma, eps = 2.5, torch.ones_like(z)
    alpha_bar = 1 / (1 + sigma**2)
    noisy = alpha_bar**0.5 * z + (1 - alpha_bar) ** 0.5 * eps
    torch.testing.assert_close(from_ddim(noisy, sigma), z + sigma * eps)
    torch.testing.assert_close(to_ddim(z + sigma * eps, sigma), noisy)


def test_predicted_noise_is_what_was_added(z):
    torch.testing.assert_close(predicted_noise(z + 3.0, z, 1.5), torch.full_like(z, 2.0))


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_inversion_is_the_destination_timestep_update_in_alpha_bar_form(z, steps):
    sigmas = stable_diffusion_sigmas().double()
    alpha_bar = 1 / (1 + sigmas**2)
    expected, previous = z, alpha_bar[0]
    for t in leading(steps):
        eps = eps_model(expected, t)
        clean = (expected - (1 - previous).sqrt() * eps) / previous.sqrt()
        expected = alpha_bar[t].sqrt() * clean + (1 - alpha_bar[t]).sqrt() * eps
        previous = alpha_bar[t]
    levels = noise_levels(sigmas, steps)
    torch.testing.assert_close(to_ddim(invert(z, levels, leading(steps)), levels[-1]), expected, rtol=0, atol=1e-11)


def test_inversion_is_that_of_diffusers(z):
    scheduler = DDIMInverseScheduler(**SD)
    scheduler.set_timesteps(50)
    expected = z
    for t in scheduler.timesteps:
        expected = scheduler.step(eps_model(expected, int(t)), t, expected).prev_sample
    assert scheduler.timesteps.tolist() == leading(50)
    levels = noise_levels(stable_diffusion_sigmas().double(), 50)
    found = to_ddim(invert(z, levels, leading(50)), levels[-1])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_sampling_is_that_of_diffusers(z):
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(50)
    expected = z
    for t in scheduler.timesteps:
        expected = scheduler.step(eps_model(expected, int(t)), t, expected, eta=0.0).prev_sample
    levels = noise_levels(stable_diffusion_sigmas().double(), 50)
    found = sample(from_ddim(z, levels[-1]), levels, leading(50))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_inversion_and_sampling_cancel_out_where_the_noise_does_not_depend_on_the_latent(z):
    levels = noise_levels(stable_diffusion_sigmas().double(), 20)
    eps = torch.cos(torch.arange(z.numel(), dtype=z.dtype)).reshape(z.shape)
    x = start_latent(z, levels)
    for a, b in pairwise(levels):
        x = inversion_update(x, inversion_input(x, a, b) - b * eps, a, b)
    assert (x - start_latent(z, levels)).abs().max() > 1
    for a, b in pairwise(levels.flip(0)):
        x = sampling_update(x, x - a * eps, a, b)
    torch.testing.assert_close(to_ddim(x, levels[0]), z, rtol=0, atol=1e-12)


def test_more_steps_bring_the_clip_back_more_nearly(z):
    errors = []
    for steps in (10, 50, 250):
        levels = noise_levels(stable_diffusion_sigmas().double(), steps)
        back = sample(invert(z, levels, leading(steps)), levels, leading(steps))
        errors.append((back - z).norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
