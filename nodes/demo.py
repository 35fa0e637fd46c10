"""A small model and a generated clip that come with the pack: for trying out, teaching and testing, nothing to download."""

from comfy_api.latest import io

from ..stem.scenes import BACKGROUNDS, COLOURS, SHAPES, caption, random_scene, render
from .bridge.demo_model import load_demo_controlnet, load_demo_model
from .settings import CATEGORY, named

RANDOM = "random"


class STEMDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMDemoModel",
            display_name="STEM Demo Model",
            category=f"{CATEGORY}/demo",
            description="A tiny Stable Diffusion 1.5 that ships with this pack. It knows coloured shapes on five backgrounds "
            "at 128 x 128 pixels, runs on any computer and makes every STEM workflow work without a download.",
            search_aliases=["demo checkpoint", "tiny model", "test model", "stem checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model, of SD1.5's layout."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="vae", tooltip="The VAE, for VAE Encode and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model())


class STEMDemoClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMDemoClip",
            display_name="STEM Demo Clip",
            category=f"{CATEGORY}/demo",
            description="A generated clip of a shape that moves over a textured background, with its mask and the prompt that "
            "describes it. Change colour, shape or background alone, and you see the perfect edit.",
            search_aliases=["test video", "generated clip", "sample video", "synthetic video"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides all that is not chosen below: motion, camera, texture, and whatever is set to random.",
                ),
                io.Int.Input("frames", default=16, min=1, max=4096, tooltip="Length of the clip in frames."),
                io.Int.Input(
                    "size",
                    default=128,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Width and height in pixels. The demo model was trained at 128.",
                ),
                io.Combo.Input("colour", options=[RANDOM, *COLOURS], default=RANDOM, tooltip="Colour of the main shape."),
                io.Combo.Input("shape", options=[RANDOM, *SHAPES], default=RANDOM, tooltip="Form of the main shape."),
                io.Combo.Input("background", options=[RANDOM, *BACKGROUNDS], default=RANDOM, tooltip="What it moves over."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames."),
                io.Mask.Output(display_name="mask", tooltip="Where the main shape is, for every frame."),
                io.String.Output(display_name="prompt", tooltip="What the clip shows, in the demo model's words."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, frames: int, size: int, colour: str, shape: str, background: str) -> io.NodeOutput:
        colour, shape, background = (None if name == RANDOM else name for name in (colour, shape, background))
        with named(cls):
            scene = random_scene(seed, frames, size, size, colour, shape, background)
        clip = render(scene)
        return io.NodeOutput(clip.images, clip.mask, caption(scene))


class STEMDemoControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMDemoControlNet",
            display_name="STEM Demo ControlNet",
            category=f"{CATEGORY}/demo",
            description="A small ControlNet for the STEM Demo Model that ships with this pack. It reads the edges that Canny "
            "finds in a clip and keeps the outline of the main shape while a prompt changes the rest. Connect it to "
            "Apply ControlNet.",
            search_aliases=["demo controlnet", "demo control net", "controlnet", "canny", "edges", "outline"],
            inputs=[],
            outputs=[
                io.ControlNet.Output(
                    display_name="control_net",
                    tooltip="For Apply ControlNet; its image is what Canny finds, at thresholds of 0.2 and 0.4 or lower. Works "
                    "with the demo model only.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_demo_controlnet())


NODES = [STEMDemoModel, STEMDemoClip, STEMDemoControlNet]
