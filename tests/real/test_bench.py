"""The benchmark of edits through the nodes and the demo model, small and short."""

import pytest
import torch

import nodes as core
from stem.scenes import render
from tools.bench import clips, edit


@pytest.fixture
def demo(pack, monkeypatch):
    monkeypatch.setattr(edit, "FRAMES", 3)
    monkeypatch.setattr(edit, "SIZE", 64)
    return clips.Demo(pack, core, *pack.nodes.demo.STEMDemoModel.execute().result, "")


def test_every_editor_gives_another_clip_of_the_same_size(demo):
    asked = edit.pair(0)
    editors = edit.RUNS["stem"]
    found = {name: (images, measures) for name, images, measures in edit.edit(demo, asked, "stem", editors, 2)}
    assert list(found) == list(editors)
    for images, measures in found.values():
        assert images.shape == render(asked.source).images.shape == (3, 64, 64, 3)
        assert measures.keys() == edit.MEASURES.keys()
    assert len({round(measures["psnr"], 4) for _, measures in found.values()}) == len(editors)


def test_references_are_measured_as_the_edits_are(demo):
    asked = edit.pair(0)  # another colour
    truth, source = (edit.compare(asked, made(demo, asked)) for made in edit.REFERENCES.values())
    assert truth["psnr"] > source["psnr"] + 3, "the VAE gives the true edit back, and the source is another clip"
    assert abs(truth["psnr_outside"] - source["psnr_outside"]) < 3, "where nothing was to change they are alike"


def test_fatezeros_own_inversion_looks_at_the_middle_frame(demo):
    """Of a clip of one frame it is plain DDIM; of three it is another."""
    asked = edit.pair(0).source
    for frames, same in ((1, True), (3, False)):
        source = asked._replace(frames=frames)
        own, plain = (edit.invert(demo, source, method, 2)[0]["samples"] for method in ("middle_frame", "ddim"))
        assert torch.allclose(own, plain, atol=1e-4) is same
