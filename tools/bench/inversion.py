"""How well each way of inverting gives a clip back, and what it costs.

A clip is inverted by STEMInvertLatents and sampled back by core's DDIM over the SIGMAS that come out, at cfg 1, with the
same self-attention on the way back as on the way there. For `stem` there are two more ways back, so that one sees what
matters: with the bases that the inversion recorded (`stem_fixed`), and with plain self-attention (`stem_plain`).
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stem.metrics import flicker, psnr, ssim
from tools.bench import report
from tools.bench.clips import FRAMES, GENERATED, SIZE, Clip, Demo, environment, load_clip, load_demo
from tools.bench.cost import Cost
from tools.training_data import REAL_CLIPS

STEPS, QUICK_STEPS = 50, 10
QUICK_CLIPS = (*GENERATED[:2], "bikes.mp4")
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0}  # the nodes' defaults
MEASURES = {
    "psnr": "dB, all frames together, against the source as the VAE alone gives it back",
    "ssim": "against the same",
    "flicker": "mean absolute change along the motion of the source, exact for scenes, estimated for real clips",
    "psnr_source": "dB, against the source itself, with the VAE's own error",
    "ssim_source": "against the source itself",
    "seconds": "of the inversion, after one of a single step",
    "peak_mb": "growth of the process's resident memory (10^6 bytes) in the inversion, its results included",
}
COLUMNS = {
    "psnr": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "flicker": ("flicker", ".4f"),
    "psnr_source": ("PSNR to source", ".2f"),
    "seconds": ("seconds", ".1f"),
    "peak_mb": ("peak MB", ".0f"),
}


class Inversion(NamedTuple):
    """One run of STEMInvertLatents, and the ways back from it."""

    method: str
    frames_per_em: int
    ways_back: tuple[str, ...]


INVERSIONS = (
    Inversion("stem", 0, ("stem", "stem_fixed", "stem_plain")),
    Inversion("stem", 8, ("stem_8",)),
    Inversion("ddim", 0, ("ddim",)),
    Inversion("first_previous", 0, ("first_previous",)),
    Inversion("all_frames", 0, ("all_frames",)),
)


def run(path: Path, quick: bool) -> None:
    """Measures what the file does not hold yet, saves after every inversion, and prints the tables."""
    names = QUICK_CLIPS if quick else (*GENERATED, *REAL_CLIPS)
    demo = load_demo()
    settings = {
        "steps": QUICK_STEPS if quick else STEPS,
        "frames": FRAMES,
        "size": SIZE,
        **BASES,
        **environment(demo),
        "measures": MEASURES,
    }
    results = report.load(path, settings)
    clips = results.setdefault("clips", {})
    references = results.setdefault("references", {})
    for name in names:
        done = clips.setdefault(name, {})
        missing = [inversion for inversion in INVERSIONS if not set(inversion.ways_back) <= set(done)]
        if not missing:
            continue
        source = load_clip(name)
        latents, positive = demo.encode(source.images), demo.text(source.prompt)
        kept = demo.decode(latents)
        references[name] = {
            "source": {"flicker": flicker(source.images, source.flow, source.valid)},
            "vae": compare(kept, kept, source),
        }
        for inversion in missing:
            done |= measure(demo, inversion, source, kept, latents, positive, settings["steps"])
            results["methods"] = report.mean(clips)
            report.save(path, results)
            print(f"{name}: {', '.join(inversion.ways_back)} done", file=sys.stderr, flush=True)
    print_tables(results)


def measure(
    demo: Demo,
    inversion: Inversion,
    source: Clip,
    kept: Tensor,
    latents: dict,
    positive: list,
    steps: int,
    bases: dict[str, Any] = BASES,
) -> dict[str, report.Measures]:
    """Inverts a clip once and samples it back in each of the ways; their measures by name.

    Args:
        kept: the source as the VAE gives it back, (f, height, width, 3).
        latents: the source, encoded.
        positive: its prompt, encoded.
        bases: the inputs of the node that say how bases are estimated.
    """

    def invert(steps: int) -> tuple:
        return demo.pack.nodes.invert.STEMInvertLatents.execute(
            model=demo.model,
            latents=latents,
            positive=positive,
            steps=steps,
            method=inversion.method,
            frames_per_em=inversion.frames_per_em,
            frames_per_batch=len(source.images),  # all at once, whatever is free
            blocks="all",
            **bases,
        ).result

    invert(1)
    with Cost() as cost:
        noise, sigmas, trajectory, basis = invert(steps)
    measures = {}
    for name in inversion.ways_back:
        choice = attention_back(demo, name, trajectory, basis)
        images = demo.decode(sample(demo, choice, noise, sigmas, positive))
        measures[name] = {
            **compare(images, kept, source),
            "seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
        }
    return measures


def attention_back(demo: Demo, name: str, trajectory: Any, basis: Any) -> Any:
    """What the self-attention reads while the clip is sampled back; None for each frame's own tokens."""
    attention = demo.pack.nodes.bridge.self_attention
    if name == "stem_plain":
        return None
    if name == "stem_fixed":
        return attention.FixedBases(basis)
    if name in ("stem", "stem_8"):  # estimated anew, from other random bases than on the way there
        settings = trajectory.settings.basis
        return attention.EstimatedBases(settings._replace(seed=settings.seed + 1))
    return demo.pack.nodes.invert.BASELINES[name]


def sample(demo: Demo, choice: Any, noise: dict, sigmas: Tensor, positive: list) -> dict:
    """Latents that DDIM finds from the inverted noise."""
    model, bridge = demo.model, demo.pack.nodes.bridge
    if choice is not None:
        layout = bridge.layout.read_layout(model)
        blocks = bridge.layout.choose_blocks(layout, "all")
        model = bridge.self_attention.patch_self_attention(model, layout, blocks, choice)
    return demo.sample(model, noise, sigmas, positive, positive, cfg=1.0)  # the negative is not looked at with cfg 1


def compare(images: Tensor, kept: Tensor, source: Clip) -> report.Measures:
    """How near images are to the source, as the VAE alone keeps it and as it is, and how steady they are."""
    near = {} if images is kept else {"psnr": psnr(images, kept), "ssim": ssim(images, kept)}
    return {
        **near,
        "flicker": flicker(images, source.flow, source.valid),
        "psnr_source": psnr(images, source.images),
        "ssim_source": ssim(images, source.images),
    }


def print_tables(results: dict[str, Any]) -> None:
    """All clips, generated and real ones apart, and every clip alone."""
    groups = {
        "all clips": [*results["clips"]],
        "generated clips": [name for name in results["clips"] if name in GENERATED],
        "real clips": [name for name in results["clips"] if name in REAL_CLIPS],
    }
    for title, names in groups.items():
        references, methods = (report.mean({name: results[kind][name] for name in names}) for kind in ("references", "clips"))
        print(f"\n{title} ({len(names)})\n\n{report.table(references | methods, COLUMNS, 'method')}")
    alone = {
        clip: {method: f"{found['psnr']:.2f} / {1000 * found['flicker']:.2f}" for method, found in methods.items()}
        for clip, methods in results["clips"].items()
    }
    columns = {method: (method, "") for inversion in INVERSIONS for method in inversion.ways_back}
    print(f"\nPSNR (dB) / flicker x 1000 of every clip\n\n{report.table(alone, columns, 'clip')}")
