"""Trains the demo model's UNet and text encoder together, on latents of a finished VAE.

    python -m torch.distributed.run --nproc-per-node 2 -m tools.train_unet --clips FOLDER --vae FILE --state FILE --minutes 90

Can be stopped at any time and started again with the same words; it goes on from the state file. `--export` writes the
checkpoint that the pack ships (half precision, averaged weights) at every save. Where the state file is lost, `--start` goes on
from such a checkpoint, VAE included, with fresh optimisers.

Started like this, each core trains on its share of the batch in a process of its own: the layers are small, and threads wait
for one another. `python -m tools.train_unet` with the same words trains in one process.
"""

import argparse
import math
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stem.ddim import stable_diffusion_sigmas
from stem.scenes import COLOURS, PHRASES, PLACES, SHAPES
from tools import comfy, train_vae
from tools.training_data import REAL_CLIPS, TRAINING_SEEDS, real_frames, scene_frames

BATCH = 32  # over all processes
POOL, REFRESH = 4096, 2  # latents of generated scenes at hand, and how many of them are new at every step, likewise
NO_CAPTION = 0.25  # share of the samples that learn the unconditional prediction, whose errors guidance multiplies
HEAVIEST = 10  # weight of the highest noise levels in the loss, the middle ones having 1
AVERAGE = 0.9985  # decay of the averaged weights


class Text(nn.Module):
    """The text encoder of the pack, with an embedding of just the tokens that occur."""

    def __init__(self, demo, ids: Tensor):
        super().__init__()
        self.model = demo.DemoTextModel(dtype=torch.float32).transformer
        self.width = demo.TEXT_CONFIG["hidden_size"]
        self.heads = demo.TEXT_CONFIG["num_attention_heads"]
        del self.model.text_projection  # of the pooled output, which nothing here uses
        self.model.text_model.embeddings.token_embedding = nn.Identity()
        self.embedding = nn.Embedding(len(ids), self.width)
        self.register_buffer("ids", ids)

    def forward(self, rows: Tensor) -> Tensor:
        """(b, 77) row numbers of the embedding to (b, 77, width), as core's CLIPTextModel_ but for its in-place sums."""
        text = self.model.text_model
        x = self.embedding(rows) + text.embeddings.position_embedding.weight

        def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, _mask) -> Tensor:
            q, k, v = (w.unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        for layer in text.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), None, attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x)


def comfy_tokenizer():
    """The tokenizer of SD1 in core."""
    from comfy.sd1_clip import SD1Tokenizer

    return SD1Tokenizer()


