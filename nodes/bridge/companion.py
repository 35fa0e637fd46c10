"""The source clip beside the one that is sampled: its latents and its prompt at the level of every model call.

An editor asks for features of the source by a pass of its own through the same model, with the conditioning of the inversion.
Nothing of it is a hidden part of the sampler's batch.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...stem.ddim import to_ddim
from ...stem.trajectory import Trajectory, check_trajectory, latents_at, latents_between
from .frames import frames_of_call
from .layout import Layout, block_of_call
from .naming import named_by

KEY = "stem_source"
"""Of the wrappers, of the run in `transformer_options`, and of the source's prompt among those of a guider."""

REGIONS = ("area", "mask", "mask_strength", "set_area_to_bounds", "strength")
"""Options of a conditioning that say where and how much it acts."""


class Stream(NamedTuple):
    """One conditioning in a call: its place among the guider's, and its uuid."""

    role: int
    uuid: object


SOURCE = Stream(-1, None)


def streams_of(options: dict, of_source: bool) -> list[Stream]:
    """The conditionings that share a call, in the order of its rows."""
    if of_source:
        return [SOURCE]
    roles = options.get("cond_or_uncond") or [0]
    return [Stream(*pair) for pair in zip(roles, options.get("uuids") or [None] * len(roles), strict=True)]


def name_of(options: dict, node: str) -> str:
    """Of the block that a patch of a node is called in."""
    with named_by(node):
        return block_of_call(options)


def check_frames(q: Tensor, k: Tensor, options: dict, node: str) -> list[int]:
    """The frames of a call to a node's patch, where its rows and tokens are those of the latents' frames."""
    with named_by(node):
        return frames_of_call(q, k, options)[1]


def without_regions(conditioning: list) -> list:
    """Core's list of [tensor, options], of the whole picture: where a prompt acts does not matter for features."""
    return [[text, {name: value for name, value in options.items() if name not in REGIONS}] for text, options in conditioning]


@dataclass(eq=False)
class SourceRun:
    """What one run of a sampler knows of the source."""

    trajectory: Trajectory
    node: str  # to name in an error
    mask: Tensor | None  # 1 where the clip is to be edited
    clean: Tensor | None = None  # the source without noise, in the model's scale; where there is a mask
    conds: list[dict] = field(default_factory=list)
    edits: list[dict] = field(default_factory=list)  # the sampler's own prompts, but negative ones
    kept: Any = None  # what the editor keeps from one model call to the next

    def latents(self, sigma: float, like: Tensor) -> Tensor:
        """(f, c, height, width) of the source at a noise level, in the model's scale."""
        with named_by(self.node):
            return latents_between(self.trajectory, sigma).to(like)

    def prompt(self, sigma: float) -> list[dict]:
        """The source's conditioning at a noise level: of several that act, the first.

        Raises:
            ValueError: None acts there.
        """
        active = acting(self.conds, sigma)
        if not active:
            raise ValueError(
                f"{self.node}: the prompt that the clip was inverted with does not act at sigma {sigma:.4g}. Sample on the "
                "SIGMAS of STEM Invert Latents, or let its prompts follow one another without a gap."
            )
        return active[:1]

    def keep(self, x: Tensor, source: Tensor) -> Tensor:
        """x where the clip is to be edited, the source elsewhere."""
        return x if self.mask is None else source + self.mask * (x - source)

    def keep_clean(self, predicted: list[Tensor]) -> list[Tensor]:
        """Denoised latents with the clean source where the clip is not to be edited."""
        return [self.keep(x, self.clean) for x in predicted]


def acting(conds: list[dict], sigma: float) -> list[dict]:
    """Those of prepared conditionings that act at a noise level."""
    return [c for c in conds if c.get("timestep_end", 0) <= sigma <= c.get("timestep_start", float("inf"))]


