"""Saving and loading inversions and bases among ComfyUI's folders, and what editors make of what was loaded."""

import json
import os
import resource
from pathlib import Path

import comfy.hooks
import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from fatezero_card import demo_images, edit, encode, invert, sample
from models import clip_latents, prompt, tiny_controlnet, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

import nodes as core

STEPS = 4
EM = {"num_bases": 6, "em_iterations": 1, "temperature": 1.0, "seed": 4, "blocks": "all"}
FLOW = {"mode": "pnp", "keyframe_every": 2, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all", "blend": "official"}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Output, input and temp folders of this test's own."""
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def inverted(pack, model, positive=None, latents=None, method="stem", **changes):
    """Outputs of STEMInvertLatents: latents, sigmas, trajectory, basis."""
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=latents or clip_latents(3), positive=positive or prompt(), method=method, steps=STEPS,
        frames_per_em=0, **EM, **changes,
    ).result  # fmt: skip


def save(pack, outputs, prefix="stem/inversion", with_basis=True, **hidden):
    """The name that STEMSaveInversion gives."""
    latents, _, trajectory, basis = outputs
    node = pack.nodes.files.STEMSaveInversion
    if hidden:
        node = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    return node.execute(latents, trajectory, prefix, basis if with_basis else None).result[0]


def load(pack, file):
    return pack.nodes.files.STEMLoadInversion.execute(file).result


def levels(trajectory):
    return torch.stack([trajectory.latents[i] for i in range(STEPS + 1)])


def equal_bases(a, b):
    tensors = zip([*a.keys, *a.values, a.sigmas], [*b.keys, *b.values, b.sigmas], strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors) and a[2] == b[2] and a[4:] == b[4:]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_loaded_is_what_was_saved_bit_by_bit(pack, model, dtype, on_disk):
    given = {**clip_latents(3), "batch_index": [4, 5, 6], "noise_mask": torch.ones(1, 64, 128)}
    latents, sigmas, trajectory, basis = inverted(pack, model, None, given, trajectory_dtype=dtype, trajectory_on_disk=on_disk)
    found = load(pack, save(pack, (latents, sigmas, trajectory, basis)))
    assert found[0].keys() == latents.keys() == {"samples", "batch_index"} and found[0]["batch_index"] == [4, 5, 6]
    assert torch.equal(found[0]["samples"], latents["samples"]) and torch.equal(found[1], sigmas)
    assert levels(found[2]).dtype == levels(trajectory).dtype and torch.equal(levels(found[2]), levels(trajectory))
    assert torch.equal(found[2].sigmas, trajectory.sigmas) and found[2][3:] == trajectory[3:]
    assert equal_bases(found[3], basis)


