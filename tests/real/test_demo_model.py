"""The shipped checkpoint in the hands of stock nodes."""

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from models import tiny_controlnet

import nodes as core


@pytest.fixture(scope="module")
def clip(pack):
    node = pack.nodes.demo.STEMDemoClip
    return node.execute(seed=3, frames=4, size=128, colour="red", shape="circle", background="sand").result


def sampled(model, text, vae, latents, positive, **changes):
    inputs = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    negative = core.CLIPTextEncode().encode(text, "")[0]
    [out] = core.KSampler().sample(model, positive=positive, negative=negative, latent_image=latents, **{**inputs, **changes})
    return core.VAEDecode().decode(vae, out)[0]


def test_the_checkpoint_is_small(pack):
    path = pack.nodes.bridge.demo_model.CHECKPOINT
    assert path.stat().st_size <= 25e6
    state = safetensors.torch.load_file(path)
    assert {v.dtype for v in state.values()} == {torch.float16, torch.int32}
    assert all(v.isfinite().all() for v in state.values())


def test_its_blocks_are_those_of_sd15(pack, demo):
    layout = pack.nodes.bridge.layout.read_layout(demo[0])
    expected = [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", i) for i in range(3, 12)]
    assert list(layout.slots) == expected and {block.heads for block in layout.model.blocks} == {8}


def test_stock_nodes_encode_sample_and_decode(demo, clip):
    model, text, vae = demo
    images, _, prompt = clip
    latents = core.VAEEncode().encode(vae, images)[0]
    assert latents["samples"].shape == (4, 4, 16, 16)
    out = sampled(model, text, vae, latents, core.CLIPTextEncode().encode(text, prompt)[0])
    assert out.shape == images.shape and out.isfinite().all()


def test_the_vae_gives_pictures_back(demo, clip):
    images = clip[0]
    again = core.VAEDecode().decode(demo[2], core.VAEEncode().encode(demo[2], images)[0])[0]
    assert -10 * (images - again).square().mean().log10() > 30


def test_words_change_the_conditioning_and_unknown_ones_do_not_break_it(demo):
    encode = core.CLIPTextEncode().encode
    red, blue, unknown = (encode(demo[1], words)[0][0][0] for words in ("a red circle", "a blue circle", "an aardvark"))
    assert red.shape == (1, 77, 64) and not torch.allclose(red, blue) and unknown.isfinite().all()


def test_a_lora_is_loaded_by_the_stock_node(demo, clip, tmp_path, monkeypatch):
    model, text, vae = demo
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k"
    assert name in comfy.lora.model_lora_keys_unet(model.model, {})
    g = torch.Generator().manual_seed(0)
    lora = {
        f"{name}.lora_up.weight": torch.randn(64, 4, generator=g),
        f"{name}.lora_down.weight": torch.randn(4, 64, generator=g),
    }
    safetensors.torch.save_file(lora, tmp_path / "test.safetensors")
    monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda kind, file: str(tmp_path / file))
    changed, _ = core.LoraLoader().load_lora(model, text, "test.safetensors", 1.0, 1.0)
    latents = core.VAEEncode().encode(vae, clip[0])[0]
    positive = core.CLIPTextEncode().encode(text, clip[2])[0]
    assert not torch.allclose(sampled(changed, text, vae, latents, positive), sampled(model, text, vae, latents, positive))


def test_a_controlnet_of_its_layout_acts(pack, demo, clip):
    model, text, vae = demo
    control = tiny_controlnet(unet=pack.nodes.bridge.demo_model.UNET_CONFIG)
    positive = core.CLIPTextEncode().encode(text, clip[2])[0]
    [steered] = core.ControlNetApply().apply_controlnet(positive, control, clip[0], 1.0)
    latents = core.VAEEncode().encode(vae, clip[0])[0]
    assert not torch.allclose(sampled(model, text, vae, latents, steered), sampled(model, text, vae, latents, positive))


def test_model_save_writes_what_was_loaded(pack, demo, tmp_path):
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), demo[0], demo[1], demo[2])
    saved = comfy.utils.load_torch_file(str(path))
    shipped = pack.nodes.bridge.demo_model._read_checkpoint()
    for prefix in ("model.diffusion_model.", "first_stage_model."):
        names = {key for key in shipped if key.startswith(prefix)}
        assert names and {key for key in saved if key.startswith(prefix)} == names
        assert all(torch.equal(saved[key].float(), shipped[key].float()) for key in names)
    words = [value for key, value in saved.items() if key.endswith("token_embedding.weight")]
    assert len(words) == 1 and words[0].shape == (49408, 64) and words[0].any()


def test_a_missing_checkpoint_is_explained(pack, monkeypatch, tmp_path):
    monkeypatch.setattr(pack.nodes.bridge.demo_model, "CHECKPOINT", tmp_path / "demo_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"STEMDemoModel: demo_model.safetensors is missing .* install the pack again"):
        pack.nodes.demo.STEMDemoModel.execute()


def test_the_clip_shows_what_was_chosen_and_random_means_drawn(pack, clip):
    images, mask, prompt = clip
    assert images.shape == (4, 128, 128, 3) and mask.shape == (4, 128, 128)
    assert all(word in prompt for word in ("red", "circle", "sand"))
    node = pack.nodes.demo.STEMDemoClip
    random = {"colour": "random", "shape": "random", "background": "random"}
    first, second, other = (node.execute(seed=seed, frames=2, size=64, **random).result for seed in (1, 1, 2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
