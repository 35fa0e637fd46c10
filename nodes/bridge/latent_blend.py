"""FateZero's latent blending: outside of some words, the source's latents are put back after a step."""

from dataclasses import dataclass, field
from functools import partial

import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.ddim import from_ddim, sampling_update, to_ddim
from ...stem.fatezero import blend_mask
from .companion import KEY, SourceRun


@dataclass(eq=False)
class Blend:
    """Where the words of source and target are looked at, (f, y, x) by sigma; kept for a run of the sampler."""

    source_words: dict[float, Tensor] = field(default_factory=dict)
    target_words: dict[float, Tensor] = field(default_factory=dict)

    def add(self, sigma: float, source: Tensor | None, target: Tensor) -> None:
        """Keeps the maps of a level, the source's where it is to be blended; of several calls (guidance nodes) the first's."""
        if sigma not in self.target_words:
            self.target_words[sigma] = target
            self.source_words = {} if source is None else {sigma: source}

    def mask(self, sigma: float, threshold: float, size: tuple[int, int]) -> Tensor:
        """(f, 1, height, width): the source's words at this level, or the target's over all levels so far."""
        words = self.source_words[sigma], torch.stack(list(self.target_words.values())).sum(0)
        return torch.maximum(*(blend_mask(w, threshold, size) for w in words))[:, None]


def place_latent_blend(model: ModelPatcher, threshold: float, timing: str, node: str) -> None:
    """Puts the blending on a model that has been cloned already.

    Args:
        threshold: Of the maximum of a word map.
        timing: "official": the source of the level that is left; "matched": of the level that is entered.
        node: To name in errors.
    """
    blended = partial(_blended, threshold=threshold, timing=timing)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, f"{node} latents", blended)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{node} latents", partial(_first_order_only, node=node))


def _first_order_only(executor, noise, latent_image, sampler, *args, node: str, **kwargs) -> Tensor:
    if getattr(sampler, "sampler_function", None) is not sample_euler:
        raise ValueError(
            f"{node}: blend_latents works on the straight steps of euler and ddim, and this sampler takes others. Choose one "
            "of the two, or switch blend_latents off."
        )
    return executor(noise, latent_image, sampler, *args, **kwargs)


def _blended(executor, x: Tensor, timestep: Tensor, model_options: dict, *args, threshold: float, timing: str, **kwargs):
    """PREDICT_NOISE wrapper: the step that follows lands on latents blended with those of the source.

    The sampler takes a straight step from x to the next level through the denoised latent: this gives it the one that leads to
    the blend, after all guidance, of whatever node.
    """
    denoised = executor(x, timestep, model_options, *args, **kwargs)
    options, sigma = model_options["transformer_options"], float(timestep[0])
    run: SourceRun | None = options.get(KEY)
    blend = None if run is None or run.kept is None else run.kept.blend
    lower = [s for s in options.get("sample_sigmas", x.new_zeros(0)).tolist() if s < sigma * 0.999]
    if blend is None or not lower or sigma not in blend.source_words:
        return denoised
    following = max(lower)
    mask = blend.mask(sigma, threshold, tuple(x.shape[-2:])).to(x)
    level = sigma if timing == "official" else following
    z = to_ddim(run.latents(level, x), level)  # official: of the level that is being left, noisier than what it is put into
    next_x = sampling_update(x, denoised, sigma, following)
    wanted = from_ddim(z + mask * (to_ddim(next_x, following) - z), following)
    return x - (wanted - x) * sigma / (following - sigma)
