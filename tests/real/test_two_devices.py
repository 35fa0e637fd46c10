"""Core's MultiGPU, with a copy of the model and a thread for each device: here "cpu" and "cpu:0", which are one."""

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from fatezero_card import DEFAULTS as FATEZERO
from fatezero_card import SOURCE, TARGET, text
from models import clip_latents, prompt, tiny_clip, tiny_model

ONE, OTHER = torch.device("cpu"), torch.device("cpu:0")
FRAMES, STEPS = 5, 4
EM = {"num_bases": 8, "em_iterations": 2, "seed": 0, "temperature": 0.1, "blocks": "all"}
TOKENFLOW = {
    "mode": "pnp", "keyframe_every": 2, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all", "blend": "official",
    "keyframes": "random",
}  # fmt: skip


def on_two_devices(model):
    """A clone of the model with a copy for the other device, made and attached as core's node does it."""
    model = model.clone()
    model.cached_patcher_init = (tiny_model, ())
    other = model.deepclone_multigpu(new_load_device=OTHER)
    other.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [other])
    return model


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return tiny_clip()


@pytest.fixture(scope="module")
def models():
    """The same model on one device and on two."""
    with torch.inference_mode():
        model = tiny_model()
        return model, on_two_devices(model)


def watched(model):
    """A clone of the model, and the set of the devices whose threads call it."""
    seen, model = set(), model.clone()

    def look(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        seen.add(transformer_options.get("multigpu_thread_device"))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watched", look)
    return model, seen


def invert(pack, model, positive, **changes):
    how = {"steps": STEPS, "method": "stem", "frames_per_em": 0, **EM, **changes}
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=clip_latents(FRAMES), positive=positive, **how
    ).result  # fmt: skip


def sample(model, start, sigmas, positive, negative):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(start), start, euler, sigmas, disable_pbar=True, seed=0)


def patched(pack, kind, model, clip, inversion):
    """The model under one of our nodes."""
    _, _, trajectory, basis = inversion
    nodes = pack.nodes
    if kind == "fixed basis":
        return nodes.patch.STEMPatchModel.execute(model=model, basis=basis, start_percent=0.0, end_percent=1.0, **EM).result[0]
    if kind == "estimated bases":
        return nodes.patch.STEMPatchModel.execute(model=model, start_percent=0.0, end_percent=1.0, **EM).result[0]
    if kind == "tokenflow":
        return nodes.tokenflow.STEMTokenFlow.execute(model=model, trajectory=trajectory, **TOKENFLOW).result[0]
    return nodes.fatezero.STEMFateZero.execute(model=model, trajectory=trajectory, clip=clip, **FATEZERO).result[0]


@pytest.mark.parametrize("kind", ["fixed basis", "estimated bases", "tokenflow", "fatezero"])
def test_sampling_on_two_devices_is_that_on_one(pack, models, clip, kind):
    single, double = models
    source, target, negative = text(clip, SOURCE), text(clip, TARGET), text(clip, "a circle")
    inversion = invert(pack, single, source)
    start, sigmas = inversion[0]["samples"], inversion[1]
    edited = patched(pack, kind, single, clip, inversion)
    wanted = sample(edited, start, sigmas, target, negative)
    watching, devices = watched(patched(pack, kind, double, clip, inversion))
    found = [sample(watching, start, sigmas, target, negative) for _ in range(3)]
    assert devices >= {ONE, OTHER}
    assert torch.allclose(found[0], wanted, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(found[0], other) for other in found[1:]), "threads must not meet in what they write"
    assert torch.equal(sample(edited, start, sigmas, target, negative), wanted), "and the model on one device is as before"


def test_an_inversion_with_prompts_on_two_devices_is_that_on_one(pack, models):
    single, double = models
    several = [*prompt(1, strength=0.5), *prompt(2, strength=0.5)]
    wanted = invert(pack, single, several)
    watching, devices = watched(double)
    found = [invert(pack, watching, several) for _ in range(3)]
    assert devices >= {ONE, OTHER}
    for latents, sigmas, trajectory, basis in found:
        assert torch.allclose(latents["samples"], wanted[0]["samples"], atol=1e-4)
        assert torch.equal(sigmas, wanted[1])
        assert torch.equal(trajectory.latents, found[0][2].latents)
        assert all(torch.equal(a, b) for a, b in zip(basis.keys, found[0][3].keys, strict=True))
        for a, b in zip(basis.keys, wanted[3].keys, strict=True):  # in the mean: EM may amplify the rounding of a single one
            assert (a - b).norm() <= 1e-3 * b.norm()