@dataclass(frozen=True, eq=False)
class Companion:
    """Wrappers around a sampler's run that bring the source along; the object is shared by clones and never changes."""

    trajectory: Trajectory
    node: str  # to name in an error

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        """Opens a `SourceRun`. Where the sampler adds noise of its own, it is given the source's instead."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        adds_noise = bool(noise.count_nonzero())
        with named_by(self.node):
            self._check(guider, latent_image, sigmas, denoise_mask)
            self._check_start(guider.model_patcher.model.process_latent_in(latent_image), sigmas, adds_noise)
        if adds_noise:
            noise = noise_of_source(self.trajectory).to(noise)
            sigma = float(sigmas[0])
            if sigma > float(guider.model_patcher.get_model_object("model_sampling").sigma_max) * 0.99999:
                noise = noise * sigma / (1 + sigma**2) ** 0.5  # core scales it by the root there, and by sigma below
        run = SourceRun(self.trajectory, self.node, denoise_mask)
        options[KEY] = run
        guider.conds[KEY] = self._source_conds()  # so that core loads their ControlNets, and cleans them up afterwards
        try:
            out = executor(noise, latent_image, sampler, sigmas, None, *args, **kwargs)
        finally:
            del options[KEY]
        if denoise_mask is None:
            return out
        end = float(sigmas[-1])
        kept = latents_between(self.trajectory, end) if end else clean_source(self.trajectory)
        kept = guider.model_patcher.model.process_latent_out(kept).to(out)
        return torch.where(denoise_mask.to(out) == 0, kept, out)  # where it is between 0 and 1, every model call was blended

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        """Prepares the source's conditioning as core does its own, but apart: no ControlNet of the edit gets into it."""
        run = extra_args["model_options"]["transformer_options"][KEY]
        if any("area" in cond for role in guider.conds.values() for cond in role):
            raise ValueError(
                f"{self.node}: a prompt acts on an area of its own size, for which the source has no features. Use masks with "
                "set_cond_area default instead."
            )
        source = {"positive": self._source_conds()}
        prepared = comfy.samplers.process_conds(
            guider.inner_model, noise, source, noise.device, latent_image, None, extra_args.get("seed")
        )
        run.conds = prepared["positive"]
        if any(len(acting(run.conds, sigma)) > 1 for sigma in sigmas[:-1].tolist()):
            logging.warning(f"{self.node}: of several prompts that the clip was inverted with, the first leads, everywhere.")
        run.edits = [cond for role, conds in guider.conds.items() if role != KEY and "negative" not in role for cond in conds]
        if run.mask is not None:
            run.mask, run.clean = run.mask.to(noise), clean_source(self.trajectory).to(noise)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)

    def _source_conds(self) -> list[dict]:
        return comfy.sampler_helpers.convert_cond(without_regions(self.trajectory.conditioning))

    def _check(self, guider, latent_image: Tensor, sigmas: Tensor, mask: Tensor | None) -> None:
        recorded = self.trajectory.latents.shape[1:]
        if latent_image.shape != recorded:
            raise ValueError(
                f"the sampler's latents have the shape {tuple(latent_image.shape)}, those of the trajectory {tuple(recorded)}. "
                "Sample the clip that was inverted, all its frames, in its size."
            )
        low, high = float(self.trajectory.sigmas[0]), float(self.trajectory.sigmas[-1])
        if float(sigmas[0]) > high * 1.001:
            steps = self.trajectory.settings.steps
            other = f", or the scheduler ddim_uniform with {steps} steps" if 1000 % steps == 0 else ""
            raise ValueError(
                f"the sampler starts at sigma {float(sigmas[0]):.4g}, the trajectory ends at {high:.4g}. Use the SIGMAS of "
                f"STEM Invert Latents{other}, with the sampler euler or ddim (dpm_2 and uni_pc begin one step earlier)."
            )
        if float(sigmas[0]) <= low:
            raise ValueError(
                f"the sampler starts at sigma {float(sigmas[0]):.4g}, the trajectory at {low:.4g}: nothing is left to edit. "
                "Raise denoise, or begin at an earlier step."
            )
        if mask is not None and "denoise_mask_function" in guider.model_options:
            raise ValueError(
                "Differential Diffusion is on this model and changes the noise mask from step to step, where the source is "
                "kept outside one mask. Take that node off this model."
            )
        if any(options.get("hooks") is not None for _, options in self.trajectory.conditioning):
            raise ValueError("the clip was inverted with hooks on its prompt, which cannot be kept apart. Invert it without.")

    def _check_start(self, given: Tensor, sigmas: Tensor, adds_noise: bool) -> None:
        """Whether the latents are those of another point of the way: a wire that is easily drawn, and gives noise or blur.

        Args:
            given: The sampler's latents, in the model's scale.
            sigmas: Of the sampler.
            adds_noise: Whether it adds noise to them.
        """
        high, sigma, given = float(self.trajectory.sigmas[-1]), float(sigmas[0]), given.cpu().float()
        clean, inverted = clean_source(self.trajectory), latents_at(self.trajectory, -1)
        wanted = clean if adds_noise else latents_between(self.trajectory, sigma)

        def near(other: Tensor) -> bool:
            return bool((given - other).norm() < 0.1 * (wanted - other).norm())

        if adds_noise and near(inverted):
            raise ValueError(
                "the latents are noisy already, and the sampler adds noise. Switch add_noise off, or, where it cannot be "
                "(KSampler), connect the clip's own latents in place of the inverted ones."
            )
        if not adds_noise and near(clean):
            raise ValueError(
                "the latents are the clip's own, and the sampler adds no noise. Connect the latents of STEM Invert Latents, or "
                "switch add_noise on."
            )
        if not adds_noise and near(inverted):
            raise ValueError(
                f"the latents have noise of sigma {high:.4g}, the sampler starts at {sigma:.4g}. Start at the first of the "
                "SIGMAS, or connect the clip's own latents and switch add_noise on."
            )


def clean_source(trajectory: Trajectory) -> Tensor:
    """The source without noise (f, c, height, width), in the model's scale."""
    return to_ddim(latents_at(trajectory, 0), trajectory.sigmas[0])


def noise_of_source(trajectory: Trajectory) -> Tensor:
    """eps that leads from the source to the end of its inversion, x = z0 + sigma eps: the card's start at any level."""
    return (latents_at(trajectory, -1) - clean_source(trajectory)) / trajectory.sigmas[-1]


def add_companion(model: ModelPatcher, layout: Layout, trajectory: Trajectory, node: str) -> None:
    """Puts the wrappers on a model that has been cloned already.

    Raises:
        ValueError: The trajectory was recorded with another model, or an editor is on this one already.
    """
    if (other := editor_on(model)) is not None:
        raise ValueError(f"{other} is on this model already, and one clip is edited in one way. Take one of the two off.")
    check_trajectory(trajectory, layout.model)
    companion = Companion(trajectory, node)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, companion.outer_sample)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, companion.sampler_sample)


def editor_on(model: ModelPatcher) -> str | None:
    """The editor that is on a model already, by the id of its node."""
    wrappers = model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(KEY, [])
    return wrappers[0].__self__.node if wrappers else None
