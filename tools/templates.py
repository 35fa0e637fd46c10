"""Writes the workflow templates of the pack, with thumbnails of what they make.

    python -m tools.templates [--only NAME] [--pictures]

A template is a graph of tests/graphs as it lies on the canvas: nodes in groups from left to right, and a note. With
--pictures the graphs are run, and a row of frames of every clip that they preview becomes the thumbnail. The subgraph
blueprint of tools/blueprint.py is written along with them.
"""

import argparse
from typing import NamedTuple

from tools import blueprint, places
from tools.canvas import Registry, place, stored, workflow
from tools.demo import PATIENCE, load_graph, previews
from tools.pictures import thumbnail
from tools.server import Server

FOLDER = places.ROOT / "workflows"
TITLES = {  # of nodes, by their names in the graphs
    "positive": "Source Prompt",
    "edited": "Edit Prompt",
    "negative": "Negative Prompt (empty)",
    "source": "Source",
    "edit": "Edit",
    "autoencoder": "VAE Alone",
    "roundtrip": "VAE Decode (VAE alone)",
    "reconstruction": "Reconstruction",
    "edges": "Edges",
    "invert_ddim": "Invert by DDIM",
    "sample_ddim": "Sample from DDIM's Noise",
    "decode_ddim": "VAE Decode (DDIM)",
    "report_ddim": "Report on DDIM",
    "compared": "Side by Side",
    "plot": "Report",
    "plot_ddim": "Report (DDIM)",
    "painted": "Bases",
    "chart": "Use of the Bases",
}


class Template(NamedTuple):
    graph: str  # of tests/graphs
    groups: dict[str, list[list[str]]]  # title -> columns of node ids, from left to right
    note: str  # Markdown
    thumbnail: tuple[str, ...] = ()  # previews that are seen in the template browser; none: all
    charts: tuple[str, ...] = ()  # previews of charts, which need room


def own_video(more: str = "", cfg: str = "", edit: bool = False) -> str:
    """What to swap for a real model and clip; `more` says where else its prompt goes, `cfg` what to do with cfg."""
    return (
        "**Your own video:** put *Load Checkpoint* (SD1.5, SD2.x or SDXL) in place of *STEM Demo Model*, and *Load Video* with "
        "*Get Video Components* in place of *STEM Demo Clip*, its *fps* into *Create Video*; a large video goes through "
        f"*Upscale Image* first (SD1.5 likes 512). Write what is in it into *Source Prompt*{more}"
        f"{', what should be seen into *Edit Prompt*' if edit else ''}{cfg}."
    )


def raised(cfg: int) -> str:
    return f", and raise cfg from {cfg}, which suits the demo model, to 7.5"


CLIP_AND_MODEL = {"1. Clip and model": [["demo", "clip", "source"]]}
INVERSION = {"2. Inversion": [["encode", "positive", "invert"]]}
EDITED = [["decode", "edit"], ["video", "save"]]
RECONSTRUCTED = [["decode", "reconstruction"], ["roundtrip", "autoencoder"], ["video", "save"]]

