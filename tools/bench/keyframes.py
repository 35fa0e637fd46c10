"""How many keyframes a fixed basis needs: long clips inverted frame by frame against it, and sampled back with it.

Beside it are the bases of the whole clip at once, recorded and read again, and each frame's own tokens.
"""

import sys
from pathlib import Path
from typing import Any

from tools.bench import report
from tools.bench.clips import SIZE, Clip, Demo, environment, load_clip, load_demo
from tools.bench.cost import Cost
from tools.bench.inversion import compare, sample

FRAMES, QUICK_FRAMES = 128, 32
CLIPS, QUICK_CLIPS = ("scene 0", "scene 1", "bikes.mp4", "bigbuckbunny.mp4"), ("scene 0",)
KEYFRAMES, QUICK_KEYFRAMES = (2, 4, 8, 16, 32, 64), (4, 16)
STEPS, QUICK_STEPS = 10, 4
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0, "blocks": "all"}
BATCH = 16
MEASURES = {
    "psnr": "dB, all frames together, against the source as the VAE alone gives it back",
    "flicker": "mean absolute change along the motion of the source, exact for scenes, estimated for real clips",
    "seconds": "of the estimate of the basis and the inversion",
    "peak_mb": "growth of the process's resident memory (10^6 bytes) in these",
}
COLUMNS = {
    "psnr": ("PSNR (dB)", ".2f"),
    "psnr_worst": ("worst clip beside the whole clip's bases (dB)", "+.2f"),
    "flicker": ("flicker", ".4f"),
    "seconds": ("seconds", ".0f"),
    "peak_mb": ("peak MB", ".0f"),
}


def run(path: Path, quick: bool) -> None:
    """Measures what the file does not hold yet, saves after every inversion, and prints the table."""
    frames, keyframes = (QUICK_FRAMES, QUICK_KEYFRAMES) if quick else (FRAMES, KEYFRAMES)
    demo = load_demo()
    settings = {
        "steps": QUICK_STEPS if quick else STEPS, "frames": frames, "size": SIZE, "frames_per_batch": BATCH,
        "keyframes": list(keyframes), **BASES,
        **environment(demo), "measures": MEASURES,
    }  # fmt: skip
    results = report.load(path, settings)
    clips = results.setdefault("clips", {})
    ways = {"own tokens (ddim)": None, **{f"{n} keyframes": n for n in keyframes}, "all frames together": 0}
    for name in QUICK_CLIPS if quick else CLIPS:
        done = clips.setdefault(name, {})
        for way in (way for way in ways if way not in done):
            done[way] = measure(demo, load_clip(name, frames), ways[way], settings["steps"])
            results["ways"] = beside_all(clips)
            report.save(path, results)
            print(f"{name}: {way} done", file=sys.stderr, flush=True)
    print(report.table(results["ways"], COLUMNS, "basis"))


def beside_all(clips: report.Clips) -> dict[str, report.Measures]:
    """Means over the clips, and the clip on which a way does worst beside the bases of the whole clip."""
    rows = report.mean(clips)
    for way, row in rows.items():
        pairs = [(done[way], done["all frames together"]) for done in clips.values() if "all frames together" in done]
        if pairs:
            row["psnr_worst"] = min(found["psnr"] - whole["psnr"] for found, whole in pairs)
    return rows


def measure(demo: Demo, source: Clip, keyframes: int | None, steps: int) -> report.Measures:
    """Inverts a clip and samples it back; keyframes None: without a basis, 0: with that of the inversion itself."""
    nodes, latents, positive = demo.pack.nodes, demo.encode(source.images), demo.text(source.prompt)
    how: dict[str, Any] = {"model": demo.model, "latents": latents, "positive": positive, "steps": steps, **BASES}
    with Cost() as cost:
        basis = nodes.basis.STEMBasisEstimate.execute(**how, keyframes=keyframes).result[0] if keyframes else None
        batch = {} if keyframes == 0 else {"frames_per_batch": BATCH}
        noise, sigmas, _, basis = nodes.invert.STEMInvertLatents.execute(
            **how, **batch, basis=basis, method="ddim" if keyframes is None else "stem", frames_per_em=0
        ).result
    choice = None if keyframes is None else nodes.bridge.self_attention.FixedBases(basis)
    images = demo.decode(sample(demo, choice, noise, sigmas, positive))
    found = compare(images, demo.decode(latents), source)
    return {"psnr": found["psnr"], "flicker": found["flicker"], "seconds": cost.seconds, "peak_mb": cost.peak_mb}