def test_a_basis_is_loaded_as_it_was_saved(pack, model):
    basis = pack.nodes.basis.STEMBasisEstimate.execute(
        model=model, latents=clip_latents(5), positive=prompt(), steps=STEPS, keyframes=3, **EM
    ).result[0]
    files = pack.nodes.files
    file = files.STEMSaveBasis.execute(basis, "clips/of mine").result[0]
    assert file == "clips/of mine_00001_.stem-basis.safetensors [output]"
    found = files.STEMLoadBasis.execute(file).result[0]
    assert found.frame_ids == (0, 2, 4) and equal_bases(found, basis)
    before, after = (inverted(pack, model, None, clip_latents(5), basis=each)[0]["samples"] for each in (basis, found))
    assert torch.equal(before, after)
    patch, start = {**EM, "start_percent": 0.0, "end_percent": 1.0}, clip_latents(5)
    patched = (pack.nodes.patch.STEMPatchModel.execute(model=model, basis=each, **patch).result[0] for each in (basis, found))
    before, after = (
        core.common_ksampler(each, 0, 2, 1.0, "euler", "normal", prompt(), prompt(), start)[0]["samples"] for each in patched
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("editor", ["tokenflow", "fatezero"])
def test_editors_make_the_same_of_it(pack, demo, editor):
    outputs = invert(pack, demo[0], demo[1], encode(demo, demo_images(pack, 3)), STEPS)
    loaded = load(pack, save(pack, outputs, with_basis=False))
    results = []
    for latents, sigmas, trajectory, _ in (outputs, loaded):
        if editor == "fatezero":
            edited, _ = edit(pack, demo, trajectory)
        else:
            node = pack.nodes.tokenflow.STEMTokenFlow
            edited = node.execute(model=demo[0], trajectory=trajectory, keyframes="random", **FLOW).result[0]
        results.append(sample(demo, edited, latents["samples"], sigmas))
    assert torch.equal(*results) and results[0].std() > 0.01


def test_all_that_a_prompt_brings_along_comes_back(pack, model):
    g = torch.Generator().manual_seed(0)
    options = {
        "mask": torch.rand(3, 8, 16, generator=g), "mask_strength": 0.5, "set_area_to_bounds": False, "start_percent": 0.0,
        "area": ("percentage", 1.0, 1.0, 0.0, 0.0), "width": 128, "crop_h": 0, "note": "ä 雨", "none": None, "list": [1, [2.5]],
    }  # fmt: skip
    whole = prompt(2, frames=3)
    outputs = inverted(pack, model, [*whole, *prompt(1, **options)], method="ddim")
    found = load(pack, save(pack, outputs, with_basis=False))[2].conditioning
    assert len(found) == 2 and torch.equal(found[0][0], whole[0][0])
    wanted = outputs[2].conditioning[1][1]
    assert found[1][1].keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[1][1][name], value) if isinstance(value, torch.Tensor) else found[1][1][name] == value
    assert type(found[1][1]["area"]) is tuple


def test_what_cannot_be_stored_is_named_with_a_way_out(pack, model):
    control = core.ControlNetApplyAdvanced().apply_controlnet(
        prompt(), prompt(2), tiny_controlnet(), torch.zeros(1, 64, 128, 3), 1.0, 0.0, 1.0
    )[0]
    hooks = [[prompt()[0][0], {**prompt()[0][1], "hooks": comfy.hooks.HookGroup()}]]
    latents, sigmas, trajectory, _ = inverted(pack, model, method="ddim")
    for positive, message in (
        (control, r'STEMSaveInversion: .* has "control": .*ControlNet, which .*put the ControlNet on the edit\'s prompt only'),
        (hooks, r'STEMSaveInversion: .* has "hooks": .*HookGroup, which .*Invert with a prompt without hooks'),
        (prompt(ipadapter=object()), r'has "ipadapter": .* Take the node off that adds it'),
    ):
        with pytest.raises(ValueError, match=message):
            save(pack, (latents, sigmas, trajectory._replace(conditioning=positive), None))
    assert not list(Path(folder_paths.output_directory).rglob("*.*"))


def test_without_a_basis_the_output_says_so(pack, model):
    file = save(pack, inverted(pack, model, method="ddim"), with_basis=False)
    blocked = load(pack, file)[3]
    assert isinstance(blocked, ExecutionBlocker) and f"STEMLoadInversion: {file} was saved without a basis" in blocked.message


def test_files_are_numbered_and_told(pack, model):
    latents, _, trajectory, _ = inverted(pack, model, method="ddim")
    node = pack.nodes.files.STEMSaveInversion
    told = [node.execute(latents, trajectory, "stem/%year%/clip") for _ in range(2)]
    first, second = (each.result[0] for each in told)
    assert first[-len("_00001_.stem.safetensors [output]") :] == "_00001_.stem.safetensors [output]" and "%" not in first
    assert second == first.replace("00001", "00002")
    size = Path(folder_paths.get_annotated_filepath(first)).stat().st_size
    assert told[0].ui.as_dict() == {"text": (f"{first}\n{size / 1e6:.1f} MB",)}


# ------------------------------------------------------------------------------------------------------- what files tell


