import pytest

from tools import comfy


@pytest.fixture(scope="session")
def server():
    """A running ComfyUI with the pack and no other."""
    with comfy.Server() as running:
        yield running
