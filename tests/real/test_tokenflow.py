"""STEM TokenFlow against a slow implementation of its card over the bare UNet, and among other nodes."""

import copy
import math
from functools import partial

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy_extras.nodes_freelunch import FreeU
from models import clip_latents, prompt, tiny_controlnet, tiny_model

import nodes as core
from stem.metrics import psnr

FRAMES, EVERY, STEPS, CFG = 7, 3, 10, 4.0  # a last group of one frame
DEFAULTS = {
    "mode": "pnp", "keyframe_every": EVERY, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all",
    "blend": "official", "keyframes": "fixed",
}  # fmt: skip
FIXED = [1, 4, 6]  # the middle frames of the groups 0-2, 3-5 and 6


def invert(pack, model, frames):
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=clip_latents(frames), positive=prompt(3), steps=STEPS, method="ddim", num_bases=8,
        em_iterations=1, seed=0, temperature=1.0, blocks="all", frames_per_em=0,
    ).result  # fmt: skip


@pytest.fixture(scope="module")
def inverted(pack):
    with torch.inference_mode():
        model = tiny_model()
        return model, invert(pack, model, FRAMES)


def edit(pack, model, trajectory, **changes):
    return pack.nodes.tokenflow.STEMTokenFlow.execute(model=model, trajectory=trajectory, **{**DEFAULTS, **changes}).result[0]


def sample(model, start, sigmas, positive=None, negative=None, cfg=CFG, noise=None, **options):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompt(1), negative or prompt(2))
    guider.set_cfg(cfg)
    euler = comfy.samplers.sampler_object("euler")
    noise = torch.zeros_like(start) if noise is None else noise
    return guider.sample(noise, start, euler, sigmas, disable_pbar=True, seed=0, **options)


# ------------------------------------------------------------------------------ the oracle: no code of the pack in it


def blocks_of(unet):
    for side in ("input_blocks", "middle_block", "output_blocks"):
        for name, module in getattr(unet, side).named_modules():
            if isinstance(module, BasicTransformerBlock):
                number = 0 if side == "middle_block" else int(name.split(".")[0])
                yield side, number, name, module.attn1


def softmax_attention(q, k, v, heads):
    """q (n, c), k and v (m, c)."""
    d = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        parts.append(torch.softmax(q[:, s] @ k[:, s].T / d**0.5, -1) @ v[:, s])
    return torch.cat(parts, -1)


