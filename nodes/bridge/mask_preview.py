"""FateZero's mask, seen before anything is edited."""

import comfy.model_management
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...stem.fatezero import blend_mask
from ...stem.trajectory import Trajectory
from .companion import without_regions
from .fatezero import PASS, FateZeroSettings, Pass, Source, mean_over_blocks
from .fatezero_passes import place_fatezero, seen_by_the_inversion
from .inversion import without_guidance
from .layout import Layout
from .sight import look_once


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
    look_once(guider, seen_by_the_inversion(trajectory, sigma, trajectory.sigmas), sigma)
    mask = blend_mask(mean_over_blocks(source.words), settings.threshold, patch.shape[1:])
    return mask.to(comfy.model_management.intermediate_device())
