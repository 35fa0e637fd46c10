"""Inversions in batches of frames, under memory that runs out, and trajectories that are kept small."""

import logging
from types import SimpleNamespace

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from fatezero_card import demo_images, encode, text
from models import clip_latents, prompt, tiny_controlnet, tiny_model

import nodes as core
from stem.metrics import psnr

FRAMES, STEPS = 7, 4
INPUTS = {
    "num_bases": 12, "em_iterations": 2, "temperature": 1.0, "seed": 4, "blocks": "all", "frames_per_em": 0, "steps": STEPS,
}  # fmt: skip


def invert(pack, model, positive=None, latents=None, **changes):
    """Outputs of STEMInvertLatents: latents, sigmas, trajectory, basis."""
    inputs = {"method": "ddim", **INPUTS, **changes}
    latents = clip_latents(FRAMES) if latents is None else latents
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=latents, positive=positive or prompt(), **inputs
    ).result


def keyframe_basis(pack, model, keyframes=3):
    inputs = {name: value for name, value in INPUTS.items() if name != "frames_per_em"}
    return pack.nodes.basis.STEMBasisEstimate.execute(
        model=model, latents=clip_latents(FRAMES), positive=prompt(), keyframes=keyframes, **inputs
    ).result[0]


def difference(a, b):
    return float((a - b).norm() / b.norm())


def rows_of(model):
    """A clone of the model that notes how many frames its UNet is called with."""
    model, seen = model.clone(), []

    def note(run, told):
        seen.append(len(told["input"]))
        return run(told["input"], told["timestep"], **told["c"])

    model.set_model_unet_function_wrapper(note)
    return model, seen


@pytest.mark.parametrize("how", ["ddim", "basis"])
def test_batches_give_what_the_whole_clip_gives(pack, how):
    model, seen = rows_of(tiny_model())
    chosen = {"method": "stem", "basis": keyframe_basis(pack, model)} if how == "basis" else {}
    whole = invert(pack, model, **chosen)
    for size, calls in ((3, [3, 3, 1]), (1, [1] * 7), (7, [7]), (100, [7])):
        seen.clear()
        parts = invert(pack, model, **chosen, frames_per_batch=size)
        assert seen == calls * STEPS
        assert difference(parts[2].latents, whole[2].latents) < 1e-5
    again = invert(pack, model, **chosen, frames_per_batch=3)
    assert torch.equal(again[2].latents, invert(pack, model, **chosen, frames_per_batch=3)[2].latents)


