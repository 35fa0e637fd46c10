"""Trajectory: the path of a video's latents from clean to noise, which editors follow and compare with.

A NamedTuple of tensors on the CPU, lists and tuples only: ComfyUI's cache counts the memory of nothing else.
"""

from typing import NamedTuple

from torch import Tensor

from .basis import BasisSettings, ModelFingerprint
from .ddim import nearest_level


class InversionSettings(NamedTuple):
    """How the trajectory was made."""

    method: str  # "stem", "ddim", "first_previous" or "all_frames"
    steps: int
    basis: BasisSettings | None  # None where the method has no bases


class Trajectory(NamedTuple):
    latents: Tensor  # (t+1, f, c, height, width) x = z0 + sigma eps in the model's scale, clean to noisiest, CPU
    sigmas: Tensor  # (t+1,) level of each, ascending, CPU
    conditioning: list  # of the source prompt, as the host gave it; opaque here
    settings: InversionSettings
    model: ModelFingerprint


def latents_at(trajectory: Trajectory, sigma: float | Tensor, rtol: float = 1e-3) -> Tensor:
    """Latents (f, c, height, width) that were recorded at the level `sigma`.

    Raises:
        ValueError: no level within the relative tolerance; latents of another level would not do.
    """
    level = nearest_level(trajectory.sigmas, sigma)
    nearest = float(trajectory.sigmas[level])
    if abs(nearest - float(sigma)) > rtol * nearest:
        raise ValueError(
            f"the trajectory has no latents at sigma {float(sigma):.6g}, the nearest is {nearest:.6g}; "
            f"sample on the sigmas of its inversion ({trajectory.settings.steps} steps)."
        )
    return trajectory.latents[level]
