"""FateZero: an edit that keeps the attention of the source."""

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..stem.fatezero import LENGTH, Alignment, align_refine, align_replace, reweighted
from .bridge.fatezero import FateZeroSettings
from .bridge.fatezero_passes import patch_fatezero
from .bridge.layout import choose_blocks, read_layout
from .bridge.mask_preview import preview_mask
from .bridge.naming import naming, shown
from .bridge.prompts import Prompt, places, read_prompt, same_conditioning
from .settings import CATEGORY, blocks_input, check_numbers, named
from .types import StemTrajectory

FUSED = "input_4-8, middle, output_0-8"  # output 0 to 2 have attention in SDXL alone
PIXELS = 8  # of an edge of one latent


class STEMFateZero(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="STEMFateZero",
            display_name="STEM FateZero",
            category=CATEGORY,
            description="Edits an inverted clip by prompt and keeps the attention of the source: its layout, motion and all "
            "that the words do not change. Put it on the model of the sampler.",
            search_aliases=[
                "fatezero",
                "prompt to prompt",
                "p2p",
                "attention fusion",
                "attention control",
                "video editing",
                "edit video",
                "video to video",
                "vid2vid",
                "word swap",
                "style",
                "attribute",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the clip was inverted with (SD1.x, SD2.x, SDXL)."),
                StemTrajectory.Input("trajectory", tooltip="From STEM Invert Latents, by any of its methods."),
                io.Clip.Input("clip", tooltip="The CLIP that encodes both prompts."),
                io.String.Input(
                    "source_prompt",
                    multiline=True,
                    default="",
                    tooltip="The prompt that the clip was inverted with, word for word.",
                ),
                io.String.Input(
                    "target_prompt",
                    multiline=True,
                    default="",
                    tooltip="The prompt that the sampler gets, word for word. Change as few words of source_prompt as you can.",
                ),
                _share("cross_until", "cross-attention (where each word acts) is the source's. More keeps more of the layout"),
                _share("self_until", "self-attention (what belongs together) is the source's. More keeps more of the shapes"),
                io.Combo.Input(
                    "attention",
                    options=["refine", "replace"],
                    default="refine",
                    tooltip="refine: words that both prompts have take the source's map. replace: every word takes the map of "
                    "the word in its place; both prompts need as many words.",
                ),
                io.String.Input(
                    "reweight",
                    default="",
                    tooltip='Words of the target prompt that are to act more or less, such as "watercolor: 10". Several with '
                    "commas.",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    tooltip='What is edited, in words of the source and of the target prompt: "silver jeep | porsche car". '
                    "Outside of it the source's self-attention is kept. Empty: the whole picture.",
                ),
                io.Float.Input(
                    "blend_threshold",
                    default=0.3,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How much of the greatest attention to blend_words a place needs to be edited. Lower edits more.",
                ),
                io.Boolean.Input(
                    "blend_latents",
                    default=False,
                    tooltip="Puts the source's latents back outside of blend_words, in the middle steps. For euler and ddim.",
                ),
                io.Combo.Input(
                    "context",
                    options=["mid", "previous_first", "own"],
                    default="mid",
                    advanced=True,
                    tooltip="Which frames each frame attends to: the middle one, the one before and the first, or its own.",
                ),
                io.Int.Input(
                    "min_channels",
                    default=640,
                    min=0,
                    max=1280,
                    advanced=True,
                    tooltip="Blocks with fewer channels attend to their own frame. Counted as in SD1.5: 320, 640 and 1280. "
                    "The official settings mostly have 640 with mid, and 0 with previous_first.",
                ),
                io.Boolean.Input(
                    "joint_norm",
                    default=False,
                    advanced=True,
                    tooltip="Normalises the convolutions over all frames together, as FateZero's own model does.",
                ),
                blocks_input(
                    FUSED,
                    "Blocks whose self- and cross-attention take over the source's: names separated by commas, such as "
                    '"middle, output_3-8", or "all".',
                ),
                io.Combo.Input(
                    "blend_timing",
                    options=["official", "matched"],
                    default="official",
                    advanced=True,
                    tooltip="Which latents of the source blend_latents puts back. official: those of the noise level that is "
                    "being left. matched: those of the level that is entered.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A copy of the model that edits along the trajectory."),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="What blend_words find in every frame of the source, at the middle noise level. Needs blend_words.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, trajectory, clip, source_prompt, target_prompt, cross_until, self_until, attention, reweight, blend_words,
        blend_threshold, blend_latents, context, min_channels, joint_norm, blocks, blend_timing,
    ) -> io.NodeOutput:  # fmt: skip
        with named(cls):
            check_numbers(cross_until=cross_until, self_until=self_until, blend_threshold=blend_threshold)
            layout = read_layout(model)
            fused = choose_blocks(layout, blocks)
            source = read_prompt(clip, source_prompt, "source_prompt")
            target = read_prompt(clip, target_prompt, "target_prompt")
            _check_source(source, trajectory.conditioning)
            of_source, of_target = _blend_words(blend_words, source, target, blend_latents)
            alignment = _weighted(_aligned(attention, source, target), reweight, target)
            settings = FateZeroSettings(
                fused=fused, cross_until=cross_until, self_until=self_until, alignment=alignment, source_words=of_source,
                target_words=of_target, threshold=blend_threshold, blend_latents=blend_latents, blend_timing=blend_timing,
                context=context, min_channels=min_channels, joint_norm=joint_norm, target=target.conditioning,
            )  # fmt: skip
            patched = patch_fatezero(model, layout, trajectory, settings)
            if not of_source:
                return io.NodeOutput(
                    patched, ExecutionBlocker("STEMFateZero: mask needs blend_words. Write some, or unplug it.")
                )
            mask = preview_mask(model, layout, trajectory, settings)
        return io.NodeOutput(patched, mask.repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2))


