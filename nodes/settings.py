"""Inputs that several nodes have in common, and the check that names the node in an error."""

import math
from contextlib import AbstractContextManager

from comfy_api.latest import io
from torch import Tensor

from .bridge.naming import named_by

CATEGORY = "video/STEM"


def named(node: type[io.ComfyNode]) -> AbstractContextManager[None]:
    """Puts the node's id in front of an error about its inputs."""
    return named_by(node.define_schema().node_id)


def check_numbers(**widgets: float) -> None:
    """
    Raises:
        ValueError: A widget of this name is no number. ComfyUI's own check of its limits lets that pass.
    """
    for name, value in widgets.items():
        if math.isnan(value):
            raise ValueError(f"{name} is {value}. Give a number.")


def checked_images(name: str, images: Tensor) -> Tensor:
    """The colours (f, height, width, 3) of an IMAGE, 0 to 1, in float32.

    Raises:
        ValueError: The input of this name holds something else; says what.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] < 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} has the shape {tuple(images.shape)} and the type {str(images.dtype).removeprefix('torch.')}, needed are "
            "frames (frames, height, width, 3) of numbers from 0 to 1. Connect the frames of a clip."
        )
    images = images[..., :3].float()
    if not images.isfinite().all():
        raise ValueError(f"{name} has pixels that are no numbers. Look at what makes these frames, such as a VAE in float16.")
    return images.clamp(0, 1)


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=50,
        min=1,
        max=999,
        tooltip="Noise levels to climb. 50 is what the papers use; more give the clip back more exactly and take longer. "
        "Divisors of 1000 come the nearer to full noise the more they are (20 steps reach timestep 951 of 999, 50 reach 981, "
        "200 reach 996); other numbers can stop far short (300 at 898, 501 at 501). "
        "A basis is best estimated with the steps of the inversion that will read it.",
    )


def num_bases_input() -> io.Int.Input:
    return io.Int.Input(
        "num_bases",
        default=256,
        min=1,
        max=4096,
        tooltip="How many bases stand for the whole video, for each attention head. 256 is the paper's number. A connected "
        "basis has its own.",
    )


def em_iterations_input() -> io.Int.Input:
    return io.Int.Input(
        "em_iterations",
        default=5,
        min=1,
        max=100,
        tooltip="Rounds of expectation maximisation that refine the bases. 5 is the paper's number. A connected basis has its "
        "own.",
    )


def seed_input() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=False,  # an inversion is not to run anew with every queue
        tooltip="Where the bases start from: the same random numbers on every device. A connected basis has its own.",
    )


def temperature_input() -> io.Float.Input:
    return io.Float.Input(
        "temperature",
        default=0.01,
        min=0.0001,
        max=100.0,
        step=0.0001,  # the front end rounds to it
        advanced=True,
        tooltip="How softly a token is shared among bases. The paper's 0.01 gives nearly every token to a single basis. A "
        "connected basis has its own.",
    )


BLOCKS = (
    'Self-attention blocks to act on: "all", or names separated by commas, such as "output" or "input_4, output_4-8"; on SDXL '
    '"input_7_0" is the first of several in a block.'
)


def blocks_input(default: str = "all", tooltip: str = BLOCKS) -> io.String.Input:
    return io.String.Input("blocks", default=default, advanced=True, tooltip=tooltip)


def frames_per_batch_input() -> io.Int.Input:
    return io.Int.Input(
        "frames_per_batch",
        optional=True,  # came later: graphs without it stay valid
        default=0,
        min=0,
        max=4096,
        advanced=True,
        tooltip="Frames that go through the model at once, where each is inverted on its own (with a basis, or method ddim) "
        "or in groups (frames_per_em). 0 = as many as free memory allows. It changes the memory that is needed; the result, in "
        "rounding alone.",
    )


def warm_iterations_input() -> io.Int.Input:
    return io.Int.Input(
        "warm_iterations",
        optional=True,  # came later: graphs without it stay valid
        default=0,
        min=0,
        max=100,
        advanced=True,
        tooltip="Rounds from the second noise level on, starting from the bases of the level before, not em_iterations. "
        "0 = as the paper: random bases at every level. 1 is faster, and as good where the basis output is connected to the "
        "editor; bases that an editor estimates anew fit less well then. Not read when a basis is connected, nor by other "
        "methods.",
    )


def frames_per_em_input() -> io.Int.Input:
    return io.Int.Input(
        "frames_per_em",
        default=0,
        min=0,
        max=4096,
        advanced=True,
        tooltip="Frames that share one set of bases: 0 = all frames of the clip (of the window, with context windows), as the "
        "paper describes it; 8 = what its official code does. Several groups have no basis in common to give on. Not read when "
        "a basis is connected.",
    )
