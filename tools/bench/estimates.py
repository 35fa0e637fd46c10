"""What the nodes need of a GPU's memory, by ComfyUI's estimate and by what they announce to it before a run. Nothing is run.

The models have no weights (PyTorch's "meta" device), the numbers are those of half precision and PyTorch's attention on CUDA.
ComfyUI keeps as much of the weights in system memory as does not fit, so less than a row says can do, more slowly.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools import comfy
from tools.bench import report

CLIPS = (16, 32, 64, 128)  # frames
PROMPT_TOKENS = 77
GIB = 2**30


class Family(NamedTuple):
    """A model at the size of its pictures."""

    config: str  # class of comfy.supported_models
    width: int  # of the text encoder's output
    latent_size: int
    unet: dict[str, Any]  # beside those of the class


FAMILIES = {
    "SD1.5, 512 x 512": Family(
        "SD15",
        768,
        64,
        {
            "num_heads": 8,
            "num_head_channels": -1,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        },
    ),
    "SDXL, 1024 x 1024": Family(
        "SDXL",
        2048,
        128,
        {
            "num_heads": -1,
            "num_head_channels": 64,
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
}
ALL_MODELS = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
    "dtype": torch.float16,
}


def run(path: Path, quick: bool) -> None:
    """Prints a table for each family."""
    clips = CLIPS[:1] if quick else CLIPS
    results = report.load(path, {"frames": list(clips), "dtype": "float16"})
    pack = comfy.start(("--cpu",))
    import comfy.model_management as management

    management.pytorch_attention_flash_attention = lambda: True  # as on CUDA; of this process alone
    columns = {str(frames): (f"{frames} frames", ".1f") for frames in clips}
    for name, family in FAMILIES.items():
        rows = {}
        for frames in clips:
            for task, needed in estimate(pack, family, frames, on_cuda=torch.device("cuda")).items():
                rows.setdefault(task, {})[str(frames)] = needed / GIB
        results[name] = rows
        print(f"\n{name} (GiB)\n\n{report.table(rows, columns, 'what runs')}")
    report.save(path, results)
    print(f"kept in {path}", file=sys.stderr)


def estimate(pack: Any, family: Family, frames: int, on_cuda: torch.device) -> dict[str, float]:
    """Bytes of the weights, one model call and what is kept beside it, by what runs.

    Args:
        pack: As ComfyUI has loaded it.
        family: Of the model.
        frames: Of the clip.
        on_cuda: Device whose blocks of tokens expectation maximisation works on.
    """
    from comfy.patcher_extension import WrappersMP

    bridge = pack.nodes.bridge
    model = without_weights(family)
    layout = bridge.layout.read_layout(model)
    picture = (4, family.latent_size, family.latent_size)
    trajectory = pack.stem.trajectory.Trajectory(
        torch.empty(51, frames, *picture, device="meta"), Tensor(), [], None, layout.model
    )
    blocks = tuple(block.name for block in layout.model.blocks)

    def total(at_once: int, beside: float) -> float:
        return model.model_size() + model.model.memory_required([at_once, *picture]) + beside

    def announced(patched: Any) -> float:
        (wrapper,) = patched.get_wrappers(WrappersMP.PREPARE_SAMPLING, bridge.memory.KEY)
        at_once, beside = zip(*(needed(patched, frames) for needed in wrapper.__self__.needed.values()), strict=True)
        return total(min(at_once), sum(beside))

    return {
        "weights of the UNet alone": model.model_size(),
        "inversion with a fixed basis, or ddim: a frame at a time": total(1, 0),
        "inversion, all frames together": total(frames, pack.stem.em.block_bytes(on_cuda)),
        "sampling, all frames together": total(frames, 0),
        "STEM TokenFlow": announced(bridge.tokenflow.patch_tokenflow(model, layout, blocks, trajectory, tokenflow(pack))),
        "STEM FateZero": announced(
            bridge.fatezero_passes.patch_fatezero(model, layout, trajectory, fatezero(pack, layout, family))
        ),
    }


def without_weights(family: Family) -> Any:
    """The family's UNet in half precision, on the meta device."""
    import comfy.model_management as management
    from comfy import supported_models
    from comfy.model_base import BaseModel, ModelType
    from comfy.model_patcher import ModelPatcher

    config = getattr(supported_models, family.config)({**ALL_MODELS, **family.unet, "context_dim": family.width})
    config.set_inference_dtype(torch.float16, None)
    model = BaseModel(config, ModelType.EPS, device=torch.device("meta"))
    return ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def tokenflow(pack: Any) -> Any:
    """The node's defaults."""
    inputs = {i.id: i.default for i in pack.nodes.tokenflow.STEMTokenFlow.define_schema().inputs if hasattr(i, "default")}
    settings = pack.nodes.bridge.tokenflow.TokenFlowSettings
    return settings(**{name: inputs[name] for name in settings._fields})


def fatezero(pack: Any, layout: Any, family: Family) -> Any:
    """The node's defaults, prompts of no words."""
    inputs = {i.id: i.default for i in pack.nodes.fatezero.STEMFateZero.define_schema().inputs if hasattr(i, "default")}
    target = torch.zeros(1, PROMPT_TOKENS, family.width)
    settings = pack.nodes.bridge.fatezero.FateZeroSettings
    special = {
        "fused": pack.nodes.bridge.layout.choose_blocks(layout, inputs["blocks"]),
        "alignment": None,
        "source_words": (),
        "target_words": (),
        "threshold": inputs["blend_threshold"],
        "target": target,
    }
    return settings(**{name: special[name] if name in special else inputs[name] for name in settings._fields})
