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
