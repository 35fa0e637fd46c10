"""Group normalisation over all frames of a clip together, as in UNets that were inflated from pictures to videos.

Source: FateZero's and Tune-A-Video's UNet, whose residual blocks and output normalise (frames, height, width) at once.
"""

from collections.abc import Callable

from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher
from einops import rearrange
from torch import Tensor, nn


def place_joint_norms(model: ModelPatcher, frames: int) -> None:
    """Puts them on a model that has been cloned already; core takes them off again."""
    unet = model.model.diffusion_model
    names = ["out.0"]
    for name, module in unet.named_modules():
        if isinstance(module, ResBlock):
            names += [f"{name}.in_layers.0", f"{name}.out_layers.0"]
    for name in names:
        model.add_object_patch(f"diffusion_model.{name}.forward", joint_forward(unet.get_submodule(name), frames))


def joint_forward(norm: nn.GroupNorm, frames: int) -> Callable[[Tensor], Tensor]:
    """What the norm does to rows (prompts x frames, c, height, width), each prompt's frames taken together."""

    def forward(x: Tensor) -> Tensor:
        joint = rearrange(x, "(p f) c y x -> p c f (y x)", f=frames)
        return rearrange(type(norm).forward(norm, joint), "p c f (y x) -> (p f) c y x", y=x.shape[-2])

    return forward
