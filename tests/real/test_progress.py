"""What an inversion tells while it runs, and how soon it stops when it is told to."""

import io
import itertools

import comfy.cli_args
import comfy.model_management
import comfy.utils
import fatezero_card
import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from models import clip_latents, prompt, tiny_model
from PIL import Image

FRAMES, STEPS = 7, 4
INPUTS = {"num_bases": 12, "em_iterations": 2, "temperature": 1.0, "seed": 4, "blocks": "all", "steps": STEPS}


def invert(pack, model, frames=FRAMES, **changes):
    """Outputs of STEMInvertLatents: latents, sigmas, trajectory, basis."""
    inputs = {"method": "ddim", "frames_per_em": 0, **INPUTS, **changes}
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=clip_latents(frames), positive=prompt(), **inputs
    ).result


def estimate(pack, model):
    return pack.nodes.basis.STEMBasisEstimate.execute(
        model=model, latents=clip_latents(FRAMES), positive=prompt(), keyframes=3, **INPUTS
    ).result


@pytest.fixture
def shown(monkeypatch):
    """What core's progress bars are told, where a server would listen."""
    seen = []
    hook = lambda value, total, preview, node_id=None: seen.append((value, total, preview))  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", LatentPreviewMethod.Auto)
    return seen


@pytest.fixture
def clock(pack, monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(pack.nodes.bridge.progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def lines(pack, monkeypatch):
    """The node's status lines."""
    seen = []
    monkeypatch.setattr(pack.nodes.bridge.progress.Progress, "_send", lambda self, text: seen.append(text))
    return seen


def saved(preview) -> Image.Image:
    """As a browser gets it from core's server: with the options that it saves with."""
    kind, image, size = preview
    file = io.BytesIO()
    image.save(file, format=kind, quality=95, compress_level=1)
    assert size is None, "resizing leaves one frame"
    return Image.open(file)


def pictures(image: Image.Image) -> list[bytes]:
    found = []
    for i in range(image.n_frames):
        image.seek(i)
        found.append(image.convert("RGB").tobytes())
    return found


# ------------------------------------------------------------------------------------------------------------ previews


def test_every_level_moves_the_bar_and_the_preview_is_the_clip(pack, shown, monkeypatch):
    """Not its noise: of the first level it is nearly the clip itself, drawn by core's own previewer."""
    monkeypatch.setattr(pack.nodes.bridge.progress, "PREVIEW_EVERY", 0)
    monkeypatch.setattr(pack.nodes.bridge.progress, "PREVIEW_SHARE", float("inf"))
    model = tiny_model()
    trajectory = invert(pack, model)[2]
    assert [(value, total) for value, total, _ in shown] == [(i + 1, STEPS) for i in range(STEPS)]
    clean = trajectory.latents[0] / (1 + trajectory.sigmas[0] ** 2) ** 0.5
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    first = saved(shown[0][2])
    assert (first.format, first.n_frames, first.info["loop"]) == ("PNG", FRAMES, 0)
    assert first.info["duration"] == 1000 // FRAMES
    for i, got in enumerate(pictures(first)):
        wanted = previewer.decode_latent_to_preview(clean[i : i + 1]).resize(first.size, Image.Resampling.BILINEAR)
        a, b = (torch.frombuffer(bytearray(x), dtype=torch.uint8).float() for x in (got, wanted.tobytes()))
        assert (a - b).abs().mean() < 8 < b.std()
    for earlier, later in itertools.pairwise(shown):  # what the classic front end draws is another frame each time
        a, b = pictures(saved(earlier[2])), pictures(saved(later[2]))
        near = [sum(abs(x - y) for x, y in zip(a[1], c, strict=True)) for c in b]
        assert near.index(min(near)) == 0


@pytest.mark.parametrize(("frames", "count"), [(2, 2), (8, 8), (40, 8)])
def test_a_preview_has_few_frames_spread_over_the_clip(pack, shown, frames, count):
    model = tiny_model()
    marked = torch.linspace(-8, 8, frames).reshape(-1, 1, 1, 1).expand(-1, 4, 8, 16)
    image = saved(pack.nodes.bridge.progress.Previews(model).of(marked))
    brightness = [sum(picture) / len(picture) for picture in pictures(image)]
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    ends = [sum(raw) / len(raw) for raw in (previewer.decode_latent_to_preview(marked[[i]]).tobytes() for i in (0, -1))]
    assert image.n_frames == count and max(image.size) <= 256
    assert [brightness[0], brightness[-1]] == pytest.approx(ends, abs=1)


def test_one_frame_is_shown_as_core_shows_it(pack, shown):
    invert(pack, tiny_model(), frames=1)
    kind, image, size = shown[0][2]
    assert (kind, image.size, size) == ("JPEG", (16, 8), latent_preview.MAX_PREVIEW_RESOLUTION)


def test_a_previewer_of_another_pack_is_given_the_whole_clip(pack, shown, monkeypatch):
    class Other(latent_preview.LatentPreviewer):
        def decode_latent_to_preview_image(self, preview_format, x0):
            return preview_format, len(x0), 64

    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: Other())
    invert(pack, tiny_model())
    assert shown[0][2] == ("JPEG", FRAMES, 64)


def test_no_preview_where_the_user_wants_none(pack, shown, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", LatentPreviewMethod.NoPreviews)
    invert(pack, tiny_model())
    assert shown and all(preview is None for *_, preview in shown)


def test_previews_take_a_twentieth_of_the_time_at_most(pack, shown, clock, monkeypatch):
    progress = pack.nodes.bridge.progress
    previews, x0 = progress.Previews(tiny_model()), clip_latents(3)["samples"]
    usual, spent = progress.animated, [0.0]

    def slow(chosen):
        clock[0] += spent[0]
        return usual(chosen)

    monkeypatch.setattr(progress, "animated", slow)
    for spent[0], pause in ((0.001, 0.5), (0.1, 2.0)):
        clock[0] += 100
        assert previews.of(x0) is not None
        clock[0] += pause - 0.01
        assert previews.of(x0) is None
        clock[0] += 0.02
        assert previews.of(x0) is not None


# --------------------------------------------------------------------------------------------------------- status line


def test_the_status_line_tells_level_and_remaining_time(pack, lines, clock):
    """Levels of 40 s after a first one of 100 s, which is left out of the estimate as soon as there is another."""
    run = pack.nodes.bridge.progress.Progress(tiny_model(), 4)
    clock[0] += 30  # the model is loaded
    with run:
        for i, seconds in enumerate((100, 40, 40, 40)):
            run.level(0.5 + i)
            clock[0] += seconds / 4
            run.frames(range(8, 16), 40)
            clock[0] += 3 * seconds / 4
            run.callback(i, None, None, 4)
    assert lines == [
        "level 1 of 4 (sigma 0.5)",
        "level 1 of 4 (sigma 0.5), frames 9 to 16 of 40",
        "level 2 of 4 (sigma 1.5), 5:00 left",
        "level 2 of 4 (sigma 1.5), frames 9 to 16 of 40, 4:50 left",
        "level 3 of 4 (sigma 2.5), 1:20 left",
        "level 3 of 4 (sigma 2.5), frames 9 to 16 of 40, 1:10 left",
        "level 4 of 4 (sigma 3.5), 0:40 left",
        "level 4 of 4 (sigma 3.5), frames 9 to 16 of 40, 0:30 left",
        "4 levels in 3:40",
    ]


def test_fast_levels_are_told_once_a_second(pack, lines, clock):
    with pack.nodes.bridge.progress.Progress(tiny_model(), 50) as run:
        for i in range(50):
            run.level(1.0)
            clock[0] += 0.125
            run.callback(i, None, None, 50)
    assert [line.split()[1] for line in lines[:-1]] == [str(i) for i in range(1, 51, 8)]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599, "59:59"), (3665, "1:01:05")])
