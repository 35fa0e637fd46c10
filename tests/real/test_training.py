"""What the demo model is trained with is what core runs, and what judges it is run at all."""

import pytest
import torch
from models import fill

from tools import evaluate, train_unet
from tools.bench import clips, inversion


@pytest.fixture(scope="module")
def demo(pack):
    with torch.inference_mode():
        return clips.load_demo()


def test_the_text_encoder_in_training_is_that_of_core(pack, demo):
    config = pack.nodes.bridge.demo_model
    shipped = train_unet.read_checkpoint(config.CHECKPOINT, config)
    text = train_unet.Text(config, shipped["text.ids"])
    weights = {k.removeprefix("text."): v for k, v in shipped.items() if k.startswith("text.")}
    text.load_state_dict(weights)
    words = "a red circle on grass"
    ids = [token for token, _ in train_unet.comfy_tokenizer().tokenize_with_weights(words)["l"][0]]
    rows = torch.tensor([shipped["text.ids"].tolist().index(i) for i in ids])
    [[expected, _]] = demo.text(words)
    assert torch.allclose(text(rows[None]), expected.float(), atol=2e-3)


@torch.inference_mode(False)  # unlike the nodes of all other tests here
def test_training_goes_on_from_the_shipped_checkpoint(pack):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = pack.nodes.bridge.demo_model
    shipped = train_unet.read_checkpoint(config.CHECKPOINT, config)
    shipped.pop("vae")
    unet = UNetModel(**config.UNET_CONFIG, device="cpu", dtype=torch.float32)
    both = train_unet.Denoiser(unet, train_unet.Text(config, shipped["text.ids"])).requires_grad_(True)
    both.load_state_dict(shipped)
    optimisers = train_unet.Optimisers(both)
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    z = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)) / 4
    rows = torch.randint(len(shipped["text.ids"]), (4, 77), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        both.zero_grad()
        loss = both(z, rows, torch.Generator().manual_seed(2))
        loss.backward()
        optimisers.step(3e-4)
        losses.append(loss.item())
    assert sorted(losses, reverse=True) == losses, "the same pictures and noise are predicted better after every step"
    still = [name for name, p in both.named_parameters() if torch.equal(p, before[name])]
    assert not still, "every weight is trained"
    again = train_unet.Optimisers(both)
    again.load_state_dict(optimisers.state_dict())
    momenta = [[state["momentum_buffer"] for state in o.all[0].state.values()] for o in (optimisers, again)]
    assert len(momenta[0]) == len(optimisers.flat) > 100 and all(map(torch.equal, *momenta))


def test_padded_attention_is_attention(pack):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**pack.nodes.bridge.demo_model.UNET_CONFIG, device="cpu", dtype=torch.float32)
    fill(unet, 0)
    g = torch.Generator().manual_seed(0)
    x, context, t = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 77, 64, generator=g), torch.tensor([3.0, 700.0])
    plain = unet(x, t, context=context, transformer_options={})
    padded = unet(x, t, context=context, transformer_options={"optimized_attention_override": train_unet.narrow_attention})
    assert torch.allclose(padded, plain, atol=1e-4 * float(plain.abs().max()))


def test_prompts_are_sampled_and_judged(pack):
    pictures = evaluate.sample(pack, ["a red circle on grass", "a blue star on sand"], steps=2, cfg=5.0)
    assert pictures.shape == (2, 128, 128, 3) and pictures.isfinite().all() and not torch.equal(*pictures)


@pytest.mark.parametrize("what", inversion.INVERSIONS, ids=lambda what: what.ways_back[0])
def test_the_benchmark_measures_every_way_back(demo, what):
    source = clips.load_clip("scene 0")
    source = source._replace(images=source.images[:3], flow=source.flow[:2], valid=source.valid[:2])
    latents, positive = demo.encode(source.images), demo.text(source.prompt)
    kept = demo.decode(latents)
    found = inversion.measure(demo, what, source, kept, latents, positive, steps=4)
    assert set(found) == set(what.ways_back)
    for measures in found.values():
        assert set(measures) == set(inversion.MEASURES)
        assert measures["psnr"] > 15 and measures["psnr_source"] > 12 and 0 < measures["ssim"] <= 1
    if len(what.ways_back) > 1:
        assert len({measures["psnr"] for measures in found.values()}) == len(what.ways_back), "ways back that differ"
