"""What the bases of STEM inversion are like: how many live, how sharply tokens choose them, how much they keep, and how the
reconstruction changes with their number, the temperature and the rounds of EM.

Keys and values are caught in a STEM inversion of the whole clip, EM is run over them from the same random bases, and the
responsibilities of its last step are looked at. Figures are means over the heads and over the blocks of one resolution.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from stem.attention import pool_tokens
from stem.basis import BasisSettings
from stem.ddim import noise_levels
from stem.em import EPSILON, estimate_basis, initial_bases
from tools.bench import report
from tools.bench.clips import GENERATED, Demo, environment, load_clip, load_demo
from tools.bench.inversion import BASES, Inversion, measure

CLIPS = (GENERATED[0], "bikes.mp4")
STEPS = 10  # few, for there are many inversions to compare with one another
DEAD = 1e-3  # tokens: a basis with less of them in all is dead
COLUMNS = {
    "tokens": ("tokens", ".0f"),
    "dead": ("dead bases", ".1f"),
    "certainty": ("mean max responsibility", ".3f"),
    "entropy": ("entropy (nats)", ".3f"),
    "key_norm": ("norm of keys", ".2f"),
    "sharpness": ("norm / temperature", ".0f"),
    "lost_keys": ("keys lost", ".1%"),
    "lost_values": ("values lost", ".1%"),
}
VARIATIONS = {  # of the nodes' defaults
    "as the paper": {},
    "64 bases": {"num_bases": 64},
    "1024 bases": {"num_bases": 1024},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 1": {"temperature": 1.0},
    "20 iterations": {"em_iterations": 20},
}
WITH_BASES = Inversion("stem", 0, ("stem", "stem_fixed"))
WITHOUT = Inversion("ddim", 0, ("ddim",))
VARIATION_COLUMNS = {
    "ddim": ("PSNR (dB), no bases", ".2f"),
    "stem": ("PSNR (dB), estimated anew", ".2f"),
    "stem_fixed": ("PSNR (dB), recorded bases", ".2f"),
}
MEASURES = {
    "tokens": "of all frames together, for 256 bases",
    "dead": f"bases that share less than {DEAD} tokens",
    "certainty": "responsibility of a token's first choice",
    "entropy": "of a token's responsibilities",
    "key_norm": "mean norm of the keys",
    "sharpness": "mean norm of the keys over the temperature: what multiplies the cosine in the softmax over bases",
    "lost_keys": "share of the keys' variance that is lost when each token is replaced by its bases",
    "lost_values": "the same of the values",
}


class CaughtTokens:
    """A choice of context that is STEM's, and keeps the keys and values it is called with at some noise levels."""

    def __init__(self, choice: Any, sigmas: Tensor):
        self.choice, self.sigmas = choice, sigmas
        self.found: dict[tuple[int, str], tuple[int, int, Tensor, Tensor]] = {}  # level, block -> tokens a frame, seed, k, v

    def __call__(self, k: Tensor, v: Tensor, call: Any) -> Iterator:
        for level, sigma in enumerate(self.sigmas.tolist()):
            if abs(sigma - call.sigma) < 1e-4 * sigma:
                pooled = (pool_tokens(x, call.heads).clone() for x in (k, v))
                self.found[level, call.block] = (k.shape[1], self.choice.seed(call, 0), *pooled)
        yield from self.choice(k, v, call)