class Data:
    """Latents with captions: a pool of generated scenes that is renewed all the time, and the real clips."""

    def __init__(self, clips: Path, vae: nn.Module, tokenizer, seed: int, processes: int):
        self.vae, self.tokenizer, self.next_seed = vae, tokenizer, seed
        self.size, self.pool, self.refresh = (whole // processes for whole in (BATCH, POOL, REFRESH))
        words = [*PHRASES, *COLOURS, *SHAPES, *sum((*PLACES.values(), *REAL_CLIPS.values()), ()), "a thing, a thing"]
        self.vocabulary = sorted({i for text in words for i in self._token_ids(text)})
        self.latents, self.rows = self._scenes(self.pool)
        self.real = []
        for name, wordings in REAL_CLIPS.items():
            rows = torch.stack([self._tokens(words) for words in wordings])
            for height, step in ((128, 4), (144, 5)):
                frames = real_frames(clips, name, height, every=step)[:, :, :128]
                self.real.append((self._encode(frames), rows))
        self.empty = self._tokens("")
        self.slot = 0

    def batch(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """(b, 4, 16, 16) latents of unit size and (b, 77) rows; one in sixteen is of a real clip."""
        fresh, rows = self._scenes(self.refresh)
        where = torch.arange(self.slot, self.slot + self.refresh) % self.pool
        self.latents[where], self.rows[where] = fresh, rows
        self.slot = (self.slot + self.refresh) % self.pool
        pick = torch.randint(self.pool, (self.size,), generator=g)
        z, rows = self.latents[pick].clone(), self.rows[pick].clone()
        for i in (torch.rand(self.size, generator=g) < 1 / 16).nonzero().flatten().tolist():
            frames, wordings = self.real[int(torch.randint(len(self.real), (1,), generator=g))]
            frame = frames[int(torch.randint(len(frames), (1,), generator=g))]
            left = int(torch.randint(frame.shape[-1] - 15, (1,), generator=g))
            z[i], rows[i] = (
                frame[:, :, left : left + 16],
                wordings[int(torch.randint(len(wordings), (1,), generator=g))],
            )
        rows[torch.rand(self.size, generator=g) < NO_CAPTION] = self.empty
        return z, rows

    def _scenes(self, count: int) -> tuple[Tensor, Tensor]:
        images, captions = scene_frames(count, self.next_seed)
        self.next_seed += count
        return self._encode(images), torch.stack([self._tokens(words) for words in captions])

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        out = []
        for part in images.split(16):
            x = (part.float() / 255).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                out.append(self.vae.taesd_encoder(x).float().contiguous())
        return torch.cat(out)

    def _token_ids(self, words: str) -> list[int]:
        return [token for token, _ in self.tokenizer.tokenize_with_weights(words)["l"][0]]

    def _tokens(self, words: str) -> Tensor:
        return torch.tensor([self.vocabulary.index(i) for i in self._token_ids(words)])


def initialise(unet: nn.Module, text: Text) -> None:
    """Core's layers start uninitialised: PyTorch's own defaults, zeros where a residual branch ends."""
    for module in (*unet.modules(), *text.modules()):
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)  # the one of core's subclass does nothing
    nn.init.normal_(text.embedding.weight, std=0.5)
    nn.init.normal_(text.model.text_model.embeddings.position_embedding.weight, std=0.1)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def narrow_attention(_usual, q: Tensor, k: Tensor, v: Tensor, heads: int, **_) -> Tensor:
    """Attention for core's UNet whose few channels per head are padded: PyTorch's kernel is a third faster so."""
    q, k, v = (w.unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v))
    dim = q.shape[-1]
    q, k, v = (F.pad(w, (0, max(0, 16 - dim))) for w in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)[..., :dim].transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    """The UNet and the text encoder, whose call is the loss."""

    def __init__(self, unet: nn.Module, text: Text):
        super().__init__()
        self.unet, self.text = unet, text
        self.sigmas = stable_diffusion_sigmas()

    def forward(self, z: Tensor, rows: Tensor, g: torch.Generator) -> Tensor:
        """Squared error of the noise prediction for latents z (b, 4, height, width), weighted over the noise levels.

        Where noise prevails, the error of the clean latent is sigma times that of the noise, so the weight rises with
        1 + sigma^2 (the error of v, as in EDM) up to a bound: colours and places are decided there. At low noise it is
        min(SNR, 5) / SNR (Hang et al., ICCV 2023). Timesteps are spread over the batch, more of them where forms are decided.
        """
        even = (torch.arange(len(z)) + torch.rand(1, generator=g)) / len(z)
        t = (1000 * even**0.7).long().clamp(max=999)
        sigma = self.sigmas[t].reshape(-1, 1, 1, 1)
        noise = torch.randn(z.shape, generator=g)
        x = (z + sigma * noise) / (1 + sigma**2).sqrt()
        options = {"optimized_attention_override": narrow_attention}
        eps = self.unet(x, t.float(), context=self.text(rows), transformer_options=options)
        weight = (5 * sigma**2).clamp(max=1) * (1 + sigma**2).clamp(max=HEAVIEST)
        return (weight * (eps - noise).square()).mean()


