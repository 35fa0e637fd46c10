"""The inversion as a sampler: core's machinery runs it, and brings offloading, hooks, ControlNet, previews and cancelling."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete
from torch import Tensor

from ...stem.basis import BasisSettings
from ...stem.ddim import inversion_input, inversion_update, noise_levels, start_latent
from ...stem.level_files import LevelFiles, Levels
from ...stem.trajectory import InversionSettings, Trajectory
from .batches import Batches, plan_batches
from .companion import editor_on
from .conditioning import check_prompt
from .layout import Layout
from .memory import block_memory, context_memory, withdraw
from .progress import Progress
from .record import RECORD, BasisRecord
from .resume import Resume
from .self_attention import BLOCK_MEMORY, ContextChoice, patch_self_attention, without_own_patches

GUIDANCE = (
    "sampler_calc_cond_batch_function",
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "disable_cfg1_optimization",
)
"""Model options by which other nodes (PAG, SAG, RescaleCFG) change the prediction; an inversion takes it as it is."""


class Inversion(NamedTuple):
    """What one run yields."""

    latents: Tensor  # (f, c, height, width), inverted, in the scale of a LATENT
    trajectory: Trajectory
    record: BasisRecord  # empty where no bases were estimated


def checked_latents(latents: dict[str, Any], model: ModelPatcher) -> Tensor:
    """The samples (f, c, height, width) of a LATENT.

    Raises:
        ValueError: No LATENT, a video model's, no frames, channels of another model family, or what is no number.
    """
    samples = latents.get("samples") if isinstance(latents, dict) else None
    if not isinstance(samples, Tensor):
        raise ValueError("latents hold no samples. Connect the encoded frames of a clip.")
    needed = model.model.latent_format.latent_channels
    if samples.ndim != 4:
        raise ValueError(
            f"latents of the shape {tuple(samples.shape)} found, needed are frames on the batch axis (frames, {needed}, "
            "height, width). Encode the frames with the VAE of an image model."
        )
    if samples.shape[0] == 0 or 0 in samples.shape[2:]:
        raise ValueError(f"latents hold no frames (shape {tuple(samples.shape)}). Connect the encoded frames of a clip.")
    if samples.shape[1] != needed:
        raise ValueError(
            f"latents have {samples.shape[1]} channels, this model needs {needed}. Encode the frames with the model's own VAE."
        )
    if not samples.isfinite().all():
        raise ValueError(
            "latents have places that are no finite numbers. Look at what makes them: a VAE that overflows in float16 runs in "
            "float32 with ComfyUI's option --fp32-vae."
        )
    return samples


def invert(
    model: ModelPatcher,
    layout: Layout,
    blocks: tuple[str, ...],
    choice: ContextChoice | None,
    samples: Tensor,
    positive: list,
    steps: int,
    method: str,
    basis: BasisSettings | None,
    batches: Batches | None = None,
    path: Levels | None = None,
    resume: Resume | None = None,
) -> Inversion:
    """Climbs from a clean video to the noise that it came from, with the conditional prediction alone.

    Args:
        model: Left as it is.
        layout: Of the model.
        blocks: Names of the blocks whose self-attention is chosen.
        choice: What they attend to; None for each frame's own tokens.
        samples: (f, c, height, width) of a LATENT.
        positive: Source conditioning.
        steps: 1 to 999.
        method, basis: How, for the trajectory's record.
        batches: How many frames go through the model at once; None: as many as can and fit.
        path: Of the shape (steps + 1, f, c, height, width), to be filled with the latents of every level; None: float32 in
            memory.
        resume: Where levels are kept until the run is complete, and where an earlier run may have left some.

    Raises:
        ValueError: No conditioning, one of another model, one that leaves levels or parts of the picture out, hooks that
            change over the sampling, an editor on the model, steps out of range, or a model that gives what is no number.
    """
    check_prompt(positive, model)
    _refuse_scheduled_hooks(positive)
    if (editor := editor_on(model)) is not None:
        raise ValueError(f"{editor} is on this model, and edits along an inversion. Connect the model from before that node.")
    sampling = model.get_model_object("model_sampling")
    levels = noise_levels(sampling.sigmas.cpu().float(), steps)
    _refuse_gaps(positive, levels[1:], sampling)
    model = without_guidance(without_own_patches(model))
    if choice is not None:
        model = patch_self_attention(model, layout, blocks, choice)
    withdraw(model)
    batches = batches or plan_batches(model, samples.shape, 0, choice, positive)
    path = empty_path(steps, samples.shape) if path is None else path
    picture = samples.shape[1:]
    batches.place(model, lambda model, frames: context_memory(model, layout, blocks, choice, (frames, *picture)))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    uuids = [cond["uuid"] for cond in guider.original_conds["positive"]]
    record = BasisRecord(levels[1:], blocks, uuids)
    model.model_options["transformer_options"] |= {RECORD: record, BLOCK_MEMORY: block_memory()}
    with Progress(model, steps) as progress:
        batches.follow = progress.frames
        noisy = guider.sample(
            torch.zeros_like(samples),
            samples,
            comfy.samplers.KSAMPLER(climb, {"path": path, "progress": progress, "record": record, "resume": resume}),
            levels,
            callback=progress.callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )
    settings = InversionSettings(method, steps, basis)
    return Inversion(
        noisy.to(comfy.model_management.intermediate_device()),
        Trajectory(path, levels, positive, settings, layout.model),
        record,
    )


def empty_path(steps: int, shape: Sequence[int], dtype: torch.dtype = torch.float32, on_disk: bool = False) -> Levels:
    """Room for the latents (steps + 1, f, c, height, width) of every level.

    Args:
        steps: Of the inversion.
        shape: Of the latents of the clip.
        dtype: To keep them in.
        on_disk: In ComfyUI's temporary folder instead of memory, gone with the object or with ComfyUI.

    Raises:
        ValueError: The disk has no room for it.
    """
    shape = (steps + 1, *shape)
    if not on_disk:
        return torch.empty(shape, dtype=dtype, device="cpu")
    folder, size = Path(folder_paths.get_temp_directory()), math.prod(shape) * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(
            f"the trajectory takes {size / 1e6:.0f} MB, and {folder} has {free / 1e6:.0f} MB left. Free space there, choose "
            "trajectory_dtype float16, or switch trajectory_on_disk off."
        )
    return LevelFiles(folder / f"stem_{uuid4().hex}", shape, dtype)


def without_guidance(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model without what changes its prediction."""
    model = model.clone()
    for name in GUIDANCE:
        model.model_options.pop(name, None)
    return model


