"""What every node promises: names, tooltips, ranges, and the contract that shared workflows rely on."""

import asyncio
import inspect
import json

import pytest

from tools import places

CONTRACT = {
    "STEMDemoModel": ([], ["MODEL", "CLIP", "VAE"]),
    "STEMDemoClip": (["seed", "frames", "size", "colour", "shape", "background"], ["IMAGE", "MASK", "STRING"]),
    "STEMDemoControlNet": ([], ["CONTROL_NET"]),
    "STEMBasisEstimate": (
        [
            "model", "latents", "positive", "steps", "num_bases", "em_iterations", "keyframes", "seed", "temperature", "blocks",
            "warm_iterations",
        ],
        ["STEM_BASIS"],
    ),
    "STEMInvertLatents": (
        [
            "model", "latents", "positive", "basis", "steps", "method", "num_bases", "em_iterations", "seed", "temperature",
            "blocks", "frames_per_em", "frames_per_batch", "trajectory_dtype", "trajectory_on_disk", "warm_iterations",
            "resume",
        ],
        ["LATENT", "SIGMAS", "STEM_TRAJECTORY", "STEM_BASIS"],
    ),
    "STEMPatchModel": (
        [
            "model", "basis", "num_bases", "em_iterations", "seed", "start_percent", "end_percent", "temperature", "blocks",
        ],
        ["MODEL"],
    ),
    "STEMTokenFlow": (
        [
            "model", "trajectory", "mode", "keyframe_every", "qk_until", "conv_until", "seed", "blocks", "blend", "keyframes",
        ],
        ["MODEL"],
    ),
    "STEMFateZero": (
        [
            "model", "trajectory", "clip", "source_prompt", "target_prompt", "cross_until", "self_until", "attention",
            "reweight", "blend_words", "blend_threshold", "blend_latents", "context", "min_channels", "joint_norm", "blocks",
            "blend_timing",
        ],
        ["MODEL", "MASK"],
    ),
    "STEMBasisPreview": (
        ["model", "basis", "trajectory", "images", "block", "noise_level", "opacity", "head"], ["IMAGE", "IMAGE", "STRING"],
    ),
    "STEMInversionReport": (["trajectory", "source", "reconstruction"], ["IMAGE", "STRING"]),
    "STEMCompareVideos": (
        [
            "images_1", "images_2", "images_3", "images_4", "label_1", "label_2", "label_3", "label_4", "columns",
        ],
        ["IMAGE"],
    ),
    "STEMSaveInversion": (["latents", "trajectory", "basis", "filename_prefix"], ["STRING"]),
    "STEMLoadInversion": (["file"], ["LATENT", "SIGMAS", "STEM_TRAJECTORY", "STEM_BASIS"]),
    "STEMSaveBasis": (["basis", "filename_prefix"], ["STRING"]),
    "STEMLoadBasis": (["file"], ["STEM_BASIS"]),
}  # fmt: skip
DEFAULTS = {
    "steps": 50, "num_bases": 256, "em_iterations": 5, "keyframes": 16, "seed": 0, "temperature": 0.01, "method": "stem",
    "frames_per_em": 0, "frames_per_batch": 0, "trajectory_dtype": "float32", "trajectory_on_disk": False, "warm_iterations": 0,
    "resume": "",
    "start_percent": 0.0, "end_percent": 1.0, "frames": 16, "size": 128,
    "blocks": "all", "colour": "random", "shape": "random", "background": "random",
    "mode": "pnp", "keyframe_every": 8, "qk_until": 0.5, "conv_until": 0.8, "blend": "official",
    ("STEMTokenFlow", "keyframes"): "random",
    "source_prompt": "", "target_prompt": "", "cross_until": 0.8, "self_until": 0.8, "attention": "refine", "reweight": "",
    "blend_words": "", "blend_threshold": 0.3, "blend_latents": False, "context": "mid", "min_channels": 640,
    "joint_norm": False, ("STEMFateZero", "blocks"): "input_4-8, middle, output_0-8", "blend_timing": "official",
    "block": "output_8", "noise_level": 0.5, "opacity": 0.7, "head": 0,
    "label_1": "source", "label_2": "edit", "label_3": "", "label_4": "", "columns": 0,
    ("STEMSaveInversion", "filename_prefix"): "stem/inversion", ("STEMSaveBasis", "filename_prefix"): "stem/basis",
}  # fmt: skip
ADVANCED = {
    "temperature", "blocks", "frames_per_em", "frames_per_batch", "trajectory_dtype", "trajectory_on_disk", "warm_iterations",
    "resume",
    "blend", ("STEMTokenFlow", "keyframes"), "context", "min_channels",
    "joint_norm", "blend_timing", "head",
}  # fmt: skip

