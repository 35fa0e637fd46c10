"""The main job end to end, through the nodes of the pack on a real server.

    python -m tools.demo [--output output/demo] [--steps 50] [--animation FILE]

A generated scene is inverted, sampled back, and edited into another colour, which is judged against its known
truth; a stretch of a real clip is inverted and sampled back. The graphs are those of tests/graphs. Each clip
leaves a video with its versions side by side and a contact sheet; the figures go to metrics.json. `--animation` writes
the scene's video as an animated picture too, as the README shows it.
"""

import argparse
import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO
from urllib.parse import urlencode

from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from stem.metrics import estimate_flow, flicker, psnr, ssim
from stem.reader import read_clip, true_reading
from stem.scenes import Scene, edit_scene, random_scene, render
from tools import places, processes
from tools.pictures import contact_sheet, save_animation, save_video, side_by_side
from tools.server import Graph, GraphError, Progress, Server, ServerError

GRAPHS = places.ROOT / "tests" / "graphs"
REAL_CLIP = "bikes.mp4"
EDIT_COLOUR = "blue"  # what the prompt of the edit asks for
IN_VIDEO = ("source", "reconstruction", "edit")
FPS = 8  # slow enough to see every frame
PATIENCE = 3600  # seconds for one graph, on the slowest machine
BAR, CLEAR = 24, "\r\033[K"


class Result(NamedTuple):
    """What the demo has to show of one clip, by what it is: "source", "reconstruction", "edit" ..."""

    clips: dict[str, Tensor]  # (f, height, width, 3)
    metrics: dict[str, dict]


# ---------------------------------------------------------------------------------------------- the two clips


def generated_scene(server: Server, steps: int, out: TextIO) -> Result:
    """A generated scene, its reconstruction, and its edit beside the truth."""
    reconstruct, edit = load_graph("reconstruct", steps), load_graph("edit", steps)
    scene = scene_of(edit["clip"])
    wanted = edit_scene(scene, colour=EDIT_COLOUR)
    drawn, truth = render(scene), render(wanted).images
    clips, seconds = run(server, reconstruct, "scene: invert, reconstruct", out)
    edited, edit_seconds = run(server, edit, "scene: edit", out)  # the inversion is in the server's cache
    clips |= edited
    metrics = compare(clips, {"edit": truth}, drawn.flow, drawn.visible)
    metrics["reconstruction"]["seconds"] = seconds
    metrics["edit"] |= {
        "seconds": edit_seconds,
        "psnr_outside_mask": psnr(clips["edit"], clips["source"], 1 - drawn.mask),
        "shows": read_clip(clips["edit"])._asdict(),
        "should_show": true_reading(wanted)._asdict(),
    }
    return Result({**clips, "truth of the edit": truth}, metrics)


def real_clip(server: Server, steps: int, out: TextIO) -> Result:
    """A stretch of a real clip and its reconstruction."""
    provide_real_clip(server)
    clips, seconds = run(server, load_graph("real_clip", steps), f"{REAL_CLIP}: invert, reconstruct", out)
    metrics = compare(clips, {}, *estimate_flow(clips["source"]))
    metrics["reconstruction"]["seconds"] = seconds
    return Result(clips, metrics)


def scene_of(node: dict) -> Scene:
    """The scene that a STEMDemoClip node shows."""
    size = node["inputs"]["size"]
    chosen = {name: value for name, value in node["inputs"].items() if name != "size"}
    return random_scene(height=size, width=size, **chosen)


def compare(clips: dict[str, Tensor], truths: dict[str, Tensor], flow: Tensor, visible: Tensor) -> dict:
    """Flicker of every clip along the motion; PSNR and SSIM to its truth, which for most is the source."""
    metrics = {}
    for name, clip in clips.items():
        metrics[name] = {"flicker": flicker(clip, flow, visible)}
        truth = truths.get(name, clips["source"])
        if clip is not truth:
            metrics[name] |= {"psnr": psnr(clip, truth), "ssim": ssim(clip, truth)}
    return metrics


# --------------------------------------------------------------------------------------------------- graphs


def load_graph(name: str, steps: int | None = None) -> Graph:
    """A graph of tests/graphs, with another number of steps where one is given."""
    graph = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if steps is not None and "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return graph


