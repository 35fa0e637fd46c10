"""Measures against closed forms: known noise, known motion, textures given by a formula."""

import math

import pytest
import torch

from stem.metrics import estimate_flow, flicker, iou, psnr, psnr_per_frame, ssim, warp


def texture(height=64, width=64, frames=1, motion=(0.0, 0.0)):
    """A smooth pattern that moves by exactly `motion` pixels (x, y) a frame, (f, height, width, 3)."""
    f, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in (frames, height, width)), indexing="ij")
    x, y = x - motion[0] * f, y - motion[1] * f
    waves = [
        ((0.31, 0.07), 0.0),
        ((-0.11, 0.23), 1.0),
        ((0.05, -0.17), 2.0),
        ((0.4, 0.35), 0.5),
        ((0.13, 0.19), 4.0),
    ]
    tone = sum(torch.sin(u * x + v * y + phase) for (u, v), phase in waves) / 10
    return torch.stack([0.5 + tone, 0.5 - tone / 2, 0.5 + tone / 3], dim=-1)


def constant_flow(frames, height, width, motion):
    return torch.tensor(motion).expand(frames - 1, height, width, 2)


@pytest.mark.parametrize("error", [0.1, 0.01])
def test_psnr_of_a_constant_error(error):
    clip = torch.rand(3, 8, 8, 3, dtype=torch.float64)
    assert psnr(clip + error, clip) == pytest.approx(-20 * math.log10(error))


def test_psnr_of_known_noise():
    clip = texture(frames=8)
    noise = 0.05 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(clip + noise, clip) == pytest.approx(-20 * math.log10(0.05), abs=0.05)


def test_psnr_of_a_clip_pools_the_errors_of_its_frames():
    clip = torch.zeros(2, 4, 4, 1, dtype=torch.float64)
    other = clip.clone()
    other[0] += 0.1
    other[1] += 0.2
    assert psnr_per_frame(other, clip).tolist() == pytest.approx([20, -20 * math.log10(0.2)])
    assert psnr(other, clip) == pytest.approx(-10 * math.log10((0.01 + 0.04) / 2))


def test_psnr_of_equal_clips_is_infinite():
    assert psnr(texture(), texture()) == math.inf


def test_mask_takes_out_what_it_covers():
    clip = torch.full((2, 16, 16, 3), 0.5)
    other, mask = clip + 0.1, torch.zeros(2, 16, 16)
    mask[:, :8] = 1
    other[:, 8:] = 1
    assert psnr(other, clip, mask) == pytest.approx(20, abs=1e-3)
    assert psnr_per_frame(other, clip, mask).tolist() == pytest.approx([20, 20], abs=1e-3)
    assert psnr(other, clip) < 10
    assert ssim(other, clip, mask) > ssim(other, clip)


def test_masks_that_do_not_fit_are_told():
    clip = texture()
    with pytest.raises(ValueError, match="empty"):
        psnr(clip, clip, torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(1, 64, 64\)"):
        psnr(clip, clip, torch.ones(64, 64))


@pytest.mark.parametrize("measure", [psnr, psnr_per_frame])
def test_clips_of_different_shapes_are_told(measure):
    with pytest.raises(ValueError, match=r"\(2, 64, 64, 3\) and \(1, 64, 64, 3\)"):
        measure(texture(frames=2), texture(frames=1))


def test_ssim_of_flat_clips_is_its_luminance_term():
    """No variance: (2 a b + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2."""
    a, b = torch.full((2, 24, 24, 3), 0.01), torch.full((2, 24, 24, 3), 0.03)
    assert ssim(a, b) == pytest.approx((2 * 0.0003 + 1e-4) / (0.0001 + 0.0009 + 1e-4), abs=1e-4)
    assert ssim(a, a) == pytest.approx(1, abs=1e-4)


def test_ssim_of_a_negative_is_below_that_of_little_noise():
    clip = texture()
    noise = 0.02 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert ssim(1 - clip, clip) < 0 < 0.8 < ssim(clip + noise, clip) < 1


def test_overlap_of_shifted_squares_is_known():
    masks = torch.zeros(3, 16, 16)
    masks[:2, 4:12, 2:10] = 1
    reference = torch.zeros(3, 16, 16)
    reference[0, 4:12, 2:10] = 1
    reference[1, 4:12, 6:14] = 1
    assert iou(masks, reference).tolist() == pytest.approx([1, 32 / 96, 1])  # the last has nothing in both
    assert iou(masks[:1], reference[2:]).tolist() == [0]


def test_masks_of_different_shapes_are_told_by_the_overlap():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 4, 5\); give two of one shape"):
        iou(torch.ones(2, 4, 4), torch.ones(2, 4, 5))


