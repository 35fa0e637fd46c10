"""STEM FateZero against a slow implementation of its card, and its words."""

import copy

import pytest
import torch
from fatezero_card import (
    BLENDED,
    FRAMES,
    LONGER,
    SD15,
    SDXL,
    SOURCE,
    STEPS,
    Official,
    card_step,
    demo_images,
    edit,
    encode,
    invert,
    near,
    sample,
    step_of,
    text,
)  # fmt: skip
from models import clip_latents, prompt, tiny_clip, tiny_model

import nodes as core
from stem.metrics import psnr

CASES = [
    pytest.param(0, {}, id="all"),
    pytest.param(0, {"attention": "replace"}, id="replace"),
    pytest.param(0, {"attention": "replace", "target_prompt": LONGER}, id="replace by more tokens"),
    pytest.param(0, {"reweight": "blue: 10"}, id="reweight"),
    pytest.param(0, {"blend_words": "red star", "blend_threshold": None}, id="blend words"),
    pytest.param(0, {"context": "previous_first", "min_channels": 0}, id="previous and first"),
    pytest.param(0, {"context": "own"}, id="own"),
    pytest.param(0, {"min_channels": 1280}, id="own where wide"),
    pytest.param(0, {"joint_norm": True}, id="joint norm"),
    pytest.param(5, {"self_until": 0.5, "cross_until": 0.8}, id="cross alone"),
    pytest.param(4, {"self_until": 0.5, "cross_until": 0.3}, id="self alone"),
    pytest.param(8, {}, id="none"),
    pytest.param(9, {"self_until": 0.95, "cross_until": 0.95}, id="cross lasts floor((t + 1) c) steps"),
    pytest.param(3, BLENDED, id="latents, official"),
    pytest.param(3, {**BLENDED, "blend_timing": "matched"}, id="latents, matched"),
    pytest.param(7, BLENDED, id="latents, too late"),
]


@pytest.mark.parametrize(("step", "case"), CASES)
def test_one_step_equals_the_card(pack, demo, bare, inverted_demo, step, case):
    _, _, trajectory, _ = inverted_demo
    x = near(trajectory, step)
    expected, official = card_step(bare, demo[1], trajectory, x, step, case)
    if case.get("blend_words") and step < 5:
        mask = official.mask_of_latents() if case.get("blend_latents") else official.mask(x.shape[-2:])
        assert 0.02 < float(mask.mean()) < 0.98, "a mask that says something"
    edited = edit(pack, demo, trajectory, **{**case, "blend_threshold": official.case["blend_threshold"]})[0]
    out = step_of(demo, edited, trajectory, x, step, 1, official.case["target_prompt"])
    assert float((out - expected).norm() / (expected - x).norm()) < 1e-4


def test_two_steps_look_at_the_words_of_both(pack, demo, bare, inverted_demo):
    """Latent blending sums the edit's maps over the steps."""
    trajectory = inverted_demo[2]
    x = near(trajectory, 3)

    def two_steps(threshold):
        case = {**BLENDED, "blend_threshold": threshold}
        between, first = card_step(bare, demo[1], trajectory, x, 3, case)
        alone, second = card_step(bare, demo[1], trajectory, between, 4, case)
        words = first.target_words, second.target_words
        both, _ = card_step(bare, demo[1], trajectory, between, 4, case, earlier_words=first.target_words)
        return between, alone, both, second, words

    *_, second, (before, now) = two_steps(0.3)
    source, alone, both = (
        second.share_of_maximum(each, second.size_at(4)) for each in (second.source_words(), now, [*before, *now])
    )
    low, high = torch.maximum(source, torch.minimum(alone, both)), torch.maximum(alone, both)
    place = (high - low).argmax()
    threshold = float((low.flatten()[place] + high.flatten()[place]) / 2)  # where the first step's words count most
    between, alone, expected, *_ = two_steps(threshold)
    assert not torch.equal(alone, expected)
    edited = edit(pack, demo, trajectory, **{**BLENDED, "blend_threshold": threshold})[0]
    out = step_of(demo, edited, trajectory, x, 3, 2)
    assert float((out - expected).norm() / (expected - between).norm()) < 1e-4


FAMILIES = [("sd2", SD15, {}), ("sdxl", SDXL, {}), ("sdxl", SDXL, {"context": "previous_first", "min_channels": 0})]


