"""The self-attention patch among everything else that people put on a model."""

import copy

import comfy.context_windows
import comfy.hooks
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from models import clip_latents, prompt, tiny_controlnet, tiny_model

FRAMES = 4
DEFAULTS = {
    "num_bases": 8, "em_iterations": 2, "seed": 0, "start_percent": 0.0, "end_percent": 1.0, "temperature": 0.1,
    "blocks": "all",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return tiny_model()


def patch(pack, model, **changes):
    return pack.nodes.patch.STEMPatchModel.execute(model=model, **{**DEFAULTS, **changes}).result[0]


def sample(model, positive=None, negative=None, cfg=1.0, frames=FRAMES, steps=2, **options):
    latents = clip_latents(frames)["samples"]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompt(1), negative or prompt(2))
    guider.set_cfg(cfg)
    sigmas = model.get_model_object("model_sampling").sigmas[[900, 500, 100][: steps + 1]]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latents, euler, sigmas, disable_pbar=True, seed=0, **options)


def call(pack, q, k, v, **options):
    """One direct call of the patch with bases estimated at block input_1 (8 heads)."""
    attention = pack.nodes.bridge.self_attention
    choice = attention.EstimatedBases(pack.stem.basis.BasisSettings(8, 2, 0.1, 0, 0))
    given = {"block": ("input", 1), "block_index": 0, "n_heads": 8, "sigmas": torch.ones(len(q)), **options}
    return attention.SelfAttentionPatch(choice, {"input_1": 8}, 100.0, 0.0)(q, k, v, given)