def test_what_changes_from_frame_to_frame_follows_its_frames(pack):
    """Prompts, masks and the hints of a ControlNet."""
    model = tiny_model()
    hints = torch.rand(FRAMES, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    control = tiny_controlnet().set_cond_hint(hints)
    masks = torch.rand(FRAMES, 8, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    positive = prompt(1, frames=FRAMES, control=control, mask=masks) + prompt(2)
    whole = invert(pack, model, positive)
    parts = invert(pack, model, positive, frames_per_batch=3)
    assert difference(parts[2].latents, whole[2].latents) < 1e-5
    assert torch.equal(control.cond_hint_original, hints)
    alike = invert(pack, model, prompt(1) + prompt(2))
    assert difference(alike[2].latents, whole[2].latents) > 1e-2


def test_groups_of_frames_keep_together(pack):
    """Each with the bases, and so the seeds, of its own frames."""
    model, seen = rows_of(tiny_model())
    settings = {"method": "stem", "frames_per_em": 2}
    whole = invert(pack, model, **settings)
    seen.clear()
    parts = invert(pack, model, **settings, frames_per_batch=4)
    assert seen == [4, 3] * STEPS
    assert difference(parts[2].latents, whole[2].latents) < 1e-4


def test_core_windows_are_split_inside(pack):
    windows = {
        "context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False,
    }  # fmt: skip
    model = ContextWindowsManualNode.execute(tiny_model(), **windows).result[0]
    model, seen = rows_of(model)
    settings = {"method": "stem", "frames_per_em": 2}  # whose seeds are those of frames' numbers in the clip
    whole = invert(pack, model, **settings)
    assert set(seen) == {4, 5}, "core puts an anchor in front of later windows"
    seen.clear()
    parts = invert(pack, model, **settings, frames_per_batch=4)
    assert set(seen) == {4, 1}
    assert difference(parts[2].latents, whole[2].latents) < 1e-4


@pytest.mark.parametrize("windows", [False, True])
def test_other_packs_are_told_which_frames_a_call_has(pack, windows):
    """As AnimateDiff tells it: their hints, weights and embeddings follow."""
    model, told = tiny_model(), []
    if windows:
        model = ContextWindowsManualNode.execute(
            model, context_length=4, context_overlap=1, context_schedule="standard_static", context_stride=1,
            closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
        ).result[0]  # fmt: skip

    def note(n, context, value, options):
        if options["block"] == ("middle", 0):
            told.append((options["ad_params"]["sub_idxs"], options.get("context_window"), len(n)))
        return n, context, value

    model.set_model_attn2_patch(note)
    invert(pack, model, frames_per_batch=3, steps=1)
    frames = [[0, 1, 2], [3], [2, 3, 4], [5, 6]] if windows else [[0, 1, 2], [3, 4, 5], [6]]
    assert told == [(ids, None, len(ids)) for ids in frames]


def test_a_control_that_picks_its_own_hints_is_left_to_it(pack):
    """Advanced-ControlNet reads `ad_params`; its hints are not cut a second time."""
    hints = torch.arange(FRAMES, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 128)
    control, seen = tiny_controlnet().set_cond_hint(hints), []
    control.sub_idxs = None
    usual = control.get_control

    def get_control(x, t, cond, batched, options):
        seen.append((len(control.cond_hint_original), options["ad_params"]["sub_idxs"]))
        chosen = control.cond_hint_original
        control.cond_hint_original, control.cond_hint = chosen[options["ad_params"]["sub_idxs"]], None
        try:
            return usual(x, t, cond, batched, options)
        finally:
            control.cond_hint_original = chosen

    control.get_control = get_control
    control.copy = lambda: control
    parts = invert(pack, tiny_model(), prompt(1, control=control), frames_per_batch=3, steps=1)
    assert seen == [(FRAMES, [0, 1, 2]), (FRAMES, [3, 4, 5]), (FRAMES, [6])]
    plain = tiny_controlnet().set_cond_hint(hints)
    assert difference(parts[2].latents, invert(pack, tiny_model(), prompt(1, control=plain), steps=1)[2].latents) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "stem"}, r"frames_per_batch is 3, but this method looks at all 7 frames at once\..*STEM Basis Estimate"),
        ({"method": "all_frames"}, r"but this method looks at all 7 frames at once"),
        ({"method": "stem", "frames_per_em": 9}, r"but this method looks at all 7 frames at once"),
        ({"method": "stem", "frames_per_em": 2}, r"2 frames share their bases \(frames_per_em\)\. Choose a multiple of 2"),
    ],
)
def test_batches_that_would_part_frames_are_refused(pack, changes, message):
    with pytest.raises(ValueError, match=f"STEMInvertLatents: .*{message}"):
        invert(pack, tiny_model(), **changes, frames_per_batch=3)


def test_motion_modules_are_not_torn_apart(pack, monkeypatch):
    model, seen = rows_of(tiny_model())
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "ADE", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    memory_for(3, model, monkeypatch)
    invert(pack, model, steps=1)
    assert seen == [FRAMES]
    with pytest.raises(ValueError, match="AnimateDiff's motion modules need their neighbours: set it to 0"):
        invert(pack, model, frames_per_batch=3)


# ------------------------------------------------------------------------------------------------------------ memory


def memory_for(frames, model, monkeypatch):
    """Lets so many frames of the test's clip fit, by core's estimate."""
    one = model.model.memory_required([1, 4, 8, 16])
    free = 1.5 * one * (frames + 0.5)
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda dev=None, torch_free_too=False: (free, free) if torch_free_too else free,
    )


