"""Trains the demo model's ControlNet for edges, on latents of generated scenes and what core's Canny node finds in them.

    python -m tools.train_controlnet --state FILE --export FILE --minutes 70

Can be stopped at any time and started again with the same words; it goes on from the state file. `--export` writes the
weights that the pack ships (half precision, averaged) at every save.

As Zhang et al. (Adding Conditional Control to Text-to-Image Diffusion Models, ICCV 2023): a copy of the UNet's encoder and
middle, convolutions that start at zero, the UNet and the text encoder frozen. Half of the captions say less than the picture
shows or something else, so that the outline is taken from the edges and not from the words. For the same end the features of
the edges learn beside the loss where the scene's shape is.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stem.ddim import stable_diffusion_sigmas
from stem.scenes import PLACES, SHAPES, caption, edit_scene, random_scene, render
from tools import comfy, train_unet, train_vae
from tools.training_data import TRAINING_SEEDS, as_bytes

FIRST_SEED = 5 * TRAINING_SEEDS  # none of the scenes that the UNet was trained on, nor of those that tests look at
PICTURES, LEVELS = 8, 3  # in a batch, and at how many noise levels each of them: the features of its edges are found once
POOL, REFRESH = 640, 1  # samples at hand, and how many of them are new at every step
TOGETHER = 4  # samples whose edges are found with the same thresholds
THRESHOLDS = (0.2, 0.4)  # those of core's node, 0.4 and 0.8, find no edges of a shape as bright as what it is on
HEAVIEST = 25  # weight of the highest noise levels in the loss, the middle ones having 1: outlines are decided there
AUXILIARY = 0.1  # weight of the loss that tells where the shape is
AVERAGE = 0.997  # decay of the averaged weights
SAVE_EVERY = 180  # seconds


class Samples(NamedTuple):
    """What is known of scenes.

    latents: (n, 4, 16, 16) of unit size.
    edges: (n, 128, 128) bytes, 0 or 1.
    masks: (n, 16, 16) in 0..1, how much of each place the main shape covers.
    rows: (n, WORDINGS, 77) row numbers of captions.
    """

    latents: Tensor
    edges: Tensor
    masks: Tensor
    rows: Tensor


class Data:
    """A pool of samples that is renewed all the time."""

    def __init__(self, vae: nn.Module, ids: Tensor, seed: int, size: int = POOL):
        self.vae, self.next_seed, self.slot = vae, seed, 0
        self.tokenizer, self.row_of = train_unet.comfy_tokenizer(), {int(token): row for row, token in enumerate(ids)}
        parts = [self._make(64) for _ in range(size // 64)]
        self.pool = Samples(*map(torch.cat, zip(*parts, strict=True)))

    def batch(self, g: torch.Generator) -> Samples:
        """Some samples; `rows` (PICTURES, LEVELS, 77) has a caption for every noise level."""
        fresh = self._make(REFRESH)
        where = (self.slot + torch.arange(REFRESH)) % len(self.pool.latents)
        for kept, new in zip(self.pool, fresh, strict=True):
            kept[where] = new
        self.slot = (self.slot + REFRESH) % len(self.pool.latents)
        pick = torch.randint(len(self.pool.latents), (PICTURES,), generator=g)
        latents, edges, masks, rows = (kept[pick] for kept in self.pool)
        wording = torch.rand(PICTURES, rows.shape[1], generator=g).argsort(1)[:, :LEVELS]
        return Samples(latents, edges, masks, rows.gather(1, wording[..., None].expand(-1, -1, rows.shape[-1])))

    @torch.no_grad()
    def _make(self, count: int) -> Samples:
        images, masks, rows = [], [], []
        g = torch.Generator().manual_seed(self.next_seed)
        for seed in range(self.next_seed, self.next_seed + count):
            scene = random_scene(seed, frames=9)
            clip = render(scene, moments=[seed % 9])
            images.append(clip.images[0])
            masks.append(F.avg_pool2d(clip.mask[None], 8)[0, 0])
            rows.append(torch.stack([self._tokens(words) for words in wordings(scene, seed)]))
        self.next_seed += count
        frames = torch.stack(images)
        edges = torch.cat([find_edges(part, *thresholds(g)) for part in frames.split(TOGETHER)])
        z = torch.cat([self.vae.taesd_encoder(part.float() / 255) for part in as_bytes(frames).split(16)])
        return Samples(z.contiguous(), edges, torch.stack(masks), torch.stack(rows))

    def _tokens(self, words: str) -> Tensor:
        return torch.tensor([self.row_of[token] for token, _ in self.tokenizer.tokenize_with_weights(words)["l"][0]])


def wordings(scene, seed: int) -> list[str]:
    """Captions of a scene, from nothing over too little and something wrong to the truth."""
    shape = scene.figures[0].shape
    full, other = caption(scene, seed // 9), caption(scene, seed // 7)
    wrong = edit_scene(scene, shape=[name for name in SHAPES if name != shape][seed % 3])
    place = PLACES[scene.background]
    return ["", "", "", full, full, other, full.replace(shape, "thing"), caption(wrong, seed // 9), place[seed % len(place)]]


def thresholds(g: torch.Generator) -> tuple[float, float]:
    """Those that suit the scenes, or others up to those of core's Canny node."""
    own, low, gap = torch.rand(3, generator=g).tolist()
    low = 0.05 + 0.35 * low
    return THRESHOLDS if own < 0.5 else (low, low + 0.05 + 0.35 * gap)


