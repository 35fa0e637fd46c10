"""The inversion nodes against plain loops over the bare UNet, written from the equations."""

import copy

import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from diffusers import DDIMScheduler
from models import clip_latents, prompt, tiny_controlnet, tiny_model

FRAMES, STEPS = 5, 10
# A soft temperature: at the paper's 0.01 a token between two bases jumps from one to the other at the last bit of float32,
# so that no two orders of summation agree to five digits after ten levels. tests/unit/test_em.py holds 0.01.
EM = {"num_bases": 12, "em_iterations": 3, "temperature": 1.0, "seed": 4}
ADVANCED = {"blocks": "all", "frames_per_em": 0}


def invert(pack, model, latents, positive, method="stem", steps=STEPS, basis=None, **changes):
    """Outputs of STEMInvertLatents: latents, sigmas, trajectory, basis."""
    inputs = {**EM, **ADVANCED, **changes}
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=latents, positive=positive, method=method, steps=steps, basis=basis, **inputs
    ).result


def difference(a, b):
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------ the oracle: no code of the pack in it


def softmax_attention(q, k, v):
    """One head of one frame: q (n, d), k and v (m, d)."""
    return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1) @ v


def em(k, v, seed, num_bases, em_iterations, temperature):
    """Dense EM of one head: k and v (n, d), g (m, d)."""
    mu = k.mean(0) + k.std(0) * seed
    for _ in range(em_iterations):
        z = torch.softmax(k @ (mu / (mu.norm(dim=1, keepdim=True) + 1e-4)).T / temperature, dim=1)
        z = z / (z.sum(0) + 1e-4)
        mu = z.T @ k
    return mu, z.T @ v


def oracle_attention(attn1, name, method, now, derive_seed):
    def forward(x, **_):
        q, k, v = attn1.to_q(x), attn1.to_k(x), attn1.to_v(x)
        frames, _, channels = q.shape
        heads, d = attn1.heads, channels // attn1.heads
        group = now["frames_per_em"] or frames
        out = torch.empty_like(q)
        for f in range(frames):
            first = f - f % group
            seed = derive_seed(EM["seed"], name, f"{now['sigma']:.5g}", first)
            g = torch.randn(heads, EM["num_bases"], d, generator=torch.Generator().manual_seed(seed))
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                context = {
                    "ddim": [f],
                    "first_previous": [0, max(f - 1, 0)],
                    "all_frames": range(frames),
                    "stem": range(first, min(first + group, frames)),
                }[method]
                keys = torch.cat([k[i, :, part] for i in context])
                values = torch.cat([v[i, :, part] for i in context])
                if method == "stem":
                    keys, values = em(keys, values, g[h], EM["num_bases"], EM["em_iterations"], EM["temperature"])
                out[f, :, part] = softmax_attention(q[f, :, part], keys, values)
        return attn1.to_out(out)

    return forward


