"""Tiny random models, each built from ComfyUI's own classes in the block layout of a real family.

Import after ComfyUI is importable. Random nets are not smooth: their output layer is scaled down, so that an inversion
and the way back do not run apart.
"""

from functools import partial

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

CONTEXT, POOLED = 48, 32
SD1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": CONTEXT,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
    "adm_in_channels": None,
}
SD2 = {**SD1, "num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True}
SDXL = {
    **SD2,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "num_classes": "sequential",
    "adm_in_channels": POOLED + 6 * 256,
}
SVD = {
    **SD2,
    "in_channels": 8,
    "num_classes": "sequential",
    "adm_in_channels": 3 * 256,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
}
DIT = {"image_model": "pixart_alpha", "in_channels": 4, "depth": 1, "hidden_size": 32, "num_heads": 2, "input_size": 16}


def tiny_model(layout: str = "sd15", seed: int = 0, dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """A model with seeded weights: sd15 (epsilon), sd2 (v-prediction, 16 channels a head), sdxl, svd (video), dit (no UNet)."""
    known, base = comfy.supported_models, comfy.model_base
    family, sizes, build = {
        "sd15": (known.SD15, SD1, lambda c: base.BaseModel(c, ModelType.EPS)),
        "sd2": (known.SD20, SD2, lambda c: base.BaseModel(c, ModelType.V_PREDICTION)),
        "sdxl": (known.SDXL, SDXL, lambda c: base.SDXL(c)),
        "svd": (known.SVD_img2vid, SVD, lambda c: base.SVD_img2vid(c)),
        "dit": (known.PixArtAlpha, DIT, lambda c: base.PixArt(c)),
    }[layout]
    config = type(family.__name__, (family,), {"unet_extra_config": {}})({**sizes})
    config.set_inference_dtype(dtype, None)
    model = build(config)
    fill(model.diffusion_model, seed)
    if hasattr(model.diffusion_model, "out"):
        model.diffusion_model.out[-1].weight.data.mul_(0.15)
    return ModelPatcher(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


def tiny_controlnet(seed: int = 7, unet: dict = SD1) -> comfy.controlnet.ControlNet:
    """A ControlNet for the sd15 layout, or for another UNet of the given sizes."""
    sizes = {k: v for k, v in unet.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(**sizes, hint_channels=3, operations=comfy.ops.disable_weight_init)
    fill(net, seed, gain=0.3)
    return comfy.controlnet.ControlNet(net, load_device=comfy.model_management.get_torch_device())


class TinyTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP's text model, CONTEXT wide."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        config = {
            "hidden_size": CONTEXT, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
            "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
        }  # fmt: skip
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, textmodel_json_config=config)


def tiny_clip(layout: str = "sd15", seed: int = 11) -> comfy.sd.CLIP:
    """A text encoder with seeded weights behind the family's own tokenizer; of SDXL's two rows of tokens it reads CLIP-L's."""
    tokenizer, name = {
        "sd15": (comfy.sd1_clip.SD1Tokenizer, "l"),
        "sd2": (comfy.text_encoders.sd2_clip.SD2Tokenizer, "h"),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, "l"),
    }[layout]
    encoder = partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=TinyTextModel)
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(tokenizer, encoder))
    fill(clip.cond_stage_model, seed)
    return clip


def fill(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Core's layers start uninitialised: weights of unit gain, norms and biases near one and zero, all from the seed."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            value = noise * gain / p[0].numel() ** 0.5
        else:
            value = name.endswith("weight") + 0.02 * noise
        p.data.copy_(value)
        p.requires_grad_(False)


def prompt(seed: int = 1, tokens: int = 77, frames: int = 1, **options) -> list:
    """A random conditioning."""
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(frames, POOLED, generator=g)
    return [[torch.randn(frames, tokens, CONTEXT, generator=g), {"pooled_output": pooled, **options}]]


def clip_latents(frames: int = 5, height: int = 8, width: int = 16, seed: int = 3) -> dict:
    """A LATENT whose frames resemble one another."""
    g = torch.Generator().manual_seed(seed)
    still, change = torch.randn(2, 1, 4, height, width, generator=g)
    moving = still + 0.3 * change * torch.arange(frames).reshape(-1, 1, 1, 1) / frames
    return {"samples": 5 * moving + torch.randn(frames, 4, height, width, generator=g)}
