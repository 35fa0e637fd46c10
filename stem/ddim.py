"""DDIM noise levels and the deterministic steps between them, up (inversion) and down (sampling).

Two ways to write a noisy latent: DDIM's z = sqrt(abar) z0 + sqrt(1 - abar) eps, and the x = z / sqrt(abar) =
z0 + sigma eps that k-diffusion and ComfyUI sample in, sigma = sqrt((1 - abar) / abar). A DDIM step is a
straight line in x. Functions here work on x unless they say otherwise, and take the model's denoised latent,
which is the same for every prediction type.

Source: Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eq. 12 with eta 0, with the
schedule and the pairing of latents and timesteps that the code of TokenFlow, STEM inversion, FateZero and
Tune-A-Video share.
"""

import torch
from torch import Tensor


def stable_diffusion_sigmas() -> Tensor:
    """Sigma of each of the 1000 timesteps of Stable Diffusion 1 and 2, (1000,) float32 on the CPU.

    Source: the "scaled_linear" betas, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu") ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def noise_levels(sigmas: Tensor, steps: int) -> Tensor:
    """The levels that an inversion climbs, clean to noisy: sigma at the timesteps 0, 1, 1 + s, 1 + 2 s, ...

    The stride is s = timesteps // steps ("leading" spacing with offset 1), so the last level is 981 for 50 of
    1000 timesteps, and falls well short of the noisiest where `steps` does not divide them: 501 steps end at
    timestep 501. A clean latent counts as timestep 0, not as sigma = 0 ("set_alpha_to_one" false).

    Args:
        sigmas: sigma of every timestep, ascending, (timesteps,); 1000 of them in Stable Diffusion.
        steps: 1 to timesteps - 1.

    Returns:
        (steps + 1,), ascending; sampling goes through them in the opposite direction.

    Raises:
        ValueError: steps out of range. As many steps as timesteps would ask for one timestep too many.
    """
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas have the shape {tuple(sigmas.shape)}; needed is one per timestep, (timesteps,).")
    if not 1 <= steps < len(sigmas):
        raise ValueError(f"steps is {steps}; choose 1 to {len(sigmas) - 1} for a model with {len(sigmas)} timesteps.")
    stride = len(sigmas) // steps
    timesteps = torch.tensor([0, *(1 + i * stride for i in range(steps))], device=sigmas.device)
    return sigmas[timesteps]


def nearest_level(sigmas: Tensor, sigma: float | Tensor) -> int:
    """Index of the level nearest to `sigma` on a logarithmic scale; sigmas: (t,), above 0."""
    sigma = max(float(sigma), torch.finfo(sigmas.dtype).tiny)
    return int((sigmas / sigma).log().abs().argmin())


def from_ddim(z: Tensor, sigma: float | Tensor) -> Tensor:
    """x = z / sqrt(abar) = z sqrt(1 + sigma^2)."""
    return z * (1 + sigma**2) ** 0.5


def to_ddim(x: Tensor, sigma: float | Tensor) -> Tensor:
    """z = sqrt(abar) x = x / sqrt(1 + sigma^2)."""
    return x / (1 + sigma**2) ** 0.5


def start_latent(latent: Tensor, levels: Tensor) -> Tensor:
    """Where an inversion starts: the clean latent, in the model's scale, is the z of the first level.

    At the end of sampling, `to_ddim(x, levels[0])` is the clean latent.
    """
    return from_ddim(latent, levels[0])


def inversion_input(x: Tensor, source: float | Tensor, destination: float | Tensor) -> Tensor:
    """What the model is shown, at sigma `destination`, on the way from `source` up to `destination`.

    It sees the timestep that is being entered with the latent that is being left, z of the source level. A
    host divides its input by sqrt(1 + destination^2), hence x sqrt((1 + destination^2) / (1 + source^2)).

    Source: diffusers' DDIMInverseScheduler and the official code of the editors; plain Euler steps on rising
    sigmas pair the latent with the timestep that is being left instead.
    """
    return x * ((1 + destination**2) / (1 + source**2)) ** 0.5


def predicted_noise(x: Tensor, denoised: Tensor, sigma: float | Tensor) -> Tensor:
    """eps = (x - denoised) / sigma, of an input x at the level `sigma` that the model was shown."""
    return (x - denoised) / sigma


def inversion_update(x: Tensor, denoised: Tensor, source: float | Tensor, destination: float | Tensor) -> Tensor:
    """One step up, from `source` to `destination`: x + (destination - source) eps.

    Args:
        x: latent at the level `source`.
        denoised: the model's answer to `inversion_input(x, source, destination)` at sigma `destination`.
        source: sigma to leave.
        destination: sigma to enter.
    """
    eps = predicted_noise(inversion_input(x, source, destination), denoised, destination)
    return x + (destination - source) * eps


def sampling_update(x: Tensor, denoised: Tensor, source: float | Tensor, destination: float | Tensor) -> Tensor:
    """One step down, from `source` to `destination`, DDIM with eta 0, an Euler step in x.

    Args:
        x: latent at the level `source`.
        denoised: the model's answer to x at sigma `source`.
        source: sigma to leave.
        destination: sigma to enter.
    """
    return x + (destination - source) * predicted_noise(x, denoised, source)