class Optimisers:
    """Muon for the matrices between the layers, a convolution counting as one too, and AdamW for the rest."""

    def __init__(self, both: Denoiser):
        ends = ("embedding", "input_blocks.0.", "out.2.")
        matrices = {id(p) for name, p in both.named_parameters() if p.ndim > 1 and not any(end in name for end in ends)}
        rest = [p for p in both.parameters() if id(p) not in matrices]
        self.kernels = [p for p in both.parameters() if id(p) in matrices]
        self.flat = [p.detach().flatten(1) for p in self.kernels]  # the same memory
        muon = torch.optim.Muon(self.flat, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
        self.all = [muon, torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)]

    def step(self, rate: float) -> None:
        """One step at a learning rate from the gradients that there are."""
        for flat, kernel in zip(self.flat, self.kernels, strict=True):
            flat.grad = kernel.grad.flatten(1)
        for optimiser in self.all:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()

    def state_dict(self) -> list[dict]:
        return [optimiser.state_dict() for optimiser in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimiser, state in zip(self.all, states, strict=True):
            optimiser.load_state_dict(state)


def names(demo) -> list[tuple[str, str]]:
    """Starts of names: here, and in the checkpoint, which has those of an SD1 checkpoint. The first that fits counts."""
    return [
        ("text.embedding.weight", demo.TOKEN_EMBEDDING),
        ("text.ids", demo.TOKEN_IDS),
        ("text.model.text_model.", demo.TEXT_PREFIX + "transformer.text_model."),
        ("unet.", demo.UNET_PREFIX),
        ("vae.", demo.VAE_PREFIX),
    ]


def export(path: Path, demo, weights: dict[str, Tensor], vae: nn.Module) -> None:
    """Writes the pack's checkpoint in half precision."""
    state = {}
    for key, value in {**weights, **vae.state_dict(prefix="vae.")}.items():
        for here, there in names(demo):
            if key.startswith(here):
                kept = value.half() if value.is_floating_point() else value.to(torch.int32)
                state[there + key.removeprefix(here)] = kept.detach().contiguous()
                break
    part = path.with_suffix(".part")
    safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    part.replace(path)


def read_checkpoint(path: Path, demo) -> dict:
    """The weights of a checkpoint by their names here, those of the VAE apart under "vae"."""
    state = {}
    for key, value in safetensors.torch.load_file(path).items():
        here, there = next(pair for pair in names(demo) if key.startswith(pair[1]))
        state[here + key.removeprefix(there)] = value.float() if value.is_floating_point() else value.long()
    vae = {key.removeprefix("vae."): value for key, value in state.items() if key.startswith("vae.")}
    return {"vae": vae, **{key: value for key, value in state.items() if not key.startswith("vae.")}}


def save(args, demo, both: Denoiser, average: dict, optimisers: Optimisers, vae: nn.Module, step: int) -> None:
    """Progress to the state file, averaged weights to the checkpoint."""
    part = args.state.with_suffix(".part")
    state = {"weights": both.state_dict(), "average": average, "optimisers": optimisers.state_dict(), "step": step}
    torch.save(state, part)
    part.replace(args.state)
    if args.export:
        export(args.export, demo, average, vae)


def seconds_of_first(began: float) -> float:
    """Time since the first process began, so that all stop after the same step."""
    passed = torch.tensor([time.time() - began], dtype=torch.float64)
    dist.broadcast(passed, 0)
    return passed.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with the three real clips")
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--vae", type=Path, help="state file of tools.train_vae")
    origin.add_argument("--start", type=Path, help="checkpoint of the pack to go on from")
    parser.add_argument("--state", type=Path, required=True, help="file that holds weights and progress")
    parser.add_argument("--export", type=Path, help="checkpoint to write at every save")
    parser.add_argument("--minutes", type=float, default=90, help="time from now on")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, processes = dist.get_rank(), dist.get_world_size()
    if BATCH % processes or REFRESH % processes:
        parser.error(f"{processes} processes cannot share {BATCH} samples and {REFRESH} new scenes a step evenly; use 1 or 2.")
    pack = comfy.start(("--cpu", comfy.PYTORCH_ATTENTION))
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    demo = pack.nodes.bridge.demo_model
    vae = train_vae.build()
    shipped = read_checkpoint(args.start, demo) if args.start else {}
    vae.load_state_dict(shipped.pop("vae") if shipped else torch.load(args.vae, weights_only=True)["vae"])
    state = torch.load(args.state, weights_only=True) if args.state.exists() else None
    step = state["step"] if state else 0
    data = Data(args.clips, vae, comfy_tokenizer(), TRAINING_SEEDS * (1 + 100 * rank) + step * REFRESH, processes)
    unet = UNetModel(**demo.UNET_CONFIG, device="cpu", dtype=torch.float32)
    both = Denoiser(unet, Text(demo, torch.tensor(data.vocabulary))).requires_grad_(True)
    initialise(both.unet, both.text)
    if shipped:
        both.load_state_dict(shipped)
    average = {k: v.detach().clone() for k, v in both.state_dict().items()}
    optimisers = Optimisers(both)
    if state:
        both.load_state_dict(state["weights"])
        average = state["average"]
        optimisers.load_state_dict(state["optimisers"])
    shared = DistributedDataParallel(both)
    g = torch.Generator().manual_seed(step * processes + rank)
    began = saved = time.time()
    first, recent = step, 0.0
    while (progress := seconds_of_first(began) / (60 * args.minutes)) < 1:
        loss = shared(*data.batch(g), g)
        shared.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        warm = min(1.0, (step - first + 1) / 200)
        optimisers.step(args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))))
        step += 1
        decay = min(AVERAGE, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in both.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        recent = 0.98 * recent + 0.02 * loss.item() if recent else loss.item()
        if rank == 0 and step % 100 == 0:
            print(f"step {step} loss {recent:.4f} {time.time() - began:.0f} s", flush=True)
        if rank == 0 and time.time() - saved > 300:
            save(args, demo, both, average, optimisers, vae, step)
            saved = time.time()
    if rank == 0:
        save(args, demo, both, average, optimisers, vae, step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