def oracle(model, latents, positive, method, derive_seed, frames_per_em=0, control=None):
    """DDIM inversion in z = sqrt(abar) z0 + sqrt(1 - abar) eps: all latents on the way, (t+1, f, c, y, x).

    Prompts with masks (in the size of the latents) share the picture; `control` gives a ControlNet's residuals for x, sigma.
    """
    base = model.model
    unet = copy.deepcopy(base.diffusion_model)
    now = {"frames_per_em": frames_per_em}
    for side in ("input_blocks", "middle_block", "output_blocks"):
        for name, module in getattr(unet, side).named_modules():
            if isinstance(module, BasicTransformerBlock):
                numbers = [int(part) for part in name.split(".") if part.isdigit()]
                number, index = (0 if side == "middle_block" else numbers[0]), numbers[-1]
                label = f"{side.split('_')[0]}_{number}" + (f"_{index}" if index else "")
                module.attn1.forward = oracle_attention(module.attn1, label, method, now, derive_seed)
    sigmas = base.model_sampling.sigmas.double()
    abar = 1 / (1 + sigmas**2)
    z = latents["samples"] * base.latent_format.scale_factor
    prompts = [(text.expand(len(z), -1, -1), options.get("latent_mask", 1.0)) for text, options in positive]
    extra = {}
    if "SDXL" in type(base).__name__:
        y = base.encode_adm(device="cpu", pooled_output=positive[0][1]["pooled_output"], width=128, height=64)
        extra["y"] = y.expand(len(z), -1)
    path, previous = [z], abar[0]
    for t in range(1, 1000, 1000 // STEPS):
        if len(path) > STEPS:
            break
        now["sigma"] = float(sigmas[t].float())
        if control is not None:
            extra["control"] = control(z * (1 + sigmas[t] ** 2).sqrt().float(), sigmas[t].float(), prompts[0][0])
        time, out = torch.full((len(z),), float(t)), 0
        for context, mask in prompts:
            residuals = copy.deepcopy(extra)  # core empties the lists of residuals
            out = out + mask * unet(z, time, context=context, transformer_options={}, **residuals)
        v_prediction = "V_PREDICTION" in [kind.__name__ for kind in type(base.model_sampling).__mro__]
        eps = abar[t].sqrt() * out + (1 - abar[t]).sqrt() * z if v_prediction else out
        z0 = (z - (1 - previous).sqrt() * eps) / previous.sqrt()
        z = (abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * eps).float()
        previous = abar[t]
        path.append(z)
    return torch.stack(path)


def in_ddim_scale(trajectory):
    return trajectory.latents / (1 + trajectory.sigmas**2).sqrt().reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("method", ["stem", "ddim", "first_previous", "all_frames"])
def test_every_method_equals_a_plain_loop_over_the_bare_unet(pack, method):
    model, latents, positive = tiny_model(), clip_latents(FRAMES), prompt()
    expected = oracle(model, latents, positive, method, pack.stem.em.derive_seed)
    noise, sigmas, trajectory, _ = invert(pack, model, latents, positive, method)
    assert difference(in_ddim_scale(trajectory), expected) < 1e-5
    assert difference(noise["samples"] * 0.18215 / (1 + sigmas[0] ** 2) ** 0.5, expected[-1]) < 1e-5


@pytest.mark.parametrize("layout", ["sd2", "sdxl"])
def test_other_layouts_equal_a_plain_loop_over_their_unet(pack, layout):
    model, latents, positive = tiny_model(layout), clip_latents(3), prompt()
    expected = oracle(model, latents, positive, "stem", pack.stem.em.derive_seed)
    trajectory = invert(pack, model, latents, positive)[2]
    assert difference(in_ddim_scale(trajectory), expected) < 1e-5


def test_frames_per_em_estimates_for_each_group_of_frames_alone(pack):
    model, latents, positive = tiny_model(), clip_latents(FRAMES), prompt()
    expected = oracle(model, latents, positive, "stem", pack.stem.em.derive_seed, frames_per_em=2)
    _, _, trajectory, blocker = invert(pack, model, latents, positive, frames_per_em=2)
    assert difference(in_ddim_scale(trajectory), expected) < 1e-5
    assert "set frames_per_em to 0" in blocker.message, "groups have no basis in common"


# --------------------------------------------------------------- with what people put on the model and on the prompt


LEFT, RIGHT = torch.zeros(2, 1, 64, 128)
LEFT[..., :64], RIGHT[..., 64:] = 1, 1


def halves():
    """Two prompts, each for one half of the picture."""
    return [
        [text, {**options, "mask": mask, "latent_mask": mask[:, None, ::8, ::8]}]
        for [[text, options]], mask in ((prompt(1), LEFT), (prompt(5), RIGHT))
    ]


@pytest.mark.parametrize("method", ["stem", "ddim"])
def test_prompts_that_share_the_picture_equal_a_plain_loop(pack, method):
    model, latents = tiny_model(), clip_latents(3)
    expected = oracle(model, latents, halves(), method, pack.stem.em.derive_seed)
    assert difference(in_ddim_scale(invert(pack, model, latents, halves(), method)[2]), expected) < 1e-5


def test_a_prompt_for_every_frame_equals_a_plain_loop(pack):
    model, latents, positive = tiny_model(), clip_latents(3), prompt(frames=3)
    expected = oracle(model, latents, positive, "stem", pack.stem.em.derive_seed)
    assert difference(in_ddim_scale(invert(pack, model, latents, positive)[2]), expected) < 1e-5


def test_a_lora_acts_as_if_it_were_part_of_the_weights(pack):
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    model, merged, latents = tiny_model(), tiny_model(), clip_latents(3)
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 10
    model.add_patches({key: ("diff", (change,))})
    merged.model.get_parameter(key).add_(change)
    expected = oracle(merged, latents, prompt(), "stem", pack.stem.em.derive_seed)
    assert difference(in_ddim_scale(invert(pack, model, latents, prompt())[2]), expected) < 1e-5


def test_a_controlnet_sees_the_latent_that_is_left_at_the_level_that_is_entered(pack):
    model, latents = tiny_model(), clip_latents(3)
    hints = torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    alone = tiny_controlnet().set_cond_hint(hints)
    alone.pre_run(model.model, model.model.model_sampling.percent_to_sigma)

    def residuals(x, sigma, context):
        return alone.get_control(x, sigma.expand(len(x)), {"c_crossattn": context}, 1, {})

    expected = oracle(model, latents, prompt(), "stem", pack.stem.em.derive_seed, control=residuals)
    positive = prompt(control=tiny_controlnet().set_cond_hint(hints))
    got = in_ddim_scale(invert(pack, model, latents, positive)[2])
    assert difference(got, expected) < 1e-5
    assert difference(got, in_ddim_scale(invert(pack, model, latents, prompt())[2])) > 1e-3


def test_nodes_that_change_the_guidance_do_not_change_the_inversion(pack):
    model, latents = tiny_model(), clip_latents(2)
    plain = invert(pack, model, latents, prompt(), "ddim", steps=2)[0]["samples"]
    [pag] = PerturbedAttentionGuidance.execute(model, scale=3.0).result
    [sag] = SelfAttentionGuidance.execute(model, scale=0.5, blur_sigma=2.0).result
    assert torch.equal(invert(pack, pag, latents, prompt(), "ddim", steps=2)[0]["samples"], plain)
    with pytest.raises(ValueError, match=r"STEMInvertLatents: .* middle_0 is already replaced by .* of comfy_extras.nodes_sag"):
        invert(pack, sag, latents, prompt(), steps=2)
    assert difference(invert(pack, sag, latents, prompt(), "ddim", steps=2)[0]["samples"], plain) < 1e-5
    assert "sampler_post_cfg_function" in pag.model_options and "sampler_post_cfg_function" in sag.model_options


def test_the_sampler_function_of_another_node_is_not_asked(pack):
    model, latents = tiny_model(), clip_latents(2)
    changed = model.clone()
    changed.set_model_sampler_calc_cond_batch_function(lambda given: [torch.zeros_like(given["input"])] * 2)
    plain = invert(pack, model, latents, prompt(), "ddim", steps=2)[0]["samples"]
    assert torch.equal(invert(pack, changed, latents, prompt(), "ddim", steps=2)[0]["samples"], plain)


def test_half_precision_comes_near_to_full(pack):
    latents = clip_latents(3)
    full, half = (invert(pack, tiny_model(dtype=d), latents, prompt(), steps=4) for d in (torch.float32, torch.float16))
    assert 0 < difference(half[0]["samples"], full[0]["samples"]) < 0.02
    assert {x.dtype for x in half[3].keys + half[3].values} == {torch.float16}
    assert half[2].latents.dtype == torch.float32


def test_the_recorded_bases_are_those_of_the_first_prompt(pack):
    model, latents = tiny_model(), clip_latents(2)
    both, alone, other = (invert(pack, model, latents, p, steps=1)[3] for p in (halves(), prompt(1), prompt(5)))
    block = both.blocks.index("input_2")  # the first whose keys depend on the prompt
    assert torch.allclose(both.keys[block], alone.keys[block], atol=1e-5)
    assert not torch.allclose(both.keys[block], other.keys[block], atol=1e-2)


def test_a_warm_start_goes_on_from_the_bases_of_the_same_frames_at_the_level_before(pack):
    attention, record = pack.nodes.bridge.self_attention, pack.nodes.bridge.record
    settings = pack.stem.basis.BasisSettings(6, 3, 1.0, 0, 0, warm_iterations=1)
    run = record.BasisRecord(torch.tensor([0.5, 1.0, 2.0]), ("input_1",), ["a", "b"])
    k, v = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))

    def bases(sigma, warm=True, uuid="a", frames=(3, 4)):
        choice = attention.EstimatedBases(settings if warm else settings._replace(warm_iterations=0))
        call = attention.Call("input_1", 2, sigma, list(frames), uuid, {record.RECORD: run})
        (context,) = choice(k + 0.1 * sigma, v, call)
        return context.k.reshape(6, 2, 8).transpose(0, 1)

    def one_iteration(mu, sigma):
        keys = (k + 0.1 * sigma).reshape(10, 2, 8).transpose(0, 1)
        z = torch.softmax(keys @ (mu / (mu.norm(dim=-1, keepdim=True) + 1e-4)).mT, dim=-1)
        return z.mT @ keys / (z.sum(1)[..., None] + 1e-4)

    first = bases(0.5)
    assert torch.equal(first, bases(0.5, warm=False))
    second = bases(1.0)
    assert torch.allclose(second, one_iteration(first, 1.0), atol=1e-5)
    assert torch.allclose(bases(2.0), one_iteration(second, 2.0), atol=1e-5)
    for other in ({"uuid": "b"}, {"frames": (3, 5)}):
        assert torch.equal(bases(1.0, **other), bases(1.0, warm=False))


