import signal
from pathlib import Path

import pytest

from tools import processes
from tools.server import Server

TEST_MODELS = Path(__file__).parent / "test_models"


@pytest.fixture(scope="session")
def server():
    """A running ComfyUI with the pack, and the nodes that only tests need."""
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    with Server(extra_packs=[TEST_MODELS]) as running:
        yield running
