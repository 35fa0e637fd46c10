"""The table of memory that README gives: what it is made of, by the nodes' own announcements."""

import pytest
import torch

from tools import places
from tools.bench import estimates, report

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def sd15(pack):
    family = estimates.FAMILIES["SD1.5, 512 x 512"]
    return {frames: estimates.estimate(pack, family, frames, CUDA) for frames in (8, 16)}


def test_weights_are_those_of_the_published_unet(sd15):
    """859,520,964 parameters in half precision, and the thousand noise levels and their logarithms in float32."""
    assert sd15[8]["weights of the UNet alone"] == 2 * 859_520_964 + 2 * 1000 * 4


def test_a_frame_at_a_time_does_not_grow_with_the_clip_and_all_together_do(sd15):
    one, together = "inversion with a fixed basis, or ddim: a frame at a time", "inversion, all frames together"
    assert sd15[8][one] == sd15[16][one] < sd15[8][together] < sd15[16][together]


def test_ten_thousand_frames_are_estimated(sd15, pack):
    """And not run: a frame at a time takes what it always takes, all others what their frames take."""
    long = estimates.estimate(pack, estimates.FAMILIES["SD1.5, 512 x 512"], 10_000, CUDA)
    one, together = "inversion with a fixed basis, or ddim: a frame at a time", "inversion, all frames together"
    assert long[one] == sd15[16][one]
    assert 600 < (long[together] - long[one]) / (sd15[16][together] - sd15[16][one]) < 700  # 9,999 frames against 15


def test_queries_and_keys_for_fatezero_are_counted_as_its_equation_says(sd15, pack):
    """Beside a call of all frames: queries of self- and cross-attention, the middle frame's keys, the prompt's keys."""
    frames, blocks = 8, {32: (2, 3, 640), 16: (2, 3, 1280), 8: (0, 1, 1280)}  # size: blocks down, up or middle, channels
    numbers = sum(
        (down + up) * ((2 * frames + 1) * size * size + frames * 77) * channels for size, (down, up, channels) in blocks.items()
    )
    beside = sd15[frames]["STEM FateZero"] - sd15[frames]["sampling, all frames together"]
    assert beside == 2 * numbers


def test_readme_has_what_is_estimated(pack, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    family, rows = estimates.FAMILIES["SD1.5, 512 x 512"], {}
    for frames in estimates.CLIPS:
        for task, needed in estimates.estimate(pack, family, frames, CUDA).items():
            rows.setdefault(task, {})[str(frames)] = needed / estimates.GIB
    made = report.table(rows, {str(frames): ("", ".1f") for frames in estimates.CLIPS}, "")
    readme = (places.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    weights, *others = made.splitlines()[2:]
    assert set(others) <= set(readme) and "1.6" in weights