def find_edges(images: Tensor, low: float, high: float) -> Tensor:
    """Edges (f, y, x) as bytes of pictures (f, y, x, 3), found by core's node."""
    from comfy_extras.nodes_canny import Canny

    return Canny.execute(images, low, high).result[0][..., 0].to(torch.uint8)


def build(demo, unet: nn.Module) -> nn.Module:
    """Core's ControlNet of the demo UNet's sizes: its encoder's weights, a new encoder of hints, zeros where it ends."""
    net = demo.new_controlnet(torch.float32)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.Conv2d.reset_parameters(module)  # the one of core's subclass does nothing
    copied = unet.state_dict()
    left = net.load_state_dict({k: v for k, v in copied.items() if k in net.state_dict()}, strict=False).missing_keys
    if unknown := [key for key in left if not key.startswith(("zero_convs", "middle_block_out", "input_hint_block"))]:
        raise ValueError(f"the UNet has no weights for {', '.join(unknown)}.")
    convolutions = [module for module in net.input_hint_block if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
    convolutions[-1].weight.data.mul_(0.3)
    for part in (net.zero_convs, net.middle_block_out):
        for parameter in part.parameters():
            nn.init.zeros_(parameter)
    return net


class Control(nn.Module):
    """The ControlNet beside the frozen UNet and text encoder; its call is the loss."""

    def __init__(self, net: nn.Module, unet: nn.Module, text: nn.Module):
        super().__init__()
        self.net = net.requires_grad_(True)
        self.where = nn.Conv2d(net.model_channels, 2, 1)  # reads the shape from features of hints, and two blocks later
        self.frozen = [unet.requires_grad_(False), text.requires_grad_(False)]  # in a list: not saved with the rest
        self.sigmas = stable_diffusion_sigmas()

    def control(self, x: Tensor, guide: Tensor, t: Tensor, context: Tensor) -> tuple[dict, Tensor]:
        """What core's ControlNet gives the UNet, from encoded hints and with the faster attention; and a block's output."""
        from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
        from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

        net, options = self.net, {"optimized_attention_override": train_unet.narrow_attention}
        emb = net.time_embed(timestep_embedding(t, net.model_channels, repeat_only=False))
        outputs, h, inner = [], x, None
        for i, (block, end) in enumerate(zip(net.input_blocks, net.zero_convs, strict=True)):
            h = forward_timestep_embed(block, h, emb, context, options)
            h = h + guide if i == 0 else h
            inner = h if i == 2 else inner
            outputs.append(end(h, emb, context))
        h = forward_timestep_embed(net.middle_block, h, emb, context, options)
        return {"middle": [net.middle_block_out(h, emb, context)], "output": outputs}, inner

    def forward(self, samples: Samples, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weighted squared error of the noise prediction as in train_unet, and how badly the shape's place is told."""
        unet, text = self.frozen
        z, masks, rows = samples.latents, samples.masks, samples.rows
        count, levels = rows.shape[:2]
        z, masks = (w.repeat_interleave(levels, 0) for w in (z, masks))
        # Every picture has noise levels from the whole range, and no two in the batch are alike.
        even = (torch.arange(count * levels) + torch.rand(1, generator=g)) / (count * levels)
        even = even.reshape(levels, count).T.flatten()
        t = (1000 * even**0.6).long().clamp(max=999)
        sigma = self.sigmas[t].reshape(-1, 1, 1, 1)
        noise = torch.randn(z.shape, generator=g)
        x = (z + sigma * noise) / (1 + sigma**2).sqrt()
        with torch.no_grad():
            context = text(rows.flatten(0, 1))
        hint = samples.edges.float()[:, None].expand(-1, 3, -1, -1).contiguous()
        guide = self.net.input_hint_block(hint, None, None)
        told = [self.where.weight[i : i + 1] for i in range(2)]
        guides = guide.repeat_interleave(levels, 0)
        control, inner = self.control(x, guides, t.float(), context)
        options = {"optimized_attention_override": train_unet.narrow_attention}
        eps = unet(x, t.float(), context=context, control=control, transformer_options=options)
        weight = (5 * sigma**2).clamp(max=1) * (1 + sigma**2).clamp(max=HEAVIEST) * (0.7 + masks[:, None])
        loss = (weight * (eps - noise).square()).mean()
        first = F.conv2d(guide, told[0], self.where.bias[:1])[:, 0]
        second = F.conv2d(inner, told[1], self.where.bias[1:])[:, 0]
        aside = F.binary_cross_entropy_with_logits(first, samples.masks) + F.binary_cross_entropy_with_logits(second, masks)
        return loss, aside


def optimiser_of(both: Control) -> torch.optim.Optimizer:
    """AdamW; what starts from nothing learns faster than what is copied."""
    new, copied = [], []
    for name, parameter in both.named_parameters():
        fresh = any(part in name for part in ("zero_convs", "middle_block_out", "input_hint_block", "where"))
        (new if fresh else copied).append(parameter)
    groups = [{"params": new, "part": 1.0}, {"params": copied, "part": 0.3}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)


def export(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes the ControlNet under core's names in half precision."""
    state = {k.removeprefix("net."): v.half().contiguous() for k, v in weights.items() if k.startswith("net.")}
    part = path.with_suffix(".part")
    safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    part.replace(path)


def save(args, both: Control, average: dict, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Progress to the state file, averaged weights to the export."""
    part = args.state.with_suffix(".part")
    state = {"weights": both.state_dict(), "average": average, "optimiser": optimiser.state_dict(), "step": step}
    torch.save(state, part)
    part.replace(args.state)
    if args.export:
        export(args.export, average)


def frozen_parts(demo) -> tuple[nn.Module, nn.Module, nn.Module]:
    """UNet, text encoder and VAE of the shipped checkpoint in single precision."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    shipped = train_unet.read_checkpoint(demo.CHECKPOINT, demo)
    vae = train_vae.build()
    vae.load_state_dict(shipped.pop("vae"))
    unet = UNetModel(**demo.UNET_CONFIG, device="cpu", dtype=torch.float32)
    text = train_unet.Text(demo, shipped["text.ids"])
    train_unet.Denoiser(unet, text).load_state_dict(shipped)
    return unet, text, vae.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="file that holds weights and progress")
    parser.add_argument("--export", type=Path, help="weights to write at every save")
    parser.add_argument("--minutes", type=float, default=70, help="time from now on")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    pack = comfy.start(("--cpu", comfy.PYTORCH_ATTENTION))
    demo = pack.nodes.bridge.demo_model
    unet, text, vae = frozen_parts(demo)
    both = Control(build(demo, unet), unet, text)
    average = {k: v.detach().clone() for k, v in both.state_dict().items()}
    optimiser = optimiser_of(both)
    step = 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        both.load_state_dict(state["weights"])
        average, step = state["average"], state["step"]
        optimiser.load_state_dict(state["optimiser"])
    began = saved = time.time()
    data = Data(vae, text.ids, FIRST_SEED + step * REFRESH + (POOL if step else 0))
    print(f"{len(data.pool.latents)} samples after {time.time() - began:.0f} s", flush=True)
    g = torch.Generator().manual_seed(step)
    first, recent, recent_aside = step, 0.0, 0.0
    while (progress := (time.time() - began) / (60 * args.minutes)) < 1:
        loss, aside = both(data.batch(g), g)
        optimiser.zero_grad()
        (loss + AUXILIARY * aside).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        warm = min(1.0, (step - first + 1) / 50)
        for group in optimiser.param_groups:
            group["lr"] = args.rate * group["part"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimiser.step()
        step += 1
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in both.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        recent, recent_aside = (
            0.98 * old + 0.02 * new.item() if step > first + 1 else new.item()
            for old, new in ((recent, loss), (recent_aside, aside))
        )
        if step % 20 == 0:
            print(f"step {step} loss {recent:.4f} shape {recent_aside:.3f} {time.time() - began:.0f} s", flush=True)
        if time.time() - saved > SAVE_EVERY:
            save(args, both, average, optimiser, step)
            saved = time.time()
    save(args, both, average, optimiser, step)


if __name__ == "__main__":
    main()
