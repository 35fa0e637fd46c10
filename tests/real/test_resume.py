"""Inversions that are cancelled, fail or are killed, and go on from the last whole level."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.graph import DynamicPrompt
from comfy_execution.utils import CurrentNodeContext
from models import clip_latents, prompt, tiny_controlnet, tiny_model

import nodes as core
from tools import places

STEPS, FRAMES = 5, 4
EM = {"num_bases": 6, "em_iterations": 2, "temperature": 0.1, "seed": 4, "blocks": "all", "frames_per_em": 0}
GRAPH = {
    "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
    "lora": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["model", 0], "strength_model": 0.5}},
    "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a red star"}},
    "invert": {"class_type": "STEMInvertLatents", "inputs": {"model": ["lora", 0], "positive": ["text", 0], "steps": STEPS}},
}
WAYS = {
    "stem": {},
    "warm": {"warm_iterations": 1},
    "ddim": {"method": "ddim"},
    "batches": {"method": "ddim", "frames_per_batch": 2},
    "groups": {"frames_per_em": 2},
    "on disk": {"trajectory_on_disk": True, "trajectory_dtype": "float16"},
}


CANCELLED = comfy.model_management.InterruptProcessingException


class Halt(Exception):
    pass


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def kept(output, name="clip"):
    return sorted(path.name for path in (output / "stem" / "resume" / name).glob("*"))


def invert(pack, model, resume="clip", graph=GRAPH, latents=None, positive=None, **changes):
    hidden = {"hidden_inputs": {io.Hidden.dynprompt: DynamicPrompt(graph)}}
    node = pack.nodes.invert.STEMInvertLatents.PREPARE_CLASS_CLONE(hidden)
    how = {"steps": STEPS, "method": "stem", **EM, **changes}
    with CurrentNodeContext("prompt", "invert", 0):
        return node.execute(
            model=model, latents=latents or clip_latents(FRAMES), positive=positive or prompt(), resume=resume, **how
        ).result  # fmt: skip


def halting(model, at, how=Halt):
    """The model, which breaks off at a noise level (from 1), and the sigmas of its calls."""
    model, seen = model.clone(), []

    def call(run, told):
        sigma = float(told["timestep"][0])
        if sigma not in seen:
            seen.append(sigma)
        if len(seen) == at:
            if how is Halt:
                raise Halt
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        return run(told["input"], told["timestep"], **told["c"])

    model.set_model_unet_function_wrapper(call)
    return model, seen


def equal(a, b):
    levels = [torch.stack([each[2].latents[i] for i in range(STEPS + 1)]) for each in (a, b)]
    if not (torch.equal(a[0]["samples"], b[0]["samples"]) and torch.equal(a[1], b[1]) and torch.equal(*levels)):
        return False
    if not hasattr(a[3], "keys"):
        return type(a[3]) is type(b[3])
    return all(torch.equal(x, y) for x, y in zip([*a[3].keys, *a[3].values], [*b[3].keys, *b[3].values], strict=True))


@pytest.mark.parametrize(("way", "how"), [*((way, Halt) for way in WAYS), ("stem", CANCELLED)])
def test_a_run_that_broke_off_goes_on_from_the_last_whole_level(pack, output, caplog, way, how):
    model = tiny_model()
    wanted = invert(pack, model, resume="", **WAYS[way])
    assert not list(output.iterdir()), "nothing is kept unasked"
    with pytest.raises(how):
        invert(pack, halting(model, 3, how)[0], **WAYS[way])
    assert kept(output) == ["0001.stem-level.safetensors", "0002.stem-level.safetensors"]
    watching, seen = halting(model, 99)
    with caplog.at_level("INFO"):
        found = invert(pack, watching, **WAYS[way])
    assert len(seen) == STEPS - 2
    assert 'the inversion "clip" goes on after level 2 of 5' in caplog.text
    assert equal(found, wanted)
    assert not (output / "stem" / "resume" / "clip").exists(), "what is complete is not kept"


def test_it_may_break_off_again_and_again(pack, output):
    model = tiny_model()
    wanted = invert(pack, model, resume="", warm_iterations=1)
    for level in range(1, STEPS + 1):
        with pytest.raises(Halt):
            invert(pack, halting(model, min(level, 2))[0], warm_iterations=1)
        assert len(kept(output)) == level - 1
    assert equal(invert(pack, model, warm_iterations=1), wanted)


def changed(**inputs):
    """The graph with other values, by "node.input"."""
    graph = copy.deepcopy(GRAPH)
    for place, value in inputs.items():
        node, _, name = place.partition("__")
        graph[node]["inputs"][name] = value
    return graph


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": clip_latents(FRAMES, 8, 16, seed=9)},
        {"positive": prompt(7)},
        {"num_bases": 5},
        {"em_iterations": 1},
        {"seed": 5},
        {"blocks": "middle"},
        {"method": "ddim"},
        {"frames_per_batch": 1, "method": "ddim"},
        {"steps": STEPS + 1},
        {"graph": changed(lora__strength_model=0.6)},
        {"graph": changed(text__text="a blue star")},
        {"graph": changed(model__ckpt_name="other.safetensors")},
    ],
    ids=str,
)
def test_other_inputs_start_anew_and_it_is_said(pack, output, caplog, changes):
    model = tiny_model()
    with pytest.raises(Halt):
        invert(pack, halting(model, 3)[0])
    watching, seen = halting(model, 99)
    invert(pack, watching, **changes)
    assert len(seen) == changes.get("steps", STEPS)
    assert '2 kept levels of the inversion "clip" are of other inputs or damaged' in caplog.text
    assert "they are removed, and it starts anew" in caplog.text
    assert not kept(output)


def test_a_model_file_that_changes_starts_anew(pack, output, monkeypatch, caplog):
    folder = output / "checkpoints"
    folder.mkdir()
    (folder / "tiny.safetensors").write_bytes(b"one")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(folder)], {".safetensors"}))
    model = tiny_model()
    with pytest.raises(Halt):
        invert(pack, halting(model, 3)[0])
    (folder / "tiny.safetensors").write_bytes(b"other")
    watching, seen = halting(model, 99)
    invert(pack, watching)
    assert len(seen) == STEPS and "it starts anew" in caplog.text


def test_what_does_not_matter_does_not_start_anew(pack, output):
    """Other names of the nodes, another precision or place of the trajectory."""
    model = tiny_model()
    with pytest.raises(Halt):
        invert(pack, halting(model, 3)[0])
    renamed = {**copy.deepcopy(GRAPH), "7": GRAPH["model"]}
    del renamed["model"]
    renamed["lora"]["inputs"]["model"], renamed["text"]["inputs"]["clip"] = ["7", 0], ["7", 1]
    watching, seen = halting(model, 99)
    invert(pack, watching, graph=renamed, trajectory_dtype="float16", trajectory_on_disk=True)
    assert len(seen) == STEPS - 2


def test_two_names_do_not_meet(pack, output):
    model = tiny_model()
    for name in ("one", "two"):
        with pytest.raises(Halt):
            invert(pack, halting(model, 3)[0], resume=name)
    invert(pack, model, resume="one")
    assert not kept(output, "one") and len(kept(output, "two")) == 2


@pytest.mark.parametrize("damage", ["cut", "foreign", "gone"])
def test_it_goes_on_before_a_level_that_is_damaged(pack, output, damage):
    model = tiny_model()
    wanted = invert(pack, model, resume="")
    with pytest.raises(Halt):
        invert(pack, halting(model, 4)[0])
    file = output / "stem" / "resume" / "clip" / "0002.stem-level.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-100] if damage == "cut" else b"no file of ours")
    watching, seen = halting(model, 99)
    assert equal(invert(pack, watching), wanted)
    assert len(seen) == STEPS - 1


def test_prompts_and_a_controlnet_go_on(pack):
    model = tiny_model()
    several = core.ControlNetApplyAdvanced().apply_controlnet(
        [*prompt(1, strength=0.5), *prompt(2, strength=0.5)], prompt(3), tiny_controlnet(), torch.rand(1, 64, 128, 3), 0.7, 0, 1
    )[0]  # fmt: skip
    wanted = invert(pack, model, resume="", positive=several)
    with pytest.raises(Halt):
        invert(pack, halting(model, 3)[0], positive=several)
    watching, seen = halting(model, 99)
    assert equal(invert(pack, watching, positive=several), wanted)
    assert len(seen) == STEPS - 2


KILLED = """
import sys
sys.path += [{root!r}, {tests!r}]
from tools import comfy
pack = comfy.start()
import folder_paths, torch
folder_paths.output_directory = {output!r}
import test_resume
model, seen = test_resume.halting(test_resume.tiny_model(), 99)
run = model.model_options["model_function_wrapper"]
def call(*given):
    found = run(*given)
    if len(seen) == 4:
        print("at level 4", flush=True)
        import time; time.sleep(600)
    return found