def test_context_windows_have_bases_each(pack):
    latents = clip_latents(6)
    windowed = ContextWindowsManualNode.execute(
        tiny_model(), context_length=4, context_overlap=2, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    ).result[0]  # fmt: skip
    noise, _, _, blocker = invert(pack, windowed, latents, prompt(), steps=2)
    assert noise["samples"].isfinite().all() and "Take the context windows off" in blocker.message


def test_a_hook_of_constant_strength_acts_and_a_scheduled_one_is_refused(pack):
    model, latents = tiny_model(), clip_latents(2)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights, hook.need_weight_init = {key: ("diff", (torch.ones(32, 32),))}, False
    hooks.add(hook)
    plain = invert(pack, model, latents, prompt(), "ddim", steps=2)[0]["samples"]
    assert difference(invert(pack, model, latents, prompt(hooks=hooks), "ddim", steps=2)[0]["samples"], plain) > 1e-4
    for start in (0.0, 0.5):
        hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=1 - start, start_percent=start))
    with pytest.raises(ValueError, match=r"STEMInvertLatents: .*hooks of constant strength"):
        invert(pack, model, latents, prompt(hooks=hooks), steps=2)


def test_sampling_from_the_inverted_latent_equals_diffusers_ddim(pack):
    model, latents, positive = tiny_model(), clip_latents(3), prompt()
    noise, sigmas, trajectory, _ = invert(pack, model, latents, positive, "ddim")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    z = in_ddim_scale(trajectory)[-1]
    for t in scheduler.timesteps:
        eps = model.model.diffusion_model(z, t.float().expand(3), context=positive[0][0].expand(3, -1, -1))
        z = scheduler.step(eps, t, z).prev_sample
    sampled = sample(model, noise, sigmas, positive)
    assert difference(sampled * 0.18215 / (1 + sigmas[-1] ** 2) ** 0.5, z) < 1e-5


