"""What one level of an inversion costs in a full-size SD1.5 UNet: STEM beside the contexts that it is compared with.

The weights are random, from a seed: 860 million, float32. The clip is random too. Two kinds of ComfyUI's attention are measured
in turn, in one process: PyTorch's (`--use-pytorch-cross-attention`), and what ComfyUI takes by itself on a CPU.
With a warm start the level that is measured is the second: the first has no bases before it.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tools import comfy
from tools.bench import report
from tools.bench.cost import Cost

FRAMES, QUICK_FRAMES = 8, 2
LATENT_SIZE = 64  # 512 x 512 pixels
ROUNDS, QUICK_ROUNDS = 3, 1
WARM = {"method": "stem", "warm_iterations": 1, "steps": 2}
METHODS = {
    "ddim": {"method": "ddim"},
    "stem": {"method": "stem"},
    "stem, warm start": WARM,
    "first_previous": {"method": "first_previous"},
    "all_frames": {"method": "all_frames"},
}
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0, "frames_per_em": 0, "blocks": "all"}
ATTENTION = {"methods": "attention_pytorch", "default_attention": "attention_sub_quad"}
SIZES = {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "context_dim": 768}  # SD1.5's, where the demo model's are smaller
MEASURES = {
    "seconds": "of inverting the clip by one level; median of the rounds",
    "attn1_seconds": "the part of self-attention in that, expectation maximisation included, projections not",
    "peak_mb": "growth of the process's resident memory (10^6 bytes) in that, its results included, the model's weights not",
}
COLUMNS = {
    "seconds": ("seconds", ".1f"),
    "of_ddim": ("of ddim", ".2f"),
    "attn1_seconds": ("self-attention (s)", ".1f"),
    "attn1_of_ddim": ("of ddim", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "peak_of_ddim": ("of ddim", ".2f"),
}


class SelfAttentionTime:
    """Adds up the seconds that the self-attention of a UNet takes in a `with` block.

    That is from the end of the projection to values to the beginning of that of the result, whether core's attention or
    a patch runs in between. Right on a CPU, where nothing runs on after a call.
    """

    def __init__(self, unet: nn.Module):
        self.blocks = [module for name, module in unet.named_modules() if name.endswith(".attn1")]
        self.seconds = 0.0

    def __enter__(self) -> "SelfAttentionTime":
        self._hooks = [block.to_v.register_forward_hook(self._begin) for block in self.blocks]
        self._hooks += [block.to_out.register_forward_pre_hook(self._end) for block in self.blocks]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def run(path: Path, quick: bool) -> None:
    """Measures the rounds that the file does not hold yet, and prints the tables."""
    frames, rounds = (QUICK_FRAMES, QUICK_ROUNDS) if quick else (FRAMES, ROUNDS)
    settings = {
        "frames": frames,
        "size": 8 * LATENT_SIZE,
        "levels": 1,
        "dtype": "float32",
        **BASES,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "measures": MEASURES,
    }
    results = report.load(path, settings)
    found = results.setdefault("rounds", {part: {} for part in ATTENTION})
    todo = [
        (number, part, method)
        for part in ATTENTION
        for number in range(rounds)
        for method in METHODS
        if len(found[part].get(method, [])) <= number
    ]
    if todo:
        pack = comfy.start(("--cpu",))
        model, latents, positive = full_size_model(pack), random_clip(frames), random_prompt()
        for part in ATTENTION:  # what a first call takes longer is not counted
            measure(pack, with_attention(model, part), random_clip(1), positive, **METHODS["ddim"])
    for number, part, method in todo:
        measures = measure(pack, with_attention(model, part), latents, positive, **METHODS[method])
        found[part].setdefault(method, []).append(measures)
        summarise(results)
        report.save(path, results)
        print(f"round {number + 1}, {ATTENTION[part]}, {method} done", file=sys.stderr, flush=True)
    for part, kind in ATTENTION.items():
        print(f"\n{kind}\n\n{report.table(beside_ddim(results[part]), COLUMNS, 'method')}")


def summarise(results: dict[str, Any]) -> None:
    """Puts the medians of the rounds into a report."""
    for part, methods in results["rounds"].items():
        results[part] = {
            method: {name: median(row[name] for row in rows) for name in MEASURES} for method, rows in methods.items() if rows
        }


def beside_ddim(rows: dict[str, report.Measures]) -> dict[str, report.Measures]:
    ratios = {"of_ddim": "seconds", "attn1_of_ddim": "attn1_seconds", "peak_of_ddim": "peak_mb"}
    ddim = rows["ddim"]
    return {name: row | {ratio: row[of] / ddim[of] for ratio, of in ratios.items()} for name, row in rows.items()}


def measure(pack: Any, model: Any, latents: dict, positive: list, steps: int = 1, **how: Any) -> report.Measures:
    """An inversion over so many levels, of which the last counts."""
    calls = []

    def note(call: Callable, told: dict) -> Tensor:
        calls.append((time.perf_counter(), attention.seconds))
        return call(told["input"], told["timestep"], **told["c"])

    model.set_model_unet_function_wrapper(note)
    with SelfAttentionTime(model.model.diffusion_model) as attention, Cost() as cost:
        pack.nodes.invert.STEMInvertLatents.execute(
            model=model, latents=latents, positive=positive, steps=steps, frames_per_batch=len(latents["samples"]),
            **BASES, **how,
        )  # fmt: skip
    if len(calls) != steps:
        raise RuntimeError(f"{len(calls)} calls of the UNet for {steps} levels")
    (began, _), (last, before) = calls[0], calls[-1]
    return {
        "seconds": cost.seconds - (last - began),
        "attn1_seconds": attention.seconds - before,
        "peak_mb": cost.peak_mb,
    }


def with_attention(model: Any, part: str) -> Any:
    """A clone of a model whose every attention is of one kind, by core's own switch."""
    from comfy.ldm.modules import attention

    chosen = getattr(attention, ATTENTION[part])
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = lambda function, *args, **kwargs: chosen(*args, **kwargs)
    return model


def full_size_model(pack: Any) -> Any:
    """SD1.5's UNet with random weights of unit gain."""
    import comfy.model_management as management
    from comfy.model_base import BaseModel, ModelType
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models import SD15

    config = SD15({**pack.nodes.bridge.demo_model.UNET_CONFIG, **SIZES})
    config.set_inference_dtype(torch.float32, None)
    model = BaseModel(config, ModelType.EPS)
    fill(model.diffusion_model)
    return ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def fill(module: nn.Module) -> None:
    """Core's layers start uninitialised: matrices that keep the size of what they multiply, norms of 1, no bias."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.requires_grad_(False)
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=generator)
        else:
            p.fill_(float(name.endswith("weight")))


def random_clip(frames: int) -> dict[str, Tensor]:
    """A LATENT whose frames resemble one another."""
    generator = torch.Generator().manual_seed(1)
    still = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    return {"samples": 5 * (still + 0.2 * torch.randn(frames, 4, LATENT_SIZE, LATENT_SIZE, generator=generator))}


def random_prompt() -> list:
    return [[torch.randn(1, 77, SIZES["context_dim"], generator=torch.Generator().manual_seed(2)), {}]]
