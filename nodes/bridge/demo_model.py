"""The small checkpoint that ships with the pack, as the three objects that every stock node accepts, and its ControlNet.

SD1.5's block layout at a small width: ComfyUI's own UNetModel with 64 base channels, a text encoder of CLIP's type with 64
channels behind the SD1 tokenizer, and a TAESD. Core normalises in 32 groups: with 32 base channels each channel would be a
group of its own, the mean over the picture would be lost before the last layer, and with it the colours. So the widths are
1, 1, 2 and 2 times the base, where SD1.5 has 1, 2, 4 and 4. The file has the keys of an ordinary SD1 checkpoint, but for the
token embedding: it holds the rows of the words that were trained (`token_ids`), all others are zero.
"""

from functools import cache
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

CHECKPOINT = Path(__file__).parents[1] / "demo_model.safetensors"
CONTROLNET = CHECKPOINT.with_name("demo_controlnet.safetensors")
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
TOKEN_EMBEDDING = TEXT_PREFIX + "transformer.text_model.embeddings.token_embedding.weight"
TOKEN_IDS = TEXT_PREFIX + "token_ids"
VOCABULARY = 49408
TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 1, 2, 2],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": TEXT_CONFIG["hidden_size"],
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


class DemoTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP's text model with the sizes of `TEXT_CONFIG`."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, textmodel_json_config=dict(TEXT_CONFIG))


class DemoTextEncoder(comfy.sd1_clip.SD1ClipModel):
    """What a CLIP object holds."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoTextModel)


class DemoModelConfig(comfy.supported_models.SD15):
    """SD1.5 with other sizes."""

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, DemoTextEncoder)


def load_demo_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Loads model, text encoder and VAE from the checkpoint of the pack.

    Raises:
        FileNotFoundError: The checkpoint is not there, as in a clone without its large files.
    """
    state = _read_checkpoint()
    config = DemoModelConfig(dict(UNET_CONFIG))
    text = config.process_clip_state_dict(state)
    clip = comfy.sd.CLIP(
        config.clip_target(), parameters=comfy.utils.calculate_parameters(text), tokenizer_data=text, state_dict=text
    )
    vae = comfy.sd.VAE(sd=comfy.utils.state_dict_prefix_replace(state, {VAE_PREFIX: ""}, filter_keys=True))
    return load_demo_unet(), clip, vae


def load_demo_unet(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The diffusion model alone; also what core calls for a fresh copy on a second device."""
    state = _read_checkpoint()
    device = comfy.model_management.get_torch_device()
    config = DemoModelConfig(dict(UNET_CONFIG))
    parameters = comfy.utils.calculate_parameters(state, UNET_PREFIX)
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(model_params=parameters, supported_dtypes=supported)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported), device=device)
    model = config.get_model(state, UNET_PREFIX, device=comfy.model_management.unet_inital_load_device(parameters, dtype))
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights(state, UNET_PREFIX, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_demo_unet, ())
    return patcher


def load_demo_controlnet() -> comfy.controlnet.ControlNet:
    """The ControlNet for edges, an object of its own at every call; the weights are read once.

    Raises:
        FileNotFoundError: The file is not there, as in a clone without its large files.
    """
    return _shared_controlnet().copy()


def new_controlnet(dtype: torch.dtype, operations=comfy.ops.disable_weight_init, device="cpu") -> comfy.cldm.cldm.ControlNet:
    """Core's ControlNet of the demo UNet's sizes, for hints of three channels; its weights are not set.

    In the middle, at 2 x 2 places, it has a residual block alone: attention has nothing to tell apart there, and the file is
    1.4 MB smaller.
    """
    sizes = {k: v for k, v in UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    sizes["transformer_depth_middle"] = -1
    return comfy.cldm.cldm.ControlNet(**sizes, hint_channels=3, dtype=dtype, operations=operations, device=device)


@cache
def _shared_controlnet() -> comfy.controlnet.ControlNet:
    """As core loads a ControlNet of SD1.5, whose sizes it would not recognise in this one."""
    state = _read(CONTROLNET, "STEMDemoControlNet")
    management = comfy.model_management
    device = management.get_torch_device()
    dtype = management.unet_dtype(
        model_params=-1,
        supported_dtypes=list(DemoModelConfig.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    cast = management.unet_manual_cast(dtype, device)
    net = new_controlnet(dtype, comfy.ops.pick_operations(dtype, cast), management.unet_offload_device())
    net.load_state_dict(state)
    return comfy.controlnet.ControlNet(net, load_device=device, manual_cast_dtype=cast)


def _read_checkpoint() -> dict[str, Tensor]:
    """All weights under an SD1 checkpoint's names, the token embedding spread to the whole vocabulary."""
    state = _read(CHECKPOINT, "STEMDemoModel")
    rows, ids = state.pop(TOKEN_EMBEDDING), state.pop(TOKEN_IDS)
    table = torch.zeros(VOCABULARY, rows.shape[1], dtype=rows.dtype)
    table[ids.long()] = rows
    state[TOKEN_EMBEDDING] = table
    return state


def _read(path: Path, node: str) -> dict[str, Tensor]:
    """The weights in a file of the pack."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{node}: {path.name} is missing in {path.parent}. It belongs to the pack: install the "
            "pack again, or clone its repository with all files."
        )
    return comfy.utils.load_torch_file(str(path), safe_load=True)