def sample(model, noise, sigmas, positive, negative=None, cfg=1.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative or prompt(seed=2))
    guider.set_cfg(cfg)
    zeros, euler = torch.zeros_like(noise["samples"]), comfy.samplers.sampler_object("euler")
    return guider.sample(zeros, noise["samples"], euler, sigmas, disable_pbar=True, seed=0)


# ------------------------------------------------------------------------------------------------- what comes out


def test_the_way_back_gives_the_clip(pack):
    model, latents, positive = tiny_model(), clip_latents(2), prompt()
    model.model.diffusion_model.out[-1].weight.mul_(0.1)  # a smooth net: what an inversion takes for granted
    error = {}
    for steps in (5, 20):
        noise, sigmas, _, _ = invert(pack, model, latents, positive, "ddim", steps)
        error[steps] = difference(sample(model, noise, sigmas, positive), latents["samples"])
    assert error[20] < 0.01 and error[20] < 0.7 * error[5], error


def test_outputs_fit_together(pack):
    model, latents, positive = tiny_model(), clip_latents(3), prompt()
    noise, sigmas, trajectory, basis = invert(pack, model, latents, positive, steps=4)
    table = model.get_model_object("model_sampling").sigmas
    assert sigmas.tolist() == table[[751, 501, 251, 1, 0]].tolist()
    assert trajectory.latents.shape == (5, 3, 4, 8, 16) and trajectory.sigmas.tolist() == sigmas.flip(0).tolist()
    assert torch.allclose(trajectory.latents[-1] / 0.18215, noise["samples"])
    start = latents["samples"] * 0.18215 * (1 + sigmas[-1] ** 2) ** 0.5
    assert torch.allclose(trajectory.latents[0], start)
    assert basis.sigmas.tolist() == sigmas.flip(0)[1:].tolist() and len(basis.keys) == len(basis.blocks) == 16
    assert all(k.shape[:3] == (4, 8, EM["num_bases"]) and k.device.type == "cpu" for k in basis.keys + basis.values)
    assert trajectory.conditioning is positive