def test_a_time_is_told_in_minutes(pack, seconds, text):
    assert pack.nodes.bridge.progress.clock(seconds) == text


def told_frames(lines):
    return [line.split(", ")[1] for line in lines if ", frame" in line]


def test_batches_are_told_by_the_frames_of_the_clip(pack, lines, monkeypatch):
    monkeypatch.setattr(pack.nodes.bridge.progress, "STATUS_EVERY", 0)
    invert(pack, tiny_model(), frames_per_batch=3)
    assert told_frames(lines) == ["frames 1 to 3 of 7", "frames 4 to 6 of 7", "frame 7 of 7"] * STEPS
    lines.clear()
    windows = ContextWindowsManualNode.execute(tiny_model(), 4, 1, "standard_static", 1, False, "flat", 0, False).result[0]
    invert(pack, windows, frames_per_batch=2)  # frame 3 is the anchor that core puts in front of the second window
    expected = ["frames 1 to 2", "frames 3 to 4", "frames 3 to 4", "frames 5 to 6", "frame 7"]
    assert told_frames(lines) == [f"{frames} of 7" for frames in expected] * STEPS


def test_a_run_that_breaks_off_says_where(pack, lines):
    model = tiny_model()
    model.set_model_unet_function_wrapper(stop_after(2, []))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        invert(pack, model)
    assert lines[-1] == f"stopped at level 3 of {STEPS}"