def test_as_many_frames_as_fit_go_at_once(pack, monkeypatch, caplog):
    model, seen = rows_of(tiny_model())
    memory_for(3, model, monkeypatch)
    with caplog.at_level(logging.INFO):
        invert(pack, model)
    assert seen == [3, 3, 1] * STEPS and "3 of 7 frames at once" in caplog.text
    seen.clear()
    invert(pack, model, frames_per_batch=FRAMES)
    assert seen == [FRAMES] * STEPS, "as it was asked for"
    seen.clear()
    invert(pack, model, method="stem", frames_per_em=2)
    assert seen == [2, 2, 2, 1] * STEPS
    caplog.clear()
    seen.clear()
    invert(pack, model, method="stem")
    assert seen == [7] * STEPS, "its bases are of the whole clip: nothing else would be the same result"
    assert "by ComfyUI's estimate 3 fit into the free memory" in caplog.text and "STEM Basis Estimate" in caplog.text
    caplog.clear()
    keyframe_basis(pack, model, keyframes=6)
    assert "6 frames go through the model at once" in caplog.text and "choose fewer keyframes" in caplog.text


def test_nothing_is_split_by_itself_where_other_nodes_may_look_at_all_frames(pack, monkeypatch):
    model, seen = rows_of(tiny_model())
    memory_for(3, model, monkeypatch)
    model.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    invert(pack, model, steps=1)
    assert seen == [7]
    seen.clear()
    invert(pack, model, steps=1, frames_per_batch=3)
    assert seen == [3, 3, 1], "but where it is asked for"


