"""A run that is cancelled or fails, wherever that is, leaves the model as it was, no memory, no file, and an equal next run."""

import copy
import gc
from itertools import cycle
from pathlib import Path

import comfy.model_management
import fatezero_card
import folder_paths
import pytest
import test_tokenflow
import torch
from comfy.model_patcher import ModelPatcher
from models import clip_latents, prompt, tiny_model

STEPS, FRAMES = 3, 4
EM = {"num_bases": 6, "em_iterations": 2, "temperature": 0.1, "seed": 4, "blocks": "all"}
TENSORS = (torch.Tensor, torch.nn.Parameter)  # not those of a compiler, which have no memory
CANCELLED = comfy.model_management.InterruptProcessingException


class Failure(Exception):
    pass


class Point:
    """A place in the code that counts how often it is passed, and where a run can be made to end."""

    def __init__(self):
        self.passed, self.end, self.how = 0, None, None

    def reach(self):
        self.passed += 1
        if self.passed == self.end:
            if self.how is Failure:
                raise Failure
            comfy.model_management.interrupt_current_processing()

    def set(self, end=None, how=None):
        self.passed, self.end, self.how = 0, end, how


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    comfy.model_management.unload_all_models()  # what other tests left there counts as memory, and may go at any time
    with torch.inference_mode():
        return tiny_model()


def with_point(model):
    """A clone of the model, and the point that each of its calls passes."""
    model, point = model.clone(), Point()

    def call(run, told):
        point.reach()
        return run(told["input"], told["timestep"], **told["c"])

    model.set_model_unet_function_wrapper(call)
    return model, point


def state(model):
    """All of a model that a run could leave behind."""
    inner = model.model.diffusion_model
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in inner.modules())
    weights = {name: parameter.sum().item() for name, parameter in inner.named_parameters()}
    kept = (model.patches, model.object_patches, model.additional_models, model.injections, model.hook_patches)
    return copy.copy(model.model_options), *map(dict, kept), hooks, weights, model.model.current_patcher is None


def living():
    """How many models, and how many bytes of tensors, there are."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), ModelPatcher) or type(thing) in TENSORS]
    dense = [thing for thing in found if type(thing) in TENSORS and thing.layout is torch.strided and thing.is_cpu]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in dense}
    return sum(isinstance(thing, ModelPatcher) for thing in found), sum(storages.values())


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def flat(result):
    """The tensors of a result, whatever it is."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for each in result for tensor in flat(each)]
    if isinstance(result, dict):
        return flat(list(result.values()))
    if hasattr(result, "folder") or hasattr(result, "archive"):  # levels in files
        return [result[i] for i in range(len(result))]
    return []


def check(folder, models, point, run, ends=None, ways=(CANCELLED, Failure)):
    """Lets a run end at the first, a middle and the last pass of a point, cancelled and by an error in turn."""
    point.set()
    wanted, passes = [tensor.clone() for tensor in flat(run())], point.passed
    ends = ends or (1, passes // 2 + 1, passes, passes)
    assert wanted and passes >= 1
    there, before, memory = files(folder), [state(model) for model in models], living()
    for end, how in zip(ends, cycle(ways), strict=False):
        point.set(end, how)
        with pytest.raises(how):
            run()
        point.set()
        assert not comfy.model_management.processing_interrupted()
        assert [state(model) for model in models] == before
        assert living() == memory
        assert files(folder) == there
    found = flat(run())
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


WAYS = {
    "ddim": {"method": "ddim"},
    "stem": {"method": "stem"},
    "warm": {"method": "stem", "warm_iterations": 1},
    "batches": {"method": "ddim", "frames_per_batch": 2},
    "on disk": {"method": "ddim", "trajectory_on_disk": True},
}


def invert(pack, model, **changes):
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=clip_latents(FRAMES), positive=prompt(), steps=STEPS, frames_per_em=0, **EM, **changes
    ).result  # fmt: skip


def estimate(pack, model):
    node = pack.nodes.basis.STEMBasisEstimate
    return node.execute(model=model, latents=clip_latents(FRAMES), positive=prompt(), steps=STEPS, keyframes=3, **EM).result


@pytest.mark.parametrize("way", WAYS)
def test_an_inversion(pack, model, folders, way):
    watched, point = with_point(model)
    check(folders, [model, watched], point, lambda: invert(pack, watched, **WAYS[way]))