def test_warp_reads_along_the_flow_to_the_right_and_down():
    x, y = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="xy")
    images = torch.stack([x, y], dim=-1)[None]
    read, inside = warp(images, torch.tensor([1.5, -1.0]).expand(1, 5, 6, 2))
    expected = images + torch.tensor([1.5, -1.0])
    torch.testing.assert_close(read[:, 2:-1, 1:-3], expected[:, 2:-1, 1:-3])
    assert inside.sum() == 4 * 4 and inside[0, 0].sum() == 0 and inside[0, :, 4:].sum() == 0


@pytest.mark.parametrize("motion", [(0.0, 0.0), (3.0, -2.0)])
def test_a_translated_clip_does_not_flicker(motion):
    clip = texture(frames=4, motion=motion)
    flow = constant_flow(4, 64, 64, motion)
    assert flicker(clip, flow) < 1e-5
    if motion != (0.0, 0.0):
        assert flicker(clip, torch.zeros_like(flow)) > 0.01


def test_flicker_of_known_noise():
    """The difference of two normal variables of std s has the mean absolute value 2 s / sqrt(pi)."""
    clip = texture(frames=6, motion=(1.0, 2.0))
    noise = 0.02 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    found = flicker(clip + noise, constant_flow(6, 64, 64, (1.0, 2.0)))
    assert found == pytest.approx(2 * 0.02 / math.pi**0.5, rel=0.02)


def test_flicker_of_alternating_brightness():
    clip = torch.full((4, 8, 8, 3), 0.5)
    clip[1::2] += 0.25
    assert flicker(clip, torch.zeros(3, 8, 8, 2)) == pytest.approx(0.25)


def test_flicker_leaves_out_what_is_hidden_or_leaves_the_picture():
    clip = texture(frames=2, motion=(3.0, 0.0))
    clip[1, :32] = 1.0
    valid = torch.ones(1, 64, 64)
    valid[:, :32] = 0
    flow = constant_flow(2, 64, 64, (3.0, 0.0))
    assert flicker(clip, flow, valid) < 1e-5 < 0.1 < flicker(clip, flow)
    with pytest.raises(ValueError, match="empty"):
        flicker(clip, flow + 100)


@pytest.mark.parametrize("frames, flow", [(1, (0, 8, 8, 2)), (3, (3, 8, 8, 2)), (3, (2, 8, 9, 2))])
def test_flicker_tells_shapes_that_do_not_fit(frames, flow):
    with pytest.raises(ValueError, match="a flow from each to the next"):
        flicker(torch.zeros(frames, 8, 8, 3), torch.zeros(flow))


@pytest.mark.parametrize("motion", [(0.0, 0.0), (0.4, -0.7), (2.3, 1.6), (-5.5, 4.25)])
@pytest.mark.parametrize("size", [(64, 64), (96, 131)])
def test_flow_of_a_translated_texture_is_its_motion(motion, size):
    clip = texture(*size, frames=3, motion=motion)
    flow, valid = estimate_flow(clip)
    assert flow.shape == (2, *size, 2) and valid.shape == (2, *size)
    error = (flow - torch.tensor(motion)).norm(dim=-1)
    inner = (slice(None), slice(8, -8), slice(8, -8))
    assert error[inner].max() < 0.3 and error[inner].mean() < 0.1
    assert valid[inner].mean() > 0.98


def test_flow_of_a_still_background_is_nothing_beside_a_moving_shape():
    clip = 0.5 * texture(96, 96, frames=2, motion=(0.0, 0.0))
    for f in range(2):
        clip[f, 30:60, 20 + 4 * f : 50 + 4 * f] = 0.5 + 0.5 * texture(30, 30)[0]
    flow, _ = estimate_flow(clip)
    assert (flow[0, 36:54, 28:42] - torch.tensor([4.0, 0.0])).norm(dim=-1).mean() < 0.15
    assert flow[0, 80:].abs().max() < 0.05 and flow[0, :, 80:].abs().max() < 0.05


def test_flow_of_frames_that_show_different_things_is_not_trusted():
    noise = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert estimate_flow(noise)[1].mean() < 0.5


def test_flow_of_a_flat_clip_is_nothing():
    flow, _ = estimate_flow(torch.full((2, 40, 40, 3), 0.5))
    assert flow.abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (2, 15, 32, 3)])
def test_flow_needs_two_frames_of_some_size(shape):
    with pytest.raises(ValueError, match="two frames of 16x16"):
        estimate_flow(torch.zeros(shape))