def official_step(
    model, x, source, level, texts, every, keyframes, inject_qk, inject_conv, y=None, blend="official", side=None, patches=None
):
    """What the UNet says of uncond and cond for all frames, in batches [source | uncond | cond]: x, source in DDIM's z.

    `every` None: Plug-and-Play, each frame on its own. `side`: the only one whose blocks take part. `patches`: core's, of other
    nodes.
    """
    unet = copy.deepcopy(model.model.diffusion_model)
    memory = {}

    def pivotal(side, number, name, attn1):
        def forward(tokens, **_):
            n = len(tokens) // 3
            q, k, v = attn1.to_q(tokens), attn1.to_k(tokens), attn1.to_v(tokens)
            if inject_qk and side == "output_blocks" and number >= 4:
                q, k = (torch.cat([w[:n]] * 3) for w in (q, k))
            out = torch.empty_like(q)
            for i in range(3 * n):
                stream = slice(i, i + 1) if i < n or every is None else slice(i // n * n, i // n * n + n)
                out[i] = softmax_attention(q[i], k[stream].flatten(0, 1), v[stream].flatten(0, 1), attn1.heads)
            out = attn1.to_out(out)
            memory[side, name] = tokens[:n], out.chunk(3)
            return out

        return forward

    def propagating(side, name, group, frames):
        def forward(tokens, **_):
            keys, outs = memory[side, name]
            parts = []
            for stream in range(3):
                for j, frame in enumerate(frames):
                    mine = torch.nn.functional.normalize(tokens[j], dim=-1)
                    found = []
                    for kf in (group, group - 1) if group else (group,):
                        cosine = mine @ torch.nn.functional.normalize(keys[kf], dim=-1).T
                        found.append(outs[stream][kf][cosine.argmax(-1)])
                    assumed = {g: every * g + every // 2 for g in (group, group - 1)}
                    d1, d2 = (abs(frame - (assumed if blend == "official" else keyframes)[g]) for g in (group, group - 1))
                    w = d2 / (d1 + d2)
                    w = torch.sigmoid(torch.tensor(w)) if blend == "official" else w
                    parts.append(w * found[0] + (1 - w) * found[1] if group else found[0])
            return torch.stack(parts)

        return forward

    block = unet.output_blocks[4][0]

    def residual(h, emb):
        inner = block.out_layers(block.in_layers(h) + block.emb_layers(emb)[:, :, None, None])
        if inject_conv:
            inner = torch.cat([inner[: len(inner) // 3]] * 3)
        return block.skip_connection(h) + inner

    block.forward = residual

    def run(ids):
        ids = list(ids)
        z = torch.cat([source[ids], x[ids], x[ids]])
        context = torch.cat([text.expand(len(ids), -1, -1) for text in texts])
        extra = {} if y is None else {"y": y.expand(len(z), -1)}
        options = {"patches": patches or {}}
        return unet(z, torch.full((len(z),), float(level)), context=context, transformer_options=options, **extra).chunk(3)[1:]

    attentions = [found for found in blocks_of(unet) if side in (None, found[0])]
    for side, number, name, attn1 in attentions:
        attn1.forward = pivotal(side, number, name, attn1)
    if every is None:
        return run(range(len(x)))
    run(keyframes)
    outs = []
    for group, start in enumerate(range(0, len(x), every)):
        frames = list(range(start, min(start + every, len(x))))
        for side, _, name, attn1 in attentions:
            attn1.forward = propagating(side, name, group, frames)
        outs.append(run(frames))
    return [torch.cat(part) for part in zip(*outs, strict=True)]


def step_and_card(pack, model, trajectory, level, every, chosen, inject_qk, inject_conv, cfg=CFG, patch=None, **settings):
    """One step from near the trajectory: how far the node is from the card, over how far the step goes.

    `patch` is put on the model after the node, and its UNet patches into the card's pass too.
    """
    table = model.get_model_object("model_sampling").sigmas
    high, low = table[level], table[level - 100]
    above = int((trajectory.sigmas < high).sum())
    share = (high - trajectory.sigmas[above - 1]) / (trajectory.sigmas[above] - trajectory.sigmas[above - 1])
    scale = (1 + high**2) ** 0.5
    source = trajectory.latents[above - 1] * (1 - share) + trajectory.latents[above] * share
    x = source + 0.1 * high * torch.randn(source.shape, generator=torch.Generator().manual_seed(1))
    texts = [prompt(seed)[0][0] for seed in (3, 2, 1)]
    y = None
    if trajectory.model.family == "SDXL":  # every prompt with the pooled text of seed 1, so that one vector serves
        pooled = prompt(1)[0][1]["pooled_output"]
        y = model.model.encode_adm(pooled_output=pooled, width=128, height=64, device="cpu")
    options = {"blend": settings.get("blend", "official"), "side": {"output": "output_blocks"}.get(settings.get("blocks"))}
    edited = edit(pack, model, trajectory, keyframe_every=every, **settings)
    if patch is not None:
        edited = patch(edited)
        found = edited.model_options["transformer_options"]["patches"]
        options["patches"] = {"output_block_patch": found["output_block_patch"]}
    uncond, cond = official_step(
        model, x / scale, source / scale, level, texts, None if settings.get("mode") == "pnp_per_frame" else every, chosen,
        inject_qk, inject_conv, y, **options,
    )  # fmt: skip
    said = uncond + cfg * (cond - uncond)
    if trajectory.model.prediction == "v":
        denoised = x / scale**2 - said * high / scale
    else:
        denoised = x - high * said
    expected = x + (low - high) * (x - denoised) / high
    factor = model.model.latent_format.scale_factor
    out = sample(edited, x / factor, torch.stack([high, low]), same_pool(1), same_pool(2), cfg) * factor
    return float((out - expected).norm() / (expected - x).norm())


def same_pool(seed):
    return [[prompt(seed)[0][0], prompt(1)[0][1]]]


@pytest.mark.parametrize(
    ("level", "mode", "inject_qk", "inject_conv"),
    [
        (901, "pnp", True, True),
        (851, "pnp", True, True),  # between two levels of the inversion
        (301, "pnp", False, True),
        (101, "pnp", False, False),
        (901, "sdedit", False, False),
        (901, "pnp_per_frame", True, True),
        (301, "pnp_per_frame", False, True),
    ],
)
def test_one_step_equals_the_card(pack, inverted, level, mode, inject_qk, inject_conv):
    model, (_, _, trajectory, _) = inverted
    assert step_and_card(pack, model, trajectory, level, EVERY, FIXED, inject_qk, inject_conv, mode=mode) < 1e-4


def test_one_step_of_sixteen_frames_with_every_default(pack):
    """Two groups of eight, a random keyframe in each."""
    model = tiny_model()
    trajectory = invert(pack, model, 16)[2]
    sigma = model.get_model_object("model_sampling").sigmas[901]
    keyframes = pack.stem.tokenflow.draw_keyframes(16, 8, DEFAULTS["seed"], float(sigma))
    assert step_and_card(pack, model, trajectory, 901, 8, keyframes, True, True, keyframes="random") < 1e-4


@pytest.mark.parametrize("layout", ["sd2", "sdxl"])
def test_one_step_of_other_families_equals_the_card(pack, layout):
    """v-prediction and other head counts; several transformers in a block, fewer blocks."""
    model = tiny_model(layout)
    trajectory = invert(pack, model, FRAMES)[2]._replace(conditioning=same_pool(3))
    assert step_and_card(pack, model, trajectory, 901, EVERY, FIXED, True, True) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"blend": "distance"},
        {"blocks": "output"},
        {"cfg": 1.0},
        {"patch": lambda model: FreeU.execute(model, b1=1.2, b2=1.4, s1=0.9, s2=0.2).result[0]},
    ],
    ids=["distance", "output", "cfg 1", "FreeU"],
)
def test_one_step_equals_the_card_with(pack, inverted, settings):
    """FreeU, as STEM's official editor has it on, acts in the passes of source and edit alike."""
    model, (_, _, trajectory, _) = inverted
    assert step_and_card(pack, model, trajectory, 901, EVERY, FIXED, True, True, **settings) < 1e-4


def test_random_keyframes_follow_the_seed(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    start = noise["samples"]
    one, same, other = (
        sample(edit(pack, model, trajectory, keyframes="random", seed=seed), start, sigmas[:3]) for seed in (0, 0, 5)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------ in the graph


def test_noise_of_the_sampler_is_replaced_by_the_trajectory(pack, inverted):
    """KSampler always adds noise: that of the source's inversion, at whatever level it begins."""
    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    expected = sample(edited, noise["samples"], sigmas[:3])
    anything = torch.randn(noise["samples"].shape, generator=torch.Generator().manual_seed(2))
    clean = clip_latents(FRAMES)["samples"]
    assert torch.allclose(sample(edited, clean, sigmas[:3], noise=anything), expected, atol=1e-4)
    # Later on: the noise that leads to the end of the inversion, as the official SDEdit has it, on the sampler's own latents.
    factor = model.model.latent_format.scale_factor
    eps = (trajectory.latents[-1] - clean * factor) / trajectory.sigmas[-1]
    other = clean + 1
    start = other + eps * sigmas[4] / factor
    assert torch.allclose(sample(edited, other, sigmas[4:6], noise=anything), sample(edited, start, sigmas[4:6]), atol=1e-4)


def test_the_noise_ends_on_the_trajectory_where_core_scales_it_otherwise(pack):
    """999 steps reach the model's highest level, where core makes noise of the whole variance."""
    model = tiny_model()
    clean = clip_latents(3)
    levels = model.get_model_object("model_sampling").sigmas[[0, 999]]
    trajectory = invert(pack, model, 3)[2]
    trajectory = trajectory._replace(sigmas=levels, latents=torch.stack([trajectory.latents[0], trajectory.latents[-1] * 1.1]))
    seen = []
    edited = edit(pack, model, trajectory, mode="sdedit")
    edited.set_model_unet_function_wrapper(
        lambda run, told: seen.append(told["input"]) or run(told["input"], told["timestep"], **told["c"])
    )
    sample(edited, clean["samples"], levels.flip(0), noise=torch.ones_like(clean["samples"]))
    assert torch.allclose(seen[1][:1], trajectory.latents[-1][1:2], rtol=1e-4, atol=1e-4), "the edit's keyframe"


def test_a_masked_clip_keeps_the_source_outside(pack, inverted):
    """A soft edge mixes each prediction once, as core's own inpainting does."""
    model, (_, sigmas, trajectory, _) = inverted
    mask = torch.zeros(FRAMES, 1, 64, 128)
    mask[..., :64] = 1
    edited, clean = edit(pack, model, trajectory), clip_latents(FRAMES)["samples"]
    factor = model.model.latent_format.scale_factor
    for levels, kept in (
        (torch.cat([sigmas[:-1], torch.zeros(1)]), clean),
        (sigmas, trajectory.latents[0] / factor),
        (sigmas[3:7], trajectory.latents[-7] / factor),
    ):
        out = sample(edited, clean, levels, noise=torch.ones_like(clean), denoise_mask=mask)
        assert float((out - kept)[..., 8:].norm() / kept[..., 8:].norm()) < 1e-5
        assert not torch.allclose(out[..., :8], kept[..., :8], atol=0.1)
    last = torch.stack([sigmas[0], torch.zeros(())])  # one step, from a start that masks do not change
    half, whole = (
        sample(edited, clean, last, noise=torch.ones_like(clean), denoise_mask=torch.full_like(mask, amount))
        for amount in (0.5, 1)
    )
    assert torch.allclose(half, (clean + whole) / 2, atol=1e-3)


def test_two_halves_of_one_prompt_are_the_prompt(pack, inverted):
    """Conditionings with masks, a ControlNet on both; core repeats the shorter of two prompts."""
    model, (noise, sigmas, trajectory, _) = inverted
    hints = torch.rand(FRAMES, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    control = tiny_controlnet().set_cond_hint(hints)
    left, right = torch.zeros(2, 1, 64, 128)
    left[..., :64], right[..., 64:] = 1, 1
    [[text, options]] = prompt(2)
    edited = edit(pack, model, trajectory)
    whole = sample(edited, noise["samples"], sigmas[:3], prompt(1, control=control), prompt(2))
    halves = prompt(1, control=control, mask=left) + prompt(1, control=control, mask=right)
    out = sample(edited, noise["samples"], sigmas[:3], halves, [[text.repeat(1, 2, 1), options]])
    assert torch.allclose(out, whole, atol=1e-4 * float(whole.abs().max()))
    assert torch.equal(control.cond_hint_original, hints), "the hints are put back"
    without = sample(edited, noise["samples"], sigmas[:3], prompt(1), prompt(2))
    assert float((out - without).abs().max()) > 1e-2 * float(whole.abs().max())


def test_prompts_that_change_from_frame_to_frame(pack, inverted):
    """All frames with one prompt of their own each, and these all alike: as the single one."""
    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    [[text, options]] = prompt(1)
    single, alike, changing = (
        sample(edited, noise["samples"], sigmas[:3], positive)
        for positive in (prompt(1), [[text.repeat(FRAMES, 1, 1), options]], prompt(1, frames=FRAMES))
    )
    assert torch.allclose(single, alike, atol=1e-4 * float(single.abs().max()))
    assert not torch.allclose(single, changing, atol=0.1)


def test_a_lora_is_the_change_of_weights_that_it_says(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 10
    patched, changed = model.clone(), tiny_model()
    patched.add_patches({key: ("diff", (change,))})
    changed.model.get_parameter(key).data += change
    outs = [sample(edit(pack, m, trajectory), noise["samples"], sigmas[:3]) for m in (patched, changed, model)]
    assert torch.allclose(outs[0], outs[1], atol=1e-4 * float(outs[1].abs().max())) and not torch.allclose(outs[0], outs[2])


def test_every_pass_has_the_hints_of_its_frames(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    hints = torch.arange(FRAMES, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 128)
    control, seen = tiny_controlnet().set_cond_hint(hints), []
    inner = control.control_model.forward

    def watch(x, hint, **kwargs):
        seen.append(hint[:, 0, 0, 0].tolist())
        return inner(x=x, hint=hint, **kwargs)

    control.control_model.forward = watch
    positive, negative = (prompt(seed, control=control) for seed in (1, 2))
    sample(edit(pack, model, trajectory), noise["samples"], sigmas[:2], positive, negative)
    assert seen == [FIXED * 2, [0, 1, 2] * 2, [3, 4, 5] * 2, [6]], "core broadcasts a single hint"


def test_the_source_is_shown_its_own_hints(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    hints = torch.arange(FRAMES, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 64, 128)
    control, seen = tiny_controlnet().set_cond_hint(hints), []
    inner = control.control_model.forward
    control.control_model.forward = lambda x, hint, **kw: seen.append(hint[:, 0, 0, 0].tolist()) or inner(x=x, hint=hint, **kw)
    plain = sample(edit(pack, model, trajectory), noise["samples"], sigmas[:2])
    controlled = trajectory._replace(conditioning=prompt(3, control=control))
    assert not torch.allclose(sample(edit(pack, model, controlled), noise["samples"], sigmas[:2]), plain)
    assert seen == [FIXED, [0, 1, 2], [3, 4, 5], [6]], "core broadcasts a single hint"


def test_of_several_source_prompts_the_one_of_the_level_is_taken(pack, inverted):
    model, (_, sigmas, trajectory, _) = inverted
    early, late = prompt(3, start_percent=0.0, end_percent=0.5), prompt(5, start_percent=0.5, end_percent=1.0)
    for levels, alone in ((sigmas[:2], 3), (sigmas[-3:-1], 5)):
        start = clip_latents(FRAMES)["samples"]
        found, expected = (
            sample(edit(pack, model, trajectory._replace(conditioning=source)), start, levels, noise=torch.ones_like(start))
            for source in (early + late, prompt(alone))
        )
        assert torch.equal(found, expected)


def test_clones_do_not_leak_and_a_second_run_is_the_same(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    options, plain = copy.deepcopy(model.model_options), sample(model, noise["samples"], sigmas[:3])
    first, second = edit(pack, model, trajectory), edit(pack, model, trajectory, mode="pnp_per_frame")
    outs = [sample(m, noise["samples"], sigmas[:3]) for m in (first, second, first, model)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[3], plain)
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[0], plain)
    assert model.model_options == options


# --------------------------------------------------------------------------------------------------- wrong inputs


def test_a_trajectory_of_another_model_is_refused(pack, inverted):
    with pytest.raises(ValueError, match=r"STEMTokenFlow: .*SD15.*SD20"):
        edit(pack, tiny_model("sd2"), inverted[1][2])


def test_another_clip_is_refused(pack, inverted):
    model, (_, sigmas, trajectory, _) = inverted
    with pytest.raises(ValueError, match=r"STEMTokenFlow: .*\(4, 4, 8, 16\).*\(7, 4, 8, 16\)"):
        sample(edit(pack, model, trajectory), clip_latents(4)["samples"], sigmas)


def test_levels_above_the_trajectory_are_refused(pack, inverted):
    model, (noise, _, trajectory, _) = inverted
    with pytest.raises(ValueError, match=r"STEMTokenFlow: the sampler starts at sigma 14\.61, the trajectory ends at"):
        sample(edit(pack, model, trajectory), noise["samples"], model.get_model_object("model_sampling").sigmas[[999, 500]])


@pytest.mark.parametrize(
    ("latents", "adds", "start", "message"),
    [
        ("inverted", True, 0, "the latents are noisy already, and the sampler adds noise. Switch add_noise off"),
        ("clean", False, 0, "the latents are the clip's own, and the sampler adds no noise. Connect the"),
        ("inverted", False, 4, r"the latents have noise of sigma 8\.391, the sampler starts at .* Start at the first"),
    ],
)
def test_latents_of_another_point_of_the_way_are_refused(pack, inverted, latents, adds, start, message):
    model, (noise, sigmas, trajectory, _) = inverted
    given = noise["samples"] if latents == "inverted" else clip_latents(FRAMES)["samples"]
    with pytest.raises(ValueError, match=f"STEMTokenFlow: {message}"):
        sample(edit(pack, model, trajectory), given, sigmas[start:], noise=torch.full_like(given, float(adds)))


def test_a_level_without_a_source_prompt_is_refused(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    late = trajectory._replace(conditioning=prompt(3, start_percent=0.5))
    with pytest.raises(ValueError, match=r"STEMTokenFlow: the prompt that the clip was inverted with does not act at sigma"):
        sample(edit(pack, model, late), noise["samples"], sigmas[:2])


def test_several_source_prompts_at_once_are_told(pack, inverted, caplog):
    model, (noise, sigmas, trajectory, _) = inverted
    both = trajectory._replace(conditioning=prompt(3) + prompt(5))
    assert torch.equal(
        sample(edit(pack, model, both), noise["samples"], sigmas[:2]),
        sample(edit(pack, model, trajectory), noise["samples"], sigmas[:2]),
    )
    assert caplog.text.count("STEMTokenFlow: of several prompts that the clip was inverted with, the first leads") == 1


def patched(pack, model, blocks):
    return pack.nodes.patch.STEMPatchModel.execute(
        model=model, num_bases=8, em_iterations=1, seed=0, start_percent=0.0, end_percent=1.0, temperature=1.0, blocks=blocks
    ).result[0]


def test_stem_attention_is_refused_on_the_same_blocks_and_kept_on_others(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    with pytest.raises(ValueError, match=r"STEMTokenFlow: .*replaced by STEMPatchModel"):
        edit(pack, patched(pack, model, "all"), trajectory)
    with pytest.raises(ValueError, match=r"STEMPatchModel: .*replaced by STEMTokenFlow"):
        patched(pack, edit(pack, model, trajectory), "all")
    both = edit(pack, patched(pack, model, "input"), trajectory, blocks="output, middle")
    assert not torch.equal(
        sample(both, noise["samples"], sigmas[:2]),
        sample(edit(pack, model, trajectory, blocks="output, middle"), noise["samples"], sigmas[:2]),
    )


def test_guidance_by_attention_is_refused_where_it_takes_a_block_and_kept_where_it_does_not(pack, inverted):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    later = SelfAttentionGuidance.execute(edited, 0.5, 2.0).result[0]
    with pytest.raises(ValueError, match=r"STEMTokenFlow: .* comes after it and replaces the self-attention of block middle_0"):
        sample(later, noise["samples"], sigmas[:2])
    with pytest.raises(ValueError, match=r"STEMTokenFlow: the self-attention of block middle_0 is already replaced"):
        edit(pack, SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0], trajectory)
    perturbed = sample(PerturbedAttentionGuidance.execute(edited, 3.0).result[0], noise["samples"], sigmas[:2])
    assert perturbed.isfinite().all() and not torch.equal(perturbed, sample(edited, noise["samples"], sigmas[:2]))


def test_residual_blocks_that_another_node_runs_are_refused(pack, inverted):
    model, (_, _, trajectory, _) = inverted
    taken = model.clone()
    taken.set_model_patch((ResBlock, print), "forward_timestep_embed_patch")
    with pytest.raises(ValueError, match=r"STEMTokenFlow: another node on this model already runs its residual blocks"):
        edit(pack, taken, trajectory)


def test_self_attention_called_in_a_way_of_its_own_is_refused(pack, inverted):
    model, (_, _, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    patch = edited.model_options["transformer_options"]["patches_replace"]["attn1"]["middle", 0]
    q = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=r"STEMTokenFlow: self-attention was called without its block"):
        patch(q, q, q, {"block": ("middle", 0), "sigmas": torch.ones(1)})


def test_half_precision_stays_near(pack, inverted):
    """A step in bfloat16 beside one in float32, of the same weights."""
    model, (noise, sigmas, trajectory, _) = inverted
    half = tiny_model(dtype=torch.bfloat16)
    outs = [sample(edit(pack, m, trajectory), noise["samples"], sigmas[:2]) for m in (model, half)]
    step = (outs[0] - noise["samples"]).norm()
    assert outs[1].isfinite().all() and float((outs[1] - outs[0]).norm() / step) < 0.2


def test_two_editors_are_refused(pack, inverted):
    model, (_, _, trajectory, _) = inverted
    for blocks in ("all", "middle"):
        with pytest.raises(ValueError, match=r"STEMTokenFlow: STEMTokenFlow is on this model already.*Take one"):
            edit(pack, edit(pack, model, trajectory, blocks="output"), trajectory, blocks=blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ad_params": {"sub_idxs": None}}, r"AnimateDiff's motion modules need all of them at once\. Take one"),
        ({"context_window": object()}, r"context windows would tear its keyframes apart\. Take the context windows off"),
    ],
)
def test_what_needs_the_whole_clip_is_refused(pack, inverted, changes, message):
    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    edited.model_options["transformer_options"].update(changes)
    with pytest.raises(ValueError, match=f"STEMTokenFlow: .*{message}"):
        sample(edited, noise["samples"], sigmas[:2])


@pytest.mark.parametrize("first", [True, False])
def test_merged_tokens_are_refused(pack, inverted, first):
    from comfy_extras.nodes_tomesd import TomePatchModel

    model, (noise, sigmas, trajectory, _) = inverted
    merged = TomePatchModel.execute(model if first else edit(pack, model, trajectory), 0.5).result[0]
    with pytest.raises(ValueError, match=r"STEMTokenFlow: .*another node changes its tokens"):
        sample(edit(pack, merged, trajectory) if first else merged, noise["samples"], sigmas[:2])


def test_areas_and_masks_that_change_are_refused(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    edited, mask = edit(pack, model, trajectory), torch.zeros(1, 64, 128)
    mask[..., :64] = 1
    bounded = prompt(1, mask=mask, set_area_to_bounds=True, mask_strength=1.0)
    with pytest.raises(ValueError, match=r"STEMTokenFlow: a prompt acts on an area"):
        sample(edited, noise["samples"], sigmas[:2], bounded)
    source = trajectory._replace(conditioning=prompt(3, mask=mask, set_area_to_bounds=True, mask_strength=1.0))
    found = sample(edit(pack, model, source), noise["samples"], sigmas[:2])
    assert torch.equal(found, sample(edited, noise["samples"], sigmas[:2])), "where a source prompt acts does not matter"
    differential = edited.clone()
    differential.set_model_denoise_mask_function(lambda sigma, mask, extra_options: mask)
    with pytest.raises(ValueError, match=r"STEMTokenFlow: Differential Diffusion is on this model"):
        sample(differential, noise["samples"], sigmas[:2], denoise_mask=torch.ones(FRAMES, 1, 64, 128))


def test_a_model_that_edits_is_not_inverted(pack, inverted):
    model, (_, _, trajectory, _) = inverted
    with pytest.raises(ValueError, match=r"STEMInvertLatents: STEMTokenFlow is on this model.*Connect the model from before"):
        invert(pack, edit(pack, model, trajectory), FRAMES)


# ------------------------------------------------------------------------------- among what people put on a model


def test_cross_attention_patches_act_in_every_pass(pack, inverted):
    model, (noise, sigmas, trajectory, _) = inverted
    edited, seen = edit(pack, model, trajectory), []
    plain = sample(edited, noise["samples"], sigmas[:2])

    def adapter(n, context, value, extra_options):
        if extra_options["block"] == ("middle", 0):
            seen.append(len(n))
        return n, context, value * 1.1

    edited.set_model_attn2_patch(adapter)
    assert not torch.allclose(sample(edited, noise["samples"], sigmas[:2]), plain)
    assert seen == [3, 6, 3, 6, 3, 6, 1, 2], "source and edit: keyframes, then each group"


@pytest.mark.parametrize("node", ["KSampler", "KSamplerAdvanced"])
def test_core_samplers_edit_from_the_trajectory(pack, inverted, node):
    """Ten steps of ddim_uniform are the inversion's own levels, and a final zero."""
    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    expected = sample(edited, noise["samples"], torch.cat([sigmas[:-1], torch.zeros(1)]))
    inputs = {"steps": STEPS, "cfg": CFG, "sampler_name": "euler", "scheduler": "ddim_uniform"}
    prompts = {"positive": prompt(1), "negative": prompt(2)}
    if node == "KSampler":
        [out] = core.KSampler().sample(edited, seed=5, latent_image=clip_latents(FRAMES), **inputs, **prompts)
    else:
        [out] = core.KSamplerAdvanced().sample(
            edited, add_noise="disable", noise_seed=5, latent_image=noise, start_at_step=0, end_at_step=STEPS,
            return_with_leftover_noise="disable", **inputs, **prompts,
        )  # fmt: skip
    assert torch.allclose(out["samples"], expected, atol=1e-3 * float(expected.abs().max()))


def test_the_custom_sampler_nodes_edit_from_the_trajectory(pack, inverted):
    from comfy_extras import nodes_custom_sampler as custom

    model, (noise, sigmas, trajectory, _) = inverted
    edited = edit(pack, model, trajectory)
    guider = custom.CFGGuider.execute(edited, prompt(1), prompt(2), CFG).result[0]
    euler = custom.KSamplerSelect.execute("euler").result[0]
    for way, latents in ((custom.DisableNoise.execute(), noise), (custom.RandomNoise.execute(3), clip_latents(FRAMES))):
        out, denoised = custom.SamplerCustomAdvanced.execute(way.result[0], guider, euler, sigmas[:3], latents).result
        expected = sample(edited, noise["samples"], sigmas[:3])
        assert torch.allclose(out["samples"], expected, atol=1e-3 * float(expected.abs().max()))
        assert denoised["samples"].isfinite().all()


def test_ksampler_with_less_denoise_starts_from_the_source_at_that_level(pack, inverted):
    model, (_, _, trajectory, _) = inverted
    edited, clean = edit(pack, model, trajectory), clip_latents(FRAMES)
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)[-5:]
    factor = model.model.latent_format.scale_factor
    eps = (trajectory.latents[-1] - clean["samples"] * factor) / trajectory.sigmas[-1]
    expected = sample(edited, clean["samples"] + eps * levels[0] / factor, levels)
    [out] = core.KSampler().sample(edited, 5, 4, CFG, "euler", "normal", prompt(1), prompt(2), clean, denoise=0.5)
    assert torch.allclose(out["samples"], expected, atol=1e-3 * float(expected.abs().max()))


def test_the_memory_of_keyframes_is_what_was_announced(pack, inverted, monkeypatch):
    model, (noise, sigmas, trajectory, _) = inverted
    tokenflow, layouts = pack.nodes.bridge.tokenflow, pack.nodes.bridge.layout
    layout, steps, passes = layouts.read_layout(model), [], []
    scales = layouts.block_scales(model.model.diffusion_model)
    names = layouts.choose_blocks(layout, "all")
    announced = tokenflow.keyframe_memory(layout, scales, names, len(FIXED), trajectory.latents.shape[-2:], 4)
    made = tokenflow.Step
    monkeypatch.setattr(tokenflow, "Step", lambda *given: steps.append(made(*given)) or steps[-1])
    made_pass = tokenflow.Pass
    monkeypatch.setattr(tokenflow, "Pass", lambda *given: passes.append(made_pass(*given)) or passes[-1])
    sample(edit(pack, model, trajectory), noise["samples"], sigmas[:2])
    [step], injected = steps, sum(passes[0].queries.values(), ())
    assert sum(x.nbytes for x in (*step.norms.values(), *step.outputs.values(), *injected)) == announced


def test_memory_is_reserved_for_a_pass_and_not_for_the_clip(pack, inverted, rows_announced):
    model, (noise, sigmas, trajectory, _) = inverted
    layouts = pack.nodes.bridge.layout
    layout, scales = layouts.read_layout(model), layouts.block_scales(model.model.diffusion_model)
    of_keyframes = partial(pack.nodes.bridge.tokenflow.keyframe_memory, layout, scales, layouts.choose_blocks(layout, "all"))
    rows = []
    for changes, keyframes, in_a_pass in (
        ({}, 3, 3),
        ({"keyframe_every": 1}, FRAMES, FRAMES),
        ({"mode": "pnp_per_frame"}, 0, 3),
    ):
        sample(edit(pack, model, trajectory, **changes), noise["samples"], sigmas[:2])
        features = of_keyframes(keyframes, trajectory.latents.shape[-2:], 4)
        rows.append(in_a_pass + math.ceil(features / model.model.memory_required([2, 4, 8, 16])))
    assert rows_announced == rows and rows[2] == 3 < rows[0]


def test_what_two_nodes_need_is_added(pack, inverted, rows_announced, monkeypatch):
    """STEM attention in blocks that TokenFlow leaves alone."""
    monkeypatch.setattr(pack.stem.em, "CPU_BLOCK", 2**26)  # several frames' worth
    model, (noise, sigmas, trajectory, _) = inverted
    chosen = {"num_bases": 8, "em_iterations": 1, "seed": 0, "start_percent": 0.0, "end_percent": 1.0, "temperature": 1.0}
    attending = pack.nodes.patch.STEMPatchModel.execute(model=model, **chosen, blocks="input_1").result[0]
    for each in (attending, attending, model):
        sample(edit(pack, each, trajectory, blocks="output_4-8"), noise["samples"], sigmas[:2])
    one, block = model.model.memory_required([2, 4, 8, 16]), pack.stem.em.block_bytes(torch.device("cpu"))
    with_bases, again, without = rows_announced
    assert with_bases == again and 5 < block / one - 1 < with_bases - without < block / one + 1


# --------------------------------------------------------------------------------- with the model that ships


def test_editing_with_its_own_prompt_gives_the_clip_back(pack):
    """Target prompt = source prompt, cfg 1, everything injected: within 1 dB of plain sampling where every frame is a keyframe.

    What is injected loses nothing: frame by frame it is no worse than plain sampling. Features that are carried from one
    keyframe in eight lose 1.0 to 1.2 dB in 20 steps (doc/quality.md).
    """
    model, text, vae = pack.nodes.demo.STEMDemoModel.execute().result
    images, _, words = pack.nodes.demo.STEMDemoClip.execute(
        seed=7, frames=16, size=128, colour="red", shape="circle", background="tiles"
    ).result
    latents, positive = core.VAEEncode().encode(vae, images)[0], core.CLIPTextEncode().encode(text, words)[0]
    noise, sigmas, trajectory, _ = pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=latents, positive=positive, steps=10, method="ddim", num_bases=8, em_iterations=1, seed=0,
        temperature=1.0, blocks="all", frames_per_em=0,
    ).result  # fmt: skip

    def back(model):
        out = sample(model, noise["samples"], sigmas, positive, positive, cfg=1.0)
        return psnr(core.VAEDecode().decode(vae, {"samples": out})[0], images)

    everything, plain = {"qk_until": 1.0, "conv_until": 1.0, "keyframes": "random"}, back(model)
    for mode, every, loss in (("pnp_per_frame", 8, 0.1), ("pnp", 1, 1.0), ("pnp", 8, 1.5)):
        assert back(edit(pack, model, trajectory, mode=mode, keyframe_every=every, **everything)) > plain - loss, mode