def run(path: Path, quick: bool) -> None:
    """Looks at the bases of the clips that the file does not hold yet, and prints the table."""
    demo = load_demo()
    settings = {
        "steps": STEPS,
        **BASES,
        **environment(demo),
        "measures": MEASURES,
    }
    results = report.load(path, settings)
    clips = results.setdefault("clips", {})
    for name in CLIPS[:1] if quick else CLIPS:
        if name not in clips:
            clips[name] = by_resolution(catch(demo, name, STEPS))
            report.save(path, results)
        varied = results.setdefault("variations", {}).setdefault(name, {})
        inversions = {"plain DDIM": (WITHOUT, {})} | {title: (WITH_BASES, change) for title, change in VARIATIONS.items()}
        for title, (inversion, change) in inversions.items():
            if title not in varied:
                varied[title] = reconstruct(demo, name, inversion, change)
                report.save(path, results)
    rows = {f"{name}, {row}": found for name, group in clips.items() for row, found in group.items()}
    print(report.table(rows, COLUMNS, "clip, noise level, tokens a frame"))
    print("\n" + report.table(report.mean(results["variations"]), VARIATION_COLUMNS, "bases"))


def reconstruct(demo: Demo, name: str, inversion: Inversion, change: dict[str, Any]) -> report.Measures:
    """PSNR of a clip that is inverted with other bases and sampled back."""
    source = load_clip(name)
    latents, positive = demo.encode(source.images), demo.text(source.prompt)
    kept = demo.decode(latents)
    found = measure(demo, inversion, source, kept, latents, positive, STEPS, {**BASES, **change})
    return {way: measures["psnr"] for way, measures in found.items()}


def catch(demo: Demo, name: str, steps: int) -> CaughtTokens:
    """Inverts a clip and keeps the tokens of the first, the middle and the last noise level."""
    bridge = demo.pack.nodes.bridge
    source = load_clip(name)
    layout = bridge.layout.read_layout(demo.model)
    levels = noise_levels(demo.model.get_model_object("model_sampling").sigmas, steps)[1:]
    settings = BasisSettings(BASES["num_bases"], BASES["em_iterations"], BASES["temperature"], BASES["seed"], frames_per_em=0)
    choice = CaughtTokens(bridge.self_attention.EstimatedBases(settings), levels[[0, steps // 2, steps - 1]])
    bridge.inversion.invert(
        demo.model,
        layout,
        bridge.layout.choose_blocks(layout, "all"),
        choice,
        demo.encode(source.images)["samples"],
        demo.text(source.prompt),
        steps,
        "stem",
        settings,
    )
    return choice


def by_resolution(caught: CaughtTokens) -> dict[str, report.Measures]:
    """Means over the blocks of every noise level and resolution."""
    blocks: report.Clips = {}
    for (level, block), (tokens, seed, keys, values) in caught.found.items():
        row = f"sigma {float(caught.sigmas[level]):.2f}, {tokens}"
        blocks.setdefault(block, {})[row] = look(keys.float(), values.float(), seed)
    return report.mean(blocks)


def look(keys: Tensor, values: Tensor, seed: int) -> report.Measures:
    """The bases of one block's tokens (h, n, d), and the last responsibilities z that made them."""
    count, iterations, temperature = (BASES[name] for name in ("num_bases", "em_iterations", "temperature"))
    mu = initial_bases(keys, count, seed)
    mu, _ = estimate_basis(keys, values, count, iterations - 1, temperature, initial=mu)
    z = torch.softmax(keys @ (mu / (mu.norm(dim=-1, keepdim=True) + EPSILON)).mT / temperature, dim=-1)
    mass = reduce(z, "h n m -> h m", "sum")
    norm = keys.norm(dim=-1).mean()
    return {
        "tokens": keys.shape[1],
        "dead": (mass < DEAD).sum(-1).double().mean().item(),
        "certainty": z.amax(-1).mean().item(),
        "entropy": torch.special.entr(z).sum(-1).mean().item(),
        "key_norm": norm.item(),
        "sharpness": norm.item() / temperature,
        "lost_keys": lost(keys, z, mass),
        "lost_values": lost(values, z, mass),
    }


def lost(x: Tensor, z: Tensor, mass: Tensor) -> float:
    """Share of the variance of tokens (h, n, d) that is lost in z @ means, the means weighed by z (h, n, m)."""
    means = z.mT @ x / (mass[..., None] + EPSILON)
    return ((z @ means - x).square().sum() / (x - x.mean(1, keepdim=True)).square().sum()).item()
