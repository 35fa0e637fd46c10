"""How time and memory of an inversion grow with the length of the clip: bases of all frames, and a fixed basis in batches."""

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stem.scenes import caption, random_scene, render
from tools.bench import report
from tools.bench.clips import SIZE, Demo, environment, load_demo
from tools.bench.cost import Cost

LENGTHS, QUICK_LENGTHS = (8, 16, 32, 64, 128, 256), (8, 16, 32)
STEPS, QUICK_STEPS = 4, 1
ROUNDS, QUICK_ROUNDS = 3, 1
SCENE = 0
BATCH = KEYFRAMES = 16
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0, "blocks": "all"}
MEASURES = {
    "seconds_per_frame": "of the inversion over all its levels; median of the rounds",
    "peak_mb": "growth of the process's resident memory (10^6 bytes) in that, its results included",
    "trajectory_mb": "of the trajectory in that (10^6 bytes)",
}
COLUMNS = {
    "seconds_per_frame": ("seconds a frame", ".3f"),
    "peak_mb": ("peak MB", ".0f"),
    "trajectory_mb": ("of it trajectory", ".1f"),
}


def run(path: Path, quick: bool) -> None:
    """Measures the rounds that the file does not hold yet, and prints the table."""
    lengths, rounds = (QUICK_LENGTHS, QUICK_ROUNDS) if quick else (LENGTHS, ROUNDS)
    demo = load_demo()
    settings = {
        "steps": QUICK_STEPS if quick else STEPS,
        "lengths": list(lengths),
        "size": SIZE,
        "frames_per_batch": BATCH,
        "keyframes": KEYFRAMES,
        **BASES,
        **environment(demo),
        "measures": MEASURES,
    }
    results = report.load(path, settings)
    found = results.setdefault("rounds", {})
    todo = [
        (number, frames, method)
        for number in range(rounds)
        for frames in lengths
        for method in METHODS
        if len(found.get(f"{method}, {frames}", [])) <= number
    ]
    if todo:
        scene = random_scene(SCENE, max(lengths), SIZE, SIZE)
        samples, positive = demo.encode(render(scene).images)["samples"], demo.text(caption(scene))
        for method in METHODS:  # what a first call takes longer is not counted
            measure(demo, method, samples[: min(lengths)], positive, 1)
    for number, frames, method in todo:
        measures = measure(demo, method, samples[:frames], positive, settings["steps"])
        found.setdefault(f"{method}, {frames}", []).append(measures)
        results["cases"] = cases(found)
        report.save(path, results)
        print(f"round {number + 1}, {frames} frames, {method} done", file=sys.stderr, flush=True)
    rows = {f"{case['method']}, {case['frames']} frames": case for case in results["cases"]}
    print(report.table(rows, COLUMNS, "inversion"))


def cases(rounds: dict[str, list[report.Measures]]) -> list[dict[str, Any]]:
    """The medians of the rounds."""
    found = []
    for name, rows in rounds.items():
        method, frames = name.split(", ")
        measures = {key: median(row[key] for row in rows) for key in MEASURES}
        found.append({"method": method, "frames": int(frames), **measures})
    return found


def measure(demo: Demo, method: str, samples: torch.Tensor, positive: list, steps: int) -> report.Measures:
    """One inversion of a clip of latents (f, c, height, width); what it needs from before is made before."""
    work = METHODS[method](demo, samples, positive, steps)
    with Cost() as cost:
        trajectory = work()
    megabytes = trajectory.latents.nbytes / 1e6
    return {"seconds_per_frame": cost.seconds / len(samples), "peak_mb": cost.peak_mb, "trajectory_mb": megabytes}


def whole_clip(demo: Demo, samples: torch.Tensor, positive: list, steps: int) -> partial:
    return partial(invert, demo, samples, positive, steps)


def fixed_basis(demo: Demo, samples: torch.Tensor, positive: list, steps: int) -> partial:
    """The basis of keyframes over the whole clip is made before; with it the frames are inverted in batches."""
    basis = demo.pack.nodes.basis.STEMBasisEstimate.execute(
        model=demo.model, latents={"samples": samples}, positive=positive, steps=steps, keyframes=KEYFRAMES, **BASES
    ).result[0]
    return partial(invert, demo, samples, positive, steps, basis=basis, frames_per_batch=BATCH)


def invert(demo: Demo, samples: torch.Tensor, positive: list, steps: int, **how: Any) -> Any:
    """The trajectory."""
    return demo.pack.nodes.invert.STEMInvertLatents.execute(
        model=demo.model, latents={"samples": samples}, positive=positive, steps=steps, method="stem", frames_per_em=0,
        **BASES, **how,
    ).result[2]  # fmt: skip


METHODS = {"whole_clip": whole_clip, "fixed_basis": fixed_basis}
