"""Makes the pictures of the help pages from real runs of the nodes.

    python -m tools.help_pictures [--only STEMInvertLatents ...]

Each picture shows clips beside each other, moving, in web/docs/<NodeId>.webp; nodes that save share that of the node that
loads. The graphs are those of tests/graphs with what is to be seen added, run with the demo model on a real server.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from tools import places, processes
from tools.demo import FPS, PATIENCE, load_graph, run
from tools.help import FOLDER
from tools.pictures import save_animation, side_by_side
from tools.server import Graph, GraphError, Server, ServerError

PROMPTS = ("a red star on grass", "a blue circle on sand", "a yellow square on water")
STEPS = 20  # of inversion and sampling; the whole lot takes minutes on a CPU
SEEDS = 6  # pictures of each prompt
LONG = 3  # of a long clip every third frame is shown


class Picture(NamedTuple):
    graph: Callable[[Server], Graph]
    clips: dict[str, str]  # caption -> node id of a PreviewImage; a single one without a caption is shown as it is
    fps: float = FPS
    every: int = 1  # frames that are shown
    quality: int = 80  # of the file; noise takes much room


def shown(graph: Graph, **sources: list) -> Graph:
    """The graph with a preview of each of these outputs, by the node's id."""
    return graph | {name: {"class_type": "PreviewImage", "inputs": {"images": source}} for name, source in sources.items()}


