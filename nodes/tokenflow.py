"""TokenFlow: an edit that moves with the source."""

from comfy_api.latest import io

from .bridge.layout import choose_blocks, read_layout
from .bridge.tokenflow import TokenFlowSettings, patch_tokenflow
from .settings import CATEGORY, blocks_input, check_numbers, named
from .types import StemTrajectory

MODES = ["pnp", "sdedit", "pnp_per_frame"]


class STEMTokenFlow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMTokenFlow",
            display_name="STEM TokenFlow",
            category=CATEGORY,
            description="Edits an inverted clip by prompt so that the edit moves with the source: a few keyframes are edited "
            "together, and all other frames take over their features. Put it on the model of the sampler.",
            search_aliases=[
                "tokenflow",
                "video editing",
                "edit video",
                "plug and play",
                "pnp",
                "consistent edit",
                "video to video",
                "vid2vid",
                "video style transfer",
                "temporal consistency",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the clip was inverted with (SD1.x, SD2.x, SDXL)."),
                StemTrajectory.Input("trajectory", tooltip="From STEM Invert Latents, by any of its methods."),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="pnp",
                    tooltip="pnp: the source's queries, keys and convolutions keep its structure. sdedit: without them; start "
                    "at a lower noise level. pnp_per_frame: every frame edited on its own, for comparison.",
                ),
                io.Int.Input(
                    "keyframe_every",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="One keyframe in so many frames; the others take over its features. Less keeps more detail and "
                    "takes longer; 1 edits every frame.",
                ),
                io.Float.Input(
                    "qk_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the inversion's steps, from the noisiest, in which queries and keys are the source's. "
                    "More keeps more of its shapes.",
                ),
                io.Float.Input(
                    "conv_until",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The same for the convolutions of one block, which keep the layout.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the random keyframes.",
                ),
                blocks_input(),
                io.Combo.Input(
                    "blend",
                    options=["official", "distance"],
                    default="official",
                    advanced=True,
                    tooltip="How a frame mixes its keyframe with the one before. official: always about a third of the one "
                    "before. distance: by how near each is.",
                ),
                io.Combo.Input(
                    "keyframes",
                    options=["random", "fixed"],
                    default="random",
                    advanced=True,
                    tooltip="random: another frame of each group at every step, as the paper does. fixed: the middle one.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="A copy of the model that edits along the trajectory.")],
        )

    @classmethod
    def execute(
        cls, model, trajectory, mode, keyframe_every, qk_until, conv_until, seed, blocks, blend, keyframes
    ) -> io.NodeOutput:
        with named(cls):
            check_numbers(qk_until=qk_until, conv_until=conv_until)
            layout = read_layout(model)
            settings = TokenFlowSettings(mode, keyframe_every, qk_until, conv_until, seed, blend, keyframes)
            return io.NodeOutput(patch_tokenflow(model, layout, choose_blocks(layout, blocks), trajectory, settings))


NODES = [STEMTokenFlow]
