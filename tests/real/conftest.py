import copy
import sys
from pathlib import Path

import pytest

from tools import comfy

PACK = comfy.start()  # before the tests are imported: they import ComfyUI
sys.path.append(str(Path(__file__).parent))  # and they import `models`


@pytest.fixture(scope="session")
def pack():
    """The pack as ComfyUI loads it, in this process, beside a real ComfyUI."""
    return PACK


@pytest.fixture(autouse=True)
def as_in_an_execution():
    """ComfyUI runs every node in inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def rows_announced(monkeypatch):
    """How many rows of latents core estimates the memory of, at the start of every run."""
    import comfy.sampler_helpers

    seen, usual = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *given: seen.append(given[1][0]) or usual(*given))
    return seen


@pytest.fixture(scope="session")
def demo(pack):
    """Model, clip and VAE that come with the pack."""
    import torch

    with torch.inference_mode():
        return pack.nodes.demo.STEMDemoModel.execute().result


@pytest.fixture(scope="session")
def bare(demo):
    """The demo model's UNet alone, before any node was on it."""
    return copy.deepcopy(demo[0].model.diffusion_model)


@pytest.fixture(scope="session")
def inverted_demo(pack, demo):
    """What STEMInvertLatents gives of the demo clip."""
    import torch
    from fatezero_card import FRAMES, demo_images, encode, invert

    with torch.inference_mode():
        return invert(pack, demo[0], demo[1], encode(demo, demo_images(pack, FRAMES)))