@pytest.mark.parametrize(("layout", "places", "case"), FAMILIES)
def test_one_step_of_other_families_equals_the_card(pack, layout, places, case):
    """v-prediction and other head counts; several transformers in a block, fewer blocks, words of the finest of those."""
    model, clip = tiny_model(layout), tiny_clip(layout)
    unet = copy.deepcopy(model.model.diffusion_model)
    trajectory = invert(pack, model, clip, clip_latents(FRAMES, 16, 16))[2]
    case = {"blend_words": "red star", "blend_threshold": None, **case}
    x, y = near(trajectory, 3), None
    if layout == "sdxl":
        y = model.model.encode_adm(**prompt(1)[0][1], width=128, height=128, device="cpu")
    expected, official = card_step(unet, clip, trajectory, x, 3, case, places=places, y=y)
    assert 0.02 < float(official.mask(x.shape[-2:]).mean()) < 0.98, "a mask that says something"
    tiny = model, clip
    edited = edit(pack, tiny, trajectory, **{**case, "blend_threshold": official.case["blend_threshold"]})[0]
    out = step_of(tiny, edited, trajectory, x, 3, 1)
    assert float((out - expected).norm() / (expected - x).norm()) < 1e-4


def test_half_precision_stays_near(pack):
    """A step in bfloat16 beside one in float32, of the same weights."""
    clip = tiny_clip("sd15")
    tiny = {dtype: (tiny_model(dtype=dtype), clip) for dtype in (torch.float32, torch.bfloat16)}
    trajectory = invert(pack, *tiny[torch.float32], clip_latents(FRAMES, 16, 16))[2]
    x = near(trajectory, 3)
    case = {"reweight": "blue: 2", "blend_words": "red star"}
    exact, half = (step_of(t, edit(pack, t, trajectory, **case)[0], trajectory, x, 3, 1) for t in tiny.values())
    plain = step_of(tiny[torch.float32], tiny[torch.float32][0], trajectory, x, 3, 1)
    assert float((half - exact).norm() / (exact - x).norm()) < 0.2 and not torch.allclose(exact, plain, atol=0.01)


@pytest.mark.parametrize("method", ["ddim", "stem"])
def test_its_own_prompt_with_everything_replaced_gives_the_clip_back(pack, demo, method):
    """Within 1 dB of plain sampling from the same inversion, in whatever context."""
    model, clip, vae = demo
    images = demo_images(pack, 8)
    noise, sigmas, trajectory, _ = invert(pack, model, clip, encode(demo, images), method=method)

    def back(model):
        out = sample(demo, model, noise["samples"], sigmas, SOURCE, SOURCE, cfg=1.0)
        return psnr(core.VAEDecode().decode(vae, {"samples": out})[0], images)

    plain = back(model)
    for context in ("mid", "previous_first", "own"):
        everything = {"target_prompt": SOURCE, "cross_until": 1.0, "self_until": 1.0, "context": context}
        assert back(edit(pack, demo, trajectory, **everything)[0]) > plain - 1, context


def test_the_mask_shows_where_the_words_are(pack, demo, bare, inverted_demo):
    """At the middle level, as the official mask has it there."""
    trajectory = inverted_demo[2]
    official = Official(bare, trajectory.latents.shape[-2:], 4, {"blend_threshold": None})
    below = trajectory.latents[STEPS // 2] / (1 + trajectory.sigmas[STEPS // 2] ** 2) ** 0.5
    official.run(below, below, 501, [text(demo[1], SOURCE)[0][0]] * 3)
    threshold = official.case["blend_threshold"]
    mask = edit(pack, demo, trajectory, blend_words="red star", blend_threshold=threshold)[1]
    expected = official.mask((16, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert mask.shape == (FRAMES, 128, 128) and torch.equal(mask, expected)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    everything = edit(pack, demo, inverted_demo[2], blend_words="red star", blend_threshold=0.0)[1]
    assert everything.min() == 1


# ------------------------------------------------------------------------------------------------- words and tokens


@pytest.mark.parametrize("layout", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red star", [("a", 1, 1, 1), ("red", 2, 1, 1), ("star", 3, 1, 1)]),
        ("a photorealistic star", [("a", 1, 1, 1), ("photorealistic", 2, 2, 2), ("star", 4, 1, 1)]),
        ("a star, on grass", [("a", 1, 1, 1), ("star,", 2, 2, 1), ("on", 4, 1, 1), ("grass", 5, 1, 1)]),
        ("a (red star:1.3) here", [("a", 1, 1, 1), ("red", 2, 1, 1), ("star", 3, 1, 1), ("here", 4, 1, 1)]),
        (r"star \(style\)", [("star", 1, 1, 1), ("(style)", 2, 3, 3)]),
        ("", []),
    ],
)
def test_words_lie_where_the_tokenizer_puts_them(pack, layout, prompt, words):
    found = pack.nodes.bridge.prompts.read_prompt(tiny_clip(layout), prompt, "source_prompt")
    assert [tuple(word) for word in found.words] == words
    assert found.tokens[0] == 49406 and found.tokens[-1] == 49407
    assert len(found.tokens) == 2 + sum(word.tokens for word in found.words)
