"""The clips that benchmarks run on, and the model that they run through."""

import hashlib
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from stem.metrics import estimate_flow
from stem.scenes import caption, random_scene, render
from tools import comfy, places
from tools.training_data import REAL_CLIPS, real_frames

FRAMES, SIZE = 16, 128
GENERATED = tuple(f"scene {seed}" for seed in range(12))


class Clip(NamedTuple):
    """A source clip."""

    images: Tensor  # (f, height, width, 3) in 0..1
    prompt: str
    flow: Tensor  # (f - 1, height, width, 2): exact of generated clips, estimated of real ones
    valid: Tensor  # (f - 1, height, width): where the flow holds


class Demo(NamedTuple):
    """The demo model in a ComfyUI in this process."""

    pack: ModuleType
    core: ModuleType  # core's stock nodes
    model: Any
    clip: Any
    vae: Any
    checkpoint: str  # SHA-256 of the file

    def text(self, prompt: str) -> list:
        return self.core.CLIPTextEncode().encode(self.clip, prompt)[0]

    def encode(self, images: Tensor) -> dict:
        return self.core.VAEEncode().encode(self.vae, images)[0]

    def decode(self, latents: dict) -> Tensor:
        return self.core.VAEDecode().decode(self.vae, latents)[0]

    def sample(self, model: Any, noise: dict, sigmas: Tensor, positive: list, negative: list, cfg: float) -> dict:
        """Latents that core's DDIM finds from inverted noise, with the model as it is given."""
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        return SamplerCustom.execute(
            model=model, add_noise=False, noise_seed=0, cfg=cfg, positive=positive, negative=negative,
            sampler=comfy.samplers.sampler_object("ddim"), sigmas=sigmas, latent_image=noise,
        ).result[0]  # fmt: skip


@cache  # the bases bench inverts a clip many times, and the flow of a real one takes long to estimate
def load_clip(name: str, frames: int = FRAMES) -> Clip:
    """A clip of SIZE x SIZE pixels, by a name of GENERATED or REAL_CLIPS."""
    if name in GENERATED:
        scene = random_scene(GENERATED.index(name), frames, SIZE, SIZE)
        clip = render(scene)
        return Clip(clip.images, caption(scene), clip.flow, clip.visible)
    pictures = real_frames(places.locations().clips, name, SIZE)[:frames]
    left = (pictures.shape[-1] - SIZE) // 2
    images = rearrange(pictures[..., left : left + SIZE], "f c y x -> f y x c") / 255
    return Clip(images, REAL_CLIPS[name][0], *estimate_flow(images))


def load_demo() -> Demo:
    pack = comfy.start(("--cpu", comfy.PYTORCH_ATTENTION))
    import comfy.utils as core_utils

    import nodes as core

    core_utils.set_progress_bar_enabled(False)
    checkpoint = hashlib.sha256(pack.nodes.bridge.demo_model.CHECKPOINT.read_bytes()).hexdigest()
    return Demo(pack, core, *pack.nodes.demo.STEMDemoModel.execute().result, checkpoint)


def environment(demo: Demo) -> dict[str, Any]:
    """What results depend on beside the clips."""
    return {
        "checkpoint": demo.checkpoint,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "attention": comfy.PYTORCH_ATTENTION,
    }
