"""A colour for every basis, and clips painted with them.

Bases alike have colours alike, so that what belongs together is seen as one; but bases that touch anywhere in the clip differ
so much that their border is seen. A basis has the same colour in all frames.

Colours are mixed in OKLab, where distances are about those that people see, and given in sRGB, 0..1.
Source of OKLab's numbers: Ottosson, "A perceptual color space for image processing", 2020.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize, pad

APART = 0.05
"""OKLab distance of bases that touch, where there is room for it; about 0.02 is just seen."""

LIGHTNESS, COLOURFUL = (0.42, 0.9), 0.05  # neither black, white nor grey
STEP = 0.03  # between the colours of the palette
SPREAD = (0.12, 0.17, 0.17)  # of lightness, green to red, and blue to yellow, where components spread alike

TO_CONES = ((1.0, 0.3963377774, 0.2158037573), (1.0, -0.1055613458, -0.0638541728), (1.0, -0.0894841775, -1.2914855480))
TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def colour_bases(bases: Tensor, mass: Tensor, chosen: Tensor) -> Tensor:
    """sRGB (m, 3) of the bases.

    Args:
        bases: (m, d) of the keys.
        mass: (m,) how many tokens each stands for.
        chosen: (f, y, x) the basis of every patch.
    """
    return srgb(tell_apart(wanted_colours(bases, mass), touching(chosen, len(bases)), mass))


def wanted_colours(bases: Tensor, mass: Tensor) -> Tensor:
    """OKLab (m, 3) by content: the principal components of the bases' directions, each basis weighed by its tokens.

    The first goes from green to red, the second from blue to yellow, the third is lightness. What stands out from most tokens
    (the side with the longer tail) is red, yellow and light. Weaker components have weaker colours, by the root of their
    spread.

    Args:
        bases: (m, d).
        mass: (m,).
    """
    directions = normalize(bases.double(), dim=-1)
    weight = rearrange(mass.double() / mass.double().sum(), "m -> m 1")
    centred = directions - (weight * directions).sum(0)
    _, axes = torch.linalg.eigh(centred.T @ (weight * centred))
    found = pad(centred @ axes.flip(1)[:, :3], (0, max(0, 3 - bases.shape[1])))  # the greatest first
    tail = (weight * found**3).sum(0)
    spread = (weight * found**2).sum(0).sqrt()
    found = found * torch.where(tail < 0, -1.0, 1.0) / ((spread * spread[0]).sqrt() + 1e-9)
    first, second, third = found.unbind(1)
    lab = torch.stack([third, first, second], dim=1) * found.new_tensor(SPREAD)
    lab[:, 0] += sum(LIGHTNESS) / 2
    return lab.float()


def touching(chosen: Tensor, bases: int) -> Tensor:
    """Which bases have patches side by side in any frame, (m, m) of bools, from the basis of every patch (f, y, x)."""
    found = torch.zeros(bases, bases, dtype=torch.bool, device=chosen.device)
    for one, other in ((chosen[:, 1:], chosen[:, :-1]), (chosen[:, :, 1:], chosen[:, :, :-1])):
        found[one.flatten(), other.flatten()] = True
    return (found | found.T).fill_diagonal_(False)


def tell_apart(wanted: Tensor, neighbours: Tensor, mass: Tensor) -> Tensor:
    """OKLab (m, 3) near the wanted ones (m, 3), but apart where bases are neighbours (m, m).

    The bases choose one after another, those of most tokens (m,) first: the colour nearest to what they want that is `APART`
    from their neighbours' colours; where there is none, the one that is furthest from them.
    """
    palette = all_colours().to(wanted.device)
    colours, done = torch.zeros_like(wanted), torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
    off = torch.cdist(wanted, palette)
    for basis in mass.argsort(descending=True, stable=True).tolist():
        others = colours[neighbours[basis] & done]
        gap = torch.cdist(palette, others).amin(1) if len(others) else torch.full_like(off[basis], torch.inf)
        allowed = gap >= APART
        best = off[basis].masked_fill(~allowed, torch.inf).argmin() if allowed.any() else gap.argmax()
        colours[basis], done[basis] = palette[best], True
    return colours


def all_colours() -> Tensor:
    """OKLab (n, 3) of all colours that a screen can show and a basis may have."""
    lightness, chroma = torch.arange(*LIGHTNESS, 2 * STEP), torch.arange(-0.33, 0.33, STEP)
    lab = torch.cartesian_prod(lightness, chroma, chroma)
    rgb = _linear_rgb(lab)
    return lab[((rgb >= 0) & (rgb <= 1)).all(1) & (lab[:, 1:].norm(dim=1) >= COLOURFUL)]


def srgb(lab: Tensor) -> Tensor:
    """sRGB 0..1 of OKLab colours, (n, 3)."""
    linear = _linear_rgb(lab).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _linear_rgb(lab: Tensor) -> Tensor:
    return (lab @ lab.new_tensor(TO_CONES).T) ** 3 @ lab.new_tensor(TO_RGB).T


def token_of_pixel(pixels: int, latents: int, scale: int) -> Tensor:
    """The token, counted along one edge of the picture, that each pixel of the edge belongs to, (pixels,).

    Args:
        pixels, latents: Length of the edge.
        scale: How many latents a token spans; the last one may reach over the edge.
    """
    return ((torch.arange(pixels) + 0.5) * latents / pixels).long() // scale


def paint(images: Tensor, colours: Tensor, opacity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pictures under the colours of their patches.

    Args:
        images: (f, height, width, 3), 0..1.
        colours: (f, y, x, 3) of the patches.
        opacity: (f, y, x), 0..1.
        rows, columns: The patch of every pixel, (height,) and (width,).
    """
    painted = torch.empty_like(images)
    for picture, colour, cover, out in zip(images, colours, opacity, painted, strict=True):
        cover = cover[rows][:, columns, None].to(picture)
        torch.lerp(picture, colour[rows][:, columns].to(picture), cover.expand_as(picture), out=out)
    return painted
