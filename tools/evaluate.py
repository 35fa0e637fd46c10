"""How well the demo model does what it is told, and what its VAE keeps.

    python -m tools.evaluate [--prompts 120] [--steps 30] [--cfg 5] [--json FILE] [--sheet FILE]

Prompts describe scenes that were not trained on. They are sampled through core's own nodes, and what the pictures show is
judged by `stem.reader`. Prompts of two figures are reported apart, for information: the main figure is the one named first.
"""

import argparse
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torchvision.utils import save_image

from stem.metrics import psnr
from stem.reader import Reading, read_images, true_reading
from stem.scenes import Scene, caption, random_scene, render
from tools import comfy, places
from tools.training_data import REAL_CLIPS, real_frames

FIRST_SEED = 700_000  # of the scenes; those that were trained on begin at training_data.TRAINING_SEEDS
TWO_FIGURES = 24  # prompts
BATCH = 24  # prompts sampled together
SIZE = 128
VAE_SCENES = 32
EVERY = 5  # of the real clips the VAE is tried on the frames 5, 15, 25, ..: it was trained on even ones only


class Sample(NamedTuple):
    """One prompt and what came of it."""

    scene: Scene
    prompt: str
    reading: Reading

    @property
    def wanted(self) -> Reading:
        return true_reading(self.scene)


def sample(pack: ModuleType, prompts: list[str], steps: int, cfg: float) -> Tensor:
    """Pictures (f, SIZE, SIZE, 3) of the prompts, one each, by KSampler with DDIM."""
    import nodes as core

    model, clip, vae = pack.nodes.demo.STEMDemoModel.execute().result

    def conditioning(texts: list[str]) -> list:
        """One entry with a row for each text."""
        return [[torch.cat([core.CLIPTextEncode().encode(clip, text)[0][0][0] for text in texts]), {}]]

    pictures = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        (empty,) = core.EmptyLatentImage().generate(SIZE, SIZE, len(batch))
        positive, negative = conditioning(batch), conditioning([""] * len(batch))
        (latents,) = core.KSampler().sample(model, start, steps, cfg, "ddim", "simple", positive, negative, empty)
        pictures += core.VAEDecode().decode(vae, latents)
    return torch.cat(pictures)


def judge(scenes: list[Scene], prompts: list[str], pictures: Tensor) -> list[Sample]:
    return [Sample(*row) for row in zip(scenes, prompts, read_images(pictures), strict=True)]


def shares(samples: list[Sample]) -> dict[str, float]:
    """Of the prompts, how many came out right in each respect."""
    right = [[found == want for found, want in zip(s.reading, s.wanted, strict=True)] for s in samples]
    return dict(zip(Reading._fields, torch.tensor(right).double().mean(0).tolist(), strict=True))


def vae_fidelity(pack: ModuleType, clips: Path) -> dict[str, float]:
    """PSNR in dB of what comes back from VAE Encode and VAE Decode."""
    import nodes as core

    vae = pack.nodes.demo.STEMDemoModel.execute().result[2]

    def fidelity(images: Tensor) -> float:
        (latents,) = core.VAEEncode().encode(vae, images)
        return psnr(core.VAEDecode().decode(vae, latents)[0], images)

    scenes = [random_scene(FIRST_SEED + i, frames=9) for i in range(VAE_SCENES)]
    found = {"generated": fidelity(torch.cat([render(scene, [i % 9]).images for i, scene in enumerate(scenes)]))}
    for name in REAL_CLIPS:
        frames = real_frames(clips, name, SIZE, every=EVERY)[1::2]
        found[name] = fidelity(rearrange(frames, "f c y x -> f y x c") / 255)
    return found | {"real": sum(found[name] for name in REAL_CLIPS) / len(REAL_CLIPS)}


@torch.inference_mode()  # as ComfyUI runs its nodes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120, help="number of prompts of one figure (default: 120)")
    parser.add_argument("--steps", type=int, default=30, help="of DDIM (default: 30)")
    parser.add_argument("--cfg", type=float, default=5, help="guidance scale (default: 5)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--sheet", type=Path, help="PNG to write the pictures to, in the order of the prompts")
    args = parser.parse_args()
    pack = comfy.start()
    scenes = [random_scene(FIRST_SEED + i, figures=1) for i in range(args.prompts)]
    scenes += [random_scene(FIRST_SEED + i, figures=2) for i in range(args.prompts, args.prompts + TWO_FIGURES)]
    prompts = [caption(scene, wording) for wording, scene in enumerate(scenes)]
    pictures = sample(pack, prompts, args.steps, args.cfg)
    samples = judge(scenes, prompts, pictures)
    single, double = samples[: args.prompts], samples[args.prompts :]
    report = {
        "right": shares(single),
        "right_of_two_figures": shares(double),
        "vae_psnr": vae_fidelity(pack, places.locations().clips),
        "settings": {
            "prompts": len(single),
            "prompts_of_two_figures": len(double),
            "steps": args.steps,
            "cfg": args.cfg,
            "checkpoint": hashlib.sha256(pack.nodes.bridge.demo_model.CHECKPOINT.read_bytes()).hexdigest(),
        },
        "wrong": [{"prompt": s.prompt, "read": s.reading._asdict()} for s in samples if s.reading != s.wanted],
    }
    for title, found in (("one figure", report["right"]), ("two figures", report["right_of_two_figures"])):
        print(f"{title}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items()))
    print("VAE: " + ", ".join(f"{name} {decibel:.1f} dB" for name, decibel in report["vae_psnr"].items()))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        save_image(rearrange(pictures, "f y x c -> f c y x"), args.sheet, nrow=12)


if __name__ == "__main__":
    main()
