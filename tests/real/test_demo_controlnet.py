"""The shipped ControlNet in the hands of stock nodes: what is drawn has the outline that core's Canny finds."""

import pytest
import safetensors.torch
import torch
from comfy.controlnet import ControlNet
from comfy.samplers import sampler_object
from comfy_extras.nodes_canny import Canny
from comfy_extras.nodes_custom_sampler import SamplerCustom

import nodes as core
from stem.metrics import iou
from stem.reader import main_figures
from stem.scenes import caption, edit_scene, random_scene, render

FIRST_SEED = 600_000  # of the scenes; training begins at tools.training_data.TRAINING_SEEDS
SCENES, STEPS, CFG = 8, 10, 5.0


@pytest.fixture(scope="module")
def scenes():
    """One frame each of scenes with one shape, their masks and captions."""
    drawn = [random_scene(FIRST_SEED + i, frames=1, figures=1) for i in range(SCENES)]
    clips = [render(scene) for scene in drawn]
    return torch.cat([c.images for c in clips]), torch.cat([c.mask for c in clips]), [caption(scene) for scene in drawn]


@pytest.fixture(scope="module")
def net(pack):
    return pack.nodes.demo.STEMDemoControlNet.execute().result[0]


def encoded(demo, texts):
    """A conditioning with a row for each text."""
    return [[torch.cat([core.CLIPTextEncode().encode(demo[1], text)[0][0][0] for text in texts]), {}]]


def edges_of(images):
    return Canny.execute(images, 0.2, 0.4).result[0]  # with core's own thresholds half of the shapes have no edges


def sampled(demo, texts, net=None, edges=None, strength=1.0, steps=STEPS, seed=5):
    """Pictures of the texts from noise."""
    positive, negative = encoded(demo, texts), encoded(demo, [""] * len(texts))
    if net is not None:
        apply = core.ControlNetApplyAdvanced().apply_controlnet
        positive, negative = apply(positive, negative, net, edges, strength, 0.0, 1.0)
    (empty,) = core.EmptyLatentImage().generate(128, 128, len(texts))
    (out,) = core.KSampler().sample(demo[0], seed, steps, CFG, "ddim", "simple", positive, negative, empty)
    return core.VAEDecode().decode(demo[2], out)[0]


def test_the_file_is_small(pack):
    path = pack.nodes.bridge.demo_model.CONTROLNET
    assert path.stat().st_size <= 8e6
    state = safetensors.torch.load_file(path)
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert all(v.isfinite().all() for v in state.values())


def test_it_is_an_ordinary_controlnet_with_all_its_weights(pack, net):
    assert type(net) is ControlNet
    shipped = safetensors.torch.load_file(pack.nodes.bridge.demo_model.CONTROLNET)
    loaded = net.control_model.state_dict()
    assert loaded.keys() == shipped.keys()
    assert all(torch.equal(loaded[key].float(), shipped[key].float()) for key in loaded)
    assert all(shipped[f"{end}.0.weight"].any() for end in [*(f"zero_convs.{i}" for i in range(12)), "middle_block_out"])


def test_every_call_gives_another_object_of_the_same_weights(pack, net):
    other = pack.nodes.demo.STEMDemoControlNet.execute().result[0]
    assert other is not net and other.control_model is net.control_model
    other.set_cond_hint(torch.ones(1, 3, 8, 8), 0.5)
    again = pack.nodes.demo.STEMDemoControlNet.execute().result[0]
    assert net.cond_hint_original is None and again.cond_hint_original is None and again.strength == 1.0


def test_a_missing_file_is_explained(pack, monkeypatch, tmp_path):
    bridge = pack.nodes.bridge.demo_model
    monkeypatch.setattr(bridge, "CONTROLNET", tmp_path / "demo_controlnet.safetensors")
    bridge._shared_controlnet.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"STEMDemoControlNet: demo_controlnet.safetensors is missing .* install the"):
        pack.nodes.demo.STEMDemoControlNet.execute()