def provide_real_clip(server: Server) -> None:
    """Puts the real clip where LoadVideo finds it."""
    shutil.copy(server.where.clips / REAL_CLIP, server.input_directory / REAL_CLIP)


def run(server: Server, graph: Graph, title: str, out: TextIO) -> tuple[dict[str, Tensor], float]:
    """Runs a graph with a progress bar; returns the clips that it previews, and the seconds that it took."""
    start = time.monotonic()
    entry = server.run(graph, progress_bar(title, out), timeout=PATIENCE)
    seconds = time.monotonic() - start
    print(f"{CLEAR if out.isatty() else ''}{title}: done in {seconds:.0f} s", file=out, flush=True)
    return previews(server, entry), seconds


def previews(server: Server, entry: dict) -> dict[str, Tensor]:
    """What the PreviewImage nodes of a graph that has run show, (f, height, width, 3) in 0..1, by node id."""
    clips = {}
    for node_id, output in entry["outputs"].items():
        files = [file for file in output.get("images", []) if file["type"] == "temp"]
        if files:
            frames = [Image.open(io.BytesIO(server.get(f"/view?{urlencode(file)}"))) for file in files]
            clips[node_id] = rearrange([pil_to_tensor(frame) for frame in frames], "f c y x -> f y x c") / 255
    return clips


def progress_bar(title: str, out: TextIO) -> Callable[[Progress], None]:
    """Shows how far a graph's nodes are: in place on a terminal, elsewhere by a line for each slow node."""
    begun = set()

    def show(step: Progress) -> None:
        if out.isatty():
            bar = "#" * round(BAR * step.value / step.maximum)
            state = f"[{bar:<{BAR}}] {step.value:.0f}/{step.maximum:.0f} {step.class_type}"
            print(f"{CLEAR}{title} {state}", end="", file=out, flush=True)
        elif step.maximum > 1 and step.node_id not in begun:
            begun.add(step.node_id)
            print(f"{title}: {step.class_type}, {step.maximum:.0f} steps", file=out, flush=True)

    return show


# -------------------------------------------------------------------------------------------------- results


def save(results: dict[str, Result], folder: Path, animation: Path | None = None) -> None:
    """Writes every clip's video and contact sheet, and the figures of all; the scene's video as an animated picture too."""
    for name, result in results.items():
        pictures = side_by_side({label: result.clips[label] for label in IN_VIDEO if label in result.clips})
        save_video(folder / f"{name}.mp4", pictures, FPS)
        if name == "scene" and animation is not None:
            save_animation(animation, pictures, FPS)
        contact_sheet(result.clips).save(folder / f"{name}.png")
    figures = {name: result.metrics for name, result in results.items()}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def table(results: dict[str, Result]) -> str:
    """The figures as text."""
    lines = [f"{'':<28}{'PSNR':>8}{'SSIM':>8}{'flicker':>9}{'seconds':>9}"]
    for name, result in results.items():
        for label, figures in result.metrics.items():
            cells = [f"{name}, {label}".ljust(28)]
            for key, form in (("psnr", "8.2f"), ("ssim", "8.3f"), ("flicker", "9.4f"), ("seconds", "9.0f")):
                cells.append(format(figures[key], form) if key in figures else " " * int(form[0]))
            lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def summary(edit: dict) -> str:
    """What the table does not tell of an edit."""
    shows, should_show = (" ".join(map(str, edit[reading].values())) for reading in ("shows", "should_show"))
    outside = f"PSNR to the source outside the shape {edit['psnr_outside_mask']:.2f}"
    return f"The edit shows: {shows} (should show: {should_show}); {outside}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=50, help="steps of inversion and sampling")
    parser.add_argument("--animation", type=Path, help="file for the scene as an animated picture")
    options = parser.parse_args(arguments)
    out = sys.stderr
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        print("Starting ComfyUI ...", file=out, flush=True)
        with Server() as server:
            results = {
                "scene": generated_scene(server, options.steps, out),
                "bikes": real_clip(server, options.steps, out),
            }
        save(results, options.output, options.animation)
    except (places.SetupError, ServerError, GraphError, OSError) as error:
        print(f"\nThe demo stopped. {error}", file=out)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was interrupted.", file=out)
        return 130
    print(table(results), summary(results["scene"].metrics["edit"]), sep="\n")
    print(f"Look at the pictures in {options.output.absolute()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
