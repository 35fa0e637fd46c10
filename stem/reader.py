"""Reading a scene from pictures: the colour and shape of its main figure, and its background.

A judge for pictures of the kind that `stem.scenes` draws, made by whatever means. It knows the palettes and the four
outlines, not the drawing: pixels are put to the nearest palette, the main figure is the largest connected region of one
colour, and its outline is told from its moments, which do not change when it turns, moves or grows.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, Scene

DARKEST = 0.8  # a figure's shading at its foot
NEAR = 0.15  # distance in RGB within which a pixel is surely of a palette
SMALLEST_FIGURE = 0.015  # of the square of the short side
LEAST_BACKGROUND = 0.5  # of the pixels outside the figure that must be near its palette
OUTLINES = {  # corners, and how far from the centre the sides come, the corners being at 1
    "circle": (64, math.cos(math.pi / 64)),
    "square": (4, math.cos(math.pi / 4)),
    "triangle": (3, math.cos(math.pi / 3)),
    "star": (5, 0.45),
}
FARTHEST, CLEAREST = 0.25, 0.7  # distance of moments to an outline; the same over that to the next best outline


class Reading(NamedTuple):
    """What a picture shows; None where it cannot be told."""

    colour: str | None
    shape: str | None
    background: str | None


def true_reading(scene: Scene) -> Reading:
    """What pictures of a scene should be read as."""
    main = scene.figures[0]
    return Reading(main.colour, main.shape, scene.background)


def read_clip(images: Tensor) -> Reading:
    """What most frames of a clip (f, height, width, 3) show; each field has its own vote, in which None counts too."""
    readings = read_images(images)
    return Reading(*(Counter(answers).most_common(1)[0][0] for answers in zip(*readings, strict=True)))


def read_images(images: Tensor) -> list[Reading]:
    """What each picture shows, on its own.

    Args:
        images: (f, height, width, 3) in 0..1.

    Raises:
        ValueError: not such a tensor, or no picture in it.
    """
    return [_read(image)[0] for image in _pictures(images)]


def main_figures(images: Tensor) -> Tensor:
    """Where each picture shows its main figure, (f, height, width) of 0 and 1; nowhere if it shows none.

    Args:
        images: (f, height, width, 3) in 0..1.

    Raises:
        ValueError: not such a tensor, or no picture in it.
    """
    return torch.stack([_read(image)[1] for image in _pictures(images)]).float()


def _pictures(images: Tensor) -> Tensor:
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; give (frames, height, width, 3).")
    return images.detach().cpu().float()


def _read(image: Tensor) -> tuple[Reading, Tensor]:
    """What one picture (height, width, 3) shows, and the region (height, width) of its main figure."""
    height, width = image.shape[:2]
    smallest = SMALLEST_FIGURE * min(height, width) ** 2
    to_grounds = torch.stack([_distance(image, low, high) for low, high in map(torch.tensor, BACKGROUNDS.values())])
    to_colours = torch.stack([_distance(image, DARKEST * c, c) for c in map(torch.tensor, COLOURS.values())])
    background = _background(to_grounds, to_colours)
    to_ground = to_grounds.amin(0) if background is None else to_grounds[list(BACKGROUNDS).index(background)]
    # Soft edges pass by other palettes: only colours that fill some area take part, and the background that is there.
    sure = (to_colours < NEAR) & (to_colours < to_grounds.amin(0))
    there = sure.sum((1, 2)) > smallest / 2
    names = [name for name, some in zip(COLOURS, there.tolist(), strict=True) if some]
    nearest = torch.cat([to_ground[None], to_colours[there]]).argmin(0)
    regions = [_largest_region(nearest == i) for i in range(1, len(names) + 1)]
    colour, region = max(zip(names, regions, strict=True), key=lambda found: found[1].sum(), default=(None, None))
    if colour is None or region.sum() < smallest:
        return Reading(None, None, background), torch.zeros(height, width, dtype=torch.bool)
    return Reading(colour, _shape(region), background), region


def _background(to_grounds: Tensor, to_colours: Tensor) -> str | None:
    """The palette that most pixels of no figure are nearest to, if most of those are really near it."""
    outside = to_grounds.amin(0) < to_colours.amin(0)
    votes = torch.bincount(to_grounds.argmin(0)[outside], minlength=len(BACKGROUNDS))
    best = int(votes.argmax())
    near = (to_grounds[best] < NEAR) & outside
    return list(BACKGROUNDS)[best] if near.sum() > LEAST_BACKGROUND * outside.sum() else None


def _distance(image: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distance in RGB of every pixel (height, width) to the line between two colours."""
    line = end - start
    along = ((image - start) @ line / line.dot(line)).clamp(0, 1)
    return (image - start - along[..., None] * line).norm(dim=-1)


def _largest_region(mask: Tensor) -> Tensor:
    """The largest connected part of a mask (height, width)."""
    rows, columns = _runs(mask), _runs(mask.T).T
    region, before = rows, None
    while before is None or not region.equal(before):  # the highest number in a region spreads over all of it
        before = region
        for runs in (columns, rows):
            highest = torch.zeros(mask.numel() + 1, dtype=torch.int64)
            highest.scatter_reduce_(0, runs.flatten(), region.flatten(), "amax")
            region = highest[runs]
    counts = torch.bincount(region.flatten())
    counts[0] = 0
    return mask & (region == counts.argmax())


def _runs(mask: Tensor) -> Tensor:
    """A number from 1 for each unbroken run in the rows of a mask (height, width), 0 where the mask is not."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return torch.cumsum((mask & ~before).flatten(), 0).reshape(mask.shape) * mask


def _shape(region: Tensor) -> str | None:
    """The outline whose moments are nearest to those of a region (height, width), if it is near and no other is."""
    at = region.nonzero().double()
    y, x = (at - at.mean(0)).unbind(-1)
    found = _moments(len(at), x**2 + y**2, torch.atan2(y, x))
    gaps = {name: float((found - _outline_moments(*outline)).norm()) for name, outline in OUTLINES.items()}
    best, second = sorted(gaps, key=gaps.get)[:2]
    return best if gaps[best] < min(FARTHEST, CLEAREST * gaps[second]) else None


def _outline_moments(corners: int, side: float) -> Tensor:
    """Moments of a star of straight sides, which run from every corner at radius 1 to `side` halfway to the next one."""
    angle = torch.arange(0, 2 * math.pi, math.pi / 1024, dtype=torch.float64)
    half = math.pi / corners
    a = half - (angle % (2 * half) - half).abs()  # from the nearest corner
    radius = side * math.sin(half) / (side * torch.sin(half - a) + torch.sin(a))
    step = 2 * math.pi / len(angle)
    return _moments(float((radius**2).sum() * step / 2), radius**4 * step / 4, angle)


def _moments(area: float, inertia: Tensor, angle: Tensor) -> Tensor:
    """How round a region is (1: a disc), and how far it repeats itself k times in a turn, k = 1..8.

    Args:
        area: of the region.
        inertia: of its parts, squared distance from the centre times area.
        angle: of its parts, seen from the centre.
    """
    total = inertia.sum()
    turns = rearrange(torch.arange(1, 9, dtype=angle.dtype), "k -> k 1") * angle
    harmonics = torch.hypot(turns.cos() @ inertia, turns.sin() @ inertia) / total
    return torch.cat([(area**2 / (2 * math.pi * total)).reshape(1), harmonics])
