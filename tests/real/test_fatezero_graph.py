"""STEM FateZero in the graph: memory, other nodes, samplers, and what it refuses."""

import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from fatezero_card import BLENDED, CFG, FRAMES, NEGATIVE, STEPS, TARGET, card_step, edit, near, sample, step_of, text
from models import tiny_controlnet, tiny_model

import nodes as core


def stem_attention(pack, model, blocks):
    return pack.nodes.patch.STEMPatchModel.execute(
        model=model, num_bases=16, em_iterations=1, seed=0, start_percent=0.0, end_percent=1.0, temperature=1.0, blocks=blocks
    ).result[0]


def test_nothing_of_the_source_is_computed_in_steps_without_fusion(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    edited, seen = edit(pack, demo, trajectory, cross_until=0.2, self_until=0.3)[0], []

    def count(n, extra_options):
        if extra_options["block"] == ("middle", 0):
            seen.append(len(n))
        return n

    edited.set_model_attn2_output_patch(count)
    sample(demo, edited, noise["samples"], sigmas[:6])
    assert seen == [FRAMES, 2 * FRAMES] * 3 + [2 * FRAMES] * 2


def watched_sources(pack, monkeypatch):
    """What sources' passes left, as it is made; every one has to be gone when the next comes."""
    passes, alive = pack.nodes.bridge.fatezero_passes, []
    made = passes.Source

    def watch(sigma):
        assert not any(ref() for ref in alive), "one at a time"
        source = made(sigma)
        alive.append(weakref.ref(source))
        return source

    monkeypatch.setattr(passes, "Source", watch)
    return alive


@pytest.mark.parametrize("context", ["mid", "previous_first", "own"])
def test_the_memory_of_the_source_is_what_was_announced(pack, demo, inverted_demo, monkeypatch, rows_announced, context):
    """What is left by its pass, what is told to core, and one source at a time."""
    noise, sigmas, trajectory, _ = inverted_demo
    passes, patches = pack.nodes.bridge.fatezero_passes, []
    usual, check = passes.FateZeroPatch, passes.Passes._check_source
    monkeypatch.setattr(passes, "FateZeroPatch", lambda *given: patches.append(usual(*given)) or patches[-1])
    left = []

    def measure(self, now):
        left.append(sum(x.nbytes for pair in now.source.queries.values() for x in pair))
        check(self, now)

    monkeypatch.setattr(passes.Passes, "_check_source", measure)
    alive = watched_sources(pack, monkeypatch)
    sample(demo, edit(pack, demo, trajectory, context=context)[0], noise["samples"], sigmas[:4])
    announced = passes.source_memory(pack.nodes.bridge.layout.read_layout(demo[0]), patches[-1], 4)
    assert left == [announced] * 3 and len(alive) == 3
    assert rows_announced == [FRAMES + -(-announced // demo[0].model.memory_required([2, 4, 16, 16]))]
    assert not any(ref() for ref in alive), "nothing is left of a run"


def test_guidance_and_higher_orders_find_the_source_of_the_level_as_it_was(pack, demo, inverted_demo, monkeypatch):
    """Perturbed attention calls the model a second time at each level, heun twice: with one pass of the source."""
    noise, sigmas, trajectory, _ = inverted_demo
    edited = edit(pack, demo, trajectory)[0]
    alive = watched_sources(pack, monkeypatch)
    out = sample(demo, PerturbedAttentionGuidance.execute(edited, 100.0).result[0], noise["samples"], sigmas[:3])
    assert len(alive) == 2 and not torch.allclose(out, sample(demo, edited, noise["samples"], sigmas[:3]), atol=1e-3)
    del alive[:]
    sample(demo, edited, noise["samples"], sigmas[:3], sampler="heun")
    assert len(alive) == 3, "of four calls at three levels"


def test_what_leaves_the_source_out_is_told(pack, demo, inverted_demo):
    """A cache of another pack skips a pass, or a block of it."""
    noise, sigmas, trajectory, _ = inverted_demo

    def skip(executor, model, conds, x, *args, **kwargs):
        return [torch.zeros_like(x) for _ in conds]

    for words in ("", "red star"):
        skipping = edit(pack, demo, trajectory, blend_words=words)[0]
        skipping.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "a cache", skip)
        with pytest.raises(ValueError, match=r"STEMFateZero: another node left out the source.s pass.*EasyCache.*Take that"):
            sample(demo, skipping, noise["samples"], sigmas[:2])


def test_prompts_with_more_rows_or_tokens_are_refused(pack, demo, inverted_demo):
    """Other nodes' patches of cross-attention, before ours: a second picture beside the first, a few more tokens."""
    noise, sigmas, trajectory, _ = inverted_demo
    for change in (
        lambda n, context, value, options: (n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)),
        lambda n, context, value, options: (n, *(torch.cat([x, x[:, :4]], 1) for x in (context, value))),
    ):
        changed = edit(pack, demo, trajectory)[0]
        changed.set_model_attn2_patch(change)
        changed.set_model_attn2_output_patch(lambda n, options: n[:FRAMES] if len(n) > FRAMES else n)
        with pytest.raises(ValueError, match=r"STEMFateZero: cross-attention has queries .* changes its rows or tokens"):
            sample(demo, changed, noise["samples"], sigmas[:2])


@pytest.mark.parametrize("how", ["perturbed attention", "a function after guidance", "two guidances", "nested guidances"])
def test_latents_are_blended_after_all_guidance(pack, demo, bare, inverted_demo, how):
    """Outside of the words the step ends on the source's latents, whatever acts on the prediction."""
    trajectory, step = inverted_demo[2], 3
    x = near(trajectory, step)
    _, official = card_step(bare, demo[1], trajectory, x, step, BLENDED)
    outside = official.mask_of_latents() == 0
    assert 0.02 < float(outside.float().mean()) < 0.98
    edited = edit(pack, demo, trajectory, **{**BLENDED, "blend_threshold": official.case["blend_threshold"]})[0]
    guider = comfy.samplers.CFGGuider(edited)
    target, negative = text(demo[1], TARGET), text(demo[1], NEGATIVE)
    if how == "perturbed attention":
        guider = comfy.samplers.CFGGuider(PerturbedAttentionGuidance.execute(edited, 3.0).result[0])
    elif how == "a function after guidance":
        edited.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 1)
    if "guidances" in how:
        style = "nested" if how.startswith("nested") else "regular"
        guider = DualCFGGuider.execute(edited, target, text(demo[1], "a circle on sand"), negative, 3.0, 2.0, style).result[0]
    else:
        guider.set_conds(target, negative)
    levels, scale = trajectory.sigmas.flip(0)[step : step + 2], demo[0].model.latent_format.scale_factor
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(torch.zeros_like(x), x / scale, euler, levels, disable_pbar=True, seed=0) * scale
    kept = trajectory.latents[STEPS - step] * ((1 + levels[1] ** 2) / (1 + levels[0] ** 2)) ** 0.5
    difference = (out - kept).abs() / kept.abs().max()
    assert float(difference[outside.expand_as(out)].max()) < 1e-4 < float(difference[~outside.expand_as(out)].max())


