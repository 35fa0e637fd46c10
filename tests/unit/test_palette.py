"""Colours of bases: apart where they touch, alike where bases are alike, and where they belong in the picture."""

import pytest
import torch
from einops import repeat

from stem.palette import (
    APART,
    all_colours,
    colour_bases,
    paint,
    srgb,
    tell_apart,
    token_of_pixel,
    touching,
    wanted_colours,
)


def test_oklab_of_white_black_and_red():
    lab = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.6279554, 0.2248631, 0.1258463]])  # of CSS Color 4
    torch.testing.assert_close(srgb(lab), torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]]), atol=2e-3, rtol=0)


def test_all_colours_are_of_the_screen_and_different():
    palette = all_colours()
    rgb = srgb(palette)
    assert len(palette) > 256 and rgb.min() >= 0 and rgb.max() <= 1
    assert torch.pdist(palette).min() > 0.02


def test_patches_side_by_side_touch_and_no_others():
    chosen = torch.tensor([[[0, 0, 1], [2, 2, 1]], [[3, 3, 3], [3, 3, 3]]])
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        expected[one, other] = expected[other, one] = True
    assert torch.equal(touching(chosen, 4), expected)


def test_bases_that_touch_in_any_frame_are_apart_although_they_want_one_colour():
    chosen = torch.randint(40, (6, 9, 11), generator=torch.Generator().manual_seed(0))
    near = touching(chosen, 40)
    assert near.sum(1).float().mean() > 20
    colours = tell_apart(torch.tensor([0.6, 0.1, 0.05]).repeat(40, 1), near, torch.arange(40.0))
    assert torch.cdist(colours, colours)[near].min() >= APART


def test_without_neighbours_a_basis_has_the_colour_it_wants():
    wanted = all_colours()[::50]
    alone = torch.zeros(len(wanted), len(wanted), dtype=torch.bool)
    assert torch.equal(tell_apart(wanted, alone, torch.ones(len(wanted))), wanted)


def test_where_there_is_no_room_the_furthest_colour_is_taken():
    crowd = len(all_colours()) + 5
    near = ~torch.eye(crowd, dtype=torch.bool)
    colours = tell_apart(torch.zeros(crowd, 3), near, torch.ones(crowd))
    assert colours.isfinite().all() and len(colours.unique(dim=0)) > crowd / 4


def test_alike_bases_want_alike_colours_and_the_rare_ones_are_red():
    g = torch.Generator().manual_seed(1)
    background, shape = torch.eye(8)[:2]
    bases = torch.cat([background + 0.02 * torch.randn(30, 8, generator=g), shape + 0.02 * torch.randn(5, 8, generator=g)])
    lab = wanted_colours(bases, torch.ones(35))
    ground, rare = lab[:30], lab[30:]
    assert rare[:, 1].min() > ground[:, 1].max() + 0.2  # from green to red
    assert max(torch.pdist(ground[:, 1:2]).max(), torch.pdist(rare[:, 1:2]).max()) < 0.1


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_few_channels_suffice(channels):
    bases = torch.randn(6, channels, generator=torch.Generator().manual_seed(2))
    assert wanted_colours(bases, torch.ones(6)).isfinite().all()


def test_the_clip_decides_and_not_the_order_of_its_frames():
    g = torch.Generator().manual_seed(3)
    bases, chosen = torch.randn(12, 4, generator=g), torch.randint(12, (5, 4, 4), generator=g)
    mass = torch.bincount(chosen.flatten(), minlength=12).float()
    assert torch.equal(colour_bases(bases, mass, chosen), colour_bases(bases, mass, chosen.flip(0)))


@pytest.mark.parametrize(
    ("pixels", "latents", "scale", "expected"),
    [
        (8, 4, 1, [0, 0, 1, 1, 2, 2, 3, 3]),
        (8, 4, 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        (6, 3, 2, [0, 0, 0, 0, 1, 1]),  # the last token reaches over the edge
        (5, 5, 4, [0, 0, 0, 0, 1]),
        (3, 6, 1, [1, 3, 5]),  # fewer pixels than tokens: what is in their middle
    ],
)
def test_pixels_belong_to_the_token_above_them(pixels, latents, scale, expected):
    assert token_of_pixel(pixels, latents, scale).tolist() == expected


def test_opacity_mixes_colour_and_picture():
    images = torch.full((2, 4, 6, 3), 0.2)
    colours = repeat(torch.tensor([[0.0, 1.0], [0.5, 0.25]]), "y x -> f y x c", f=2, c=3)
    opacity = repeat(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "y x -> f y x", f=2)
    painted = paint(images, colours, opacity, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1]))
    expected = torch.tensor([[0.0, 0.6], [0.2, 0.25]]).repeat_interleave(2, 0).repeat_interleave(3, 1)
    torch.testing.assert_close(painted, repeat(expected, "y x -> f y x c", f=2, c=3))