def demo_model(_: Server) -> Graph:
    graph = {
        "demo": {"class_type": "STEMDemoModel", "inputs": {}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": SEEDS}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ""}},
    }
    for prompt in PROMPTS:
        graph[f"text {prompt}"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": prompt}}
        graph[f"sample {prompt}"] = {
            "class_type": "KSampler",
            "inputs": {
                "model": ["demo", 0], "positive": [f"text {prompt}", 0], "negative": ["negative", 0],
                "latent_image": ["empty", 0], "seed": 0, "steps": 30, "cfg": 3.0, "sampler_name": "euler",
                "scheduler": "ddim_uniform", "denoise": 1.0,
            },
        }  # fmt: skip
        graph |= decoded(prompt, [f"sample {prompt}", 0])
    return graph


def decoded(name: str, latents: list) -> Graph:
    """Nodes that show latents, the preview under this name."""
    decode = {"class_type": "VAEDecode", "inputs": {"samples": latents, "vae": ["demo", 2]}}
    return shown({f"decode {name}": decode}, **{name: [f"decode {name}", 0]})


def demo_clip(_: Server) -> Graph:
    chosen = {"seed": 33, "frames": 16, "size": 128, "colour": "red", "shape": "star", "background": "grass"}
    graph = {
        "clip": {"class_type": "STEMDemoClip", "inputs": chosen},
        "other": {"class_type": "STEMDemoClip", "inputs": chosen | {"background": "sand"}},
        "white": {"class_type": "MaskToImage", "inputs": {"mask": ["clip", 1]}},
    }
    return shown(graph, images=["clip", 0], mask=["white", 0], changed=["other", 0])


def inverted(_: Server) -> Graph:
    graph = load_graph("reconstruct", STEPS)
    return graph | decoded("noise", ["invert", 0])


def patched(_: Server) -> Graph:
    graph = load_graph("reconstruct", STEPS)
    graph["plain sample"] = with_inputs(graph["sample"], model=["demo", 0])
    return graph | decoded("plain", ["plain sample", 0])


def with_inputs(node: dict, **inputs: object) -> dict:
    return {**node, "inputs": node["inputs"] | inputs}


def of_tests(name: str) -> Callable[[Server], Graph]:
    return lambda _: load_graph(name, STEPS)


def based(_: Server) -> Graph:
    graph = load_graph("reconstruct", STEPS)
    preview = {
        "model": ["demo", 0], "basis": ["invert", 3], "trajectory": ["invert", 2], "images": ["clip", 0],
        "block": "output_11", "noise_level": 0.2, "opacity": 0.8, "head": 0,
    }  # fmt: skip
    graph["look"] = {"class_type": "STEMBasisPreview", "inputs": preview}
    return shown(graph, bases=["look", 0])


def reported(_: Server) -> Graph:
    graph = load_graph("reconstruct", STEPS)
    inputs = {"trajectory": ["invert", 2], "source": ["clip", 0], "reconstruction": ["decode", 0]}
    graph["report"] = {"class_type": "STEMInversionReport", "inputs": inputs}
    return shown(graph, plot=["report", 0])


def compared(_: Server) -> Graph:
    graph = load_graph("tokenflow", STEPS)
    graph["way back"] = with_inputs(graph["sample"], model=["demo", 0], positive=["positive", 0], cfg=1.0)
    graph |= decoded("back", ["way back", 0])
    inputs = {
        "images_1": ["clip", 0], "images_2": ["decode back", 0], "images_3": ["decode", 0],
        "label_1": "source", "label_2": "sampled back", "label_3": "a blue star", "label_4": "", "columns": 0,
    }  # fmt: skip
    graph["compare"] = {"class_type": "STEMCompareVideos", "inputs": inputs}
    return shown(graph, beside=["compare", 0])


def saved(server: Server, node: str, **links: list) -> str:
    """Name of the file that this node saves of an inversion of the demo clip, as the node that loads lists it."""
    graph = load_graph("reconstruct", STEPS)
    kept = {name: graph[name] for name in ("demo", "clip", "encode", "positive", "invert")}
    kept["save"] = {"class_type": node, "inputs": {**links, "filename_prefix": "stem/help"}}
    return server.run(kept, timeout=PATIENCE)["outputs"]["save"]["text"][0].partition("\n")[0]


def loaded_inversion(server: Server) -> Graph:
    file = saved(server, "STEMSaveInversion", latents=["invert", 0], trajectory=["invert", 2])
    graph = load_graph("tokenflow", STEPS)
    graph["invert"] = {"class_type": "STEMLoadInversion", "inputs": {"file": file}}
    graph["other edited"] = with_inputs(graph["edited"], text="a red star on sand")
    graph["other sample"] = with_inputs(graph["sample"], positive=["other edited", 0])
    return graph | decoded("other", ["other sample", 0])


def loaded_basis(server: Server) -> Graph:
    file = saved(server, "STEMSaveBasis", basis=["invert", 3])
    graph = load_graph("reconstruct", STEPS)
    graph["basis"] = {"class_type": "STEMLoadBasis", "inputs": {"file": file}}
    graph["invert"] = with_inputs(graph["invert"], basis=["basis", 0])
    return graph


def to_pictures(clip: Tensor) -> list[Image.Image]:
    """Frames as they are."""
    return [Image.fromarray((frame * 255).round().byte().numpy()) for frame in clip]


PICTURES = {
    "STEMDemoModel": Picture(demo_model, {prompt: prompt for prompt in PROMPTS}, fps=1),
    "STEMDemoClip": Picture(demo_clip, {"images": "images", "mask": "mask", "background sand": "changed"}),
    "STEMBasisEstimate": Picture(
        of_tests("long_clip"), {"source, 48 frames": "source", "sampled back": "reconstruction"}, every=LONG
    ),
    "STEMInvertLatents": Picture(
        inverted, {"source": "source", "its noise": "noise", "sampled back": "reconstruction"}, quality=40
    ),
    "STEMPatchModel": Picture(patched, {"source": "source", "without this node": "plain", "with this node": "reconstruction"}),
    "STEMTokenFlow": Picture(of_tests("tokenflow"), {"source": "source", "a blue star on grass": "edit"}),
    "STEMFateZero": Picture(of_tests("fatezero"), {"source": "source", "a blue star on grass": "edit"}),
    "STEMDemoControlNet": Picture(
        of_tests("controlnet"), {"source": "source", "its edges": "edges", "a blue star on sand": "edit"}
    ),
    "STEMLoadInversion": Picture(
        loaded_inversion, {"source": "source", "a blue star on grass": "edit", "a red star on sand": "other"}
    ),
    "STEMLoadBasis": Picture(loaded_basis, {"source": "source", "sampled back": "reconstruction"}),
    "STEMBasisPreview": Picture(based, {"source": "source", "its bases": "bases"}),
    "STEMInversionReport": Picture(reported, {"": "plot"}),
    "STEMCompareVideos": Picture(compared, {"": "beside"}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="nodes to make pictures of")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, processes.interrupted)  # so that the server is ended too
    try:
        with Server() as server:
            for name in options.only:
                picture = PICTURES[name]
                clips, _ = run(server, picture.graph(server), name, sys.stderr)
                chosen = {caption: clips[node][:: picture.every] for caption, node in picture.clips.items()}
                frames = to_pictures(chosen[""]) if "" in chosen else side_by_side(chosen)
                save_animation(FOLDER / f"{name}.webp", frames, picture.fps, picture.quality)
    except (places.SetupError, ServerError, GraphError, OSError) as error:
        print(f"No more pictures were made. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
