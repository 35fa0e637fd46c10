"""Whether the outline follows the source with the demo model's ControlNet.

Generated clips are inverted and given another colour or background by prompt, with the model as it is (`plain`) and with
STEM attention on the inversion's basis (`stem`), each without and with the ControlNet on the edges that core's Canny finds.
Of the same edges and prompts pictures are sampled from noise too (`noise`), and without any prompt: there nothing but the
edges tells where the shape is. What is drawn is found by `stem.reader` and laid over the shape of the source.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stem.metrics import iou
from stem.reader import main_figures, read_images, true_reading
from stem.scenes import caption
from tools.bench import report
from tools.bench.clips import FRAMES, SIZE, Demo, environment, load_demo
from tools.bench.edit import CHANGES, NEGATIVE, Pair, compare, pair, rendered
from tools.pictures import contact_sheet

CLIPS, QUICK_CLIPS = 6, 1
STEPS, QUICK_STEPS = 20, 10
CFG = 5.0
EVERY = 4  # of the frames, whose edges are sampled from noise
STRENGTH = 1.0
THRESHOLDS = {"low_threshold": 0.2, "high_threshold": 0.4}  # core finds no edges of a shape as bright as its ground at 0.4, 0.8
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0, "blocks": "all"}
WITH = ", ControlNet"
EDITS = ("plain", f"plain{WITH}", "stem", f"stem{WITH}")
SAMPLES = ("noise", f"noise{WITH}", f"noise, no prompt{WITH}")
MEASURES = {
    "iou": "intersection over union of the shape that is seen and that of the source, mean over the frames",
    "success": "share of the clips (from noise: of the pictures) in which the reader sees what was asked for",
    "kept": "share of the clips in which it sees the other two things unchanged",
    "psnr": "dB, against the true edited clip",
    "flicker": "mean absolute change along the known motion",
}
COLUMNS = {
    "iou": ("IoU", ".2f"),
    "success": ("edit seen", ".0%"),
    "kept": ("rest kept", ".0%"),
    "psnr": ("PSNR (dB)", ".2f"),
    "flicker": ("flicker", ".4f"),
}


def pairs(count: int) -> list[Pair]:
    """Those of the benchmark of edits whose outline stays."""
    numbers = (number for number in range(len(CHANGES) * count) if pair(number).change != "shape")
    return [pair(number) for number, _ in zip(numbers, range(count), strict=False)]


def run(path: Path, quick: bool) -> None:
    """Measures what the file does not hold yet, saves after every clip, and prints the table."""
    demo = load_demo()
    weights = demo.pack.nodes.bridge.demo_model.CONTROLNET.read_bytes()
    settings = {
        "steps": QUICK_STEPS if quick else STEPS, "cfg": CFG, "strength": STRENGTH, "frames": FRAMES, "size": SIZE,
        **THRESHOLDS, **BASES, **environment(demo), "controlnet": hashlib.sha256(weights).hexdigest(), "measures": MEASURES,
    }  # fmt: skip
    results = report.load(path, settings)
    found = results.setdefault("clips", {})
    for number, asked in enumerate(pairs(QUICK_CLIPS if quick else CLIPS)):
        done = found.setdefault(f"pair {number}", {})
        if set(done) != {*EDITS, *SAMPLES}:
            clips = dict(edits(demo, asked, EDITS, settings["steps"]))
            drawn = dict(samples(demo, asked, SAMPLES, number, settings["steps"]))
            if number == 0:
                contact_sheet({"source": rendered(asked.source).images, **clips}).save(path.with_suffix(".jpg"), quality=90)
            done |= {name: measure_edit(asked, images) for name, images in clips.items()}
            done |= {name: measure_samples(asked, images) for name, images in drawn.items()}
            results["results"] = report.mean(found)
            report.save(path, results)
        print(f"pair {number} done", file=sys.stderr, flush=True)
    print(report.table(results["results"], COLUMNS, "start, editor"))


def edits(demo: Demo, asked: Pair, names: Sequence[str], steps: int) -> Iterator[tuple[str, Tensor]]:
    """Inverts the source once, without the ControlNet, and edits it in the ways that are named."""
    nodes, source = demo.pack.nodes, rendered(asked.source).images
    noise, sigmas, _, basis = nodes.invert.STEMInvertLatents.execute(
        model=demo.model, latents=demo.encode(source), positive=demo.text(caption(asked.source)), steps=steps, method="stem",
        frames_per_em=0, **BASES,
    ).result  # fmt: skip
    patch = {**BASES, "start_percent": 0.0, "end_percent": 1.0}
    patched = nodes.patch.STEMPatchModel.execute(model=demo.model, basis=basis, **patch).result[0]
    prompts = (demo.text(caption(asked.target)), demo.text(NEGATIVE))
    for name in names:
        positive, negative = controlled(demo, *prompts, edges_of(source)) if name.endswith(WITH) else prompts
        model = patched if name.startswith("stem") else demo.model
        yield name, demo.decode(demo.sample(model, noise, sigmas, positive, negative, CFG))


def samples(demo: Demo, asked: Pair, names: Sequence[str], seed: int, steps: int) -> Iterator[tuple[str, Tensor]]:
    """Pictures from noise: of the prompt alone, and of the source's edges with and without it."""
    edges = edges_of(rendered(asked.source).images[::EVERY])
    (empty,) = demo.core.EmptyLatentImage().generate(SIZE, SIZE, len(edges))
    for name in names:
        words = "" if "no prompt" in name else caption(asked.target)
        prompts = demo.text(words), demo.text(NEGATIVE)
        positive, negative = controlled(demo, *prompts, edges) if name.endswith(WITH) else prompts
        (latents,) = demo.core.KSampler().sample(demo.model, seed, steps, CFG, "ddim", "simple", positive, negative, empty)
        yield name, demo.decode(latents)


def edges_of(images: Tensor) -> Tensor:
    """What core's Canny node finds."""
    from comfy_extras.nodes_canny import Canny

    return Canny.execute(images, **THRESHOLDS).result[0]


def controlled(demo: Demo, positive: list, negative: list, edges: Tensor) -> tuple[list, list]:
    """Both prompts with the ControlNet, as core's Apply ControlNet node gives them."""
    (net,) = demo.pack.nodes.demo.STEMDemoControlNet.execute().result
    return demo.core.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, edges, STRENGTH, 0.0, 1.0)


def measure_edit(asked: Pair, images: Tensor) -> dict[str, Any]:
    """An edited clip beside the true edit, and its shape beside the source's."""
    found = compare(asked, images)
    overlap = float(iou(main_figures(images), rendered(asked.source).mask).mean())
    return {"iou": overlap, **{name: found[name] for name in ("success", "kept", "psnr", "flicker")}}


def measure_samples(asked: Pair, images: Tensor) -> dict[str, float]:
    """The shapes in pictures of single frames beside the source's, and whether all that the prompt says is seen."""
    overlap = iou(main_figures(images), rendered(asked.source).mask[::EVERY])
    right = torch.tensor([reading == true_reading(asked.target) for reading in read_images(images)])
    return {"iou": float(overlap.mean()), "success": float(right.float().mean())}
