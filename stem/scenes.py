"""Generated clips with known truth: moving shapes over a textured background.

A scene is a handful of parameters; everything else follows from them. It renders its frames together with the mask of
its main shape and the exact optical flow, it has a caption, and it can be rendered again with one thing changed and all
else equal, which is the known truth of an edit. The unit of length is 1/128 of the short side, so that a scene looks
the same at every size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

COLOURS = {
    "red": (0.85, 0.10, 0.12),
    "yellow": (0.96, 0.86, 0.10),
    "green": (0.05, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.88),
    "purple": (0.60, 0.12, 0.78),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {  # the two colours that the texture mixes
    "grass": ((0.28, 0.42, 0.20), (0.44, 0.56, 0.32)),
    "sand": ((0.68, 0.59, 0.42), (0.82, 0.74, 0.56)),
    "bricks": ((0.52, 0.28, 0.23), (0.68, 0.56, 0.50)),
    "water": ((0.22, 0.40, 0.54), (0.44, 0.62, 0.72)),
    "tiles": ((0.40, 0.40, 0.43), (0.60, 0.60, 0.62)),
}
MOTIONS = ("slide", "sway", "orbit", "spin", "bounce")
CAMERAS = ("still", "pan", "sway")
PLACES = {
    "grass": ("on grass", "on the grass", "over a green meadow of grass"),
    "sand": ("on sand", "on the sand", "over yellow sand"),
    "bricks": ("on bricks", "in front of a wall of bricks", "over bricks"),
    "water": ("on water", "over blue water", "on the water"),
    "tiles": ("on tiles", "over grey tiles", "on a floor of tiles"),
}
PHRASES = (
    "a {thing} {place}",
    "a photo of a {thing} {place}",
    "a {thing}, {place}",
    "one {thing} moving {place}",
)
EDGE = 1.0  # half the width of a shape's soft edge


class Figure(NamedTuple):
    """One moving shape."""

    colour: str
    shape: str
    motion: str
    radius: float


class Scene(NamedTuple):
    """What a clip shows; `figures[0]` is the main shape and is drawn last."""

    seed: int
    frames: int
    height: int
    width: int
    background: str
    camera: str
    figures: tuple[Figure, ...]


class Clip(NamedTuple):
    """A rendered scene.

    images: (f, height, width, 3) in 0..1.
    mask: (f, height, width) in 0..1, coverage of the main shape.
    flow: (f-1, height, width, 2) in pixels (x, y), from each frame to the next.
    visible: (f-1, height, width), 1 where the same point of the same surface is seen in both frames, else 0.
    """

    images: Tensor
    mask: Tensor
    flow: Tensor
    visible: Tensor


def random_scene(
    seed: int,
    frames: int = 16,
    height: int = 128,
    width: int = 128,
    colour: str | None = None,
    shape: str | None = None,
    background: str | None = None,
    figures: int | None = None,
) -> Scene:
    """Draws a scene from a seed; what is given is kept, and does not change what is drawn for the rest.

    Args:
        seed: Any integer; it also fixes the details of texture and motion.
        frames: Length of the clip, at least 1.
        height, width: Size in pixels.
        colour, shape, background: Keys of `COLOURS`, `SHAPES`, `BACKGROUNDS`; None draws one.
        figures: 1 or 2 shapes; None draws the number, mostly 1.

    Raises:
        ValueError: A name that does not exist, or a size or length below 1.
    """
    for what, name, known in (
        ("colour", colour, COLOURS),
        ("shape", shape, SHAPES),
        ("background", background, BACKGROUNDS),
    ):
        if name is not None and name not in known:
            raise ValueError(f"Scene: unknown {what} {name!r}. Use one of {', '.join(known)}.")
    if min(frames, height, width) < 1:
        raise ValueError(f"Scene: {frames} frames of {height}x{width} pixels found, each must be at least 1.")
    g = torch.Generator().manual_seed(seed)
    names = [_pick(g, COLOURS), _pick(g, SHAPES), _pick(g, BACKGROUNDS)]
    motions = [_pick(g, MOTIONS), _pick(g, MOTIONS)]
    camera = _pick(g, CAMERAS)
    radii = _uniform(g, 24, 34), _uniform(g, 12, 16)
    main = Figure(colour or names[0], shape or names[1], motions[0], radii[0])
    # The second figure is drawn without regard to what is given. Where it would share a name that is given, it takes the
    # one that was drawn for the main figure.
    other_colour = _pick(g, [name for name in COLOURS if name != names[0]])
    other_shape = _pick(g, [name for name in SHAPES if name != names[1]])
    other = Figure(
        names[0] if other_colour == main.colour else other_colour,
        names[1] if other_shape == main.shape else other_shape,
        motions[1],
        radii[1],
    )
    count = figures or (2 if _uniform(g, 0, 1) < 0.15 else 1)
    return Scene(seed, frames, height, width, background or names[2], camera, (main, other)[:count])


def edit_scene(scene: Scene, colour: str | None = None, shape: str | None = None, background: str | None = None) -> Scene:
    """The same scene with the main shape's colour or form, or the background, replaced: the truth of an edit."""
    main = scene.figures[0]
    main = main._replace(colour=colour or main.colour, shape=shape or main.shape)
    return scene._replace(background=background or scene.background, figures=(main, *scene.figures[1:]))


