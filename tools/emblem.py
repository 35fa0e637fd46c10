"""Draws the icon and the banner of the pack: frames of a clip, and the bases that stand for them.

    python -m tools.emblem

The frames are a clip of the pack's own renderer. Expectation maximisation of the pack finds a few bases among their pixels; a
thread leads from a pixel to the basis that it belongs to, and a basis is drawn as a Gaussian in its mean colour, the larger the
more pixels it stands for.
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.functional import normalize

from stem.em import estimate_basis
from stem.scenes import Figure, Scene, render
from tools import places

FOLDER = places.ROOT / "web"
FINE = 2  # drawn so many times as large, then reduced
TOP, BOTTOM = (0.035, 0.045, 0.11), (0.10, 0.06, 0.20)  # colours of the ground
LAYERS, THREAD = 12, 0.13  # pictures that the threads are drawn on, and how bright one is
SCENE = Scene(
    9, 8, 192, 192, "water", "pan",
    (Figure("yellow", "star", "slide", 33.0), Figure("red", "circle", "orbit", 19.0), Figure("purple", "square", "sway", 17.0)),
)  # fmt: skip


class Design(NamedTuple):
    """Lengths in pixels of the picture."""

    size: tuple[int, int]  # width, height
    card: int  # edge of a frame
    cards: tuple[tuple[int, int], ...]  # left upper corners, the first frame first
    line: tuple[tuple[int, int], tuple[int, int]]  # from the first to the last basis
    across: bool  # threads run from left to right, not from top to bottom
    bases: int
    radius: float  # of a basis of mean size
    threads: int
    thread: float  # width of one


ICON = Design(
    size=(400, 400),
    card=196,
    cards=((38, 26), (90, 44), (142, 62)),
    line=((52, 338), (348, 338)),
    across=False,
    bases=5,
    radius=30,
    threads=260,
    thread=1.3,
)
BANNER = Design(
    size=(1260, 540),
    card=270,
    cards=((70, 62), (150, 94), (230, 126), (310, 158)),
    line=((1110, 62), (1110, 478)),
    across=True,
    bases=6,
    radius=40,
    threads=620,
    thread=1.5,
)


class Tokens(NamedTuple):
    """Pixels of the last frame, each with its basis; bases in the order in which they are drawn."""

    at: np.ndarray  # (n, 2), x and y in 0..1
    colour: np.ndarray  # (n, 3)
    basis: np.ndarray  # (n,)
    means: np.ndarray  # (bases, 3), colours
    share: np.ndarray  # (bases,), of all pixels


def frames(count: int) -> np.ndarray:
    """(count, y, x, 3) in 0..1, evenly spread over the clip."""
    moments = torch.linspace(0, SCENE.frames - 1, count).round().int().tolist()
    return render(SCENE, moments).images.numpy()


def tokens(clip: np.ndarray, bases: int, across: bool) -> Tokens:
    """Bases of all pixels of a clip, and those of its last frame that belong to them."""
    pixels = torch.from_numpy(clip)[:, 2::4, 2::4]
    f, y, x, _ = pixels.shape
    keys = rearrange(pixels, "f y x c -> 1 (f y x) c")
    keys = (keys - keys.mean(1, keepdim=True)) / keys.std()
    mu, _ = estimate_basis(keys, keys, bases, iterations=30, temperature=0.05, seed=3)
    chosen = (keys @ normalize(mu, dim=-1).mT).argmax(-1)[0]
    flat = rearrange(pixels, "f y x c -> (f y x) c").numpy()
    share = np.bincount(chosen.numpy(), minlength=bases) / len(flat)
    means = np.stack([flat[chosen.numpy() == i].mean(0) if share[i] else np.zeros(3) for i in range(bases)])
    last = rearrange(chosen, "(f n) -> f n", f=f)[-1].numpy()
    grid = np.stack(np.meshgrid((np.arange(x) + 0.5) / x, (np.arange(y) + 0.5) / y), -1).reshape(-1, 2)
    place = [grid[last == i, 1 if across else 0].mean() if (last == i).any() else 1.0 for i in range(bases)]
    order = np.argsort(place)
    return Tokens(grid, pixels[-1].reshape(-1, 3).numpy(), np.argsort(order)[last], means[order], share[order])


def draw(design: Design) -> Image.Image:
    """The whole picture."""
    width, height = (FINE * length for length in design.size)
    clip = frames(len(design.cards))
    seen = tokens(clip, design.bases, design.across)
    ends = np.linspace(design.line[0], design.line[1], design.bases)
    slope = np.linspace(0, 1, height)[:, None, None]
    canvas = np.array(TOP) * (1 - slope) + np.array(BOTTOM) * slope + np.zeros((height, width, 1))
    canvas = canvas + _threads(design, seen, ends)
    for end, colour, share in zip(ends, seen.means, seen.share, strict=True):
        canvas += _gaussian((width, height), FINE * end, FINE * _radius(design, share)) * _vivid(colour)
    picture = Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8))
    for corner, frame in zip(design.cards, clip, strict=True):
        _place(picture, frame, corner, design.card)
    return picture.resize(design.size, Image.Resampling.LANCZOS)


def _radius(design: Design, share: float) -> float:
    return design.radius * (0.55 + 0.45 * min(2.0, share * design.bases) ** 0.5)


def _vivid(colour: np.ndarray) -> np.ndarray:
    """The same hue as light on a dark ground."""
    grey = colour.mean()
    strong = (grey + 1.9 * (colour - grey)).clip(0, None)
    return strong / strong.max() * (0.55 + 0.45 * colour.max())


def _gaussian(size: tuple[int, int], middle: np.ndarray, radius: float) -> np.ndarray:
    """(height, width, 1), 1 in the middle."""
    x, y = np.arange(size[0]) - middle[0], np.arange(size[1]) - middle[1]
    far = x[None, :] ** 2 + y[:, None] ** 2
    return np.exp(-far / (2 * (0.55 * radius) ** 2))[..., None]


def _threads(design: Design, seen: Tokens, ends: np.ndarray) -> np.ndarray:
    """Light of the threads, (height, width, 3): where threads of different layers cross, it adds up."""
    size = tuple(FINE * length for length in design.size)
    layers = [Image.new("RGB", size) for _ in range(LAYERS)]
    chance = np.random.default_rng(2)
    step = np.linspace(0, 1, 60)[:, None]
    weights = np.hstack([(1 - step) ** 3, 3 * (1 - step) ** 2 * step, 3 * (1 - step) * step**2, step**3])  # of a Bezier curve
    along = np.array([1, 0] if design.across else [0, 1])
    for number, i in enumerate(chance.choice(len(seen.at), design.threads, replace=False)):
        basis = seen.basis[i]
        start = np.array(design.cards[-1]) + design.card * seen.at[i]
        goal = ends[basis] + chance.normal(size=2) * 0.22 * _radius(design, seen.share[basis])
        pull = 0.55 * (goal - start) * along
        path = weights @ np.stack([start, start + pull, goal - pull, goal])
        colour = tuple((255 * THREAD * _vivid(seen.colour[i])).astype(int))
        line = [tuple(point) for point in FINE * path]
        ImageDraw.Draw(layers[number % LAYERS]).line(line, colour, round(FINE * design.thread))
    return sum(np.asarray(layer) / 255 for layer in layers)


def _place(picture: Image.Image, frame: np.ndarray, corner: tuple[int, int], edge: int) -> None:
    """Lays a frame with round corners, a pale rim and a shadow upon the picture."""
    edge, corner = FINE * edge, tuple(FINE * place for place in corner)
    rim, bend = FINE * 3, FINE * 16
    mask = Image.new("L", (edge, edge))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, edge - 1, edge - 1), bend, 255)
    shadow = Image.new("L", picture.size)
    shadow.paste(mask, (corner[0] + FINE * 3, corner[1] + FINE * 6))
    shadow = shadow.filter(ImageFilter.GaussianBlur(FINE * 9)).point(lambda v: int(0.75 * v))
    picture.paste((4, 5, 16), (0, 0), shadow)
    picture.paste((238, 240, 250), corner, mask)
    inner = Image.new("L", (edge - 2 * rim,) * 2)
    ImageDraw.Draw(inner).rounded_rectangle((0, 0, edge - 2 * rim - 1, edge - 2 * rim - 1), bend - rim, 255)
    shown = Image.fromarray((255 * frame).round().astype(np.uint8)).resize(inner.size, Image.Resampling.LANCZOS)
    picture.paste(shown, (corner[0] + rim, corner[1] + rim), inner)


def main() -> None:
    for name, design in (("icon", ICON), ("banner", BANNER)):
        draw(design).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
