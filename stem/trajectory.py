"""Trajectory: the path of a video's latents from clean to noise, which editors follow and compare with.

A NamedTuple of tensors on the CPU, lists and tuples only: ComfyUI's cache counts the memory of nothing else. The latents of
long clips may be kept on disk, or in half precision; `latents_at` reads a level of either.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .basis import BasisSettings, ModelFingerprint
from .level_files import Levels


class InversionSettings(NamedTuple):
    """How the trajectory was made."""

    method: str  # "stem", "ddim", "first_previous" or "all_frames"
    steps: int
    basis: BasisSettings | None  # None where the method has no bases


class Trajectory(NamedTuple):
    latents: Levels  # (t+1, f, c, height, width) x = z0 + sigma eps in the model's scale, clean to noisiest
    sigmas: Tensor  # (t+1,) level of each, ascending, CPU
    conditioning: list  # of the source prompt, as the host gave it; opaque here
    settings: InversionSettings
    model: ModelFingerprint


def steps_above(trajectory: Trajectory, sigma: float) -> int:
    """How many of the trajectory's levels are noisier: the number of a sampler's step, the noisiest being 0."""
    return int((trajectory.sigmas > sigma * 1.001).sum())


def latents_at(trajectory: Trajectory, level: int) -> Tensor:
    """Latents (f, c, height, width) of one recorded level, float32 on the CPU.

    Raises:
        ValueError: Some of them are no finite numbers, as an editor would spread over the clip.
    """
    latents = trajectory.latents[level].float()
    if not latents.isfinite().all():
        raise ValueError(
            f"the trajectory's latents at sigma {float(trajectory.sigmas[level]):.4g} are no finite numbers; invert the clip "
            "again."
        )
    return latents


def latents_between(trajectory: Trajectory, sigma: float | Tensor) -> Tensor:
    """Latents (f, c, height, width) at any level the trajectory covers.

    Between two recorded levels the path of an inversion is a straight line in x, so nothing is lost by walking along it. Below
    the first level, where sampling may end, it goes on in the first direction.

    Raises:
        ValueError: sigma above the last level, or latents that are no finite numbers.
    """
    sigmas, sigma = trajectory.sigmas, float(sigma)
    if sigma > float(sigmas[-1]) * 1.001:
        raise ValueError(
            f"the trajectory ends at sigma {float(sigmas[-1]):.6g}, latents are needed at {sigma:.6g}; "
            f"sample on the sigmas of its inversion ({trajectory.settings.steps} steps)."
        )
    above = int((sigmas < sigma).sum().clamp(1, len(sigmas) - 1))
    share = (sigma - float(sigmas[above - 1])) / float(sigmas[above] - sigmas[above - 1])
    if share == 0 or share >= 1:  # a recorded level, and the other one is not read
        return latents_at(trajectory, above if share else above - 1)
    return torch.lerp(latents_at(trajectory, above - 1), latents_at(trajectory, above), share)


def check_trajectory(trajectory: Trajectory, model: ModelFingerprint) -> None:
    """Whether a model can follow the trajectory.

    Raises:
        ValueError: It was recorded with another family, prediction type or other blocks.
    """
    if trajectory.model != model:
        raise ValueError(
            f"the trajectory was recorded with a {trajectory.model.family} model ({trajectory.model.prediction} prediction, "
            f"{len(trajectory.model.blocks)} blocks), this model is {model.family} ({model.prediction} prediction, "
            f"{len(model.blocks)} blocks); invert the clip with this model."
        )