# ---------------------------------------------------------------------------------------------------------- cancelling


def stop_after(call: int, begun: list):
    """A model function wrapper that asks core to interrupt while a model call, counted from 1, still runs."""

    def wrapper(run, told):
        begun.append(len(told["input"]))
        out = run(told["input"], told["timestep"], **told["c"])
        if len(begun) == call:
            comfy.model_management.interrupt_current_processing()
        return out

    return wrapper


def check_cancelling(model, run, calls):
    """`run` of a model gives a tensor; no model call begins after the interruption, and nothing is left of the run."""
    expected, options = run(model), model.clone().model_options
    for call in calls:
        stopping, begun = model.clone(), []
        stopping.set_model_unet_function_wrapper(stop_after(call, begun))
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(stopping)
        assert len(begun) == call
        assert not comfy.model_management.processing_interrupted()
    assert model.model_options == options
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("changes", [{}, {"frames_per_batch": 2}, {"method": "stem"}], ids=["ddim", "batches", "stem"])
def test_an_inversion_stops_before_the_next_model_call(pack, changes):
    check_cancelling(tiny_model(), lambda model: invert(pack, model, **changes)[2].latents, (1, 3))


def test_a_basis_estimate_stops_before_the_next_model_call(pack):
    check_cancelling(tiny_model(), lambda model: torch.stack([*estimate(pack, model)[0].keys[0]]), (1, 3))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_expectation_maximisation_stops_within_a_model_call(pack, call, monkeypatch):
    """In the round of the iterations in which it is told to."""
    attention, model = pack.nodes.bridge.self_attention, tiny_model()
    expected, rounds = invert(pack, model, method="stem")[2].latents, []

    def told(check):
        rounds.append(1)
        if len(rounds) == call:
            comfy.model_management.interrupt_current_processing()
        check()

    usual = attention.throw_exception_if_processing_interrupted
    monkeypatch.setattr(attention, "throw_exception_if_processing_interrupted", lambda: told(usual))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        invert(pack, model, method="stem")
    assert len(rounds) == call
    monkeypatch.undo()
    assert torch.equal(invert(pack, model, method="stem")[2].latents, expected)


def test_sampling_under_tokenflow_stops_before_the_next_pass(pack):
    """Four passes at least: keyframes of the source and of the edit, then groups of frames of each."""
    from test_tokenflow import DEFAULTS, edit, sample

    plain = tiny_model()
    noise, sigmas, trajectory, _ = invert(pack, plain)
    assert DEFAULTS["mode"] == "pnp"
    edited = edit(pack, plain, trajectory)
    check_cancelling(edited, lambda model: sample(model, noise["samples"], sigmas[:3]), (1, 2, 3, 4))


def test_sampling_under_fatezero_stops_before_the_next_pass(pack, demo, inverted_demo):
    """Two of each level: the source's and the edit's."""
    noise, sigmas, trajectory, _ = inverted_demo
    edited = fatezero_card.edit(pack, demo, trajectory)[0]
    check_cancelling(edited, lambda model: fatezero_card.sample(demo, model, noise["samples"], sigmas[:3]), (1, 2, 3))
