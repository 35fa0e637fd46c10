"""Estimating one fixed set of bases from keyframes of a clip."""

import torch
from comfy_api.latest import io

from ..stem.basis import BasisSettings
from .bridge.batches import plan_batches
from .bridge.conditioning import select_frames
from .bridge.inversion import checked_latents, invert
from .bridge.layout import choose_blocks, read_layout
from .bridge.self_attention import EstimatedBases
from .settings import (
    CATEGORY,
    blocks_input,
    check_numbers,
    em_iterations_input,
    named,
    num_bases_input,
    seed_input,
    steps_input,
    temperature_input,
    warm_iterations_input,
)
from .types import StemBasis


class STEMBasisEstimate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMBasisEstimate",
            display_name="STEM Basis Estimate",
            category=CATEGORY,
            description="Finds the bases that stand for a whole video, from keyframes spread evenly over it. With this basis "
            "every frame can be inverted on its own, so a long clip can be split into batches without a seam.",
            search_aliases=[
                "video basis",
                "expectation maximisation",
                "em bases",
                "256 bases",
                "stem inversion",
                "long video",
                "keyframes",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The image model that will invert and edit the clip (SD1.x, SD2.x, SDXL)."),
                io.Latent.Input("latents", tooltip="All frames of the clip, from VAE Encode."),
                io.Conditioning.Input("positive", tooltip="Prompt that describes the source clip."),
                steps_input(),
                num_bases_input(),
                em_iterations_input(),
                io.Int.Input(
                    "keyframes",
                    default=16,
                    min=0,
                    max=4096,
                    tooltip="Frames to estimate from, evenly spread; they are inverted together. 0 = all frames. More see more "
                    "of the clip and need more memory.",
                ),
                seed_input(),
                temperature_input(),
                blocks_input(),
                warm_iterations_input(),
            ],
            outputs=[
                StemBasis.Output(
                    display_name="basis",
                    tooltip="Bases of every block and noise level, for STEM Invert Latents and STEM Patch Model.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, model, latents, positive, steps, num_bases, em_iterations, keyframes, seed, temperature, blocks, warm_iterations=0
    ) -> io.NodeOutput:
        with named(cls):
            check_numbers(temperature=temperature)
            layout = read_layout(model)
            samples = checked_latents(latents, model)
            frames = len(samples)
            ids = spread(frames, keyframes)
            names = choose_blocks(layout, blocks)
            settings = BasisSettings(
                num_bases, em_iterations, temperature, seed, frames_per_em=0, warm_iterations=warm_iterations
            )
            conditioning = select_frames(positive, ids, frames)
            chosen = samples[ids]
            choice = EstimatedBases(settings)
            batches = plan_batches(model, chosen.shape, 0, choice, conditioning, remedy="choose fewer keyframes")
            run = invert(model, layout, names, choice, chosen, conditioning, steps, "stem", settings, batches)
            return io.NodeOutput(run.record.basis(tuple(ids), frames, settings, layout.model))


def spread(frames: int, keyframes: int) -> list[int]:
    """Numbers of `keyframes` frames, evenly spread from the first to the last; of all where there are no more than that."""
    if keyframes == 0 or keyframes >= frames:
        return list(range(frames))
    return torch.linspace(0, frames - 1, keyframes).round().int().tolist()


NODES = [STEMBasisEstimate]
