"""FateZero's step from its card, slow and over the bare UNet, and the edits that the tests compare with it."""

import copy
from typing import NamedTuple

import comfy.samplers
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from models import prompt

import nodes as core

FRAMES, STEPS, CFG = 5, 10, 4.0
SOURCE, TARGET, NEGATIVE = "a red star on grass", "a blue star on sand", "a circle"
LONGER = "a blue, star on grass"  # "blue" and "," for "red"
COLUMNS = [0, 1, None, 3, 4, None, 6]  # of the target: the place in the source, by hand
DEFAULTS = {
    "source_prompt": SOURCE, "target_prompt": TARGET, "cross_until": 0.8, "self_until": 0.8, "attention": "refine",
    "reweight": "", "blend_words": "", "blend_threshold": 0.3, "blend_latents": False, "context": "mid", "min_channels": 640,
    "joint_norm": False, "blocks": "input_4-8, middle, output_0-8", "blend_timing": "official",
}  # fmt: skip
BLENDED = {"blend_words": "red star | blue star", "blend_latents": True, "blend_threshold": None}


class Places(NamedTuple):
    """Blocks of a family by core's lists: where maps are fused, which of those are 640 wide, and where words are looked at."""

    fused: set
    narrower: set
    looked_at: set


def blocks(**numbers):
    return {(f"{side}_blocks", i) for side, several in numbers.items() for i in several}


MIDDLE = {("middle_block", 0)}
SD15 = Places(
    fused=blocks(input=(4, 5, 7, 8), output=range(3, 9)) | MIDDLE,
    narrower=blocks(input=(4, 5), output=(6, 7, 8)),
    looked_at=blocks(input=(7, 8), output=(3, 4, 5)),
)
SDXL = Places(
    fused=blocks(input=(4, 5, 7, 8), output=range(6)) | MIDDLE,
    narrower=blocks(input=(4, 5), output=(3, 4, 5)),
    looked_at=blocks(input=(7, 8), output=(0, 1, 2)),
)


def invert(pack, model, clip, latents, steps=STEPS, method="ddim"):
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=latents, positive=text(clip, SOURCE), steps=steps, method=method,
        num_bases=8, em_iterations=1, seed=0, temperature=1.0, blocks="all", frames_per_em=0,
    ).result  # fmt: skip


def demo_images(pack, frames):
    demo_clip = pack.nodes.demo.STEMDemoClip
    return demo_clip.execute(seed=7, frames=frames, size=128, colour="red", shape="star", background="grass").result[0]


def encode(demo, images):
    return core.VAEEncode().encode(demo[2], images)[0]


def text(clip, words):
    """Every prompt with the same pooled vector: that of a text encoder without its projection is arbitrary."""
    [[encoded, options]] = core.CLIPTextEncode().encode(clip, words)[0]
    return [[encoded, {**options, **prompt(1)[0][1]}]]


def edit(pack, demo, trajectory, model=None, **changes):
    node = pack.nodes.fatezero.STEMFateZero
    return node.execute(model=model or demo[0], trajectory=trajectory, clip=demo[1], **{**DEFAULTS, **changes}).result


def sample(demo, model, start, sigmas, positive=TARGET, negative=NEGATIVE, cfg=CFG, noise=None, sampler="euler", **options):
    guider = comfy.samplers.CFGGuider(model)
    positive, negative = (text(demo[1], p) if isinstance(p, str) else p for p in (positive, negative))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise, sampler = torch.zeros_like(start) if noise is None else noise, comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, start, sampler, sigmas, disable_pbar=True, seed=0, **options)


# ------------------------------------------------------------------------------ the oracle: no code of the pack in it


def probabilities(q, k, heads):
    """Maps (f, h, n, m) of queries (f, n, c) and keys (f, m, c)."""
    q, k = (w.unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)


def applied(maps, v):
    v = v.unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
    return (maps @ v).transpose(1, 2).flatten(2)


