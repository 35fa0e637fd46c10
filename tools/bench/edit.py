"""Which inversion and which editor make the better edit, on clips whose true edit is known.

A generated clip is inverted in several ways and edited by prompt in several; what comes out is compared with the same scene
rendered with one thing changed. `plain` samples with the target prompt from the inverted noise, with the model as
it is; `pnp_per_frame` and `tokenflow` are modes of STEMTokenFlow; `fatezero` is STEMFateZero, `fatezero_stem` the same with
STEM attention in the blocks that it does not fuse.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem.metrics import flicker, psnr, ssim
from stem.reader import Reading, read_clip, true_reading
from stem.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, caption, edit_scene, random_scene, render
from tools.bench import report
from tools.bench.clips import FRAMES, SIZE, Demo, environment, load_demo
from tools.bench.cost import Cost
from tools.pictures import contact_sheet

FIRST_SEED = 500_000  # of the scenes; those that were trained on begin at training_data.TRAINING_SEEDS
CHANGES = ("colour", "shape", "background")  # in turn
PAIRS, QUICK_PAIRS = 24, 3
SHOWN = 0  # the pair on the contact sheet
STEPS, QUICK_STEPS = 20, 10
CFG = 7.5
EDITORS = ("plain", "pnp_per_frame", "tokenflow", "fatezero")
RUNS = {  # inversion -> editors
    **dict.fromkeys(("ddim", "first_previous", "all_frames"), EDITORS),
    "middle_frame": ("fatezero",),  # FateZero's own inversion, with the attention of its editor
    "stem": (*EDITORS, "fatezero_stem"),
}
RIVALS = ("ddim", "middle_frame")  # inversions that the others are compared with, pair by pair
NEGATIVE = ""
BASES = {"num_bases": 256, "em_iterations": 5, "temperature": 0.01, "seed": 0, "frames_per_em": 0, "blocks": "all"}
TOKENFLOW = {
    "keyframe_every": 8, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all", "blend": "official",
    "keyframes": "random",
}  # fmt: skip
FATEZERO = {  # cross_until and self_until: those of the official attribute edits
    "cross_until": 0.5, "self_until": 0.5, "attention": "refine", "reweight": "", "blend_words": "", "blend_threshold": 0.3,
    "blend_latents": False, "context": "mid", "min_channels": 640, "joint_norm": False,
    "blocks": "input_4-8, middle, output_0-8", "blend_timing": "official",
}  # fmt: skip
REST = "input_1-2, output_9-11"  # the blocks that FateZero leaves
MEASURES = {
    "success": "share of the clips in which the reader sees the change that was asked for",
    "kept": "share of the clips in which it sees the other two things unchanged",
    "psnr": "dB, against the true edited clip",
    "ssim": "against the true edited clip",
    "psnr_outside": "dB, against the source where nothing was to change",
    "flicker": "mean absolute change along the known motion",
    "seconds": "of sampling the edit, the inversion not counted",
    "peak_mb": "growth of the process's resident memory (10^6 bytes) in that",
}
COUNTS = {
    **{f"success_{change}": f"success among the pairs that change the {change}" for change in CHANGES},
    **{
        f"psnr_over_{other}": f"number of pairs whose psnr is higher than after {other} with the same editor"
        for other in RIVALS
    },
    **{f"flicker_under_{other}": f"number of pairs whose flicker is lower than after {other}, likewise" for other in RIVALS},
}
COLUMNS = {
    "success": ("edit seen", ".0%"),
    **{f"success_{change}": (change, ".0%") for change in CHANGES},
    "kept": ("rest kept", ".0%"),
    "psnr": ("PSNR (dB)", ".2f"),
    **{f"psnr_over_{other}": (f"better than {other}", "d") for other in RIVALS},
    "ssim": ("SSIM", ".3f"),
    "psnr_outside": ("outside (dB)", ".2f"),
    "flicker": ("flicker", ".4f"),
    **{f"flicker_under_{other}": (f"steadier than {other}", "d") for other in RIVALS},
    "seconds": ("seconds", ".1f"),
    "peak_mb": ("peak MB", ".0f"),
}


rendered = lru_cache(maxsize=2)(render)  # the two clips of a pair are looked at after every edit


class Pair(NamedTuple):
    """A scene, and the same scene with one thing changed."""

    change: str
    source: Scene
    target: Scene


def pair(number: int) -> Pair:
    change = CHANGES[number % len(CHANGES)]
    source = random_scene(FIRST_SEED + number, FRAMES, SIZE, SIZE, figures=1)
    names = list({"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}[change])
    now = source.background if change == "background" else getattr(source.figures[0], change)
    other = names[(names.index(now) + 1 + number // len(CHANGES) % (len(names) - 1)) % len(names)]
    return Pair(change, source, edit_scene(source, **{change: other}))


def run(path: Path, quick: bool) -> None:
    """Measures what the file does not hold yet, saves after every edit, and prints the table."""
    demo = load_demo()
    settings = {
        "steps": QUICK_STEPS if quick else STEPS, "cfg": CFG, "frames": FRAMES, "size": SIZE, **BASES, "tokenflow": TOKENFLOW,
        "fatezero": FATEZERO, "fatezero_stem": {"blocks of STEM": REST}, "runs": {i: list(e) for i, e in RUNS.items()},
        **environment(demo), "measures": MEASURES,
    }  # fmt: skip
    results = report.load(path, settings)
    found = results.setdefault("edits", {})
    for number in range(QUICK_PAIRS if quick else PAIRS):
        name = f"pair {number}"
        done = found.setdefault(name, {})
        for reference, made in REFERENCES.items():
            if reference not in done:
                done[reference] = compare(pair(number), made(demo, pair(number)))
        for method, editors in RUNS.items():
            missing = [editor for editor in editors if f"{method}, {editor}" not in done]
            if missing:
                for editor, _, measures in edit(demo, pair(number), method, missing, settings["steps"]):
                    done[f"{method}, {editor}"] = measures
                    summarise(results)
                    report.save(path, results)
        print(f"{name} done", file=sys.stderr, flush=True)
    if not (picture := path.with_suffix(".jpg")).exists():
        contact_sheet(shown(demo, settings["steps"])).save(picture, quality=90)
    edited = {f"{method}, {e}": row for method, rows in results["results"].items() for e, row in rows.items()}
    print(report.table({**results["references"], **edited}, COLUMNS, "inversion, editor"))


REFERENCES = {  # what the measures say of clips that no editor made
    "truth, through the VAE": lambda demo, asked: demo.decode(demo.encode(rendered(asked.target).images)),
    "source, through the VAE": lambda demo, asked: demo.decode(demo.encode(rendered(asked.source).images)),
}


def complete(edits: report.Clips) -> report.Clips:
    """The pairs on which everything was measured, so that all averages are over the same."""
    wanted = {*REFERENCES, *(f"{method}, {editor}" for method, editors in RUNS.items() for editor in editors)}
    return {name: done for name, done in edits.items() if wanted <= done.keys()}


def summarise(results: dict[str, Any]) -> None:
    """Puts the averages and counts into a report, once the first pair is done."""
    edits = complete(results["edits"])
    rows = report.mean(edits)
    results["pairs"], results["counts"] = len(edits), COUNTS
    results["references"] = {name: rows[name] for name in REFERENCES if name in rows}
    results["results"] = {
        method: {e: {**rows[f"{method}, {e}"], **count(edits, method, e)} for e in editors}
        for method, editors in RUNS.items()
        if edits
    }


def count(edits: report.Clips, method: str, editor: str) -> report.Measures:
    """What averages do not show: each kind of change by itself, and pair by pair whether another inversion is worse."""
    rows = {int(name.split()[1]): done[f"{method}, {editor}"] for name, done in edits.items()}
    seen = {change: [row["success"] for n, row in rows.items() if pair(n).change == change] for change in CHANGES}
    counts = {f"success_{change}": fmean(each) for change, each in seen.items() if each}
    for other in RIVALS:
        if editor in RUNS[other] and method != other:
            both = [(row, done[f"{other}, {editor}"]) for row, done in zip(rows.values(), edits.values(), strict=True)]
            counts[f"psnr_over_{other}"] = sum(row["psnr"] > theirs["psnr"] for row, theirs in both)
            counts[f"flicker_under_{other}"] = sum(row["flicker"] < theirs["flicker"] for row, theirs in both)
    return counts


def edit(
    demo: Demo, asked: Pair, method: str, editors: Sequence[str], steps: int
) -> Iterator[tuple[str, Tensor, report.Measures]]:
    """Inverts the source once and edits it with each of the editors; yields its name, the clip and the measures."""
    positive, negative = demo.text(caption(asked.target)), demo.text(NEGATIVE)
    noise, sigmas, trajectory = invert(demo, asked.source, method, steps)
    for editor in editors:
        model = editing_model(demo, asked, trajectory, editor)
        with Cost() as cost:
            latents = demo.sample(model, noise, sigmas, positive, negative, CFG)
        images = demo.decode(latents)
        yield editor, images, {**compare(asked, images), "seconds": cost.seconds, "peak_mb": cost.peak_mb}


def invert(demo: Demo, source: Scene, method: str, steps: int) -> tuple[dict, Tensor, Any]:
    """LATENT, SIGMAS and trajectory of a scene."""
    latents, positive = demo.encode(rendered(source).images), demo.text(caption(source))
    if method != "middle_frame":
        return demo.pack.nodes.invert.STEMInvertLatents.execute(
            model=demo.model, latents=latents, positive=positive, steps=steps, method=method, **BASES
        ).result[:3]
    bridge = demo.pack.nodes.bridge
    layout = bridge.layout.read_layout(demo.model)
    blocks = bridge.layout.choose_blocks(layout, FATEZERO["blocks"])  # of SD1.5 those with min_channels and more

    def middle_frame(k: Tensor, v: Tensor, _call: Any) -> Iterator[Any]:
        middle = [(len(k) - 1) // 2]
        yield bridge.self_attention.Context(len(k), k[middle], v[middle])

    run = bridge.inversion.invert(demo.model, layout, blocks, middle_frame, latents["samples"], positive, steps, method, None)
    return {"samples": run.latents}, run.trajectory.sigmas.flip(0), run.trajectory


def shown(demo: Demo, steps: int) -> dict[str, Tensor]:
    """One pair for the contact sheet: the source, the true edit, and what the editors make of two inversions."""
    asked = pair(SHOWN)
    clips = {"source": rendered(asked.source).images, "true edit": rendered(asked.target).images}
    for method in ("ddim", "stem"):
        clips |= {f"{method}, {editor}": images for editor, images, _ in edit(demo, asked, method, RUNS[method], steps)}
    return clips


def compare(asked: Pair, images: Tensor) -> report.Measures:
    """A clip (f, height, width, 3) beside the true edit."""
    source, truth = rendered(asked.source), rendered(asked.target)
    changed = {
        "colour": source.mask,
        "shape": torch.maximum(source.mask, truth.mask),
        "background": 1 - source.mask,
    }[asked.change]
    seen, wanted = read_clip(images), true_reading(asked.target)
    others = [field for field in Reading._fields if field != asked.change]
    return {
        "success": float(getattr(seen, asked.change) == getattr(wanted, asked.change)),
        "kept": float(all(getattr(seen, field) == getattr(wanted, field) for field in others)),
        "psnr": psnr(images, truth.images),
        "ssim": ssim(images, truth.images),
        "psnr_outside": psnr(images, source.images, (changed == 0).float()),
        "flicker": flicker(images, truth.flow, truth.visible),
    }


def editing_model(demo: Demo, asked: Pair, trajectory: Any, editor: str) -> Any:
    """The model with an editor on it."""
    nodes, model = demo.pack.nodes, demo.model
    if editor == "plain":
        return model
    if editor in ("pnp_per_frame", "tokenflow"):
        mode = "pnp" if editor == "tokenflow" else editor
        return nodes.tokenflow.STEMTokenFlow.execute(model=model, trajectory=trajectory, mode=mode, **TOKENFLOW).result[0]
    if editor == "fatezero_stem":
        model = nodes.patch.STEMPatchModel.execute(
            model=model, start_percent=0.0, end_percent=1.0, blocks=REST,
            **{name: BASES[name] for name in ("num_bases", "em_iterations", "temperature", "seed")},
        ).result[0]  # fmt: skip
    prompts = {"source_prompt": caption(asked.source), "target_prompt": caption(asked.target)}
    return nodes.fatezero.STEMFateZero.execute(
        model=model, trajectory=trajectory, clip=demo.clip, **prompts, **FATEZERO
    ).result[0]