FOUND_BY = {
    "video inversion": "STEMInvertLatents", "ddim inversion": "STEMInvertLatents", "unsampler": "STEMInvertLatents",
    "invert video": "STEMInvertLatents", "long video": "STEMBasisEstimate", "temporal consistency": "STEMPatchModel",
    "tokenflow": "STEMTokenFlow", "pnp": "STEMTokenFlow", "fatezero": "STEMFateZero", "prompt to prompt": "STEMFateZero",
    "video editing": "STEMFateZero", "video to video": "STEMTokenFlow", "vid2vid": "STEMTokenFlow",
    "test video": "STEMDemoClip", "tiny model": "STEMDemoModel",
}  # fmt: skip


def nodes_of(pack):
    async def ask():
        extension = await pack.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(ask())}


def test_ids_inputs_outputs_and_defaults_are_the_contract(pack):
    found = {}
    for name, node in nodes_of(pack).items():
        schema = node.define_schema()
        found[name] = ([i.id for i in schema.inputs], [o.io_type for o in schema.outputs])
        for given in schema.inputs:
            if hasattr(given, "default"):
                assert given.default == DEFAULTS.get((name, given.id), DEFAULTS.get(given.id)), (name, given.id)
            assert bool(given.advanced) == bool(ADVANCED & {given.id, (name, given.id)}), (name, given.id)
            if given.id == "seed":
                assert given.as_dict()["control_after_generate"] is False, "no new inversion with every queue"
    assert found == CONTRACT


@pytest.mark.parametrize("name", CONTRACT)
def test_every_part_is_explained(pack, name):
    schema = nodes_of(pack)[name].define_schema()
    assert schema.description and schema.search_aliases and schema.display_name.startswith("STEM ")
    for part in [*schema.inputs, *schema.outputs]:
        assert part.tooltip and part.tooltip.endswith("."), part


@pytest.mark.parametrize("words", FOUND_BY)
def test_the_words_of_the_field_find_their_node(pack, words):
    schema = nodes_of(pack)[FOUND_BY[words]].define_schema()
    assert words in schema.search_aliases


def test_nodes_stand_together_where_videos_are_and_aliases_are_plain_words(pack):
    for name, node in nodes_of(pack).items():
        schema = node.define_schema()
        assert schema.category.split("/")[:2] == ["video", "STEM"], name
        for alias in schema.search_aliases:
            assert alias == alias.strip().lower() and alias != schema.display_name.lower(), (name, alias)
        assert len(set(schema.search_aliases)) == len(schema.search_aliases), name


@pytest.mark.parametrize("name", CONTRACT)
def test_execute_takes_the_inputs_of_the_schema(pack, name):
    node = nodes_of(pack)[name]
    inputs = {i.id: i for i in node.define_schema().inputs}
    parameters = inspect.signature(node.execute).parameters
    assert set(parameters) == set(inputs)
    assert {n for n, p in parameters.items() if p.default is not p.empty} == {n for n, i in inputs.items() if i.optional}


def test_sockets_come_first_and_advanced_widgets_last(pack):
    for node in nodes_of(pack).values():
        inputs = node.define_schema().inputs
        rank = [0 if not hasattr(i, "default") else 2 if i.advanced else 1 for i in inputs]
        assert rank == sorted(rank)


def test_the_list_for_comfyui_manager_is_that_of_the_nodes(pack):
    """Of ids and descriptions, as ComfyUI-Manager reads it where it finds no NODE_CLASS_MAPPINGS."""
    listed = json.loads((places.ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {name: node.define_schema().description for name, node in nodes_of(pack).items()}
