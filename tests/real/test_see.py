"""What is seen of a basis is what the model's blocks really read."""

import copy

import comfy.model_management
import pytest
import torch
from fatezero_card import demo_images, encode, text
from models import clip_latents, prompt, tiny_model

FRAMES, STEPS, BLOCK, HEAD = 5, 4, "output_8", 3
EM = {"num_bases": 16, "em_iterations": 3, "seed": 4, "temperature": 0.05, "blocks": "all"}
TOKENS = 8  # along an edge of BLOCK, for 128 pixels


def watched(model, seen):
    """A clone of which a core patch writes down what the block makes its keys of, by noise level."""
    model = model.clone()

    def patch(n, context, value, extra):
        if extra["block"] == ("output", 8):
            keys = model.model.diffusion_model.output_blocks[8][1].transformer_blocks[0].attn1.to_k(context)
            seen[round(float(extra["sigmas"][0]), 4)] = keys.unflatten(-1, (8, -1))[:, :, HEAD].clone()
        return n, context, value

    model.set_model_attn1_patch(patch)
    return model


def invert(pack, model, latents, positive, **changes):
    how = {**EM, "steps": STEPS, "method": "stem", "frames_per_em": 0, **changes}
    return pack.nodes.invert.STEMInvertLatents.execute(model=model, latents=latents, positive=positive, **how).result


@pytest.fixture(scope="module")
def clip(pack, demo):
    """Frames, their inversion, and the keys that a block had on the way."""
    with torch.inference_mode():
        images, keys = demo_images(pack, FRAMES), {}
        _, _, trajectory, basis = invert(
            pack, watched(demo[0], keys), encode(demo, images), text(demo[1], "a red star on grass")
        )
    return images, trajectory, basis, list(keys.values())


def look(pack, demo, clip, model=None, **changes):
    images, trajectory, basis, _ = clip
    inputs = {
        "model": model or demo[0], "basis": basis, "trajectory": trajectory, "images": images, "block": BLOCK,
        "noise_level": 0.5, "opacity": 0.7, "head": HEAD, **changes,
    }  # fmt: skip
    return pack.nodes.see.STEMBasisPreview.execute(**inputs).result


def keys_at(pack, model, basis, trajectory, level, head=HEAD):
    layout = pack.nodes.bridge.layout.read_layout(model)
    return pack.nodes.bridge.sight.keys_at(model, layout, basis, trajectory, BLOCK, head, level)


@pytest.mark.parametrize("level", [1, 3, 4])
def test_keys_are_those_that_the_block_had_in_the_inversion(pack, demo, clip, level):
    _, trajectory, basis, expected = clip
    found = keys_at(pack, demo[0], basis, trajectory, level)
    assert found.shape == (FRAMES, TOKENS * TOKENS, 8)
    torch.testing.assert_close(found, expected[level - 1], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(found, expected[level % 4], atol=0.05), "and not those of another level"


def test_keys_of_frames_that_do_not_fit_at_once_are_the_same(pack, demo, clip, monkeypatch):
    _, trajectory, basis, _ = clip
    whole, calls = keys_at(pack, demo[0], basis, trajectory, 2), []
    monkeypatch.setattr(pack.nodes.bridge.batches, "frames_that_fit", lambda *_: 2)
    model = demo[0].clone()
    model.set_model_attn1_patch(lambda n, k, v, extra: calls.append(len(n)) or (n, k, v))
    monkeypatch.setattr(pack.nodes.bridge.batches, "others_mix_frames", lambda _: False)
    parts = keys_at(pack, model, basis, trajectory, 2)
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)
    assert set(calls) == {2, 1}


def test_of_several_prompts_the_keys_are_those_of_the_first(pack, demo, clip):
    _, trajectory, basis, _ = clip
    [one], [other] = trajectory.conditioning, text(demo[1], "a blue circle on sand")
    alone, both = (
        keys_at(pack, demo[0], basis, trajectory._replace(conditioning=prompts), 2) for prompts in ([one], [one, other])
    )
    torch.testing.assert_close(both, alone, atol=1e-3, rtol=1e-3)


def known(basis, direction):
    """The basis with two bases in opposite directions in HEAD of BLOCK, at all levels; the others are dead."""
    index = basis.blocks.index(BLOCK)
    keys = basis.keys[index].clone()
    keys[:, HEAD] = 0
    keys[:, HEAD, 0], keys[:, HEAD, 1] = 100 * direction, -100 * direction
    return basis._replace(
        keys=(*basis.keys[:index], keys, *basis.keys[index + 1 :]), settings=basis.settings._replace(temperature=1e-4)
    )