def test_a_second_run_is_the_same_bit_by_bit(pack):
    model, latents, positive = tiny_model(), clip_latents(3), prompt()
    first, second = (invert(pack, model, latents, positive, steps=3) for _ in range(2))
    assert torch.equal(first[0]["samples"], second[0]["samples"])
    assert all(map(torch.equal, first[3].keys, second[3].keys))


def test_inputs_and_model_are_left_as_they_were(pack):
    model, latents, positive = tiny_model(), clip_latents(3), prompt()
    latents["noise_mask"] = torch.ones(3, 64, 128)
    before, options = latents["samples"].clone(), copy.deepcopy(model.model_options)
    noise, _, _, _ = invert(pack, model, latents, positive, steps=2)
    assert torch.equal(latents["samples"], before) and set(latents) == {"samples", "noise_mask"}
    assert "noise_mask" not in noise
    assert model.model_options == options


# ------------------------------------------------------------------------------------------------- a fixed basis


@pytest.fixture(scope="module")
def estimated(pack):
    with torch.inference_mode():
        model, latents = tiny_model(), clip_latents(7)
        basis = pack.nodes.basis.STEMBasisEstimate.execute(
            model=model, latents=latents, positive=prompt(), steps=4, keyframes=3, blocks="all", **EM
        ).result[0]
    return model, latents, basis


def test_keyframes_are_spread_over_the_clip(pack, estimated):
    _, _, basis = estimated
    assert basis.frame_ids == (0, 3, 6) and basis.total_frames == 7
    spread = pack.nodes.basis.spread
    assert spread(5, 0) == spread(5, 5) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 16)[0] == 0 and spread(100, 16)[-1] == 99 and len(set(spread(100, 16))) == 16
    assert spread(9, 1) == [0]


