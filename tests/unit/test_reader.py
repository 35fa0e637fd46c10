"""The reader against scenes of which the truth is known, sharp and as a VAE would blur them."""

import math
from collections import Counter

import kornia
import pytest
import torch
from einops import rearrange

from stem.metrics import iou
from stem.reader import Reading, main_figures, read_clip, read_images
from stem.scenes import BACKGROUNDS, COLOURS, SHAPES, edit_scene, random_scene, render


def blurred(images, sigma=1.5, noise=0.03):
    pixels = rearrange(images, "f y x c -> f c y x")
    pixels = kornia.filters.gaussian_blur2d(pixels, (13, 13), (sigma, sigma))
    pixels = pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return rearrange(pixels.clamp(0, 1), "f c y x -> f y x c")


def truth(scene):
    return Reading(scene.figures[0].colour, scene.figures[0].shape, scene.background)


@pytest.fixture(scope="module")
def frames():
    """200 frames of as many scenes, one or two figures in each; the main one is in front, and so fully seen."""
    scenes = [random_scene(40_000 + i, frames=9, figures=1 + i % 2) for i in range(200)]
    return [truth(s) for s in scenes], torch.cat([render(s, [i % 9]).images for i, s in enumerate(scenes)])


@pytest.mark.parametrize(
    "seen_as, needed",
    [
        (lambda x: x, Reading(0.99, 0.97, 0.99)),
        (blurred, Reading(0.97, 0.93, 0.97)),
    ],
    ids=["sharp", "blurred"],
)
def test_most_frames_are_read_right(frames, seen_as, needed):
    wanted, images = frames
    right = Counter()
    for found, want in zip(read_images(seen_as(images)), wanted, strict=True):
        right.update(name for name, a, b in zip(Reading._fields, found, want, strict=True) if a == b)
    shares = Reading(*(right[name] / len(wanted) for name in Reading._fields))
    assert all(share >= need for share, need in zip(shares, needed, strict=True)), shares


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_told_on_every_background(colour, background):
    scenes = [random_scene(7, 1, 128, 128, colour, shape, background, figures=1) for shape in SHAPES]
    assert read_images(torch.cat([render(scene).images for scene in scenes])) == [truth(scene) for scene in scenes]


@pytest.mark.parametrize("seen_as", [lambda x: x, blurred], ids=["sharp", "blurred"])
def test_the_main_figure_is_where_the_scene_has_it(seen_as):
    scenes = [random_scene(60_000 + i, frames=9, figures=1 + i % 2) for i in range(40)]
    clips = [render(scene, [i % 9]) for i, scene in enumerate(scenes)]
    images, masks = (torch.cat(each) for each in zip(*((clip.images, clip.mask) for clip in clips), strict=True))
    overlap = iou(main_figures(seen_as(images)), masks)
    assert overlap.mean() > 0.9 and overlap.min() > 0.6, overlap


@pytest.mark.parametrize("size", [(96, 96), (256, 256), (128, 304)])
def test_other_sizes_are_read_too(size):
    for seed in range(4):
        scene = random_scene(seed, 1, *size)
        assert read_clip(render(scene).images) == truth(scene)


def test_clip_is_read_by_the_vote_of_its_frames():
    scene = random_scene(3, frames=5, colour="red", figures=1)
    clip, other = render(scene).images, render(edit_scene(scene, colour="blue")).images
    assert read_clip(torch.cat([clip[:3], other[3:]])) == truth(scene)
    assert read_clip(torch.cat([clip[:2], other[2:]])).colour == "blue"
    assert read_clip(torch.cat([clip[:2], torch.zeros_like(clip[2:])])) == Reading(None, None, None)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_without_a_figure(background):
    scene = random_scene(1, frames=1, background=background)._replace(figures=())
    for images in (render(scene).images, blurred(render(scene).images)):
        assert read_clip(images) == Reading(None, None, background)
        assert not main_figures(images).any()


def test_pictures_of_something_else_are_not_read():
    noise = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    black = torch.zeros(1, 128, 128, 3)
    assert read_clip(noise).shape is None
    assert read_clip(noise).background is None
    assert read_clip(black) == Reading(None, None, None)


def test_figure_that_is_too_small_is_none():
    scene = random_scene(5, frames=1, figures=1)
    small = scene._replace(figures=(scene.figures[0]._replace(radius=4.0),))
    assert read_clip(render(small).images)[:2] == (None, None)


def ellipse(x, y):
    return torch.hypot(x / 40, y / 16) < 1


def half_disc(x, y):
    return (torch.hypot(x, y) < 36) & (y > 0)


def cross(x, y):
    return (torch.minimum(x.abs(), y.abs()) < 6) & (torch.maximum(x.abs(), y.abs()) < 34)


@pytest.mark.parametrize("angle", [0.0, 0.5])
@pytest.mark.parametrize("outline", [ellipse, half_disc, cross])
def test_other_outlines_have_a_colour_but_no_shape(outline, angle):
    picture = render(random_scene(2, frames=1, background="grass")._replace(figures=())).images
    y, x = torch.meshgrid(torch.arange(-64.0, 64), torch.arange(-64.0, 64), indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    picture[0, outline(c * x + s * y, c * y - s * x)] = torch.tensor(COLOURS["red"])
    assert read_clip(picture) == Reading("red", None, "grass")


@pytest.mark.parametrize("shape", [(128, 128, 3), (2, 128, 128, 4), (0, 128, 128, 3)])
def test_what_is_no_clip_is_told(shape):
    with pytest.raises(ValueError, match="frames, height, width, 3"):
        read_images(torch.zeros(shape))
