"""Figures of an inversion beside what is known of made-up clips and latents."""

import pytest
import torch

from stem.basis import ModelFingerprint
from stem.inversion_report import check_clips, inversion_chart, inversion_text, latent_statistics, measure
from stem.scenes import random_scene, render
from stem.trajectory import InversionSettings, Trajectory

MODEL = ModelFingerprint("SD15", "eps", ())


def trajectory(z: torch.Tensor, sigmas: list[float]) -> Trajectory:
    """With latents of a scale of one, (f, c, height, width), at every level."""
    sigmas = torch.tensor(sigmas)
    latents = torch.stack([z * float((1 + s**2).sqrt()) for s in sigmas])
    return Trajectory(latents, sigmas, [], InversionSettings("stem", len(sigmas) - 1, None), MODEL)


def noise(frames=4, size=32, seed=0):
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(seed))


def test_noise_of_its_own_in_each_frame_is_a_unit_gaussian():
    found = latent_statistics(trajectory(noise(), [0.1, 3.0, 12.0]))
    for column, expected in zip(found, (0, 1, 0, 0), strict=True):
        torch.testing.assert_close(column, torch.full((3,), float(expected)), atol=0.05, rtol=0)


def test_statistics_of_latents_that_are_known():
    z = torch.tensor([-1.0, 1.0]).repeat(3, 1, 4, 2)  # two values, the same in all frames: kurtosis 1
    found = latent_statistics(trajectory(3 * z + 0.5, [0.2, 1.0]))
    for column, expected in zip(found, (0.5, 3, -2, 1), strict=True):
        torch.testing.assert_close(column, torch.full((2,), float(expected)), atol=1e-4, rtol=0)


def test_equal_clips():
    drawn = render(random_scene(3, 3, 64, 64)).images
    figures = measure(trajectory(noise(3, 8), [0.1, 3.0]), drawn, drawn)
    assert figures.psnr.isinf().all() and (figures.ssim > 0.999).all()
    assert torch.equal(figures.flicker, figures.flicker_source)
    assert "PSNR equal" in inversion_text(figures)
    assert inversion_chart(figures).isfinite().all()


def test_psnr_of_a_known_error_and_the_flicker_it_makes():
    drawn = render(random_scene(3, 4, 64, 64)).images * 0.5 + 0.2
    off = torch.tensor([0.0, 0.1, 0.0, 0.1]).reshape(-1, 1, 1, 1)
    figures = measure(trajectory(noise(4, 8), [0.1, 3.0]), drawn, drawn + off)
    assert figures.psnr[0].isinf() and figures.psnr[1].item() == pytest.approx(20, abs=1e-3)
    assert (figures.flicker - figures.flicker_source > 0.07).all(), "every frame is off by 0.1 from the next"
    text = inversion_text(figures)
    assert "PSNR 23.01 dB" in text  # half of the frames have an error of 0.01, squared
    assert "Inversion by stem" in text


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (3, 12)])
def test_without_motion_there_is_no_flicker(frames, size):
    drawn = torch.rand(frames, size, size, 3, generator=torch.Generator().manual_seed(1))
    figures = measure(trajectory(noise(frames, 8), [0.1, 3.0]), drawn, drawn * 0.9)
    assert not figures.flicker.isfinite().any() and "Flicker unknown" in inversion_text(figures)
    assert inversion_chart(figures).isfinite().all()


def test_work_is_counted_and_can_be_cancelled():
    drawn, calls = torch.rand(3, 32, 32, 3), []
    measure(trajectory(noise(3, 8), [0.1, 3.0]), drawn, drawn, lambda: calls.append(1))
    assert len(calls) == 3 + 2 + 2

    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        measure(trajectory(noise(3, 8), [0.1, 3.0]), drawn, drawn, cancel)


def test_clips_that_do_not_fit_are_refused():
    path, clip = trajectory(noise(3, 8), [0.1, 3.0]), torch.zeros(3, 16, 24, 3)
    check_clips(path, clip, clip)
    with pytest.raises(ValueError, match=r"source is 24 x 16 and reconstruction 24 x 8 pixels\. Connect"):
        check_clips(path, clip, clip[:, :8])
    with pytest.raises(ValueError, match=r"source has 3 frames, reconstruction 2, the trajectory 3\. Connect"):
        check_clips(path, clip, clip[:2])
    with pytest.raises(ValueError, match=r"source has 2 frames, reconstruction 2, the trajectory 3\. Connect"):
        check_clips(path, clip[:2], clip[:2])