def caption(scene: Scene, wording: int = 0) -> str:
    """What the scene shows, in words. Different `wording` integers give different sentences of the same meaning."""
    place = PLACES[scene.background]
    things = [f"{figure.colour} {figure.shape}" for figure in scene.figures]
    phrase = PHRASES[wording % len(PHRASES)]
    return phrase.format(thing=" and a ".join(things), place=place[wording // len(PHRASES) % len(place)])


def render(scene: Scene, moments: Sequence[int] | None = None) -> Clip:
    """Draws the frames of a scene, with the main shape's mask and the exact flow from each frame to the next.

    Args:
        scene: What to draw.
        moments: Numbers of the frames to draw; None draws all. The flow leads from each drawn frame to the next.
    """
    unit = min(scene.height, scene.width) / 128
    y, x = torch.meshgrid((torch.arange(scene.height) + 0.5) / unit, (torch.arange(scene.width) + 0.5) / unit, indexing="ij")
    here = torch.stack([x, y], -1)  # (height, width, 2), in units
    time = torch.linspace(0, 1, scene.frames) if scene.frames > 1 else torch.zeros(1)
    time = time if moments is None else time[list(moments)]
    camera = _camera_path(scene, time)
    tone = _texture(scene, here + rearrange(camera, "f c -> f 1 1 c"))
    low, high = (torch.tensor(c) for c in BACKGROUNDS[scene.background])
    images = low + (high - low) * rearrange(tone, "f y x -> f y x 1")
    layer = torch.zeros(tone.shape, dtype=torch.int64)  # which surface is seen: 0 background, i figure i
    mask = torch.zeros_like(tone)
    poses = [_figure_path(scene, i, time) for i in range(len(scene.figures))]
    for i in reversed(range(len(scene.figures))):
        figure, (position, angle) = scene.figures[i], poses[i]
        local = _rotate(here - rearrange(position, "f c -> f 1 1 c"), -angle) / figure.radius
        distance = _signed_distance(figure.shape, local) * figure.radius
        mask = (0.5 - distance / (2 * EDGE)).clamp(0, 1)
        shade = 1 - 0.10 * (1 + local[..., 1:2].clamp(-1, 1))  # a little darker towards the figure's foot
        colour = torch.tensor(COLOURS[figure.colour]) * shade
        images = torch.lerp(images, colour, rearrange(mask, "f y x -> f y x 1"))
        layer[mask > 0.5] = i + 1
    moves = [(camera[:-1] - camera[1:], None)] + [(p, a) for p, a in poses]
    flow = _flow(here, layer[:-1], moves)
    return Clip(images.clamp(0, 1), mask, flow * unit, _visible(flow, layer, unit))


def _flow(here: Tensor, layer: Tensor, moves: list) -> Tensor:
    """Displacement in units of the surface seen at every pixel: the camera's shift, or a figure's rigid motion."""
    shift, _ = moves[0]
    flow = rearrange(shift, "f c -> f 1 1 c").expand(*layer.shape, 2).clone()
    for i, (position, angle) in enumerate(moves[1:], 1):
        offset = here - rearrange(position[:-1], "f c -> f 1 1 c")
        goal = _rotate(offset, angle[1:] - angle[:-1]) + rearrange(position[1:], "f c -> f 1 1 c")
        flow = torch.where(rearrange(layer == i, "f y x -> f y x 1"), goal - here, flow)
    return flow


def _visible(flow: Tensor, layer: Tensor, unit: float) -> Tensor:
    """1 where a pixel's surface is seen at its new place too, and all four neighbours of that place show it."""
    f, height, width = layer.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    gx, gy = x + flow[..., 0] * unit, y + flow[..., 1] * unit
    x0, y0 = gx.floor().long(), gy.floor().long()
    inside = (x0 >= 0) & (y0 >= 0) & (x0 < width - 1) & (y0 < height - 1)
    frame = torch.arange(1, f).reshape(-1, 1, 1)
    for dy in (0, 1):
        for dx in (0, 1):
            seen = layer[frame, (y0 + dy).clamp(0, height - 1), (x0 + dx).clamp(0, width - 1)]
            inside = inside & (seen == layer[:-1])
    return inside.float()


def _camera_path(scene: Scene, time: Tensor) -> Tensor:
    """Shift of the background in units, (f, 2)."""
    g = torch.Generator().manual_seed(scene.seed + 1)
    angle, reach = _uniform(g, 0, 2 * math.pi), _uniform(g, 6, 16)
    path = {"still": 0 * time, "pan": time, "sway": torch.sin(2 * math.pi * time)}[scene.camera]
    return reach * path[:, None] * torch.tensor([math.cos(angle), math.sin(angle)])


def _figure_path(scene: Scene, index: int, time: Tensor) -> tuple[Tensor, Tensor]:
    """Position in units (f, 2) and angle in radians (f,) of one figure; it stays within the picture."""
    figure = scene.figures[index]
    unit = min(scene.height, scene.width) / 128
    middle = torch.tensor([scene.width, scene.height]) / (2 * unit)
    g = torch.Generator().manual_seed(scene.seed + 2 + index)
    room = middle - 36 if index == 0 else middle - 16
    start = (torch.rand(2, generator=g) * 2 - 1) * room
    goal = (torch.rand(2, generator=g) * 2 - 1) * room
    tilt, turn, phase = _uniform(g, -0.3, 0.3), _uniform(g, 0.8, 1.8), _uniform(g, 0, 2 * math.pi)
    t = time[:, None]
    wave = torch.stack([torch.cos(2 * math.pi * time + phase), torch.sin(2 * math.pi * time + phase)], -1)
    position = {
        "slide": start + (goal - start) * t,
        "sway": start + (goal - start) * torch.sin(math.pi * t) ** 2,
        "orbit": 0.5 * start + 0.5 * room.clamp(max=28) * wave,
        "spin": start + 0.2 * (goal - start) * t,
        "bounce": torch.cat(
            [(start + (goal - start) * t)[:, :1], room[1] * (1 - 2 * (2 * math.pi * t + phase).sin().abs())],
            -1,
        ),
    }[figure.motion]
    angle = tilt + (turn * time if figure.motion in ("spin", "slide") else 0 * time)
    return middle + position, angle


def _texture(scene: Scene, at: Tensor) -> Tensor:
    """Tone 0..1 of the background at points (..., 2): soft patterns without an edge sharper than a few units."""
    g = torch.Generator().manual_seed(scene.seed + 7)
    x, y = at.unbind(-1)
    origin = torch.rand(2, generator=g) * 64
    x, y = x + origin[0], y + origin[1]

    def clouds(count: int, low: float, high: float, stretch: float = 1.0) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(count):
            angle, length, phase = (
                _uniform(g, 0, math.pi),
                _uniform(g, low, high),
                _uniform(g, 0, 2 * math.pi),
            )
            total += torch.cos((x * math.cos(angle) * stretch + y * math.sin(angle)) * (2 * math.pi / length) + phase)
        return total / math.sqrt(count)

    if scene.background == "grass":
        tone = 0.5 + 0.22 * clouds(6, 16, 40, stretch=1.6)
    elif scene.background == "sand":
        tone = 0.5 + 0.20 * torch.sin((y + 0.3 * x) * (2 * math.pi / 22) + 0.8 * clouds(3, 50, 90)) + 0.12 * clouds(4, 24, 60)
    elif scene.background == "bricks":
        row = torch.floor(y / 20)
        across = (x + 20 * (row % 2)) % 40
        gap = torch.minimum(torch.minimum(across, 40 - across), torch.minimum(y % 20, 20 - y % 20))
        tone = 0.12 + 0.88 * (1 - (gap - 1.0).clamp(0, 3) / 3) + 0.05 * clouds(4, 24, 60)
    elif scene.background == "water":
        tone = 0.5 + 0.30 * torch.sin(y * (2 * math.pi / 18) + 1.5 * clouds(3, 40, 80)) + 0.08 * clouds(3, 24, 60)
    else:
        tone = 0.5 + 0.5 * (4 * torch.sin(x * (math.pi / 22)) * torch.sin(y * (math.pi / 22))).clamp(-1, 1) * 0.8
    return tone.clamp(0, 1)


def _signed_distance(shape: str, p: Tensor) -> Tensor:
    """Distance of points (..., 2) to the edge of a shape of unit size, negative inside."""
    x, y = p.unbind(-1)
    if shape == "circle":
        return torch.hypot(x, y) - 0.92
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.84
    if shape == "triangle":  # three half planes
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.58
    sector = 2 * math.pi / 5  # star: one straight edge from tip to notch, folded into all ten places
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.cos(angle), radius * torch.sin(angle)
    tip, notch = torch.tensor([1.15, 0.0]), 0.52 * torch.tensor([math.cos(sector / 2), math.sin(sector / 2)])
    edge = notch - tip
    return ((px - tip[0]) * edge[1] - (py - tip[1]) * edge[0]) / edge.norm()


def _rotate(p: Tensor, angle: Tensor) -> Tensor:
    """Turns points (f, height, width, 2) by an angle per frame."""
    c, s = (rearrange(w, "f -> f 1 1") for w in (torch.cos(angle), torch.sin(angle)))
    x, y = p.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def _pick(g: torch.Generator, names) -> str:
    names = list(names)
    return names[int(torch.randint(len(names), (1,), generator=g))]


def _uniform(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=g))