def test_core_is_told_what_a_batch_needs(pack, rows_announced):
    model = tiny_model()
    invert(pack, model)
    invert(pack, model, frames_per_batch=3)
    invert(pack, model, method="stem")
    one = model.model.memory_required([2, 4, 8, 16])
    invert(pack, model, method="first_previous")
    block = pack.stem.em.block_bytes(torch.device("cpu"))
    contexts = 5 * FRAMES * 8 * 16 * 32 * 4  # of the finest blocks
    assert rows_announced == [7, 3, 7 + -(-block // one), 7 + -(-contexts // one)]
    attending = pack.nodes.patch.STEMPatchModel.execute(
        model=model, num_bases=8, em_iterations=1, seed=0, start_percent=0.0, end_percent=1.0, temperature=1.0, blocks="all"
    ).result[0]
    invert(pack, attending)
    assert rows_announced[-1] == 7, "the patch is gone in the inversion, and what it needs"


def test_core_is_told_what_a_window_needs(pack, rows_announced):
    windows = ContextWindowsManualNode.execute(
        tiny_model(), context_length=4, context_overlap=1, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    ).result[0]  # fmt: skip
    invert(pack, windows, steps=1)
    assert rows_announced == [4]


def test_memory_that_runs_out_makes_batches_smaller(pack, caplog):
    model, seen = rows_of(tiny_model())
    expected = invert(pack, model)[2].latents
    noted = model.model_options["model_function_wrapper"]

    def small_card(run, told):
        if len(told["input"]) > 2:
            raise torch.OutOfMemoryError("Allocation on device")
        return noted(run, told)

    model.set_model_unet_function_wrapper(small_card)
    seen.clear()
    found = invert(pack, model)[2].latents
    assert seen == [1] * FRAMES * STEPS and caplog.text.count("memory ran out") == 1
    assert "memory ran out with 7 frames at once; going on with 1" in caplog.text
    assert difference(found, expected) < 1e-5
    seen.clear()
    assert difference(invert(pack, model, frames_per_batch=4)[2].latents, expected) < 1e-5
    assert seen == [2, 2, 2, 1] * STEPS
    with pytest.raises(torch.OutOfMemoryError):
        invert(pack, model, method="stem")
    with pytest.raises(torch.OutOfMemoryError):  # motion modules need all frames of a call
        animated = model.clone()
        animated.model_options["transformer_options"]["ad_params"] = {"sub_idxs": None, "full_length": FRAMES}
        invert(pack, animated)


def test_blocks_stay_small_for_the_rest_of_a_run(pack, monkeypatch, caplog):
    """In an inversion and under any sampler; the next run begins anew."""
    model, tried = tiny_model(), []
    usual, most = pack.stem.em._blockwise, 100

    def small_card(mu, tokens, temperature, block_tokens, check):
        tried.append(block_tokens)
        if block_tokens > most:
            raise torch.OutOfMemoryError("Allocation on device")
        return usual(mu, tokens, temperature, block_tokens, check)

    def sampled():
        chosen = {**{name: INPUTS[name] for name in ("num_bases", "em_iterations", "temperature", "seed", "blocks")}}
        patched = pack.nodes.patch.STEMPatchModel.execute(model=model, **chosen, start_percent=0.0, end_percent=1.0).result[0]
        guider = comfy.samplers.CFGGuider(patched)
        guider.inner_set_conds({"positive": prompt()})
        start = clip_latents(FRAMES)["samples"]
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(torch.zeros_like(start), start, euler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True, seed=0)

    for run in (lambda: invert(pack, model, method="stem")[2].latents, sampled):
        expected = run()
        with monkeypatch.context() as patched:
            patched.setattr(pack.stem.em, "_blockwise", small_card)
            for _ in range(2):
                caplog.clear()
                tried.clear()
                assert difference(run(), expected) < 1e-4
                assert caplog.text.count("memory ran out in the estimate of bases") == 1
                failed = [size for size in tried if size > most]
                assert failed and tried[: len(failed)] == failed, "once, at the first block"


def test_a_warm_start_goes_on_from_the_level_before(pack):
    """Through the nodes, in groups of frames, in batches, and where a call is made again as memory ran out."""
    model, settings = tiny_model(), {"method": "stem", "frames_per_em": 2, "em_iterations": 3}
    cold, warm = (invert(pack, model, **settings, warm_iterations=n)[2] for n in (0, 1))
    assert warm.settings.basis.warm_iterations == 1 and cold.settings.basis.warm_iterations == 0
    assert torch.equal(cold.latents[1], warm.latents[1]) and difference(warm.latents[2], cold.latents[2]) > 1e-5
    assert difference(invert(pack, model, **settings, warm_iterations=1, frames_per_batch=4)[2].latents, warm.latents) < 1e-4
    calls = []

    def fails_once(run, told):
        calls.append(len(told["input"]))
        out = run(told["input"], told["timestep"], **told["c"])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("Allocation on device")
        return out

    failing = model.clone()
    failing.set_model_unet_function_wrapper(fails_once)
    again = invert(pack, failing, **settings, warm_iterations=1)[2].latents
    assert calls[:4] == [7, 7, 2, 2] and difference(again, warm.latents) < 1e-4

    how = {"model": model, "latents": clip_latents(FRAMES), "positive": prompt(), "keyframes": 3}
    inputs = {name: value for name, value in INPUTS.items() if name != "frames_per_em"}
    cold, warm = (pack.nodes.basis.STEMBasisEstimate.execute(**how, **inputs, warm_iterations=n).result[0] for n in (0, 1))
    assert warm.settings.warm_iterations == 1 and torch.equal(warm.keys[0][0], cold.keys[0][0])
    assert difference(warm.keys[0][1], cold.keys[0][1]) > 1e-5


def test_what_a_warm_start_keeps_is_two_levels(pack):
    record = pack.nodes.bridge.record.BasisRecord(torch.tensor([0.5, 1.0, 2.0]), ("input_1",), ["a"])
    for level, sigma in enumerate((0.5, 1.0, 2.0)):
        for first in range(3):  # windows of other frames at every level
            record.keep_latest("input_1", sigma, "a", [10 * level + first], torch.zeros(1, 2, 3))
    assert sum(len(found) for found in record._latest.values()) == 6
    assert record.latest("input_1", 2.0, "a", [11]) is not None and record.latest("input_1", 2.0, "a", [1]) is None


@pytest.mark.parametrize("changes", [{}, {"frames_per_batch": 3}, {"method": "stem"}, {"method": "stem", "warm_iterations": 1}])
def test_two_devices_give_what_one_gives(pack, changes):
    """Core's way with several: each prompt on one of them, here cpu and cpu:0."""
    model, devices = tiny_model(), []

    def several(executor, *args, **kwargs):
        guider = executor.class_obj
        guider.model_options["multigpu_clones"] = {torch.device(name): guider.model_patcher for name in ("cpu", "cpu:0")}
        return executor(*args, **kwargs)

    def note(n, context, value, options):
        devices.append((options.get("multigpu_thread_device"), len(n)))
        return n, context, value

    left, right = torch.ones(2, 1, 64, 128)
    left[..., 64:], right[..., :64] = 0, 0
    halves = [[text, {**told, "mask": mask}] for [[text, told]], mask in ((prompt(1), left), (prompt(5), right))]
    expected = invert(pack, model, halves, **changes)[2].latents
    apart = model.clone()
    apart.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "several", several)
    apart.set_model_attn2_patch(note)
    found = invert(pack, apart, halves, **changes)[2].latents
    assert {device for device, _ in devices} == {torch.device("cpu"), torch.device("cpu:0")}
    assert max(rows for _, rows in devices) == changes.get("frames_per_batch", FRAMES)
    assert difference(found, expected) < 1e-4


# -------------------------------------------------------------------------------------------------------- trajectory


def test_a_trajectory_on_disk_leads_an_editor_as_one_in_memory_does(pack):
    model = tiny_model()
    in_memory, on_disk = (invert(pack, model, trajectory_on_disk=where) for where in (False, True))
    assert torch.equal(torch.stack([on_disk[2].latents[i] for i in range(STEPS + 1)]), in_memory[2].latents)
    assert on_disk[2].latents.folder.is_dir()
    outs = []
    for noise, sigmas, trajectory, _ in (in_memory, on_disk):
        edited = pack.nodes.tokenflow.STEMTokenFlow.execute(
            model=model, trajectory=trajectory, mode="pnp", keyframe_every=3, qk_until=0.5, conv_until=0.8, seed=0,
            blocks="all", blend="official", keyframes="fixed",
        ).result[0]  # fmt: skip
        guider = comfy.samplers.CFGGuider(edited)
        guider.set_conds(prompt(1), prompt(2))
        start, euler = noise["samples"], comfy.samplers.sampler_object("euler")
        outs.append(guider.sample(torch.zeros_like(start), start, euler, sigmas, disable_pbar=True, seed=0))
    assert torch.equal(*outs)


def test_a_disk_without_room_is_told_before_the_run(pack, monkeypatch):
    model, seen = rows_of(tiny_model())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    size = 4 * 5 * FRAMES * 4 * 8 * 16
    invert(pack, model, trajectory_on_disk=True)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size - 1))
    seen.clear()
    with pytest.raises(ValueError, match=r"STEMInvertLatents: the trajectory takes 0 MB, and .* has 0 MB left"):
        invert(pack, model, trajectory_on_disk=True)
    assert not seen
    invert(pack, model, trajectory_on_disk=True, trajectory_dtype="float16")


