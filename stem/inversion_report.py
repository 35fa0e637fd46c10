"""How good an inversion is: the clip that comes back beside its source, and the latents beside a unit Gaussian."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .chart import BLUE, GREEN, INK, ORANGE, PALE, Line, Panel, draw_chart
from .ddim import to_ddim
from .metrics import estimate_flow, flicker, psnr_per_frame, ssim
from .trajectory import Trajectory, latents_at

LARGEST = 512
"""Longer edge in pixels at which motion is followed; larger clips are made smaller for it."""

ABOUT = (
    "(Flicker: mean absolute change from frame to frame along the motion of the source, which Lucas and Kanade's method "
    f"follows in frames of at most {LARGEST} pixels. Latents: x / sqrt(1 + sigma^2). Of unit Gaussian noise, new in each "
    "frame, the mean is 0, std 1, excess kurtosis 0, correlation with the next frame 0.)"
)

LEAST = 16
"""Pixels that `estimate_flow` needs."""


class LatentStatistics(NamedTuple):
    """Of x / sqrt(1 + sigma^2), each level's (t+1,)."""

    mean: Tensor
    std: Tensor
    kurtosis: Tensor  # less the 3 of a Gaussian
    neighbours: Tensor  # correlation of frames with the next one; NaN for a single frame


class InversionFigures(NamedTuple):
    method: str  # of the inversion
    psnr: Tensor  # (f,) dB; infinite for equal frames
    ssim: Tensor  # (f,)
    flicker_source: Tensor  # (f - 1,) along the source's motion; NaN where no motion is known; (0,) for a single frame
    flicker: Tensor  # (f - 1,) of the reconstruction
    latents: LatentStatistics


def check_clips(trajectory: Trajectory, source: Tensor, reconstruction: Tensor) -> None:
    """Raises a ValueError where the clips are not of one size, or not of the trajectory's length."""
    if source.shape[1:3] != reconstruction.shape[1:3]:
        sizes = [f"{clip.shape[2]} x {clip.shape[1]}" for clip in (source, reconstruction)]
        raise ValueError(
            f"source is {sizes[0]} and reconstruction {sizes[1]} pixels. Connect frames of one size: those that went into VAE "
            "Encode and those that come out of VAE Decode, or scale one to the other."
        )
    frames = trajectory.latents.shape[1]
    if not len(source) == len(reconstruction) == frames:
        raise ValueError(
            f"source has {len(source)} frames, reconstruction {len(reconstruction)}, the trajectory {frames}. Connect the "
            "clip that was inverted and what was sampled from it, all frames of both."
        )


def measure(
    trajectory: Trajectory, source: Tensor, reconstruction: Tensor, done: Callable[[], None] = lambda: None
) -> InversionFigures:
    """Frame by frame and level by level, so that memory does not grow with the clip.

    Args:
        trajectory: Of the clip.
        source, reconstruction: (f, height, width, 3), 0..1.
        done: Called 2 f - 1 + t + 1 times; a host can raise from it to cancel.
    """
    similar = []
    for one, other in zip(reconstruction.split(1), source.split(1), strict=True):
        similar.append((psnr_per_frame(one, other)[0], ssim(one, other)))
        done()
    decibels, structure = (torch.tensor([float(x) for x in column]) for column in zip(*similar, strict=True))
    steadiness = []
    for frame in range(len(source) - 1):
        pairs = [_small(clip[frame : frame + 2]) for clip in (source, reconstruction)]
        steadiness.append(_flicker_of_pair(*pairs))
        done()
    of_source, of_reconstruction = torch.tensor(steadiness).reshape(-1, 2).unbind(1)
    return InversionFigures(
        trajectory.settings.method, decibels, structure, of_source, of_reconstruction, latent_statistics(trajectory, done)
    )


def latent_statistics(trajectory: Trajectory, done: Callable[[], None] = lambda: None) -> LatentStatistics:
    """Of every level, one after another."""
    found = []
    for level, sigma in enumerate(trajectory.sigmas.tolist()):
        z = to_ddim(latents_at(trajectory, level), sigma).double()
        mean, std = z.mean(), z.std(correction=0)
        kurtosis = ((z - mean) ** 4).mean() / std**4 - 3
        flat = rearrange(z, "f c y x -> f (c y x)")
        flat = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
        found.append([float(x) for x in (mean, std, kurtosis, (flat[1:] * flat[:-1]).sum(1).mean())])
        done()
    return LatentStatistics(*torch.tensor(found).unbind(1))