def test_a_file_tells_what_it_is_and_how_it_was_made(pack, model):
    graph = {
        "0": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "on grass"}},
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red star", "clip": ["9", 1]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["0", 0], "clip": ["9", 1]}},
        "4": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["1", 0], "conditioning_2": ["6", 0]}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a circle", "clip": ["9", 1]}},
        "3": {"class_type": "STEMInvertLatents", "inputs": {"positive": ["4", 0], "blocks": "all", "model": ["9", 0]}},
        "5": {"class_type": "STEMSaveInversion", "inputs": {"trajectory": ["3", 2], "filename_prefix": "x"}},
        "9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "text.safetensors"}},
    }
    outputs = inverted(pack, model)
    workflow = {"workflow": {"nodes": [1, 2]}}
    hidden = {io.Hidden.unique_id: "5", io.Hidden.prompt: graph, io.Hidden.extra_pnginfo: workflow}
    with safe_open(folder_paths.get_annotated_filepath(save(pack, outputs, **hidden)), "pt") as file:
        texts = file.metadata()
    assert json.loads(texts["prompt"]) == graph and json.loads(texts["workflow"]) == workflow["workflow"]
    assert json.loads(texts["stem.prompts"]) == ["a red star", "on grass"]
    assert json.loads(texts["stem.latent_format"]) == {"name": "SD15", "channels": 4, "scale": 0.18215}
    assert (texts["stem.kind"], texts["stem.version"]) == ("inversion", "1")
    trajectory, basis = json.loads(texts["stem.trajectory"]), json.loads(texts["stem.basis"])
    assert trajectory["model"][:2] == ["SD15", "eps"] and ["middle_0", 8, 16] in trajectory["model"][2]
    assert torch.equal(torch.tensor(trajectory["sigmas"]), outputs[2].sigmas)
    assert trajectory["settings"]["method"] == "stem" and trajectory["settings"]["basis"]["num_bases"] == 6
    assert basis["frame_ids"] == [0, 1, 2] and basis["total_frames"] == 3