TEMPLATES = {
    "Invert and reconstruct": Template(
        "reconstruct",
        {
            **CLIP_AND_MODEL,
            **INVERSION,
            "3. Sampling back": [["patch", "negative"], ["euler", "sample"]],
            "4. Result": RECONSTRUCTED,
        },
        "## Invert and reconstruct\n\nThe noise that the clip came from is found (**2**), and sampled with the same prompt at "
        "cfg 1 (**3**): the clip comes back. Every edit starts from such an inversion. *VAE Alone* shows what encoding and "
        "decoding lose without any inversion.\n\n"
        "The sampler adds no noise, takes its SIGMAS from the inversion, and its model reads the inversion's *basis*: what "
        "STEM inverts comes back with STEM attention only.\n\n"
        f"{own_video()}",
    ),
    "Edit by prompt": Template(
        "edit",
        {
            **CLIP_AND_MODEL,
            **INVERSION,
            "3. Edit by prompt": [["edited", "negative"], ["patch", "euler"], ["sample"]],
            "4. Result": EDITED,
        },
        "## Edit by prompt\n\nThe clip is inverted with the prompt that describes it (**2**), and sampled again with the "
        "prompt that describes the edit (**3**). This is the plainest edit: only the noise and the bases of the clip hold it "
        "together. *TokenFlow edit* and *FateZero edit* keep more of the source.\n\n"
        f"{own_video(cfg=raised(5), edit=True)}\n\n"
        "**Nothing changes?** Raise cfg. **Too much changes?** Lower it, or change fewer words of the prompt.",
    ),
    "TokenFlow edit": Template(
        "tokenflow",
        {
            **CLIP_AND_MODEL,
            **INVERSION,
            "3. Edit by prompt": [["edited", "negative"], ["tokenflow", "euler"], ["sample"]],
            "4. Result": EDITED,
        },
        "## TokenFlow edit\n\nThe clip is inverted with the prompt that describes it (**2**), and sampled again with the "
        "prompt that describes the edit (**3**). STEM TokenFlow edits a few keyframes together and lets all other frames "
        "follow the motion of the source.\n\n"
        f"{own_video(cfg=raised(3), edit=True)}\n\n"
        "**Nothing changes?** Lower *qk_until* and *conv_until*. **The shape is lost?** Raise them.",
    ),
    "Long clip with a fixed basis": Template(
        "long_clip",
        {
            **CLIP_AND_MODEL,
            "2. One basis for the clip": [["encode", "positive", "basis"]],
            "3. Inversion in batches": [["invert"]],
            "4. Sampling back": [["patch", "negative"], ["euler", "sample"]],
            "5. Result": RECONSTRUCTED,
        },
        "## Long clip with a fixed basis\n\nThe bases are estimated once, from 16 keyframes spread over the clip (**2**). "
        "Against this basis every frame is inverted on its own, *frames_per_batch* at a time (**3**), so memory does not "
        "grow with the length of the clip and there is no seam between batches. The sampler reads the same basis (**4**).\n\n"
        "For an edit, give the sampler a prompt of its own and raise cfg.\n\n"
        f"{own_video()}\n\n"
        "**Out of memory?** Lower *frames_per_batch* or *keyframes*; for the sampler add *Context Windows*.",
    ),
    "Edit with ControlNet": Template(
        "controlnet",
        {
            **CLIP_AND_MODEL,
            **INVERSION,
            "3. Edges": [["control_net", "canny", "edges"]],
            "4. Edit by prompt": [["edited", "negative"], ["apply", "patch", "euler"], ["sample"]],
            "5. Result": EDITED,
        },
        "## Edit with ControlNet\n\nThe clip is inverted with the prompt that describes it (**2**). The edges of its frames "
        "(**3**) hold the outline while it is sampled with the prompt that describes the edit (**4**), so that much may "
        "change and the shape stays.\n\n"
        f"{own_video(cfg=raised(5), edit=True)} Put *Load ControlNet Model* with a canny ControlNet of the same "
        "model family in place of *STEM Demo ControlNet*.\n\n"
        "**The shape is lost?** Raise *strength*, or lower the thresholds of *Detect Edges (Canny)* until the edges show it. "
        "**Too much of the source is left?** Lower *strength* or *end_percent*.",
        thumbnail=("source", "edges", "edit"),
    ),
    "FateZero edit": Template(
        "fatezero",
        {
            **CLIP_AND_MODEL,
            **INVERSION,
            "3. Edit by prompt": [["edited", "negative"], ["fatezero", "euler"], ["sample"]],
            "4. Result": EDITED,
        },
        "## FateZero edit\n\nThe clip is inverted with the prompt that describes it (**2**). STEM FateZero takes that "
        "prompt and the one of the edit, and keeps the source's attention for all words that did not change (**3**). The "
        "sampler needs the same target prompt. With a real checkpoint *blend_words* can keep the edit where a word is, and "
        "*mask* shows what it found.\n\n"
        f"{own_video(' and *source_prompt*', ' and *target_prompt*' + raised(3), edit=True)}\n\n"
        "**Nothing changes?** Lower *self_until* and *cross_until*; with *blend_words*, lower *blend_threshold* too. **Too "
        "much changes?** Raise them.",
    ),
    "Compare inversions": Template(
        "compare",
        {
            "1. Clip and model": [["demo", "clip"]],
            "2. Inversion by STEM and DDIM": [["encode", "positive", "negative"], ["invert", "invert_ddim"]],
            "3. Sampling back": [["patch", "euler"], ["sample", "sample_ddim"], ["decode", "decode_ddim", "roundtrip"]],
            "4. Side by side": [["compare", "compared"], ["video", "save"]],
            "5. Reports and bases": [["report", "plot"], ["report_ddim", "plot_ddim"], ["view", "painted"], ["chart"]],
        },
        "## Compare inversions\n\nThe clip is inverted twice, by STEM and by plain DDIM (**2**), and sampled back from both "
        "noises (**3**). Side by side (**4**) they look nearly alike; the reports (**5**) tell them apart: they measure "
        "against what the VAE alone gives back, so that only the inversion counts. *Bases* paints every patch in the colour "
        "of the basis that explains it.\n\n"
        "For other ways change *method* in *Invert by DDIM*. On SDXL give *STEM Basis Preview* another *block*, such as "
        "output_5.\n\n"
        f"{own_video()}",
        thumbnail=("compared",),
        charts=("plot", "plot_ddim", "chart"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TEMPLATES, help="one template (default: all)")
    parser.add_argument("--pictures", action="store_true", help="run the graphs and make the thumbnails anew")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with Server() as server:
        registry = Registry.of(server)
        blueprint.write(registry)
        for name in [args.only] if args.only else TEMPLATES:
            template, graph = TEMPLATES[name], load_graph(TEMPLATES[name].graph)
            canvas = place(graph, template.groups, TITLES, registry, template.charts)
            (FOLDER / f"{name}.json").write_text(stored(workflow(canvas, template.note)), encoding="utf-8")
            if args.pictures:
                clips = previews(server, server.run(graph, timeout=PATIENCE))
                shown = {preview: clips[preview] for preview in template.thumbnail or clips}
                columns = 4 if len(shown) > 1 else 2  # a single one has clips side by side already
                thumbnail(shown, columns).save(FOLDER / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