model.set_model_unet_function_wrapper(call)
with torch.inference_mode():
    test_resume.invert(pack, model, warm_iterations=1)
"""


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(pack, output):
    script = KILLED.format(root=str(places.ROOT), tests=str(Path(__file__).parent), output=str(output))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # rounding depends on it
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=places.ROOT, env=os.environ | threads, text=True
    ) as process:
        while (line := process.stdout.readline()) and "at level 4" not in line:
            pass
        process.send_signal(signal.SIGKILL)
    assert len(kept(output)) == 3
    model = tiny_model()
    watching, seen = halting(model, 99)
    found = invert(pack, watching, warm_iterations=1)
    assert len(seen) == STEPS - 3
    assert equal(found, invert(pack, model, resume="", warm_iterations=1))


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".", "..", ".hidden", " x", "x" * 101, "a\nb", "a\\b\0"])
def test_names_that_are_no_folder_are_refused(pack, output, name):
    with pytest.raises(ValueError, match=r"STEMInvertLatents: resume .* is no name of a folder\. Choose one"):
        invert(pack, tiny_model(), resume=name)
    assert not list(output.rglob("*.safetensors"))


def test_without_a_workflow_nothing_is_resumed(pack):
    node = pack.nodes.invert.STEMInvertLatents
    with pytest.raises(ValueError, match="resume needs a workflow that ComfyUI executes"):
        node.execute(
            model=tiny_model(), latents=clip_latents(2), positive=prompt(), steps=2, method="ddim", resume="clip", **EM
        )  # fmt: skip


def test_a_full_disk_is_told(pack, output, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.stem.archive.os, "fsync", full)
    with pytest.raises(OSError, match=r"STEMInvertLatents: .*0001\.stem-level\.safetensors cannot be written: .*No space left"):
        invert(pack, tiny_model())
    assert not kept(output)