def test_the_outline_follows_the_edges(demo, net, scenes):
    images, masks, prompts = scenes
    edges = edges_of(images)
    alone = iou(main_figures(sampled(demo, prompts)), masks).mean()
    prompted = iou(main_figures(sampled(demo, prompts, net, edges)), masks).mean()
    silent = iou(main_figures(sampled(demo, [""] * SCENES, net, edges)), masks).mean()
    assert prompted > 0.6 and prompted > alone + 0.3, (prompted, alone)
    assert silent > 0.5 and silent > alone + 0.2, (silent, alone)


def test_the_edges_and_not_the_picture_decide(demo, net, scenes):
    """Edges of another scene move the shape there."""
    images, masks, _ = scenes
    edges = edges_of(images)
    drawn = main_figures(sampled(demo, ["a red circle on grass"] * SCENES, net, edges.roll(1, 0)))
    assert iou(drawn, masks.roll(1, 0)).mean() > iou(drawn, masks).mean() + 0.3


def test_a_second_run_is_equal_and_strength_zero_is_none(demo, net, scenes):
    images, _, prompts = (part[:2] for part in scenes)
    edges = edges_of(images)
    first, second, off = (sampled(demo, prompts, net, edges, strength, steps=2) for strength in (1.0, 1.0, 0.0))
    alone = sampled(demo, prompts, steps=2)
    assert torch.equal(first, second) and torch.equal(off, alone) and not torch.allclose(first, alone)


def test_strength_zero_in_the_controlnet_itself_is_none(demo, net, scenes):
    """The stock node leaves a ControlNet of strength zero out; other nodes may set it."""
    images, _, prompts = (part[:2] for part in scenes)
    control = net.copy().set_cond_hint(edges_of(images).movedim(-1, 1), 0.0)
    (empty,) = core.EmptyLatentImage().generate(128, 128, 2)
    found = []
    for options in ({"control": control}, {}):
        positive, negative = ([[text, options]] for [[text, _]] in (encoded(demo, prompts), encoded(demo, ["", ""])))
        found += core.KSampler().sample(demo[0], 5, 2, CFG, "ddim", "simple", positive, negative, empty)
    assert torch.equal(*(latents["samples"] for latents in found))


def test_an_edit_of_an_inverted_clip_keeps_its_outline(pack, demo, net):
    """As in the template: inversion, STEM attention on its basis, and the edges on the prompts of the edit."""
    scene = random_scene(FIRST_SEED + 5, frames=4, figures=1)
    clip, nodes = render(scene), pack.nodes
    words = [caption(edit_scene(scene, colour=colour)) for colour in (scene.figures[0].colour, "blue")]
    source, edited, negative = (encoded(demo, [text]) for text in (*words, ""))
    latents = core.VAEEncode().encode(demo[2], clip.images)[0]
    em = {"num_bases": 64, "em_iterations": 3, "temperature": 0.01, "seed": 0, "blocks": "all"}
    noise, sigmas, _, basis = nodes.invert.STEMInvertLatents.execute(
        model=demo[0], latents=latents, positive=source, steps=12, method="stem", frames_per_em=0, **em
    ).result
    model = nodes.patch.STEMPatchModel.execute(model=demo[0], basis=basis, start_percent=0.0, end_percent=1.0, **em).result[0]
    held = core.ControlNetApplyAdvanced().apply_controlnet(edited, negative, net, edges_of(clip.images), 1.0, 0.0, 1.0)
    found = []
    for positive, other in ((edited, negative), held):
        out = SamplerCustom.execute(model, False, 0, CFG, positive, other, sampler_object("euler"), sigmas, noise).result[0]
        found.append(float(iou(main_figures(core.VAEDecode().decode(demo[2], out)[0]), clip.mask).mean()))
    assert found[1] > 0.7 and found[1] > found[0], found
