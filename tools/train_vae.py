"""Trains the demo model's VAE: TAESD's architecture, 4 latent channels, factor 8.

    python -m tools.train_vae --clips FOLDER --state FILE --steps 2500

Can be stopped at any time and started again with the same words; it goes on from the state file. With a larger number
of steps it goes on from where it ended.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tools import comfy
from tools.training_data import REAL_CLIPS, TRAINING_SEEDS, real_frames, scene_frames

LATENT_SCALE = 0.18215  # of SD1.x: the encoder's own output is of unit size, what core calls the latent is 1/0.18215
CROP, BATCH = 64, 16


def build() -> nn.Module:
    """Core's own TAESD with weights that let a signal pass: its layers start uninitialised."""
    from comfy.taesd.taesd import TAESD, Block

    vae = TAESD()
    for parameter in vae.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
    for module in vae.modules():
        if isinstance(module, Block):
            module.conv[-1].weight.data.mul_(0.2)
    for half in (vae.taesd_encoder, vae.taesd_decoder):
        half[-1].weight.data.mul_(0.3)
    nn.init.constant_(vae.taesd_decoder[-1].bias, 0.5)
    vae.vae_scale.data.fill_(LATENT_SCALE)
    vae.vae_scale.requires_grad_(False)
    vae.vae_shift.requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def crops(scenes: Tensor, real: list[Tensor], count: int, g: torch.Generator) -> Tensor:
    """A batch (count, 3, CROP, CROP) in 0..1: half of generated scenes, half of real clips."""

    def draw(end: int) -> int:
        return int(torch.randint(end, (1,), generator=g))

    out = []
    for i in range(count):
        pool = scenes if i % 2 else real[draw(len(real))]
        image = pool[draw(len(pool))]
        y, x = (draw(n - CROP + 1) for n in image.shape[1:])
        out.append(image[:, y : y + CROP, x : x + CROP])
    return (torch.stack(out).float() / 255).contiguous(memory_format=torch.channels_last)


def loss_of(vae: nn.Module, images: Tensor, g: torch.Generator) -> Tensor:
    """Squared and absolute error of the round trip, with latents kept near zero mean and unit size."""
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.taesd_encoder(images)
        jitter = 0.05 * torch.randn(z.shape, generator=g)
        error = vae.taesd_decoder(z + jitter).float() - images
    z = z.float()
    size = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
    return error.square().mean() + 0.1 * error.abs().mean() + 0.002 * size


def psnr_of_round_trip(vae: nn.Module, images: Tensor) -> float:
    """Mean PSNR in dB of whole images (n, 3, y, x) as bytes."""
    x = images.float().div(255).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = vae.taesd_decoder(vae.taesd_encoder(x)).clamp(0, 1)
    return float((-10 * (x - y).square().mean((1, 2, 3)).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with the three real clips")
    parser.add_argument("--state", type=Path, required=True, help="file that holds weights and progress")
    parser.add_argument("--steps", type=int, default=2500, help="steps in all")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    comfy.start()

    vae = build()
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=args.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step = 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    start = step
    scenes, _ = scene_frames(1500, TRAINING_SEEDS)
    real = [real_frames(args.clips, name, height, every=2) for name in REAL_CLIPS for height in (128, 96)]
    unseen, _ = scene_frames(16, 0)
    checks = [real[i][::40, :, :, :128] for i in (0, 2, 4)]
    g = torch.Generator().manual_seed(step)
    began = time.time()
    while step < args.steps:
        warm = min(1.0, (step - start + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        loss = loss_of(vae, crops(scenes, real, BATCH, g), g)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        optimiser.step()
        step += 1
        if step % 100 == 0 or step == args.steps:
            figures = [psnr_of_round_trip(vae, x) for x in (unseen, *checks)]
            part = args.state.with_suffix(".part")
            torch.save({"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, part)
            part.replace(args.state)
            names = "scenes bikes carphone bunny".split()
            report = " ".join(f"{name} {figure:.2f}" for name, figure in zip(names, figures, strict=True))
            print(f"step {step} loss {loss.item():.5f} {time.time() - began:.0f} s, PSNR {report} dB", flush=True)


if __name__ == "__main__":
    main()