@pytest.mark.parametrize("batch", [1, 3])
def test_with_a_fixed_basis_frames_can_be_split_into_batches(pack, estimated, batch):
    model, latents, basis = estimated
    whole = invert(pack, model, latents, prompt(), steps=4, basis=basis)
    parts = [
        invert(pack, model, {"samples": part}, prompt(), steps=4, basis=basis)[0]["samples"]
        for part in latents["samples"].split(batch)
    ]
    assert difference(torch.cat(parts), whole[0]["samples"]) < 1e-5
    assert whole[3] is basis


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_its_own_basis_gives_the_same_inversion(pack, layout):
    model, latents = tiny_model(layout), clip_latents(3)
    estimated = invert(pack, model, latents, prompt(), steps=4)
    fixed = invert(pack, model, latents, prompt(), steps=4, basis=estimated[3])
    assert difference(fixed[2].latents, estimated[2].latents) < 1e-5


def test_a_sampler_reads_the_basis_of_its_level(pack):
    model, latents = tiny_model(), clip_latents(3)
    trajectory, basis = invert(pack, model, latents, prompt(), steps=4)[2:]
    patch = pack.nodes.patch.STEMPatchModel.execute
    inputs = {**EM, "start_percent": 0.0, "end_percent": 1.0, "blocks": "all"}
    fixed, estimated = (patch(model=model, basis=b, **inputs).result[0] for b in (basis, None))
    levels = trajectory.sigmas
    for i in range(1, 5):  # what the model saw on the way up, at which the bases were estimated
        x = pack.stem.ddim.inversion_input(trajectory.latents[i - 1], levels[i - 1], levels[i]) / 0.18215
        step = torch.stack([levels[i], torch.zeros(())])
        a, b = (sample(patched, {"samples": x}, step, prompt()) for patched in (fixed, estimated))
        assert difference(a, b) < 1e-5, i


def test_prompts_and_masks_of_chosen_frames_go_around(pack):
    select = pack.nodes.bridge.conditioning.select_frames
    for rows, shown in ((3, [0, 0, 2]), (8, [0, 3, 5]), (1, [0])):  # core goes around, and leaves out what is too many
        given = prompt(frames=rows, mask=torch.rand(rows, 8, 16), other=torch.rand(rows, 2))
        [[text, options]] = select(given, [0, 3, 5], 6)
        assert torch.equal(text, given[0][0][shown])
        core_shows = comfy.utils.repeat_to_batch_size(given[0][0], 6)[[0, 3, 5]]
        assert torch.equal(text.expand_as(core_shows), core_shows)
        for name in ("pooled_output", "mask"):
            assert torch.equal(options[name], given[0][1][name][shown])
        assert options["other"] is given[0][1]["other"], "not one for every frame: who knows what it is"
    flat = torch.rand(8, 16)  # one mask for all frames, as core takes it too
    assert select(prompt(mask=flat), [0, 3, 5], 6)[0][1]["mask"] is flat
    whole = prompt(frames=6)
    assert select(whole, [*range(6)], 6) is whole


def test_prompts_that_share_a_controlnet_still_do(pack):
    control = tiny_controlnet().set_cond_hint(torch.rand(6, 3, 64, 128))
    both = pack.nodes.bridge.conditioning.select_frames(prompt(1, control=control) + prompt(2, control=control), [0, 3], 6)
    assert both[0][1]["control"] is both[1][1]["control"] is not control


def test_keyframes_keep_their_own_prompts_and_hints(pack):
    frames, ids = 6, [0, 3, 5]
    control = tiny_controlnet().set_cond_hint(torch.rand(frames, 3, 64, 128))
    further = tiny_controlnet().set_cond_hint(torch.rand(1, 3, 64, 128)).set_previous_controlnet(control)
    given = prompt(frames=frames, control=further, strength=0.5)
    [[text, options]] = pack.nodes.bridge.conditioning.select_frames(given, ids, frames)
    assert torch.equal(text, given[0][0][ids])
    assert torch.equal(options["control"].previous_controlnet.cond_hint_original, control.cond_hint_original[ids])
    assert options["control"].cond_hint_original is further.cond_hint_original and options["strength"] == 0.5
    assert len(control.cond_hint_original) == frames, "the given one is left as it was"


