"""Generated clips: the same from the same seed, with a truth of motion and of edits that holds in the pixels."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from stem.metrics import flicker
from stem.scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    PHRASES,
    PLACES,
    SHAPES,
    caption,
    edit_scene,
    random_scene,
    render,
)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_same_seed_gives_the_same_clip_and_another_seed_another():
    assert random_scene(3) == random_scene(3)
    assert equal(render(random_scene(3, frames=3)), render(random_scene(3, frames=3)))
    assert len({random_scene(seed)[4:] for seed in range(20)}) == 20


def test_shapes_and_ranges_of_a_clip():
    clip = render(random_scene(0, frames=3, height=64, width=96))
    assert clip.images.shape == (3, 64, 96, 3) and clip.mask.shape == (3, 64, 96)
    assert clip.flow.shape == (2, 64, 96, 2) and clip.visible.shape == (2, 64, 96)
    for x in (clip.images, clip.mask, clip.visible):
        assert 0 <= x.min() and x.max() <= 1
    assert set(clip.visible.unique().tolist()) <= {0.0, 1.0}


def test_single_frame_has_no_flow():
    clip = render(random_scene(0, frames=1))
    assert len(clip.images) == 1 and len(clip.flow) == len(clip.visible) == 0


def test_seeds_draw_all_there_is():
    scenes = [random_scene(seed) for seed in range(200)]
    mains = [scene.figures[0] for scene in scenes]
    assert {figure.colour for figure in mains} == set(COLOURS)
    assert {figure.shape for figure in mains} == set(SHAPES)
    assert {figure.motion for figure in mains} == set(MOTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.camera for scene in scenes} == set(CAMERAS)
    assert {len(scene.figures) for scene in scenes} == {1, 2}


def test_two_figures_differ_in_colour_and_shape():
    for seed in range(50):
        main, other = random_scene(seed, figures=2).figures
        assert main.colour != other.colour and main.shape != other.shape and main.radius > other.radius


@pytest.mark.parametrize("figures", [1, 2])
@pytest.mark.parametrize("given", [{"colour": "white"}, {"shape": "star"}, {"background": "water"}])
def test_what_is_given_changes_nothing_else(given, figures):
    (value,) = given.values()
    for seed in range(50):
        drawn, chosen = random_scene(seed, figures=figures), random_scene(seed, figures=figures, **given)
        if value not in sum(drawn.figures[1:], ()):  # else the second figure has to give way
            assert chosen == edit_scene(drawn, **given)


@pytest.mark.parametrize("figures", [1, 2])
@pytest.mark.parametrize("edit", [{"colour": "purple"}, {"shape": "triangle"}])
def test_edit_of_the_figure_leaves_every_pixel_around_it(edit, figures):
    for seed in (0, 1, 2):
        scene = random_scene(seed, frames=4, colour="green", shape="circle", figures=figures)
        before, after = render(scene), render(edit_scene(scene, **edit))
        outside = (before.mask == 0) & (after.mask == 0)
        assert torch.equal(before.images[outside], after.images[outside])
        changed = (before.images != after.images).any(-1)
        assert changed.any() and 0.3 < outside.double().mean() < 1
        assert torch.equal(before.mask, after.mask) == ("shape" not in edit)


def test_edit_of_the_colour_or_the_background_keeps_form_and_motion():
    scene = random_scene(4, frames=3, background="sand", colour="red")
    before = render(scene)
    for edit in ({"background": "bricks"}, {"colour": "yellow"}):
        after = render(edit_scene(scene, **edit))
        assert equal(before[1:], after[1:])
        assert not torch.equal(before.images, after.images)
    inside = before.mask == 1
    assert torch.equal(render(edit_scene(scene, background="bricks")).images[inside], before.images[inside])


def test_edit_to_what_is_there_already_is_none():
    scene = random_scene(4)
    main = scene.figures[0]
    assert edit_scene(scene) == scene == edit_scene(scene, main.colour, main.shape, scene.background)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("motion", MOTIONS)
def test_next_frame_fetched_back_along_the_flow_is_this_frame(motion, camera):
    for figures in (1, 2):
        scene = random_scene(11, frames=8, figures=figures)
        moving = [figure._replace(motion=motion) for figure in scene.figures]
        clip = render(scene._replace(camera=camera, figures=tuple(moving)))
        assert clip.visible.mean() > 0.75
        assert flicker(clip.images, clip.flow, clip.visible) < 0.01
        on_figure = clip.visible * (clip.mask[:-1] > 0.5)
        assert on_figure.sum() > 1000
        assert flicker(clip.images, clip.flow, on_figure) < 0.01
        assert flicker(clip.images, torch.zeros_like(clip.flow), on_figure) > flicker(clip.images, clip.flow, on_figure)


def test_what_the_figure_will_cover_is_not_visible():
    scene = random_scene(0, frames=6, figures=1)._replace(camera="still")
    clip = render(scene)
    covered = (clip.mask[:-1] < 0.5) & (clip.mask[1:] > 0.5)
    assert covered.sum() > 100 and clip.visible[covered].sum() == 0


def test_camera_moves_the_background_and_not_the_figure():
    scene = random_scene(0, frames=4, figures=1)
    still, pan = (render(scene._replace(camera=camera)) for camera in ("still", "pan"))
    assert torch.equal(still.mask, pan.mask)
    ground = still.mask[:-1] == 0
    assert still.flow[ground].abs().max() == 0
    assert pan.flow[ground].norm(dim=-1).min() > 1


@pytest.mark.parametrize("figures", [1, 2])
def test_every_caption_names_what_is_to_be_seen(figures):
    scene = random_scene(0, figures=figures)
    captions = [caption(scene, wording) for wording in range(len(PHRASES) * len(PLACES[scene.background]))]
    assert len(set(captions)) == len(captions) == 12
    for words in captions:
        assert scene.background in words
        for figure in scene.figures:
            assert f"a {figure.colour} {figure.shape}" in words or f"one {figure.colour} {figure.shape}" in words
    assert caption(scene, 12) == caption(scene, 0) == caption(scene)


def test_larger_picture_is_the_same_picture():
    small, large = (render(random_scene(8, 3, size, size)) for size in (128, 256))

    def halved(x):
        return avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)

    assert (halved(large.images) - small.images).abs().mean() < 0.005
    assert (halved(large.mask[..., None])[..., 0] - small.mask).abs().mean() < 0.002
    surely = small.visible == 1
    assert (halved(large.flow) / 2 - small.flow)[surely].abs().mean() < 0.02


def test_wide_picture_has_figures_of_the_same_size():
    narrow, wide = (float(render(random_scene(8, 1, 128, width)).mask.sum()) for width in (128, 304))
    assert wide == pytest.approx(narrow, rel=0.02)


def test_moments_are_frames_of_the_whole_clip():
    scene = random_scene(6, frames=7)
    whole, some = render(scene), render(scene, moments=[1, 2, 5])
    torch.testing.assert_close(some.images, whole.images[[1, 2, 5]])
    torch.testing.assert_close(some.mask, whole.mask[[1, 2, 5]])
    torch.testing.assert_close(some.flow[0], whole.flow[1])
    assert len(some.flow) == 2
    assert flicker(some.images, some.flow, some.visible) < 0.01


@pytest.mark.parametrize("given", [{"colour": "pink"}, {"shape": "cube"}, {"background": "sky"}])
def test_unknown_names_are_told_with_what_there_is(given):
    ((what, name),) = given.items()
    with pytest.raises(ValueError, match=f"unknown {what} '{name}'. Use one of .*, "):
        random_scene(0, **given)


@pytest.mark.parametrize("size", [{"frames": 0}, {"height": 0}, {"width": -8}])
def test_sizes_below_one_are_told(size):
    with pytest.raises(ValueError, match="each must be at least 1"):
        random_scene(0, **size)