def climb(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict,
    callback,
    disable: bool,
    path: Levels,
    progress: Progress,
    record: BasisRecord,
    resume: Resume | None,
) -> Tensor:
    """A sampler function (k-diffusion's form) over rising sigmas (t+1,); fills `path` (t+1, ...) with the latents on the way.

    What an earlier run left in `resume` is taken over, and every new level is kept there, with what `record` has of it.

    Source: `stem.ddim.inversion_update`.
    """
    x = start_latent(x, sigmas)
    path[0] = x
    each, first = x.new_ones([len(x)]), 0
    for first, known in enumerate(resume.restore(record, x, len(sigmas) - 1) if resume else (), 1):
        path[first] = x = known
    progress.resumed(first)
    for i in comfy.utils.model_trange(first, len(sigmas) - 1, disable=disable):
        comfy.model_management.throw_exception_if_processing_interrupted()
        source, destination = sigmas[i], sigmas[i + 1]
        progress.level(float(destination))
        denoised = model(inversion_input(x, source, destination), destination * each, **extra_args)
        if (denoised == 0).all(dim=1).any():  # core's answer where no conditioning is active
            raise ValueError(
                f"positive leaves a part of the picture without any prompt at sigma {float(destination):.4g}. Give the parts "
                "outside its masks or areas a prompt too, for the same timesteps."
            )
        x = inversion_update(x, denoised, source, destination)
        if not x.isfinite().all():
            raise ValueError(
                f"at sigma {float(destination):.4g} the model gave what is no finite number. Look at its prompt, masks and "
                "other nodes on it; a model that overflows in float16 runs in float32 with ComfyUI's option --force-fp32."
            )
        path[i + 1] = x
        if resume:
            resume.keep(record, i + 1, x)
        callback({"x": x, "i": i, "sigma": destination, "sigma_hat": destination, "denoised": denoised})
    return x


def _refuse_gaps(conditioning: list, levels: Tensor, sampling: ModelSamplingDiscrete) -> None:
    """Timestep ranges that leave a level without any prompt; told before the climb begins."""
    ranges = []
    for _, options in conditioning:
        start, end = (options.get(f"{edge}_percent", whole) for edge, whole in (("start", 0.0), ("end", 1.0)))
        start, end = max(start, options.get("clip_start_percent", 0.0)), min(end, options.get("clip_end_percent", 1.0))
        ranges.append((sampling.percent_to_sigma(end), sampling.percent_to_sigma(start)))
    for sigma in levels.tolist():
        if not any(low <= sigma <= high for low, high in ranges):
            raise ValueError(
                f"positive leaves the picture without any prompt at sigma {sigma:.4g}. Take timestep ranges off it, or let "
                "another prompt begin where one ends."
            )


def _refuse_scheduled_hooks(conditioning: list) -> None:
    """Core's hook keyframes go on from high to low noise only; on the way up they would jump to the last at once."""
    for _, options in conditioning:
        hooks = options.get("hooks")
        if hooks is not None and any(len(hook.hook_keyframe.keyframes) > 1 for hook in hooks.hooks):
            raise ValueError(
                "positive has hooks with keyframes that change their strength during sampling, which ComfyUI follows from high "
                "to low noise only. Invert with hooks of constant strength."
            )
