import pytest

from tools import comfy


@pytest.fixture(scope="session")
def pack():
    """The pack as ComfyUI loads it, in this process, beside a real ComfyUI."""
    return comfy.start()