def test_estimating_with_prompts_for_every_frame_runs(pack):
    latents = clip_latents(4)
    basis = pack.nodes.basis.STEMBasisEstimate.execute(
        model=tiny_model(), latents=latents, positive=prompt(frames=4), steps=2, keyframes=2, blocks="output", **EM
    ).result[0]
    assert basis.blocks == tuple(f"output_{i}" for i in range(3, 12))


# --------------------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(0, 4, 8, 8), "no frames"),
        (torch.zeros(3, 16, 8, 8), "16 channels, this model needs 4"),
        (torch.zeros(1, 4, 3, 8, 8), "frames on the batch axis"),
    ],
)
def test_latents_that_do_not_fit_are_refused(pack, latents, message):
    with pytest.raises(ValueError, match=f"STEMInvertLatents: .*{message}"):
        invert(pack, tiny_model(), {"samples": latents}, prompt())


@pytest.mark.parametrize(("layout", "family"), [("svd", "SVD_img2vid"), ("dit", "PixArtAlpha")])
@pytest.mark.parametrize("channels", [4, 16])
def test_models_without_image_self_attention_blocks_are_refused_by_name(pack, layout, family, channels):
    with pytest.raises(ValueError, match=f"STEMInvertLatents: .*{family}.*Use a checkpoint of SD1"):
        invert(pack, tiny_model(layout), {"samples": torch.zeros(2, channels, 8, 8)}, prompt())


@pytest.mark.parametrize("method", ["stem", "ddim"])
def test_a_prompt_that_leaves_a_part_out_is_refused(pack, method):
    with pytest.raises(ValueError, match=r"STEMInvertLatents: positive leaves a part of the picture without any prompt"):
        invert(pack, tiny_model(), clip_latents(2), prompt(mask=LEFT), method)


@pytest.mark.parametrize(
    ("options", "sigma"),
    [
        ({"start_percent": 0.5}, "1.624"),  # the first of ten levels above percent 0.5, which is timestep 499.5
        ({"end_percent": 0.8}, "0.04131"),  # timestep 1
        ({"clip_start_percent": 0.5, "clip_end_percent": 1.0}, "1.624"),
    ],
)
def test_timesteps_without_a_prompt_are_refused_before_the_climb(pack, monkeypatch, options, sigma):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", None)
    with pytest.raises(ValueError, match=f"STEMInvertLatents: positive leaves the picture without any prompt at sigma {sigma}"):
        invert(pack, tiny_model(), clip_latents(2), prompt(**options))


def test_prompts_that_take_turns_cover_all_timesteps(pack):
    turns = prompt(1, start_percent=0.0, end_percent=0.5) + prompt(5, start_percent=0.5, end_percent=1.0)
    model, latents = tiny_model(), clip_latents(2)
    path = invert(pack, model, latents, turns, "ddim")[2].latents
    alone = invert(pack, model, latents, prompt(5), "ddim")[2].latents
    assert torch.equal(path[:6], alone[:6]) and not torch.allclose(path[6], alone[6])


def test_a_basis_of_another_model_is_refused(pack, estimated):
    with pytest.raises(ValueError, match=r"STEMInvertLatents: .*SD15.*SD20"):
        invert(pack, tiny_model("sd2"), clip_latents(2), prompt(), basis=estimated[2])


def test_a_basis_for_a_method_that_reads_none_is_refused(pack, estimated):
    with pytest.raises(ValueError, match='method "ddim" does not read'):
        invert(pack, tiny_model(), clip_latents(2), prompt(), "ddim", basis=estimated[2])


def test_the_basis_output_of_a_method_without_one_says_so(pack):
    blocker = invert(pack, tiny_model(), clip_latents(2), prompt(), "ddim", steps=1)[3]
    assert "ddim has no basis" in blocker.message


def test_blocks_that_the_model_lacks_are_refused(pack):
    with pytest.raises(ValueError, match=r'"output_2".*input_1, input_2'):
        invert(pack, tiny_model(), clip_latents(2), prompt(), blocks="output_2")


def test_an_empty_conditioning_is_refused(pack):
    with pytest.raises(ValueError, match="empty conditioning"):
        invert(pack, tiny_model(), clip_latents(2), [])