class Official:
    """Two calls of the UNet with FateZero's attention: the source alone, then [uncond | cond]."""

    def __init__(self, unet, size, step, case, places=SD15, y=None):
        self.unet = copy.deepcopy(unet)
        self.step, self.case, self.size, self.places, self.y = step, {**DEFAULTS, **case}, size, places, y
        self.source, self.maps, self.target_words = True, {}, []
        for side in ("input_blocks", "middle_block", "output_blocks"):
            for name, module in getattr(self.unet, side).named_modules():
                if isinstance(module, BasicTransformerBlock):
                    block = side, 0 if side == "middle_block" else int(name.split(".")[0])
                    module.attn1.forward = self.self_attention(module.attn1, block, ("self", side, name))
                    module.attn2.forward = self.cross_attention(module.attn2, block, ("cross", side, name))
        if self.case["joint_norm"]:
            norms = [
                m
                for block in self.unet.modules()
                if isinstance(block, ResBlock)
                for m in (block.in_layers[0], block.out_layers[0])
            ]
            for norm in [*norms, self.unet.out[0]]:
                norm.forward = self.over_all_frames(norm)

    def over_all_frames(self, norm):
        def forward(x):
            out = torch.empty_like(x)
            for start in range(0, len(x), FRAMES):
                part = x[start : start + FRAMES].unflatten(1, (norm.num_groups, -1))
                mean, var = part.mean((0, 2, 3, 4), keepdim=True), part.var((0, 2, 3, 4), keepdim=True, unbiased=False)
                out[start : start + FRAMES] = ((part - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
            return out * norm.weight.to(x)[:, None, None] + norm.bias.to(x)[:, None, None]

        return forward

    def context(self, x):
        kind = self.case["context"]  # "mid": (FRAMES - 1) // 2
        rows = {
            "mid": [x[2] for _ in range(FRAMES)],
            "previous_first": [torch.cat([x[max(i - 1, 0)], x[0]]) for i in range(FRAMES)],
            "own": list(x),
        }[kind]
        return torch.stack(rows)

    def mask(self, size):
        """Of the source's words "red star": places 2 and 3."""
        return self.mask_of(self.source_words(), size)

    def source_words(self):
        return [maps[..., [2, 3]].sum(-1) for place, maps in self.maps.items() if place[0] == "looked at"]

    def mask_of(self, words, size):
        return (self.share_of_maximum(words, size) > self.case["blend_threshold"]).float()

    def share_of_maximum(self, words, size):
        mean = torch.cat(words, 1).mean(1).unflatten(-1, self.size_at(4))
        grown = torch.nn.functional.max_pool2d(mean[:, None], 3, 1, 1)
        resized = torch.nn.functional.interpolate(grown, size)[:, 0]
        return resized / resized.flatten(1).max(1).values[:, None, None]

    def dividing_threshold(self, *words):
        """In the widest gap near the middle: attention of a small model to its words differs little from place to place."""
        values = torch.stack([self.share_of_maximum(each, self.size_at(4)) for each in words]).amax(0).unique()
        values = values[len(values) // 4 : 3 * len(values) // 4 + 1]
        widest = int(values.diff().argmax())
        return float(values[widest : widest + 2].mean())

    def mask_of_latents(self):
        """Of source or target words: (f, 1, height, width)."""
        return torch.maximum(self.mask(self.size), self.mask_of(self.target_words, self.size))[:, None]

    def size_at(self, scale):
        return tuple(edge // scale for edge in self.size)

    def self_attention(self, attn, block, place):
        def forward(x, **_):
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            out = []
            for i in range(0, len(x), FRAMES):
                q_, k_, v_ = (w[i : i + FRAMES] for w in (q, k, v))
                least = self.case["min_channels"]
                wide = self.places.fused - (self.places.narrower if least == 1280 else set())
                if least == 0 or block in wide:  # in SD1.5 the fused are those with 640 channels and more
                    k_, v_ = self.context(k_), self.context(v_)
                maps = probabilities(q_, k_, attn.heads)
                if block in self.places.fused and self.source:
                    self.maps[place] = maps
                elif block in self.places.fused and i and self.step < int(STEPS * self.case["self_until"]):
                    if self.case["blend_words"]:
                        tokens = x.shape[1]
                        scale = next(s for s in (1, 2, 4, 8) if self.size[0] // s * self.size[1] // s == tokens)
                        m = self.mask(self.size_at(scale)).flatten(1)[:, None, :, None]
                        maps = m * maps + (1 - m) * self.maps[place]
                    else:
                        maps = self.maps[place]
                out.append(applied(maps, v_))
            return attn.to_out(torch.cat(out))

        return forward

    def cross_attention(self, attn, block, place):
        def forward(x, context=None, value=None, **_):
            q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
            out = []
            for i in range(0, len(x), FRAMES):
                maps = probabilities(*(w[i : i + FRAMES] for w in (q, k)), attn.heads)
                if self.source and block in self.places.looked_at:
                    self.maps[("looked at", *place)] = maps
                if block in self.places.fused and self.source:
                    self.maps[place] = maps
                elif block in self.places.fused and i:
                    if block in self.places.looked_at:
                        self.target_words.append(maps[..., [2, 3]].sum(-1))
                    if self.step < int((STEPS + 1) * self.case["cross_until"]):
                        maps = self.fused(maps, self.maps[place])
                out.append(applied(maps, v[i : i + FRAMES]))
            return attn.to_out(torch.cat(out))

        return forward

    def fused(self, a, b):
        out = b.clone()
        if self.case["attention"] == "refine":
            for column, place in enumerate(COLUMNS):
                out[..., column] = a[..., column] if place is None else b[..., place]
        elif self.case["target_prompt"] == LONGER:  # "red" becomes two tokens
            out[..., 2] = out[..., 3] = b[..., 2] / 2
        if self.case["reweight"]:  # "blue: 10"
            out[..., 2] = out[..., 2] * 10
        return out

    def run(self, z, below, level, texts):
        source, negative, target = texts
        self.call(below, level, [source])
        self.source = False
        if self.case["blend_threshold"] is None:
            self.case["blend_threshold"] = self.dividing_threshold(self.source_words())
        return self.call(torch.cat([z, z]), level, [negative, target]).chunk(2)

    def call(self, z, level, texts):
        context = torch.cat([w.expand(FRAMES, -1, -1) for w in texts])
        extra = {} if self.y is None else {"y": self.y.expand(len(z), -1)}
        return self.unet(z, torch.full((len(z),), float(level)), context=context, transformer_options={}, **extra)


def card_step(unet, clip, trajectory, x, step, case, cfg=CFG, earlier_words=(), **family):
    """Latents x (f, c, height, width) one step on, as the sampler has them, and what was run."""
    levels = trajectory.sigmas.flip(0)
    high, low = levels[step], levels[step + 1]
    z = {s: trajectory.latents[STEPS - i] / (1 + levels[i] ** 2) ** 0.5 for i, s in ((step, "high"), (step + 1, "low"))}
    if case.get("blend_latents") and case["blend_threshold"] is None:  # one that divides the words of both prompts
        official = card_step(unet, clip, trajectory, x, step, {**case, "blend_threshold": 0.3}, **family)[1]
        case = {**case, "blend_threshold": official.dividing_threshold(official.source_words(), official.target_words)}
    official = Official(unet, x.shape[-2:], step, case, **family)
    texts = [text(clip, words)[0][0] for words in (SOURCE, NEGATIVE, official.case["target_prompt"])]
    uncond, cond = official.run(x / (1 + high**2) ** 0.5, z["low"], 901 - 100 * step, texts)
    said = uncond + cfg * (cond - uncond)
    if trajectory.model.prediction == "v":
        denoised = x / (1 + high**2) - said * high / (1 + high**2) ** 0.5
    else:
        denoised = x - high * said
    after = x + (low - high) * (x - denoised) / high
    official.target_words = [*earlier_words, *official.target_words]
    if official.case["blend_latents"] and 2 < step + 1 < 8:
        mask = official.mask_of_latents()
        kept = z["low" if official.case["blend_timing"] == "matched" else "high"]
        after = (kept + mask * (after / (1 + low**2) ** 0.5 - kept)) * (1 + low**2) ** 0.5
    return after, official


def near(trajectory, step):
    """Latents that an edit might have come to at a step."""
    source = trajectory.latents[STEPS - step]
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1))
    return source + 0.1 * trajectory.sigmas[STEPS - step] * noise


def step_of(demo, model, trajectory, x, step, steps, target=TARGET):
    """So many steps of a model, from x, as `card_step` gives one."""
    scale = demo[0].model.latent_format.scale_factor
    return sample(demo, model, x / scale, trajectory.sigmas.flip(0)[step : step + steps + 1], target) * scale