def rows(count, tokens=6, channels=32, seed=0):
    return torch.randn(3, count, tokens, channels, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- frames and chunks


def test_conditionings_in_one_call_do_not_see_each_other(pack):
    both = rows(6)
    together = call(pack, *both, cond_or_uncond=[1, 0], uuids=["a", "b"])
    apart = [call(pack, *part, cond_or_uncond=[i]) for i, part in zip((1, 0), both.chunk(2, dim=1), strict=True)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-6)


def test_frames_in_one_call_share_their_bases(pack):
    q, k, v = rows(4)
    changed = k.clone()
    changed[3] += 1
    assert not torch.allclose(call(pack, q, k, v)[0], call(pack, q, changed, v)[0])


def test_the_order_of_windows_and_their_anchor_is_understood(pack):
    frames_of_call = pack.nodes.bridge.frames.frames_of_call
    window = comfy.context_windows.IndexListContextWindow([6, 7, 0, 1], dim=0, total_frames=8)
    q = torch.zeros(8, 4, 32)
    assert frames_of_call(q, q, {"cond_or_uncond": [1, 0], "context_window": window}) == (2, [6, 7, 0, 1])
    window.causal_anchor_index = 5
    q = torch.zeros(10, 4, 32)
    assert frames_of_call(q, q, {"cond_or_uncond": [1, 0], "context_window": window}) == (2, [5, 6, 7, 0, 1])
    animatediff = {"ad_params": {"full_length": 8, "context_length": 4, "sub_idxs": [0, 2, 4, 6]}}
    assert frames_of_call(q[:4], q[:4], animatediff) == (1, [0, 2, 4, 6])
    assert frames_of_call(q[:4], q[:4], {"ad_params": {"sub_idxs": None}}) == (1, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="rearranges the frames"):
        frames_of_call(q[:3], q[:3], animatediff)
    for ids in (None, [0, 2, 4, 6]):
        with pytest.raises(ValueError, match="AnimateDiff and core's context windows are both on"):
            frames_of_call(q[:4], q[:4], {"context_window": window, "ad_params": {"full_length": 8, "sub_idxs": ids}})


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_core_context_windows_run_and_differ_from_the_whole_clip(pack, model, cfg):
    patched = patch(pack, model)
    whole = sample(patched, cfg=cfg, frames=6)
    windowed = ContextWindowsManualNode.execute(
        patched, context_length=4, context_overlap=2, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    ).result[0]  # fmt: skip
    out = sample(windowed, cfg=cfg, frames=6)
    assert out.isfinite().all() and not torch.allclose(out, whole)


@pytest.mark.parametrize("other", ["HyperTile", "ToMe"])
def test_nodes_that_change_the_tokens_are_named_in_the_error(pack, model, other):
    if other == "HyperTile":
        [changed] = HyperTile.execute(model, tile_size=1, swap_size=1, max_depth=0, scale_depth=False)
    else:
        changed = TomePatchModel.execute(model, ratio=0.5).result[0]
    with pytest.raises(ValueError, match=r"STEMPatchModel: .*HyperTile, ToMe"):
        sample(patch(pack, changed))


# ----------------------------------------------------------------------------------------------------- composition


def test_clones_do_not_leak_into_each_other(pack, model):
    plain = sample(model)
    few, many = patch(pack, model, num_bases=2), patch(pack, model, num_bases=16)
    first, second = sample(few), sample(many)
    assert not torch.allclose(first, second) and not torch.allclose(first, plain)
    assert torch.equal(sample(model), plain) and torch.equal(sample(few), first)


def test_a_second_patch_replaces_the_first_on_its_own_blocks_only(pack, model):
    twice = patch(pack, patch(pack, model, num_bases=2), num_bases=16)
    assert torch.equal(sample(twice), sample(patch(pack, model, num_bases=16)))
    inner, outer = patch(pack, model, num_bases=2, blocks="middle"), patch(pack, model, blocks="output")
    both = patch(pack, inner, blocks="output")
    assert torch.equal(sample(both), sample(patch(pack, outer, num_bases=2, blocks="middle")))
    assert not torch.equal(sample(both), sample(inner)) and not torch.equal(sample(both), sample(outer))


@pytest.mark.parametrize("end", [0.4, 0.6])
def test_a_range_that_holds_nothing_is_refused(pack, model, end):
    with pytest.raises(ValueError, match=rf"STEMPatchModel: start_percent 0\.6 is not below end_percent {end}"):
        patch(pack, model, start_percent=0.6, end_percent=end)


def test_a_model_with_our_patch_can_be_inverted_by_another_method(pack, model):
    inputs = {
        "positive": prompt(),
        "steps": 1,
        "method": "ddim",
        "frames_per_em": 0,
        "blocks": "all",
        "temperature": 0.1,
    }
    inputs |= {"latents": clip_latents(2), "num_bases": 8, "em_iterations": 2, "seed": 0}
    node = pack.nodes.invert.STEMInvertLatents
    once, twice = (node.execute(model=m, **inputs).result[0]["samples"] for m in (model, patch(pack, model)))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("key", [("output", 4), ("output", 4, 0)])
def test_the_patch_of_another_node_is_never_dropped_silently(pack, model, key):
    taken = model.clone()
    taken.set_model_attn1_replace(lambda q, k, v, extra_options: q, *key)
    with pytest.raises(ValueError, match=r"STEMPatchModel: .*output_4 is already replaced by .*<lambda> of .*test_patch"):
        patch(pack, taken)
    around = patch(pack, taken, blocks="input, middle, output_5-11")
    placed = around.model_options["transformer_options"]["patches_replace"]["attn1"]
    assert placed[key] is taken.model_options["transformer_options"]["patches_replace"]["attn1"][key]
    assert len(placed) == 1 + 14


def test_the_percent_range_decides_when_it_acts(pack, model):
    plain, always = sample(model), sample(patch(pack, model))
    assert torch.equal(sample(patch(pack, model, start_percent=0.98)), plain)
    early = sample(patch(pack, model, end_percent=0.3))
    assert not torch.equal(early, plain) and not torch.equal(early, always)


def test_cond_and_uncond_are_the_same_whether_they_share_a_call_or_not(pack, model):
    patched = patch(pack, model)
    shared = sample(patched, cfg=5.0)
    apart = patched.clone()

    def one_by_one(executor, model, conds, *args, **kwargs):
        parts = [executor(model, [c if i == j else None for j, c in enumerate(conds)], *args, **kwargs) for i in (0, 1)]
        return [parts[0][0], parts[1][1]]

    kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    apart.add_wrapper_with_key(kind, "test", one_by_one)
    assert torch.allclose(sample(apart, cfg=5.0), shared, atol=1e-4)


def test_the_users_attention_override_is_asked(pack, model):
    seen = []

    def override(function, *args, **kwargs):
        seen.append(kwargs["transformer_options"]["block"])
        return function(*args, **kwargs)

    patched = patch(pack, model)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(patched, steps=1)
    assert len(seen) == 32, "16 self-attentions and 16 cross-attentions"


def test_freeu_pag_controlnet_and_several_prompts_run_together(pack, model):
    changed = FreeU.execute(patch(pack, model), b1=1.2, b2=1.4, s1=0.9, s2=0.2).result[0]
    changed = PerturbedAttentionGuidance.execute(changed, scale=2.0).result[0]
    control = tiny_controlnet().set_cond_hint(torch.rand(FRAMES, 3, 64, 128))
    left, right = torch.zeros(2, 1, 64, 128)
    left[..., :64], right[..., 64:] = 1, 1
    positive = prompt(1, control=control, control_apply_to_uncond=True, mask=left) + prompt(5, frames=FRAMES, mask=right)
    out = sample(changed, positive, prompt(2, tokens=154), cfg=5.0)
    assert out.isfinite().all() and not torch.allclose(out, sample(patch(pack, model), cfg=5.0))


def test_pag_still_perturbs_the_middle_block(pack, model):
    patched = patch(pack, model)
    weaker, stronger = (
        sample(PerturbedAttentionGuidance.execute(patched, scale=scale).result[0], cfg=5.0) for scale in (0.0, 8.0)
    )
    assert not torch.allclose(weaker, stronger)


def test_a_lora_changes_what_the_patch_sees(pack, model):
    changed = model.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    weight = model.model.get_parameter(key)
    changed.add_patches({key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),))})
    plain = sample(patch(pack, model))
    assert not torch.allclose(sample(patch(pack, changed)), plain)
    assert torch.equal(sample(patch(pack, model)), plain)


