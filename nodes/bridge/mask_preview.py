"""FateZero's mask, seen before anything is edited."""

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...stem.fatezero import blend_mask
from ...stem.trajectory import Trajectory
from .companion import without_regions
from .fatezero import PASS, FateZeroSettings, Pass, Source, mean_over_blocks
from .fatezero_passes import place_fatezero, seen_by_the_inversion
from .inversion import without_guidance
from .layout import Layout


def preview_mask(model: ModelPatcher, layout: Layout, trajectory: Trajectory, settings: FateZeroSettings) -> Tensor:
    """The mask of every frame at the middle level of the trajectory, (f, height, width) of the latents, by one model call.

    Args: as for `patch_fatezero`.
    """
    model, patch = place_fatezero(without_guidance(model), layout, trajectory, settings)
    sigma = float(trajectory.sigmas[(len(trajectory.sigmas) - 1) // 2 + 1])
    source = Source(sigma)
    model.model_options["transformer_options"][PASS] = Pass(of_source=True, source=source, look=True)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": without_regions(trajectory.conditioning)})
    start = model.model.process_latent_out(seen_by_the_inversion(trajectory, sigma, trajectory.sigmas))
    sigmas = torch.tensor([sigma, 0.0])
    guider.sample(torch.zeros_like(start), start, comfy.samplers.KSAMPLER(_look_once), sigmas, disable_pbar=True, seed=0)
    mask = blend_mask(mean_over_blocks(source.words), settings.threshold, patch.shape[1:])
    return mask.to(comfy.model_management.intermediate_device())


def _look_once(model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable: bool) -> Tensor:
    """A sampler function (k-diffusion's form) that asks the model once and goes nowhere."""
    model(x, sigmas[0] * x.new_ones([len(x)]), **extra_args)
    return x