def test_patches_have_the_colour_of_the_basis_that_explains_them(pack, demo, clip):
    images, _, basis, keys = clip
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    side = keys[1] @ direction  # (f, n); sign: which of the two bases
    painted, chart, report = look(pack, demo, clip, basis=known(basis, direction), noise_level=1 / 3, opacity=1.0)
    assert painted.shape == images.shape and chart.shape[0] == 1
    sure = side.abs() > 0.1 * side.abs().median()  # rounding decides the others
    share = 128 // TOKENS
    patches = painted.unflatten(1, (TOKENS, share)).unflatten(3, (TOKENS, share)).movedim(3, 2).flatten(1, 2)  # f n y x c
    torch.testing.assert_close(patches, patches[:, :, :1, :1].expand_as(patches), atol=0.02, rtol=0)
    colours = [patches[(side * sign > 0) & sure][:, 0, 0] for sign in (1, -1)]
    for colour in colours:
        assert len(colour) > 20
        torch.testing.assert_close(colour, colour[:1].expand_as(colour), atol=0.02, rtol=0)
    assert (colours[0][0] - colours[1][0]).abs().max() > 0.05
    assert "Alive: 2 of 16 bases; 2 are the best of some of the 320 tokens" in report


def test_without_opacity_the_frames_are_as_they_were(pack, demo, clip):
    assert torch.equal(look(pack, demo, clip, opacity=0.0)[0], clip[0])


def test_a_basis_keeps_its_colour_over_time(pack, demo, clip):
    images, trajectory, basis, _ = clip
    still = trajectory._replace(latents=trajectory.latents[:, :1].expand(-1, FRAMES, -1, -1, -1))
    painted = look(pack, demo, (images[:1].expand(FRAMES, -1, -1, -1), still, basis, None))[0]
    torch.testing.assert_close(painted, painted[:1].expand_as(painted), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "start"),
    [({}, "on all 5 frames, from random bases"), ({"warm_iterations": 2}, "from the bases of the level below (warm start)")],
)
def test_em_run_again_comes_to_the_basis(pack, demo, changes, start):
    images = demo_images(pack, FRAMES)
    _, _, trajectory, basis = invert(pack, demo[0], encode(demo, images), text(demo[1], "a red star on grass"), **changes)
    view = pack.nodes.bridge.basis_view.view_basis
    layout = pack.nodes.bridge.layout.read_layout(demo[0])
    block = pack.nodes.bridge.layout.choose_block(layout, BLOCK)
    figures = view(demo[0], layout, basis, trajectory, images, block, HEAD, 3, 0.5).figures
    assert figures.rounds == changes.get("warm_iterations", 3) and start in figures.start
    assert float(figures.fits[figures.rounds]) == pytest.approx(figures.fit_of_basis, abs=1e-4)
    assert float(figures.fits[figures.rounds] - figures.fits[0]) > 1e-3, "it has not begun there"


def test_a_basis_of_keyframes_is_shown_on_them(pack, demo, clip):
    images, trajectory, _, _ = clip
    basis = pack.nodes.basis.STEMBasisEstimate.execute(
        model=demo[0], latents=encode(demo, images), positive=trajectory.conditioning, steps=STEPS, keyframes=3, **EM
    ).result[0]
    report = look(pack, demo, clip, basis=basis)[2]
    assert "on the 3 keyframes of 5 frames that the basis was estimated from" in report
    other = look(pack, demo, clip, basis=basis._replace(total_frames=9))[2]
    assert "on all 5 frames (the basis is of another clip, of 9 frames)" in other


def test_bases_of_another_level_are_said_to_be(pack, demo, clip):
    _, trajectory, basis, _ = clip
    sigma = float(trajectory.sigmas[3])
    assert f"noise level 3 of 4 (sigma {sigma:.3g})" in look(pack, demo, clip)[2]
    other = look(pack, demo, clip, basis=basis._replace(sigmas=1.2 * basis.sigmas))[2]
    assert f"noise level 3 of 4 (sigma {sigma:.3g}, bases of sigma {1.2 * sigma:.3g})" in other