def test_hooks_on_one_prompt_split_the_call_and_run(pack, model):
    hook = comfy.hooks.TransformerOptionsHook(transformers_dict={"patches": {}})
    group = comfy.hooks.HookGroup()
    group.add(hook)
    patched, calls = patch(pack, model), []

    def watch(executor, *args, **kwargs):
        calls.append(args[-1]["cond_or_uncond"])
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", watch)
    out = sample(patched, prompt(1, hooks=group), cfg=5.0)
    assert calls == [[0], [1]] * 2
    assert torch.allclose(out, sample(patch(pack, model), cfg=5.0), atol=1e-4)


def test_a_second_patch_leaves_the_other_transformers_of_a_block_to_the_first(pack):
    model = tiny_model("sdxl")
    names = [block.name for block in pack.nodes.bridge.layout.read_layout(model).model.blocks]
    ours = "input_8_1"  # the second of two in its block
    first, second = {"num_bases": 2}, {"num_bases": 16, "blocks": ours}
    both = patch(pack, patch(pack, model, **first), **second)
    others = ", ".join(f"{name}_0" if f"{name}_1" in names else name for name in names if name != ours)
    apart = patch(pack, patch(pack, model, **second), **{**first, "blocks": others})
    assert torch.equal(sample(both), sample(apart))
    assert not torch.allclose(sample(both), sample(patch(pack, model, **second)))
    again = patch(pack, both, num_bases=4)
    assert all(p.earlier is None for p in again.model_options["transformer_options"]["patches_replace"]["attn1"].values())


def test_a_call_that_does_not_say_where_it_is_is_refused(pack):
    for missing in ("block", "sigmas", "n_heads"):
        with pytest.raises(ValueError, match="without its block, noise level or number of heads"):
            call(pack, *rows(4), **{missing: None})


@pytest.mark.parametrize("layout", ["sd2", "sdxl"])
def test_other_layouts_are_patched_in_all_their_blocks(pack, layout):
    model = tiny_model(layout)
    patched, called = patch(pack, model), []
    [one] = set(patched.model_options["transformer_options"]["patches_replace"]["attn1"].values())
    estimate = one.choice

    def watched(k, v, call):
        called.append(call.block)
        return estimate(k, v, call)

    object.__setattr__(one, "choice", watched)
    assert sample(patched, cfg=1.0, steps=1).isfinite().all()
    assert called == [block.name for block in pack.nodes.bridge.layout.read_layout(model).model.blocks]


def test_the_patch_holds_nothing_that_changes(pack, model):
    patched = patch(pack, model)
    placed = patched.model_options["transformer_options"]["patches_replace"]["attn1"]
    assert len({id(p) for p in placed.values()}) == 1
    [one, *_] = placed.values()
    before = copy.deepcopy((vars(one), vars(one.choice)))
    sample(patched, cfg=5.0)
    assert repr((vars(one), vars(one.choice))) == repr(before)
    with pytest.raises(AttributeError):
        one.start_sigma = 0
