from pathlib import Path

import pytest

from tools import comfy

TEST_MODELS = Path(__file__).parent / "test_models"


@pytest.fixture(scope="session")
def server():
    """A running ComfyUI with the pack, and the nodes that only tests need."""
    with comfy.Server(extra_packs=[TEST_MODELS]) as running:
        yield running
