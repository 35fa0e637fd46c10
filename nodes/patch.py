"""STEM attention in any sampler."""

from comfy_api.latest import io

from ..stem.basis import BasisSettings, check_basis
from ..stem.em import block_bytes
from .bridge.layout import choose_blocks, read_layout
from .bridge.memory import announce_memory, keep_block_memory
from .bridge.self_attention import EstimatedBases, FixedBases, patch_self_attention
from .settings import (
    CATEGORY,
    blocks_input,
    check_numbers,
    em_iterations_input,
    named,
    num_bases_input,
    seed_input,
    temperature_input,
)
from .types import StemBasis


class STEMPatchModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMPatchModel",
            display_name="STEM Patch Model",
            category=CATEGORY,
            description="Lets all frames of a clip share a few bases in the model's self-attention, in any sampler. Use it "
            "when you sample from noise that STEM Invert Latents found. On blocks that an earlier STEM Patch Model acts on, "
            "the later one counts.",
            search_aliases=[
                "stem attention",
                "video consistency",
                "shared attention",
                "consistent frames",
                "temporal consistency",
                "flicker",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An image model: SD1.x, SD2.x or SDXL."),
                StemBasis.Input(
                    "basis",
                    optional=True,
                    tooltip="Fixed bases of the source clip. Without it, bases are estimated anew at every step from the "
                    "frames that are being sampled, as the paper's official code does.",
                ),
                num_bases_input(),
                em_iterations_input(),
                seed_input(),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at which STEM attention begins: 0 = at the noisiest level.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at which STEM attention ends: 1 = at the clean clip.",
                ),
                temperature_input(),
                blocks_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A copy of the model with STEM attention, for any sampler.")
            ],
        )

    @classmethod
    def execute(
        cls, model, num_bases, em_iterations, seed, start_percent, end_percent, temperature, blocks, basis=None
    ) -> io.NodeOutput:
        with named(cls):
            check_numbers(start_percent=start_percent, end_percent=end_percent, temperature=temperature)
            if start_percent >= end_percent:
                raise ValueError(
                    f"start_percent {start_percent:g} is not below end_percent {end_percent:g}, so the patch would never act. "
                    "Lower the one or raise the other."
                )
            layout = read_layout(model)
            names = choose_blocks(layout, blocks)
            if basis is not None:
                check_basis(basis, layout.model, names)
                choice = FixedBases(basis)
            else:
                choice = EstimatedBases(BasisSettings(num_bases, em_iterations, temperature, seed, frames_per_em=0))
            percent = (start_percent, end_percent)
            patched = patch_self_attention(model, layout, names, choice, percent, "STEMPatchModel")
        if basis is None:
            keep_block_memory(patched)
            announce_memory(patched, "STEMPatchModel", lambda model, frames: (frames, block_bytes(model.load_device)))
        return io.NodeOutput(patched)


NODES = [STEMPatchModel]