def inversion_text(figures: InversionFigures) -> str:
    """The figures in words and a line for each frame and level."""
    decibels, latents = figures.psnr, figures.latents
    lines = [f"Inversion by {figures.method}, sampled back:", *_summary(figures), ABOUT, "", "frame  PSNR dB    SSIM"]
    lines += [
        f"{i:>5}  {_decibels(a):>7}  {b:6.4f}" for i, (a, b) in enumerate(zip(decibels, figures.ssim.tolist(), strict=True))
    ]
    lines += ["", "level    mean     std  kurtosis  next frame"]
    columns = zip(*(column.tolist() for column in latents), strict=True)
    lines += [f"{i:>5}  {a:6.3f}  {b:6.3f}  {c:8.3f}  {d:10.3f}" for i, (a, b, c, d) in enumerate(columns)]
    return "\n".join(lines)


def inversion_chart(figures: InversionFigures) -> Tensor:
    """An image (1, height, width, 3)."""
    frames = torch.arange(len(figures.psnr))
    latents = figures.latents
    levels = torch.arange(len(latents.mean))
    panels = [
        Panel("PSNR to the source (dB, more is nearer)", "frame", frames, (Line("", figures.psnr, BLUE),)),
        Panel("SSIM to the source (1 = equal)", "frame", frames, (Line("", figures.ssim, BLUE),)),
    ]
    if figures.flicker.isfinite().any():
        panels.append(
            Panel(
                "Flicker along the source's motion (less is steadier)",
                "frame, to the next one",
                frames[:-1],
                (Line("source", figures.flicker_source, INK, dashed=True), Line("reconstruction", figures.flicker, ORANGE)),
                low=0.0,
            )
        )
    panels.append(
        Panel(
            "Latents (unit Gaussian: deviation 1, the others 0)",
            "noise level, 0 = clean",
            levels,
            (
                *(Line("", torch.full_like(latents.mean, ideal), PALE, dashed=True) for ideal in (0.0, 1.0)),
                Line("deviation", latents.std, BLUE),
                Line("mean", latents.mean, ORANGE),
                Line("like next frame", latents.neighbours, GREEN, dashed=True),
            ),
        )
    )
    return draw_chart(_summary(figures), panels)


def _summary(figures: InversionFigures) -> list[str]:
    latents = figures.latents
    steady = figures.flicker.isfinite() & figures.flicker_source.isfinite()
    lines = [f"PSNR {_decibels(_mean_decibels(figures.psnr))} dB, SSIM {float(figures.ssim.mean()):.4f}"]
    if steady.any():
        own, back = (float(x[steady].mean()) for x in (figures.flicker_source, figures.flicker))
        lines.append(f"Flicker {back:.4f}, of the source {own:.4f}")
    else:
        lines.append("Flicker unknown: no motion from frame to frame that can be followed")
    lines.append(f"Last level: mean {float(latents.mean[-1]):.3f}, deviation {float(latents.std[-1]):.3f}")
    return lines


def _mean_decibels(decibels: Tensor) -> Tensor:
    """Of the mean squared error of frames of one size."""
    return -10 * torch.log10((10 ** (-decibels.double() / 10)).mean())


def _decibels(value: Tensor) -> str:
    return f"{float(value):.2f}" if value.isfinite() else "equal"


def _flicker_of_pair(source: Tensor, reconstruction: Tensor) -> tuple[float, float]:
    """Of two frames (2, height, width, 3) each; NaN where no motion can be followed."""
    if min(source.shape[1:3]) < LEAST:
        return float("nan"), float("nan")
    flow, valid = estimate_flow(source)
    try:
        return flicker(source, flow, valid), flicker(reconstruction, flow, valid)
    except ValueError:  # not a pixel is to be trusted
        return float("nan"), float("nan")


def _small(images: Tensor) -> Tensor:
    """Frames of which the longer edge is at most `LARGEST`."""
    height, width = images.shape[1:3]
    factor = LARGEST / max(height, width)
    if factor >= 1:
        return images
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    images = rearrange(images, "f y x c -> f c y x")
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return rearrange(images, "f c y x -> f y x c")