def test_the_source_is_shown_its_own_hints(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    control = tiny_controlnet(unet=pack.nodes.bridge.demo_model.UNET_CONFIG)
    control.set_cond_hint(torch.rand(FRAMES, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    [[words, options]] = trajectory.conditioning
    controlled = trajectory._replace(conditioning=[[words, {**options, "control": control}]])
    seen, inner = [], control.control_model.forward
    control.control_model.forward = lambda x, hint, **kw: seen.append(len(x)) or inner(x=x, hint=hint, **kw)
    outs = [sample(demo, edit(pack, demo, t)[0], noise["samples"], sigmas[:2]) for t in (trajectory, controlled)]
    assert seen == [FRAMES] and not torch.allclose(*outs, atol=1e-3)


def test_a_lora_is_the_change_of_weights_that_it_says(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    key = "input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight"
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 10
    patched = demo[0].clone()
    patched.add_patches({f"diffusion_model.{key}": ("diff", (change,))})
    out, plain = (sample(demo, edit(pack, demo, trajectory, m)[0], noise["samples"], sigmas[:3]) for m in (patched, demo[0]))
    weight = demo[0].model.diffusion_model.get_parameter(key)
    original = weight.data.clone()
    weight.data = original + change.to(original)
    try:
        expected = sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:3])
    finally:
        weight.data = original
    assert torch.allclose(out, expected, atol=1e-3) and not torch.allclose(out, plain, atol=1e-2)


def test_clones_do_not_leak_and_a_second_run_is_the_same(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    model = demo[0]
    plain = sample(demo, model, noise["samples"], sigmas[:3])
    first, second = (edit(pack, demo, trajectory, joint_norm=joint)[0] for joint in (False, True))
    outs = [sample(demo, m, noise["samples"], sigmas[:3]) for m in (first, second, first, model)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[3], plain)
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[0], plain)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_the_target_prompt_alone_is_edited(pack, demo, inverted_demo, cfg):
    noise, sigmas, trajectory, _ = inverted_demo
    clip = demo[1]
    control = tiny_controlnet(unet=pack.nodes.bridge.demo_model.UNET_CONFIG)
    control.set_cond_hint(torch.rand(FRAMES, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    left, right = torch.zeros(2, 1, 128, 128)
    left[..., :64], right[..., 64:] = 1, 1
    [[target, _]], [[other, _]] = text(clip, TARGET), text(clip, "a green circle on water")
    positive = [[target, {"mask": left, "control": control}], [other, {"mask": right}]]
    negative = text(clip, NEGATIVE + ", " + "blurry " * 90)
    assert negative[0][0].shape[1] > 77
    seen = {}
    for name, settings in (("fused", {}), ("not", {"cross_until": 0.0, "self_until": 0.0})):
        edited = edit(pack, demo, trajectory, **settings)[0]
        edited.set_model_sampler_pre_cfg_function(
            lambda args, name=name: seen.update({name: args["conds_out"]}) or args["conds_out"]
        )
        sample(demo, edited, noise["samples"], sigmas[:2], positive, negative, cfg)
    half = [w[..., :8] for w in (seen["fused"][0], seen["not"][0])], [w[..., 8:] for w in (seen["fused"][0], seen["not"][0])]
    assert not torch.allclose(*half[0], atol=1e-2), "the target prompt is edited"
    assert torch.allclose(*half[1], atol=1e-5), "another prompt is not"
    if cfg != 1:
        assert torch.allclose(seen["fused"][1], seen["not"][1], atol=1e-5), "the negative prompt is not, whatever its length"


@pytest.mark.parametrize("node", ["KSampler", "KSamplerAdvanced"])
def test_core_samplers_edit_from_the_trajectory(pack, demo, inverted_demo, node):
    noise, sigmas, trajectory, _ = inverted_demo
    edited = edit(pack, demo, trajectory)[0]
    expected = sample(demo, edited, noise["samples"], torch.cat([sigmas[:-1], torch.zeros(1)]))
    inputs = {"steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "ddim_uniform"}
    prompts = {"positive": text(demo[1], TARGET), "negative": text(demo[1], NEGATIVE)}
    if node == "KSampler":
        clean = {"samples": trajectory.latents[0] / demo[0].model.latent_format.scale_factor}
        [out] = core.KSampler().sample(edited, seed=5, latent_image=clean, **inputs, **prompts)
    else:
        [out] = core.KSamplerAdvanced().sample(
            edited, add_noise="disable", noise_seed=5, latent_image=noise, start_at_step=0, end_at_step=STEPS,
            return_with_leftover_noise="disable", **inputs, **prompts,
        )  # fmt: skip
    assert torch.allclose(out["samples"], expected, atol=2e-3 * float(expected.abs().max()))


def test_the_custom_sampler_nodes_edit_from_the_trajectory(pack, demo, inverted_demo):
    from comfy_extras import nodes_custom_sampler as custom

    noise, sigmas, trajectory, _ = inverted_demo
    edited = edit(pack, demo, trajectory)[0]
    guider = custom.CFGGuider.execute(edited, text(demo[1], TARGET), text(demo[1], NEGATIVE), CFG).result[0]
    euler = custom.KSamplerSelect.execute("euler").result[0]
    clean = {"samples": trajectory.latents[0] / demo[0].model.latent_format.scale_factor}
    expected = sample(demo, edited, noise["samples"], sigmas[:3])
    for way, latents in ((custom.DisableNoise.execute(), noise), (custom.RandomNoise.execute(3), clean)):
        out, denoised = custom.SamplerCustomAdvanced.execute(way.result[0], guider, euler, sigmas[:3], latents).result
        assert torch.allclose(out["samples"], expected, atol=1e-3 * float(expected.abs().max()))
        assert denoised["samples"].isfinite().all()


def test_ksampler_with_less_denoise_starts_from_the_source_at_that_level(pack, demo, inverted_demo):
    _, _, trajectory, _ = inverted_demo
    model, clip, _ = demo
    edited, factor = edit(pack, demo, trajectory)[0], model.model.latent_format.scale_factor
    clean = trajectory.latents[0] / factor
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)[-5:]
    eps = (trajectory.latents[-1] - clean * factor) / trajectory.sigmas[-1]
    expected = sample(demo, edited, clean + eps * levels[0] / factor, levels)
    prompts = text(clip, TARGET), text(clip, NEGATIVE)
    [out] = core.KSampler().sample(edited, 5, 4, CFG, "euler", "normal", *prompts, {"samples": clean}, denoise=0.5)
    assert torch.allclose(out["samples"], expected, atol=2e-3 * float(expected.abs().max()))


def test_a_mask_without_words_stops_what_it_is_plugged_into(pack, demo, inverted_demo):
    """The model goes on; the executor tells the node that is behind the mask."""
    model, mask = edit(pack, demo, inverted_demo[2])
    assert isinstance(mask, ExecutionBlocker) and "needs blend_words" in mask.message
    assert model.model is demo[0].model


def test_stem_attention_stays_in_the_blocks_that_are_not_fused(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    patched = stem_attention(pack, demo[0], "input_1-2, output_9-11")
    out = sample(demo, edit(pack, demo, trajectory, patched)[0], noise["samples"], sigmas[:3])
    without = sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:3])
    assert out.isfinite().all() and not torch.allclose(out, without)


def test_joint_norms_can_be_queued_again_with_other_words(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    for until in (0.8, 0.5):
        edited = edit(pack, demo, trajectory, joint_norm=True, self_until=until)[0]
        assert sample(demo, edited, noise["samples"], sigmas[:2]).isfinite().all()


def test_a_call_for_another_prompt_alone_is_plain(pack, demo, bare, inverted_demo):
    """As guidance nodes make it after the main call: nothing of the source in it, nothing of it in the masks."""
    trajectory = inverted_demo[2]
    _, official = card_step(bare, demo[1], trajectory, near(trajectory, 3), 3, BLENDED)
    settings = {**BLENDED, "blend_threshold": official.case["blend_threshold"]}
    outs, alone = [], []
    for asked in (False, True):
        edited = edit(pack, demo, trajectory, **settings)[0]

        def ask(args):
            for role in (args["conds"][1], args["conds"][0]):
                call = args["model"], [role], args["input"], args["timestep"], args["model_options"]
                alone.extend(comfy.samplers.calc_cond_batch(*call))
            alone.append(args["conds_out"][1])
            return args["conds_out"]

        if asked:
            edited.set_model_sampler_pre_cfg_function(ask)
        outs.append(step_of(demo, edited, trajectory, near(trajectory, 3), 3, 2))
    assert torch.equal(*outs)
    assert torch.allclose(alone[0], alone[2], atol=1e-4), "the negative prompt alone, beside it in the main call"


def test_a_masked_clip_sampled_from_halfway_keeps_the_source_outside(pack, demo, inverted_demo):
    _, sigmas, trajectory, _ = inverted_demo
    clean = trajectory.latents[0] / demo[0].model.latent_format.scale_factor
    mask = torch.zeros(FRAMES, 1, 128, 128)
    mask[..., :64] = 1
    edited = edit(pack, demo, trajectory)[0]
    out = sample(demo, edited, clean, sigmas[4:], noise=torch.ones_like(clean), denoise_mask=mask)
    assert float((out - clean)[..., 8:].norm() / clean[..., 8:].norm()) < 1e-5 and not torch.allclose(out, clean, atol=0.05)


# --------------------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_prompt": "a red star"}, r'source_prompt "a red star" is not what the clip was inverted with\. Give'),
        ({"target_prompt": "word " * 80}, r"target_prompt takes 2 rounds of 75 tokens.*Shorten"),
        ({"blend_words": "red jeep"}, r'"jeep" is not a word of source_prompt: "a red star on grass"\. Write'),
        ({"blend_words": "star | car"}, r'"car" is not a word of target_prompt'),
        ({"blend_words": "star", "blend_latents": True}, r"blend_latents needs words of the target prompt too\. Write"),
        ({"blend_latents": True}, r"blend_words has no word of the source prompt\. Write"),
        ({"reweight": "blue 10"}, r'reweight has "blue 10"; write a word of the target prompt and a number'),
        ({"reweight": "blue: nan"}, r'reweight has "blue: nan"'),
        ({"reweight": "green: 2"}, r'"green" is not a word of target_prompt'),
        ({"attention": "replace", "target_prompt": "a very blue star on sand"}, r"the source has 5, the target 6"),
        ({"blocks": "output_99"}, r'"output_99", which this model does not have'),
    ],
)
def test_wrong_words_are_named(pack, demo, inverted_demo, changes, message):
    with pytest.raises(ValueError, match=f"STEMFateZero: .*{message}"):
        edit(pack, demo, inverted_demo[2], **changes)


def test_a_sampler_with_another_prompt_is_refused(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    with pytest.raises(ValueError, match=r"STEMFateZero: none of the sampler's prompts is its target_prompt"):
        sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:2], "a blue star on water")


def test_two_editors_and_other_models_are_refused(pack, demo, inverted_demo):
    trajectory = inverted_demo[2]
    tokenflow = {
        "mode": "pnp", "keyframe_every": 8, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all",
        "blend": "official", "keyframes": "random",
    }  # fmt: skip
    edited = pack.nodes.tokenflow.STEMTokenFlow.execute(model=demo[0], trajectory=trajectory, **tokenflow).result[0]
    with pytest.raises(ValueError, match=r"STEMFateZero: STEMTokenFlow is on this model already"):
        edit(pack, demo, trajectory, edited)
    with pytest.raises(ValueError, match=r"STEMTokenFlow: STEMFateZero is on this model already"):
        pack.nodes.tokenflow.STEMTokenFlow.execute(model=edit(pack, demo, trajectory)[0], trajectory=trajectory, **tokenflow)
    with pytest.raises(ValueError, match=r"STEMFateZero: .*the trajectory was recorded with"):
        edit(pack, demo, trajectory, tiny_model())


def test_an_adapter_in_the_same_place_is_refused(pack, demo, inverted_demo):
    model = demo[0].clone()
    model.set_model_attn2_replace(lambda q, k, v, options: q, "output", 5)
    with pytest.raises(
        ValueError, match=r"cross-attention of block output_5 is already replaced by .*lambda.*blend_words empty"
    ):
        edit(pack, demo, inverted_demo[2], model)


def test_an_adapter_that_comes_later_is_refused(pack, demo, inverted_demo):
    """In any of its ways to name the place."""
    noise, sigmas, trajectory, _ = inverted_demo
    for kind, place in (("attn2", ("output", 5)), ("attn2", ("output", 5, 0)), ("attn1", ("middle", 0, 0))):
        later = edit(pack, demo, trajectory)[0]
        later.set_model_patch_replace(lambda q, k, v, options: q, kind, *place)
        with pytest.raises(
            ValueError,
            match=rf"STEMFateZero: .*lambda.* comes after it and replaces the .* of block {place[0]}.*Leave this block out",
        ):
            sample(demo, later, noise["samples"], sigmas[:2])


def test_stem_attention_on_its_blocks_is_refused_in_both_orders(pack, demo, inverted_demo):
    remedy = r"Leave this block out of `blocks` and set context to own"
    with pytest.raises(ValueError, match=rf"STEMFateZero: .*already replaced by STEMPatchModel.*{remedy}"):
        edit(pack, demo, inverted_demo[2], stem_attention(pack, demo[0], "all"))
    with pytest.raises(ValueError, match=r"STEMPatchModel: .*already replaced by STEMFateZero"):
        stem_attention(pack, edit(pack, demo, inverted_demo[2])[0], "all")


def test_a_clip_inverted_with_several_prompts_is_refused(pack, demo, inverted_demo):
    trajectory = inverted_demo[2]._replace(conditioning=inverted_demo[2].conditioning * 2)
    with pytest.raises(ValueError, match=r"STEMFateZero: the clip was inverted with 2 prompts.* source_prompt alone"):
        edit(pack, demo, trajectory)


def test_words_without_spaces_are_refused_where_they_are_asked_for(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    glued = "(a:1.2)(b:1.1) star"
    out = sample(demo, edit(pack, demo, trajectory, target_prompt=glued)[0], noise["samples"], sigmas[:2], glued)
    assert out.isfinite().all()
    with pytest.raises(ValueError, match=r"the words of target_prompt cannot be told apart: .*Put spaces between them"):
        edit(pack, demo, inverted_demo[2], target_prompt="(a:1.2)(b:1.1) star", reweight="star: 2")


def test_a_clip_for_longer_prompts_is_refused(pack, demo, inverted_demo):
    class LongClip:
        def __getattr__(self, name):
            return getattr(demo[1], name)

        def encode_from_tokens_scheduled(self, tokens):
            [[conditioning, options]] = demo[1].encode_from_tokens_scheduled(tokens)
            return [[torch.nn.functional.pad(conditioning, (0, 0, 0, 171)), options]]

    with pytest.raises(ValueError, match=r"STEMFateZero: clip makes 248 tokens of source_prompt.*77 of an ordinary CLIP"):
        edit(pack, (demo[0], LongClip(), demo[2]), inverted_demo[2])


def test_a_late_word_makes_another_prompt(pack):
    """Even beside a first token that outweighs all others."""
    same = pack.nodes.bridge.prompts.same_conditioning
    one = torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(0))
    one[:, 0] *= 1e4
    other = one.clone()
    other[:, 5] += 0.1
    assert same(one, one.bfloat16()) and not same(one, other) and not same(one, one[:, :76])


def test_joint_norm_on_several_devices_is_refused(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo

    def two_devices(executor, model, conds, x, timestep, model_options, *args, **kwargs):
        return executor(model, conds, x, timestep, {**model_options, "multigpu_clones": {}}, *args, **kwargs)

    outer = demo[0].clone()
    outer.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "two devices", two_devices)
    edited = edit(pack, demo, trajectory, outer, joint_norm=True)[0]
    with pytest.raises(ValueError, match=r"STEMFateZero: joint_norm works on one device"):
        sample(demo, edited, noise["samples"], sigmas[:2])


def test_context_windows_are_refused(pack, demo, inverted_demo):
    from comfy import context_windows as windows

    noise, sigmas, trajectory, _ = inverted_demo
    edited = edit(pack, demo, trajectory)[0]
    schedule = windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD)
    fuse = windows.get_matching_fuse_method("pyramid")
    edited.model_options["context_handler"] = windows.IndexListContextHandler(
        schedule, fuse, context_length=3, context_overlap=1
    )
    windows.create_prepare_sampling_wrapper(edited)
    with pytest.raises(ValueError, match=r"STEMFateZero: the model is called with 3 frames, and it needs all 5"):
        sample(demo, edited, noise["samples"], sigmas[:2])


def test_other_samplers_are_refused_where_latents_are_blended(pack, demo, inverted_demo):
    noise, sigmas, trajectory, _ = inverted_demo
    blending = edit(pack, demo, trajectory, blend_words="red star | blue star", blend_latents=True)[0]
    with pytest.raises(ValueError, match=r"STEMFateZero: blend_latents works on the straight steps of euler and ddim"):
        sample(demo, blending, noise["samples"], sigmas[:3], sampler="heun")
    out = sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:3], sampler="heun")
    assert out.isfinite().all()