@pytest.mark.parametrize("block", ["input_1", "input_4", "middle_0", "output_11"])
def test_sizes_that_do_not_divide(pack, block):
    model, latents = tiny_model(), clip_latents(3, 9, 13)
    _, _, trajectory, basis = invert(pack, model, latents, prompt(), steps=2, num_bases=4)
    images = torch.full((3, 70, 101, 3), 0.5)
    painted, *_ = pack.nodes.see.STEMBasisPreview.execute(
        model=model, basis=basis, trajectory=trajectory, images=images, block=block, noise_level=1.0, opacity=1.0, head=0
    ).result
    scale = {"input_1": 1, "input_4": 2, "middle_0": 8, "output_11": 1}[block]
    assert painted.shape == images.shape
    for dim, pixels, edge in ((1, 70, 9), (2, 101, 13)):
        borders = painted.diff(dim=dim).abs().amax([d for d in range(4) if d != dim]) > 1e-4
        allowed = {i for i in range(1, pixels) if (i - 0.5) * edge / pixels // scale != (i + 0.5) * edge / pixels // scale}
        assert {i + 1 for i in borders.nonzero().flatten().tolist()} <= allowed


def test_the_model_is_left_as_it_was_and_a_second_look_is_the_same(pack, demo, clip):
    model = demo[0].clone()
    options, wrappers = copy.deepcopy(model.model_options), copy.deepcopy(model.wrappers)
    first = look(pack, demo, clip, model)
    again = look(pack, demo, clip, model)
    assert model.model_options == options and model.wrappers == wrappers and not model.patches
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]


def test_cancelling_stops_within_the_call(pack, demo, clip):
    expected, seen = look(pack, demo, clip)[0], []
    stopping = demo[0].clone()
    stopping.set_model_attn1_output_patch(
        lambda n, extra: seen.append(1) or (len(seen) == 2 and comfy.model_management.interrupt_current_processing()) or n
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        look(pack, demo, clip, stopping)
    assert torch.equal(look(pack, demo, clip)[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "output_99"}, r'block "output_99" is none of this model\'s blocks\. Choose one of input_1, '),
        ({"block": "output"}, r'block "output" stands for 9 blocks\. Choose one of'),
        ({"block": ""}, r'block "" is none'),
        ({"head": 8}, r"head is 8, and block output_8 has 8 heads\. Choose 0 to 7\."),
        ({"images": torch.zeros(4, 128, 128, 3)}, r"images has 4 frames, and the trajectory 5\. Connect"),
    ],
)
def test_wrong_input_is_named(pack, demo, clip, changes, message):
    with pytest.raises(ValueError, match=f"STEMBasisPreview: {message}"):
        look(pack, demo, clip, **changes)


def test_what_another_model_recorded_is_refused(pack, demo, clip):
    _, trajectory, basis, _ = clip
    other = basis.model._replace(prediction="v")
    with pytest.raises(ValueError, match=r"STEMBasisPreview: the basis was estimated with a .*; estimate a basis"):
        look(pack, demo, clip, basis=basis._replace(model=other))
    with pytest.raises(ValueError, match=r"STEMBasisPreview: the trajectory was recorded with a .*; invert the clip"):
        look(pack, demo, clip, trajectory=trajectory._replace(model=other))
    part = basis._replace(keys=basis.keys[:1], values=basis.values[:1], blocks=basis.blocks[:1])
    with pytest.raises(ValueError, match=r'STEMBasisPreview: the basis holds nothing for block "output_8", only for input_1'):
        look(pack, demo, clip, basis=part)


def test_an_editor_on_the_model_is_refused(pack, demo, clip):
    tokenflow = pack.nodes.tokenflow.STEMTokenFlow.execute(
        model=demo[0], trajectory=clip[1], mode="pnp", keyframe_every=3, qk_until=0.5, conv_until=0.8, seed=0, blocks="all",
        blend="official", keyframes="fixed",
    ).result[0]  # fmt: skip
    with pytest.raises(ValueError, match="STEMBasisPreview: STEMTokenFlow is on this model"):
        look(pack, demo, clip, tokenflow)


# --------------------------------------------------------------------------------------------- the other two nodes


def test_report_of_an_inversion(pack, clip):
    images, trajectory, *_ = clip
    back = (images + 0.1).clamp(0, 1)
    plot, report = pack.nodes.see.STEMInversionReport.execute(trajectory, images, back).result
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and plot.std() > 0.05
    error = ((images - back) ** 2).mean()
    assert f"PSNR {float(-10 * error.log10()):.2f} dB" in report and "Inversion by stem" in report
    with pytest.raises(ValueError, match="STEMInversionReport: source has 5 frames, reconstruction 4, the trajectory 5"):
        pack.nodes.see.STEMInversionReport.execute(trajectory, images, back[:4])


def test_clips_are_compared_in_the_order_of_the_inputs(pack):
    clips = [torch.full((2, 32, 32, 3), c) for c in (0.2, 0.4, 0.6)]
    labels = {f"label_{i}": "" for i in range(1, 5)}
    node = pack.nodes.see.STEMCompareVideos
    out = node.execute(images_1=clips[0], images_2=clips[1], images_4=clips[2], columns=0, **labels).result[0]
    assert out.shape == (2, 32, 100, 3)
    assert [round(float(x), 3) for x in out[0, 16, [16, 50, 84], 0]] == [0.2, 0.4, 0.6]
