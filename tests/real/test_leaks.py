"""The clones that a run makes are gone with it: one that holds itself stays in core's list of loaded models, with a warning."""

import gc

import fatezero_card
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from fatezero_card import TARGET, sample

BASES = {"num_bases": 8, "em_iterations": 1, "temperature": 1.0, "seed": 0, "blocks": "all"}


def patchers():
    return sum(issubclass(type(thing), ModelPatcher) for thing in gc.get_objects())


@pytest.fixture
def nothing_left():
    """Fails where a test leaves models that only the collector of cycles frees."""
    gc.collect()
    before = patchers()
    gc.disable()
    yield
    left = patchers() - before
    gc.enable()
    assert not left, f"{left} models are left"


@pytest.mark.parametrize("method", ["ddim", "first_previous", "all_frames", "stem"])
def test_of_an_inversion(pack, demo, nothing_left, method):
    fatezero_card.invert(pack, demo[0], demo[1], {"samples": torch.zeros(3, 4, 16, 16)}, steps=2, method=method)


def test_of_keyframes_and_batches(pack, demo, nothing_left):
    how = {"model": demo[0], "latents": {"samples": torch.zeros(3, 4, 16, 16)}, "positive": fatezero_card.text(demo[1], TARGET)}
    basis = pack.nodes.basis.STEMBasisEstimate.execute(**how, **BASES, steps=2, keyframes=2).result[0]
    invert = pack.nodes.invert.STEMInvertLatents.execute
    invert(**how, **BASES, steps=2, method="stem", frames_per_em=0, basis=basis, frames_per_batch=2)


def test_of_stem_attention(pack, demo, nothing_left):
    patch = {**BASES, "start_percent": 0.0, "end_percent": 1.0}
    model = pack.nodes.patch.STEMPatchModel.execute(model=demo[0], **patch).result[0]
    sample(demo, model, torch.zeros(2, 4, 16, 16), torch.tensor([1.0, 0.5]))


def test_of_tokenflow(pack, demo, inverted_demo, nothing_left):
    latents, sigmas, trajectory, _ = inverted_demo
    inputs = {"mode": "pnp", "keyframe_every": 3, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all"}
    node = pack.nodes.tokenflow.STEMTokenFlow
    model = node.execute(model=demo[0], trajectory=trajectory, **inputs, blend="official", keyframes="fixed").result[0]
    sample(demo, model, latents["samples"], sigmas[:3])


@pytest.mark.parametrize("changes", [{}, {**fatezero_card.BLENDED, "blend_threshold": 0.3}])
def test_of_fatezero(pack, demo, inverted_demo, nothing_left, changes):
    latents, sigmas, trajectory, _ = inverted_demo
    model, _ = fatezero_card.edit(pack, demo, trajectory, **changes)
    sample(demo, model, latents["samples"], sigmas[:3])


def test_of_a_look_at_a_basis(pack, demo, nothing_left):
    clip, how = {"samples": torch.zeros(3, 4, 16, 16)}, {"steps": 2, "method": "stem"}
    *_, trajectory, basis = fatezero_card.invert(pack, demo[0], demo[1], clip, **how)
    inputs = {"block": "output_8", "noise_level": 0.5, "opacity": 0.7, "head": 0}
    pack.nodes.see.STEMBasisPreview.execute(demo[0], basis, trajectory, torch.zeros(3, 128, 128, 3), **inputs)
