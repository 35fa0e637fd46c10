"""Finding the noise that a video came from."""

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..stem.basis import Basis, BasisSettings, check_basis
from .bridge.batches import plan_batches
from .bridge.inversion import Inversion, checked_latents, empty_path, invert
from .bridge.layout import choose_blocks, read_layout
from .bridge.resume import Resume, digest_of
from .bridge.self_attention import EstimatedBases, FixedBases, every_frame, first_and_previous_frame
from .settings import (
    CATEGORY,
    blocks_input,
    check_numbers,
    em_iterations_input,
    frames_per_batch_input,
    frames_per_em_input,
    named,
    num_bases_input,
    seed_input,
    steps_input,
    temperature_input,
    warm_iterations_input,
)
from .types import StemBasis, StemTrajectory

DTYPES = {"float32": torch.float32, "float16": torch.float16}
BASELINES = {"ddim": None, "first_previous": first_and_previous_frame, "all_frames": every_frame}


class STEMInvertLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMInvertLatents",
            display_name="STEM Invert Latents",
            category=CATEGORY,
            description="Finds the noise that a video came from. Sampling from that noise with the same prompt gives the clip "
            "back; with another prompt it gives an edited one.",
            search_aliases=[
                "video inversion",
                "ddim inversion",
                "unsampler",
                "noise inversion",
                "stem inversion",
                "invert video",
                "video to noise",
                "reverse sampling",
                "vid2vid",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An image model (SD1.x, SD2.x, SDXL) with any LoRA or motion module on it."),
                io.Latent.Input("latents", tooltip="All frames of the clip, from VAE Encode. A noise mask is not used."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="Prompt that describes the source clip; any ControlNet applied to it acts on the way.",
                ),
                StemBasis.Input(
                    "basis",
                    optional=True,
                    tooltip="Fixed bases from STEM Basis Estimate: every frame is then inverted on its own against them. "
                    "Without it the bases are estimated from all frames together.",
                ),
                steps_input(),
                io.Combo.Input(
                    "method",
                    options=["stem", *BASELINES],
                    default="stem",
                    tooltip="What each frame's self-attention reads. stem: bases of the whole video. ddim: the frame alone, as "
                    "in plain DDIM inversion. first_previous: the first and the previous frame. all_frames: every frame, slow.",
                ),
                num_bases_input(),
                em_iterations_input(),
                seed_input(),
                temperature_input(),
                blocks_input(),
                frames_per_em_input(),
                frames_per_batch_input(),
                io.Combo.Input(
                    "trajectory_dtype",
                    optional=True,
                    options=list(DTYPES),
                    default="float32",
                    advanced=True,
                    tooltip="Precision that the latents of the trajectory are kept in. float16 takes half the room.",
                ),
                io.Boolean.Input(
                    "trajectory_on_disk",
                    optional=True,
                    default=False,
                    advanced=True,
                    tooltip="Keeps the trajectory in ComfyUI's temporary folder, a file for each noise level, instead of in "
                    "memory. Editors read one or two levels at a time.",
                ),
                warm_iterations_input(),
                io.String.Input(
                    "resume",
                    optional=True,
                    default="",
                    advanced=True,
                    tooltip="A name under which levels that are done are kept in ComfyUI's output folder (stem/resume) until "
                    "the inversion is complete. If it is cancelled or ComfyUI ends, the same workflow goes on from there. "
                    "Empty: nothing is kept.",
                ),
            ],
            hidden=[io.Hidden.dynprompt],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    tooltip="The inverted noise, for a sampler that adds none and starts at the first of the SIGMAS.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="Noise levels for sampling from this noise, highest first."),
                StemTrajectory.Output(display_name="trajectory", tooltip="The latents of every noise level, for the editors."),
                StemBasis.Output(display_name="basis", tooltip="The bases that were used (method stem), for STEM Patch Model."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        latents,
        positive,
        steps,
        method,
        num_bases,
        em_iterations,
        seed,
        temperature,
        blocks,
        frames_per_em,
        basis=None,
        frames_per_batch=0,
        trajectory_dtype="float32",
        trajectory_on_disk=False,
        warm_iterations=0,
        resume="",
    ) -> io.NodeOutput:
        with named(cls):
            check_numbers(temperature=temperature)
            layout = read_layout(model)
            samples = checked_latents(latents, model)
            names = choose_blocks(layout, blocks)
            settings = None
            if method != "stem":
                if basis is not None:
                    raise ValueError(f'a basis is connected, which method "{method}" does not read. Choose stem, or unplug it.')
                choice = BASELINES[method]
            elif basis is not None:
                check_basis(basis, layout.model, names)
                settings, choice = basis.settings, FixedBases(basis)
            else:
                settings = BasisSettings(num_bases, em_iterations, temperature, seed, frames_per_em, warm_iterations)
                choice = EstimatedBases(settings)
            batches = plan_batches(model, samples.shape, frames_per_batch, choice, positive)
            path = empty_path(steps, samples.shape, DTYPES[trajectory_dtype], trajectory_on_disk)
            kept = None
            if resume:
                how = (steps, method, names, frames_per_batch, settings)
                graph = cls.hidden and cls.hidden.dynprompt
                kept = Resume(resume, digest_of(graph, samples, positive, basis, layout.model, how))
            run = invert(model, layout, names, choice, samples, positive, steps, method, settings, batches, path, kept)
            if kept:
                kept.finish()
        if basis is None:
            basis = _recorded_basis(run, method, len(samples))
        others = {name: value for name, value in latents.items() if name != "noise_mask"}
        return io.NodeOutput({**others, "samples": run.latents}, run.trajectory.sigmas.flip(0), run.trajectory, basis)


def _recorded_basis(run: Inversion, method: str, frames: int) -> Basis | ExecutionBlocker:
    """The bases of the run, or what is said to a node that asks for them although there are none."""
    if method != "stem":
        return ExecutionBlocker(f"STEMInvertLatents: method {method} has no basis. Choose stem, or unplug this output.")
    try:
        return run.record.basis(tuple(range(frames)), frames, run.trajectory.settings.basis, run.trajectory.model)
    except ValueError as error:
        return ExecutionBlocker(f"STEMInvertLatents: {error}")


NODES = [STEMInvertLatents]