def test_the_workflow_stays_out_where_metadata_is_disabled(pack, model, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    graph = {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a secret"}}}
    hidden = {io.Hidden.unique_id: "5", io.Hidden.prompt: graph, io.Hidden.extra_pnginfo: {"workflow": {"is": "a secret"}}}
    file = save(pack, inverted(pack, model, method="ddim"), with_basis=False, **hidden)
    path = Path(folder_paths.get_annotated_filepath(file))
    assert b"secret" not in path.read_bytes()
    with safe_open(path, "pt") as opened:
        assert opened.metadata().keys() == {
            "stem.kind",
            "stem.version",
            "stem.trajectory",
            "stem.latents",
            "stem.latent_format",
        }
    assert load(pack, file)[2].settings.steps == STEPS


# ------------------------------------------------------------------------------------------------- where files may be


@pytest.mark.parametrize(
    "prefix", ["../x", "stem/../../x", "/x", "link/x", "", ".", "..", "a/..", ".hidden/x", "a/.x", "a\0b/x"]
)
def test_nothing_is_written_elsewhere(pack, model, folders, prefix):
    (folders / "elsewhere").mkdir()
    (folders / "output" / "link").symlink_to(folders / "elsewhere", target_is_directory=True)
    before = sorted(folders.rglob("*"))
    outputs = inverted(pack, model, method="ddim")
    with pytest.raises(ValueError, match=r"STEMSaveInversion: filename_prefix .* is no name in ComfyUI's output folder"):
        save(pack, outputs, prefix, with_basis=False)
    assert sorted(folders.rglob("*")) == before


def test_nothing_is_read_elsewhere(pack, model, folders):
    node = pack.nodes.files.STEMLoadInversion
    inside = Path(folder_paths.get_annotated_filepath(save(pack, inverted(pack, model, method="ddim"), with_basis=False)))
    content = inside.read_bytes()
    for place in ("x.stem.safetensors", "temp/x.stem.safetensors", "input/x.safetensors"):
        (folders / place).write_bytes(content)
    (folders / "output" / "link.stem.safetensors").symlink_to(folders / "x.stem.safetensors")
    for file in (
        "../x.stem.safetensors", "../x.stem.safetensors [output]", f"{folders}/x.stem.safetensors", str(inside)[:-1],
        "link.stem.safetensors [output]", "x.stem.safetensors [temp]", "x.safetensors", "x.safetensors [input]", " [output]",
        "none.stem.safetensors [output]", "", "a\0.stem.safetensors [output]", "x" * 5000 + ".stem.safetensors",
    ):  # fmt: skip
        said = node.validate_inputs(file)
        assert isinstance(said, str) and "\n" not in said, file
        with pytest.raises(ValueError, match="STEMLoadInversion: "):
            node.execute(file)
    assert node.validate_inputs(None) is True and "name of a file is needed" in node.validate_inputs(7)
    (folders / "input" / "mine.stem.safetensors").write_bytes(content)
    for file in (
        "mine.stem.safetensors",
        "mine.stem.safetensors [input]",
        f"{inside.relative_to(folders / 'output')} [output]",
    ):
        assert node.validate_inputs(file) is True
        assert load(pack, file)[2].settings.steps == STEPS


def test_lists_hold_what_is_saved_and_nothing_else(pack, folders):
    for place in (
        "output/b.stem.safetensors", "output/sub/deep/a.stem.safetensors", "output/a.stem-basis.safetensors",
        "input/c.stem.safetensors", "output/.b.stem.safetensors.0.part", "output/.hidden.stem.safetensors",
        "output/.git/d.stem.safetensors", "input/model.safetensors", "temp/t.stem.safetensors",
    ):  # fmt: skip
        (folders / place).parent.mkdir(parents=True, exist_ok=True)
        (folders / place).write_bytes(b"")
    (folders / "output" / "folder.stem.safetensors").mkdir()
    (folders / "input" / "link.stem.safetensors").symlink_to(folders / "temp" / "t.stem.safetensors")
    files = pack.nodes.files
    (inversions,), (bases,) = (node.define_schema().inputs for node in (files.STEMLoadInversion, files.STEMLoadBasis))
    assert inversions.options == [
        "b.stem.safetensors [output]", "sub/deep/a.stem.safetensors [output]", "c.stem.safetensors [input]"
    ]  # fmt: skip
    assert bases.options == ["a.stem-basis.safetensors [output]"]


def test_other_files_are_told_in_one_line(pack, model, folders):
    files, outputs = pack.nodes.files, inverted(pack, model)
    basis = Path(folder_paths.get_annotated_filepath(files.STEMSaveBasis.execute(outputs[3], "basis").result[0]))
    (folders / "input" / "basis.stem.safetensors").write_bytes(basis.read_bytes())
    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8)}, folders / "input" / "latent.stem.safetensors")
    torch.save({"x": torch.zeros(3)}, folders / "input" / "pickle.stem.safetensors")
    for name, message in (
        ("basis", "it is a saved basis, not a saved inversion"),
        ("latent", r"it is a file of another kind \(a model, a LATENT\), not a saved inversion"),
        ("pickle", "it is no safetensors file"),
    ):
        with pytest.raises(ValueError, match=rf"STEMLoadInversion: {name}\.stem\.safetensors: {message}") as error:
            load(pack, f"{name}.stem.safetensors [input]")
        assert "\n" not in str(error.value)


def test_the_fingerprint_changes_with_the_file_alone(pack, model):
    node, outputs = pack.nodes.files.STEMLoadInversion, inverted(pack, model, method="ddim")
    file = save(pack, outputs, with_basis=False)
    path = folder_paths.get_annotated_filepath(file)
    found = os.stat(path)
    assert node.fingerprint_inputs(file) == node.fingerprint_inputs(file) == [path, found.st_size, found.st_mtime_ns]
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert node.fingerprint_inputs(file) == [path, found.st_size, found.st_mtime_ns + 1]


# ------------------------------------------------------------------------------------------------- nothing is half saved


def test_a_full_disk_and_a_cancel_leave_nothing_and_the_next_save_is_right(pack, model):
    outputs = inverted(pack, model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"STEMSaveInversion: .*inversion_00001_\.stem\.safetensors cannot be written"):
            save(pack, outputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(pack, outputs)
    assert not list(Path(folder_paths.output_directory, "stem").iterdir())
    assert torch.equal(levels(load(pack, save(pack, outputs))[2]), levels(outputs[2]))
