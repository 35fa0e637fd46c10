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

from torchvision.transforms.functional import to_pil_image

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
    graph: Callable[[], Graph]
    clips: dict[str, str]  # caption -> node id of a PreviewImage; a single one without a caption is shown as it is
    fps: float = FPS
    every: int = 1  # frames that are shown
    quality: int = 80  # of the file; noise takes much room
    saving: Callable[[], Graph] | None = None  # a graph that runs first, and whose node "save" writes what "load" reads


def shown(graph: Graph, **sources: list) -> Graph:
    """The graph with a preview of each of these outputs, by the node's id."""
    return graph | {name: {"class_type": "PreviewImage", "inputs": {"images": source}} for name, source in sources.items()}


def demo_model() -> Graph:
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


def demo_clip() -> Graph:
    chosen = {"seed": 33, "frames": 16, "size": 128, "colour": "red", "shape": "star", "background": "grass"}
    graph = {
        "clip": {"class_type": "STEMDemoClip", "inputs": chosen},
        "other": {"class_type": "STEMDemoClip", "inputs": chosen | {"background": "sand"}},
        "white": {"class_type": "MaskToImage", "inputs": {"mask": ["clip", 1]}},
    }
    return shown(graph, images=["clip", 0], mask=["white", 0], changed=["other", 0])


def inverted() -> Graph:
    graph = load_graph("reconstruct", STEPS)
    return graph | decoded("noise", ["invert", 0])


def patched() -> Graph:
    graph = load_graph("reconstruct", STEPS)
    graph["plain sample"] = with_inputs(graph["sample"], model=["demo", 0])
    return graph | decoded("plain", ["plain sample", 0])


def compared() -> Graph:
    graph = load_graph("compare", STEPS)
    return shown(graph, source=["clip", 0], reconstruction=["decode", 0], ddim=["decode_ddim", 0])


def saving(node: str, **links: list) -> Graph:
    """An inversion of the demo clip of which this node saves some outputs."""
    graph = load_graph("reconstruct", STEPS)
    kept = {name: graph[name] for name in ("demo", "clip", "encode", "positive", "invert")}
    return kept | {"save": {"class_type": node, "inputs": {**links, "filename_prefix": "stem/help"}}}


def edited_twice() -> Graph:
    graph = load_graph("tokenflow", STEPS)
    graph["load"] = {"class_type": "STEMLoadInversion", "inputs": {}}
    del graph["invert"]
    for node in graph.values():
        node["inputs"] |= {k: ["load", v[1]] for k, v in node["inputs"].items() if isinstance(v, list) and v[0] == "invert"}
    graph["other edited"] = with_inputs(graph["edited"], text="a red star on sand")
    graph["other sample"] = with_inputs(graph["sample"], positive=["other edited", 0])
    return graph | decoded("other", ["other sample", 0])


def based() -> Graph:
    graph = load_graph("reconstruct", STEPS)
    graph["load"] = {"class_type": "STEMLoadBasis", "inputs": {}}
    graph["invert"] = with_inputs(graph["invert"], basis=["load", 0])
    return graph


def with_inputs(node: dict, **inputs: object) -> dict:
    return {**node, "inputs": node["inputs"] | inputs}


PICTURES = {
    "STEMDemoModel": Picture(demo_model, {prompt: prompt for prompt in PROMPTS}, fps=1),
    "STEMDemoClip": Picture(demo_clip, {"images": "images", "mask": "mask", "background sand": "changed"}),
    "STEMBasisEstimate": Picture(
        lambda: load_graph("long_clip", STEPS), {"source, 48 frames": "source", "sampled back": "reconstruction"}, every=LONG
    ),
    "STEMInvertLatents": Picture(
        inverted, {"source": "source", "its noise": "noise", "sampled back": "reconstruction"}, quality=40
    ),
    "STEMPatchModel": Picture(patched, {"source": "source", "without this node": "plain", "with this node": "reconstruction"}),
    "STEMTokenFlow": Picture(lambda: load_graph("tokenflow", STEPS), {"source": "source", "a blue star on grass": "edit"}),
    "STEMFateZero": Picture(lambda: load_graph("fatezero", STEPS), {"source": "source", "a blue star on grass": "edit"}),
    "STEMDemoControlNet": Picture(
        lambda: load_graph("controlnet", STEPS), {"source": "source", "its edges": "edges", "a blue star on sand": "edit"}
    ),
    "STEMBasisPreview": Picture(compared, {"source": "source", "bases": "painted"}),
    "STEMInversionReport": Picture(compared, {"": "plot"}),
    "STEMCompareVideos": Picture(compared, {"source": "source", "stem": "reconstruction", "ddim": "ddim"}),
    "STEMLoadInversion": Picture(
        edited_twice,
        {"source": "source", "a blue star on grass": "edit", "a red star on sand": "other"},
        saving=lambda: saving("STEMSaveInversion", latents=["invert", 0], trajectory=["invert", 2]),
    ),
    "STEMLoadBasis": Picture(
        based,
        {"source": "source", "sampled back": "reconstruction"},
        saving=lambda: saving("STEMSaveBasis", basis=["invert", 3]),
    ),
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
                graph = picture.graph()
                if picture.saving:
                    told = server.run(picture.saving(), timeout=PATIENCE)["outputs"]["save"]["text"]
                    graph["load"]["inputs"]["file"] = told[0].partition("\n")[0]
                clips, _ = run(server, graph, name, sys.stderr)
                chosen = {caption: clips[node][:: picture.every] for caption, node in picture.clips.items()}
                frames = [to_pil_image(frame.movedim(-1, 0)) for frame in chosen[""]] if "" in chosen else side_by_side(chosen)
                save_animation(FOLDER / f"{name}.webp", frames, picture.fps, picture.quality)
    except (places.SetupError, ServerError, GraphError, OSError) as error:
        print(f"No more pictures were made. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