def test_an_inversion_with_a_fixed_basis(pack, model, folders):
    (watched, point), (basis,) = with_point(model), estimate(pack, model)
    run = lambda: invert(pack, watched, method="stem", basis=basis, frames_per_batch=3)  # noqa: E731
    check(folders, [model, watched], point, run)


def test_an_estimate_of_a_basis(pack, model, folders):
    watched, point = with_point(model)
    check(folders, [model, watched], point, lambda: estimate(pack, watched))


def test_expectation_maximisation(pack, model, folders, monkeypatch):
    attention, point = pack.nodes.bridge.self_attention, Point()
    usual = attention.throw_exception_if_processing_interrupted
    monkeypatch.setattr(attention, "throw_exception_if_processing_interrupted", lambda: (point.reach(), usual()))
    check(folders, [model], point, lambda: invert(pack, model, method="stem"))


def test_sampling_with_stem_attention(pack, model, folders):
    noise, sigmas, _, basis = invert(pack, model, method="stem")
    node = pack.nodes.patch.STEMPatchModel
    patched = node.execute(model=model, basis=basis, start_percent=0.0, end_percent=1.0, **EM).result[0]
    watched, point = with_point(patched)
    run = lambda: test_tokenflow.sample(watched, noise["samples"], sigmas)  # noqa: E731
    check(folders, [model, patched, watched], point, run)


def test_sampling_under_tokenflow(pack, model, folders):
    """Passes of the source and of the edit, of keyframes and of groups of frames."""
    noise, sigmas, trajectory, _ = invert(pack, model, method="ddim")
    edited = test_tokenflow.edit(pack, model, trajectory)
    watched, point = with_point(edited)
    run = lambda: test_tokenflow.sample(watched, noise["samples"], sigmas)  # noqa: E731
    check(folders, [model, edited, watched], point, run, ends=(1, 2, 3, 4))


def test_sampling_under_fatezero(pack, demo, inverted_demo, folders):
    """The pass of the source, then that of the edit."""
    noise, sigmas, trajectory, _ = inverted_demo
    edited, _ = fatezero_card.edit(pack, demo, trajectory)
    watched, point = with_point(edited)
    run = lambda: fatezero_card.sample(demo, watched, noise["samples"], sigmas[:3])  # noqa: E731
    check(folders, [demo[0], edited, watched], point, run, ends=(1, 2, 3))


def test_a_look_at_a_basis(pack, model, folders):
    *_, trajectory, basis = invert(pack, model, method="stem")
    watched, point = with_point(model)
    inputs = {"block": "output_8", "noise_level": 0.5, "opacity": 0.7, "head": 0}
    look = pack.nodes.see.STEMBasisPreview.execute
    run = lambda: look(watched, basis, trajectory, torch.zeros(FRAMES, 64, 128, 3), **inputs).result  # noqa: E731
    check(folders, [model, watched], point, run)


def test_a_report(pack, model, folders, monkeypatch):
    trajectory, clip, point = invert(pack, model, method="ddim")[2], torch.rand(FRAMES, 64, 128, 3), Point()
    usual = comfy.model_management.throw_exception_if_processing_interrupted
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: (point.reach(), usual()))
    report = pack.nodes.see.STEMInversionReport.execute
    check(folders, [model], point, lambda: report(trajectory, clip, clip.flip(0)).result)


@pytest.mark.parametrize("what", ["inversion", "basis"])
def test_saving(pack, model, folders, what, monkeypatch):
    noise, _, trajectory, basis = invert(pack, model, method="stem")
    nodes, point = pack.nodes.files, Point()
    usual = comfy.model_management.throw_exception_if_processing_interrupted
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: (point.reach(), usual()))

    def save():
        if what == "inversion":
            file = nodes.STEMSaveInversion.execute(noise, trajectory, "stem/clip", basis).result[0]
            return nodes.STEMLoadInversion.execute(file).result
        return nodes.STEMLoadBasis.execute(nodes.STEMSaveBasis.execute(basis, "stem/clip").result[0]).result

    check(folders, [model], point, save)


def test_loading(pack, model, folders, monkeypatch):
    """Between two tensors of a file."""
    noise, _, trajectory, basis = invert(pack, model, method="stem")
    file = pack.nodes.files.STEMSaveInversion.execute(noise, trajectory, "stem/clip", basis).result[0]
    archive, point = pack.stem.archive, Point()
    usual = archive._read
    monkeypatch.setattr(archive, "_read", lambda *given: (point.reach(), usual(*given))[1])
    check(folders, [model], point, lambda: pack.nodes.files.STEMLoadInversion.execute(file).result, ends=(1, 2), ways=[Failure])
