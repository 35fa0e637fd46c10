"""What the front end is sent while an inversion runs."""

import io
import re

import pytest
from PIL import Image

from tools.demo import load_graph
from tools.server import Preview, Progress, StatusLine

STEPS = 3
FRAMES = {"basis": 3, "invert": 4}
"""That the graph's two inversions, by node id, are of."""


@pytest.fixture
def run(server):
    """Runs a graph with two inversions; returns what is told of them and shown at their nodes."""

    def run(preview_method):
        graph, told = load_graph("long_clip", STEPS), []
        for node_id in ("source", "roundtrip", "autoencoder", "video", "save"):
            del graph[node_id]
        graph["clip"]["inputs"] |= {"frames": FRAMES["invert"], "size": 64, "attempt": preview_method}  # missed by the cache
        graph["basis"]["inputs"]["keyframes"] = FRAMES["basis"]
        server.run(graph, told.append, on_shown=told.append, preview_method=preview_method)
        return [message for message in told if message.node_id in FRAMES]

    return run


def test_inversions_tell_their_level_and_show_the_whole_clip(run):
    told = run("latent2rgb")
    for node_id, frames in FRAMES.items():
        progress, lines, previews = (
            [message for message in told if message.node_id == node_id and isinstance(message, kind)]
            for kind in (Progress, StatusLine, Preview)
        )
        assert (progress[-1].value, progress[-1].maximum) == (STEPS, STEPS)
        assert re.fullmatch(rf"level 1 of {STEPS} \(sigma 0\.\d+\)", lines[0].text)
        assert re.fullmatch(rf"{STEPS} levels in \d:\d\d", lines[-1].text)
        with Image.open(io.BytesIO(previews[0].data)) as image:
            assert (previews[0].kind, image.format, image.n_frames) == ("image/png", "PNG", frames)


def test_no_preview_is_sent_where_the_user_wants_none(run):
    told = run("none")
    assert {m.node_id for m in told if isinstance(m, StatusLine)} == FRAMES.keys()
    assert not [m for m in told if isinstance(m, Preview)]