def _share(name: str, what: str) -> io.Float.Input:
    tooltip = f"Part of the inversion's steps, from the noisiest, in which {what}."
    return io.Float.Input(name, default=0.8, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _check_source(source: Prompt, conditioning: list) -> None:
    if len(conditioning) != 1:
        raise ValueError(
            f"the clip was inverted with {len(conditioning)} prompts, and words are aligned with one. Invert it with "
            "source_prompt alone."
        )
    if not same_conditioning(conditioning[0][0], source.conditioning):
        raise ValueError(
            f"source_prompt {shown(source.text)} is not what the clip was inverted with. Give the same words, encoded by the "
            "same CLIP."
        )


def _aligned(attention: str, source: Prompt, target: Prompt) -> Alignment:
    if attention == "refine":
        return align_refine(source.tokens, target.tokens)
    for prompt, name in ((source, "source_prompt"), (target, "target_prompt")):
        if prompt.glued:
            raise ValueError(f"the words of {name} cannot be told apart. Choose the attention refine, or write plain words.")
    pairs = zip(source.words, target.words, strict=False)
    replaced = [a.text != b.text for a, b in pairs]
    return align_replace([w.tokens for w in source.words], [w.tokens for w in target.words], replaced)


def _weighted(alignment: Alignment, reweight: str, target: Prompt) -> Alignment:
    weights = torch.ones(LENGTH)
    for part in filter(str.strip, reweight.replace("\n", ",").split(",")):
        word, colon, number = part.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            colon = ""
        if not colon or not word.strip() or not torch.tensor(value).isfinite():
            raise ValueError(
                f'reweight has {shown(part)}; write a word of the target prompt and a number, as in "watercolor: 10".'
            )
        with naming("reweight"):
            weights[places(target, word, "target_prompt")] = value
    return reweighted(alignment, weights)


def _blend_words(blend_words: str, source: Prompt, target: Prompt, both: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    of_source, _, of_target = (part.strip() for part in blend_words.partition("|"))
    if not of_source and (of_target or both):
        raise ValueError('blend_words has no word of the source prompt. Write "silver jeep | porsche car".')
    if both and not of_target:
        raise ValueError(
            'blend_latents needs words of the target prompt too. Write blend_words as "silver jeep | porsche car".'
        )
    with naming("blend_words"):
        return tuple(places(source, of_source, "source_prompt")), tuple(places(target, of_target, "target_prompt"))


NODES = [STEMFateZero]