def test_a_disk_that_is_full_is_told(pack, monkeypatch):
    def full(tensors, file):
        raise OSError("No space left on device")

    monkeypatch.setattr(pack.stem.level_files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device"):
        invert(pack, tiny_model(), trajectory_on_disk=True)


def test_half_precision_loses_less_than_half_a_decibel(pack, demo, monkeypatch):
    """Of the model, and of the trajectory that the way back starts from, in what comes back of the demo clip."""
    vae, images = demo[2], demo_images(pack, 4)
    latents = encode(demo, images)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda dtype=dtype, **_: dtype)
        monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)
        model = pack.nodes.bridge.demo_model.load_demo_unet()
        assert model.model.get_dtype_inference() == dtype
        source = text(demo[1], "a red star on grass")
        noise, sigmas, trajectory, basis = invert(
            pack, model, source, latents, method="stem", num_bases=256, em_iterations=5, temperature=0.01, steps=20,
            trajectory_dtype="float32" if dtype == torch.float32 else "float16",
        )  # fmt: skip
        assert trajectory.latents.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        reading = pack.nodes.patch.STEMPatchModel.execute(
            model=model, num_bases=256, em_iterations=5, seed=0, start_percent=0.0, end_percent=1.0, temperature=0.01,
            blocks="all", basis=basis,
        ).result[0]  # fmt: skip
        guider = comfy.samplers.CFGGuider(reading)
        guider.set_conds(source, source)
        guider.set_cfg(1.0)
        end = pack.stem.trajectory.latents_at(trajectory, -1)
        start = model.model.process_latent_out(end)
        assert torch.allclose(start, noise["samples"].float(), rtol=2e-3, atol=2e-3 * float(start.abs().max()))
        out = guider.sample(
            torch.zeros_like(start), start, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )
        found[dtype] = psnr(core.VAEDecode().decode(vae, {"samples": out.float()})[0], images)
    assert found[torch.bfloat16] > found[torch.float32] - 0.5 and found[torch.float16] > found[torch.float32] - 0.5, found
