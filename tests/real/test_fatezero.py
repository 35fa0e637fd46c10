"""STEM FateZero against a slow implementation of its card over the bare UNet, and among other nodes."""

import copy
import weakref

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from models import tiny_controlnet, tiny_model

import nodes as core
from stem.metrics import psnr

FRAMES, STEPS, CFG = 5, 10, 4.0
SOURCE, TARGET, NEGATIVE = "a red star on grass", "a blue star on sand", "a circle"
LONGER = "a blue, star on grass"  # "blue" and "," for "red"
COLUMNS = [0, 1, None, 3, 4, None, 6]  # of the target: the place in the source, by hand
DEFAULTS = {
    "source_prompt": SOURCE, "target_prompt": TARGET, "cross_until": 0.8, "self_until": 0.8, "attention": "refine",
    "reweight": "", "blend_words": "", "blend_threshold": 0.3, "blend_latents": False, "context": "mid", "min_channels": 640,
    "joint_norm": False, "blocks": "input_4-8, middle, output_0-8", "blend_timing": "official",
}  # fmt: skip
FUSED = {
    *(("input_blocks", i) for i in (4, 5, 7, 8)), ("middle_block", 0), *(("output_blocks", i) for i in range(3, 9)),
}  # fmt: skip
NARROWER = {("input_blocks", 4), ("input_blocks", 5), *(("output_blocks", i) for i in (6, 7, 8))}  # 640 channels in SD1.5
LOOKED_AT = [("input_blocks", 7), ("input_blocks", 8), *(("output_blocks", i) for i in (3, 4, 5))]


@pytest.fixture(scope="module")
def demo(pack):
    with torch.inference_mode():
        return pack.nodes.demo.STEMDemoModel.execute().result


@pytest.fixture(scope="module")
def bare(demo):
    """The UNet alone, before any node was on it."""
    return copy.deepcopy(demo[0].model.diffusion_model)


@pytest.fixture(scope="module")
def inverted(pack, demo):
    with torch.inference_mode():
        return invert(pack, demo, frames=FRAMES, steps=STEPS)


def invert(pack, demo, frames, steps, size=128, method="ddim"):
    model, clip, vae = demo
    images = pack.nodes.demo.STEMDemoClip.execute(
        seed=7, frames=frames, size=size, colour="red", shape="star", background="grass"
    ).result[0]
    return pack.nodes.invert.STEMInvertLatents.execute(
        model=model, latents=core.VAEEncode().encode(vae, images)[0], positive=text(clip, SOURCE), steps=steps, method=method,
        num_bases=8, em_iterations=1, seed=0, temperature=1.0, blocks="all", frames_per_em=0,
    ).result  # fmt: skip


def text(clip, words):
    return core.CLIPTextEncode().encode(clip, words)[0]


def edit(pack, demo, trajectory, model=None, **changes):
    node = pack.nodes.fatezero.STEMFateZero
    return node.execute(model=model or demo[0], trajectory=trajectory, clip=demo[1], **{**DEFAULTS, **changes}).result


def sample(demo, model, start, sigmas, positive=TARGET, negative=NEGATIVE, cfg=CFG, **options):
    guider = comfy.samplers.CFGGuider(model)
    positive, negative = (text(demo[1], p) if isinstance(p, str) else p for p in (positive, negative))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(start), start, euler, sigmas, disable_pbar=True, seed=0, **options)


# ------------------------------------------------------------------------------ the oracle: no code of the pack in it


def probabilities(q, k, heads):
    """Maps (f, h, n, m) of queries (f, n, c) and keys (f, m, c)."""
    q, k = (w.unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)


def applied(maps, v):
    v = v.unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
    return (maps @ v).transpose(1, 2).flatten(2)


class Official:
    """Two calls of the UNet with FateZero's attention: the source alone, then [uncond | cond]."""

    def __init__(self, unet, size, step, case):
        self.unet = copy.deepcopy(unet)
        self.step, self.case, self.size, self.source, self.maps = step, {**DEFAULTS, **case}, size, True, {}
        self.target_words = []
        for side in ("input_blocks", "middle_block", "output_blocks"):
            for name, module in getattr(self.unet, side).named_modules():
                if isinstance(module, BasicTransformerBlock):
                    block = side, 0 if side == "middle_block" else int(name.split(".")[0])
                    module.attn1.forward = self.self_attention(module.attn1, block)
                    module.attn2.forward = self.cross_attention(module.attn2, block)
        if self.case["joint_norm"]:
            norms = [
                m
                for block in self.unet.modules()
                if isinstance(block, ResBlock)
                for m in (block.in_layers[0], block.out_layers[0])
            ]
            for norm in [*norms, self.unet.out[0]]:
                norm.forward = self.over_all_frames(norm)

    def over_all_frames(self, norm):
        def forward(x):
            out = torch.empty_like(x)
            for start in range(0, len(x), FRAMES):
                part = x[start : start + FRAMES].unflatten(1, (norm.num_groups, -1))
                mean, var = part.mean((0, 2, 3, 4), keepdim=True), part.var((0, 2, 3, 4), keepdim=True, unbiased=False)
                out[start : start + FRAMES] = ((part - mean) / (var + norm.eps).sqrt()).flatten(1, 2)
            return out * norm.weight.to(x)[:, None, None] + norm.bias.to(x)[:, None, None]

        return forward

    def context(self, x):
        kind = self.case["context"]  # "mid": (FRAMES - 1) // 2
        rows = {
            "mid": [x[2] for _ in range(FRAMES)],
            "previous_first": [torch.cat([x[max(i - 1, 0)], x[0]]) for i in range(FRAMES)],
            "own": list(x),
        }[kind]
        return torch.stack(rows)

    def mask(self, size):
        """Of the source's words "red star": places 2 and 3."""
        return self.mask_of([self.maps["cross", block][..., [2, 3]].sum(-1) for block in LOOKED_AT], size)

    def mask_of(self, words, size):
        return (self.share_of_maximum(words, size) > self.case["blend_threshold"]).float()

    def share_of_maximum(self, words, size):
        mean = torch.cat(words, 1).mean(1).unflatten(-1, self.size_at(4))
        grown = torch.nn.functional.max_pool2d(mean[:, None], 3, 1, 1)
        resized = torch.nn.functional.interpolate(grown, size)[:, 0]
        return resized / resized.flatten(1).max(1).values[:, None, None]

    def set_dividing_threshold(self):
        """In the widest gap near the middle: attention of a small model to its words differs little from place to place."""
        words = [self.maps["cross", block][..., [2, 3]].sum(-1) for block in LOOKED_AT]
        values = self.share_of_maximum(words, self.size_at(4)).unique()
        values = values[len(values) // 4 : 3 * len(values) // 4 + 1]
        widest = int(values.diff().argmax())
        self.case["blend_threshold"] = float(values[widest : widest + 2].mean())

    def size_at(self, scale):
        return tuple(edge // scale for edge in self.size)

    def self_attention(self, attn, block):
        def forward(x, **_):
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            out = []
            for i in range(0, len(x), FRAMES):
                q_, k_, v_ = (w[i : i + FRAMES] for w in (q, k, v))
                least = self.case["min_channels"]
                narrow = block not in FUSED if least == 640 else block not in FUSED or block in NARROWER
                if least == 0 or not narrow:  # in SD1.5 the fused are those with 640 channels and more
                    k_, v_ = self.context(k_), self.context(v_)
                maps = probabilities(q_, k_, attn.heads)
                if block in FUSED and self.source:
                    self.maps["self", block] = maps
                elif block in FUSED and i and self.step < int(STEPS * self.case["self_until"]):
                    if self.case["blend_words"]:
                        tokens = x.shape[1]
                        scale = next(s for s in (1, 2, 4, 8) if self.size[0] // s * self.size[1] // s == tokens)
                        m = self.mask(self.size_at(scale)).flatten(1)[:, None, :, None]
                        maps = m * maps + (1 - m) * self.maps["self", block]
                    else:
                        maps = self.maps["self", block]
                out.append(applied(maps, v_))
            return attn.to_out(torch.cat(out))

        return forward

    def cross_attention(self, attn, block):
        def forward(x, context=None, value=None, **_):
            q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
            out = []
            for i in range(0, len(x), FRAMES):
                maps = probabilities(*(w[i : i + FRAMES] for w in (q, k)), attn.heads)
                if block in FUSED and self.source:
                    self.maps["cross", block] = maps
                elif block in FUSED and i:
                    if block in LOOKED_AT:
                        self.target_words.append(maps[..., [2, 3]].sum(-1))
                    if self.step < int((STEPS + 1) * self.case["cross_until"]):
                        maps = self.fused(maps, self.maps["cross", block])
                out.append(applied(maps, v[i : i + FRAMES]))
            return attn.to_out(torch.cat(out))

        return forward

    def fused(self, a, b):
        out = b.clone()
        if self.case["attention"] == "refine":
            for column, place in enumerate(COLUMNS):
                out[..., column] = a[..., column] if place is None else b[..., place]
        elif self.case["target_prompt"] == LONGER:  # "red" becomes two tokens
            out[..., 2] = out[..., 3] = b[..., 2] / 2
        if self.case["reweight"]:  # "blue: 10"
            out[..., 2] = out[..., 2] * 10
        return out

    def run(self, z, below, level, texts):
        source, negative, target = texts
        each = torch.full((FRAMES,), float(level))
        self.unet(below, each, context=source.expand(FRAMES, -1, -1), transformer_options={})
        self.source = False
        if self.case["blend_threshold"] is None:
            self.set_dividing_threshold()
        both = torch.cat([w.expand(FRAMES, -1, -1) for w in (negative, target)])
        return self.unet(torch.cat([z, z]), torch.cat([each, each]), context=both, transformer_options={}).chunk(2)


BLENDED = {"blend_words": "red star | blue star", "blend_latents": True, "blend_threshold": None}
CASES = [
    pytest.param(0, {}, id="all"),
    pytest.param(0, {"attention": "replace"}, id="replace"),
    pytest.param(0, {"attention": "replace", "target_prompt": LONGER}, id="replace by more tokens"),
    pytest.param(0, {"reweight": "blue: 10"}, id="reweight"),
    pytest.param(0, {"blend_words": "red star", "blend_threshold": None}, id="blend words"),
    pytest.param(0, {"context": "previous_first", "min_channels": 0}, id="previous and first"),
    pytest.param(0, {"context": "own"}, id="own"),
    pytest.param(0, {"min_channels": 1280}, id="own where wide"),
    pytest.param(0, {"joint_norm": True}, id="joint norm"),
    pytest.param(5, {"self_until": 0.5, "cross_until": 0.8}, id="cross alone"),
    pytest.param(4, {"self_until": 0.5, "cross_until": 0.3}, id="self alone"),
    pytest.param(8, {}, id="none"),
    pytest.param(9, {"self_until": 0.95, "cross_until": 0.95}, id="cross lasts floor((t + 1) c) steps"),
    pytest.param(3, BLENDED, id="latents, official"),
    pytest.param(3, {**BLENDED, "blend_timing": "matched"}, id="latents, matched"),
    pytest.param(7, BLENDED, id="latents, too late"),
]


@pytest.mark.parametrize(("step", "case"), CASES)
def test_one_step_equals_the_card(pack, demo, bare, inverted, step, case):
    model, clip, _ = demo
    trajectory = inverted[2]
    levels = trajectory.sigmas.flip(0)
    high, low = levels[step], levels[step + 1]
    z = {s: trajectory.latents[STEPS - i] / (1 + levels[i] ** 2) ** 0.5 for i, s in ((step, "high"), (step + 1, "low"))}
    x = trajectory.latents[STEPS - step]
    x = x + 0.1 * high * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    target = case.get("target_prompt", TARGET)
    official = Official(bare, x.shape[-2:], step, case)
    texts = [text(clip, words)[0][0] for words in (SOURCE, NEGATIVE, target)]
    level = 901 - 100 * step
    uncond, cond = official.run(x / (1 + high**2) ** 0.5, z["low"], level, texts)
    expected = x + (low - high) * (uncond + CFG * (cond - uncond))
    if case.get("blend_latents") and 2 < step + 1 < 8:
        mask = torch.maximum(official.mask(x.shape[-2:]), official.mask_of(official.target_words, x.shape[-2:]))[:, None]
        kept = z["low" if case.get("blend_timing") == "matched" else "high"]
        new = expected / (1 + low**2) ** 0.5
        expected = (kept + mask * (new - kept)) * (1 + low**2) ** 0.5
    if case.get("blend_words") and step < 5:
        assert 0.02 < float(official.mask(x.shape[-2:]).mean()) < 0.98, "a mask that says something"
    edited = edit(pack, demo, trajectory, **{**case, "blend_threshold": official.case["blend_threshold"]})[0]
    scale = model.model.latent_format.scale_factor
    out = sample(demo, edited, x / scale, torch.stack([high, low]), target) * scale
    assert float((out - expected).norm() / (expected - x).norm()) < 1e-4


# ------------------------------------------------------------------------------------------------------ in the graph


@pytest.mark.parametrize("method", ["ddim", "stem"])
def test_its_own_prompt_with_everything_replaced_gives_the_clip_back(pack, demo, method):
    """Within 1 dB of plain sampling from the same inversion, in whatever context."""
    model, _, vae = demo
    noise, sigmas, trajectory, _ = invert(pack, demo, frames=8, steps=10, method=method)
    images = pack.nodes.demo.STEMDemoClip.execute(
        seed=7, frames=8, size=128, colour="red", shape="star", background="grass"
    ).result[0]

    def back(model):
        out = sample(demo, model, noise["samples"], sigmas, SOURCE, SOURCE, cfg=1.0)
        return psnr(core.VAEDecode().decode(vae, {"samples": out})[0], images)

    plain = back(model)
    for context in ("mid", "own"):
        everything = {"target_prompt": SOURCE, "cross_until": 1.0, "self_until": 1.0, "context": context}
        assert back(edit(pack, demo, trajectory, **everything)[0]) > plain - 1, context


def test_the_mask_shows_where_the_words_are(pack, demo, bare, inverted):
    """At the middle level, as the official mask has it there."""
    trajectory = inverted[2]
    official = Official(bare, trajectory.latents.shape[-2:], 4, {"blend_threshold": None})
    below = trajectory.latents[STEPS // 2] / (1 + trajectory.sigmas[STEPS // 2] ** 2) ** 0.5
    official.run(below, below, 501, [text(demo[1], SOURCE)[0][0]] * 3)
    threshold = official.case["blend_threshold"]
    mask = edit(pack, demo, trajectory, blend_words="red star", blend_threshold=threshold)[1]
    expected = official.mask((16, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert mask.shape == (FRAMES, 128, 128) and torch.equal(mask, expected)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    everything = edit(pack, demo, inverted[2], blend_words="red star", blend_threshold=0.0)[1]
    assert everything.min() == 1


def test_nothing_of_the_source_is_computed_in_steps_without_fusion(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    edited, seen = edit(pack, demo, trajectory, cross_until=0.2, self_until=0.3)[0], []

    def count(n, extra_options):
        if extra_options["block"] == ("middle", 0):
            seen.append(len(n))
        return n

    edited.set_model_attn2_output_patch(count)
    sample(demo, edited, noise["samples"], sigmas[:6])
    assert seen == [FRAMES, 2 * FRAMES] * 3 + [2 * FRAMES] * 2


def test_the_memory_of_a_call_is_what_was_announced(pack, demo, inverted, monkeypatch):
    noise, sigmas, trajectory, _ = inverted
    fatezero, layouts = pack.nodes.bridge.fatezero, pack.nodes.bridge.layout
    layout, passes = layouts.read_layout(demo[0]), []
    made = fatezero.Pass
    monkeypatch.setattr(fatezero, "Pass", lambda **given: passes.append(made(**given)) or passes[-1])
    patches, usual = [], fatezero.FateZeroPatch
    monkeypatch.setattr(fatezero, "FateZeroPatch", lambda *given: patches.append(usual(*given)) or patches[-1])
    for context in ("mid", "previous_first", "own"):
        passes.clear()
        sample(demo, edit(pack, demo, trajectory, context=context)[0], noise["samples"], sigmas[:2])
        left = sum(x.nbytes for pair in passes[0].queries.values() for x in pair)
        assert left == fatezero.source_memory(layout, patches[-1], 4)


def test_nothing_of_a_call_is_kept(pack, demo, inverted, monkeypatch):
    noise, sigmas, trajectory, _ = inverted
    fatezero, alive = pack.nodes.bridge.fatezero, []
    made = fatezero.Pass

    def watched(**given):
        assert not any(ref() for ref in alive), "one at a time"
        now = made(**given)
        alive.append(weakref.ref(now))
        return now

    monkeypatch.setattr(fatezero, "Pass", watched)
    sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:4])
    assert len(alive) == 3


def test_memory_is_reserved_for_what_the_source_leaves(pack, demo, inverted, monkeypatch):
    import comfy.sampler_helpers

    noise, sigmas, trajectory, _ = inverted
    seen, usual = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(
        comfy.sampler_helpers,
        "estimate_memory",
        lambda model, shape, conds: seen.append(shape[0]) or usual(model, shape, conds),
    )
    for context in ("mid", "own"):
        sample(demo, edit(pack, demo, trajectory, context=context)[0], noise["samples"], sigmas[:2])
    one = demo[0].model.memory_required([2, 4, 16, 16])
    fatezero, layout = pack.nodes.bridge.fatezero, pack.nodes.bridge.layout.read_layout(demo[0])
    assert FRAMES < seen[0] <= seen[1] and (seen[1] - FRAMES - 1) * one < 4 * sum(
        5 * FRAMES * 256 * block.heads * block.head_dim for block in layout.model.blocks
    )
    assert fatezero.NODE == "STEMFateZero"


def test_the_source_is_shown_its_own_hints(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    control = tiny_controlnet(unet=pack.nodes.bridge.demo_model.UNET_CONFIG)
    control.set_cond_hint(torch.rand(FRAMES, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    [[words, options]] = trajectory.conditioning
    controlled = trajectory._replace(conditioning=[[words, {**options, "control": control}]])
    seen, inner = [], control.control_model.forward
    control.control_model.forward = lambda x, hint, **kw: seen.append(len(x)) or inner(x=x, hint=hint, **kw)
    outs = [sample(demo, edit(pack, demo, t)[0], noise["samples"], sigmas[:2]) for t in (trajectory, controlled)]
    assert seen == [FRAMES] and not torch.allclose(*outs, atol=1e-3)


def test_a_lora_is_the_change_of_weights_that_it_says(pack, demo, bare, inverted):
    noise, sigmas, trajectory, _ = inverted
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


def test_clones_do_not_leak_and_a_second_run_is_the_same(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    model = demo[0]
    plain = sample(demo, model, noise["samples"], sigmas[:3])
    first, second = (edit(pack, demo, trajectory, joint_norm=joint)[0] for joint in (False, True))
    outs = [sample(demo, m, noise["samples"], sigmas[:3]) for m in (first, second, first, model)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[3], plain)
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[0], plain)


def test_cancelling_leaves_the_model_clean(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    edited = edit(pack, demo, trajectory)[0]
    expected, seen, stopping = sample(demo, edited, noise["samples"], sigmas[:3]), [], edited.clone()
    stopping.set_model_attn2_output_patch(
        lambda n, extra: seen.append(1) or (len(seen) == 20 and comfy.model_management.interrupt_current_processing()) or n
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(demo, stopping, noise["samples"], sigmas[:3])
    assert len(seen) < 50
    assert torch.equal(sample(demo, edited, noise["samples"], sigmas[:3]), expected)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_the_target_prompt_alone_is_edited(pack, demo, inverted, cfg):
    noise, sigmas, trajectory, _ = inverted
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
def test_core_samplers_edit_from_the_trajectory(pack, demo, inverted, node):
    noise, sigmas, trajectory, _ = inverted
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


def test_stem_attention_stays_in_the_blocks_that_are_not_fused(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    patched = stem_attention(pack, demo[0], "input_1-2, output_9-11")
    out = sample(demo, edit(pack, demo, trajectory, patched)[0], noise["samples"], sigmas[:3])
    without = sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:3])
    assert out.isfinite().all() and not torch.allclose(out, without)


def test_joint_norms_can_be_queued_again_with_other_words(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    for until in (0.8, 0.5):
        edited = edit(pack, demo, trajectory, joint_norm=True, self_until=until)[0]
        assert sample(demo, edited, noise["samples"], sigmas[:2]).isfinite().all()


def test_a_call_for_another_prompt_alone_is_plain(pack, demo, inverted):
    """As guidance nodes make it after the main call: nothing of the source in it, nothing of it in the masks."""
    noise, sigmas, trajectory, _ = inverted
    settings = {"blend_words": "red star | blue star", "blend_latents": True}
    outs = []
    for asked in (False, True):
        edited = edit(pack, demo, trajectory, **settings)[0]

        def ask(args):
            options = args["model_options"]
            comfy.samplers.calc_cond_batch(args["model"], [args["uncond"]], args["input"], args["timestep"], options)
            comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["timestep"], options)
            return args["conds_out"]

        if asked:
            edited.set_model_sampler_pre_cfg_function(
                lambda args, ask=ask: ask({**args, "uncond": args["conds"][1], "cond": args["conds"][0]})
            )
        outs.append(sample(demo, edited, noise["samples"], sigmas[:6]))
    assert torch.equal(*outs)


def test_a_masked_clip_sampled_from_halfway_keeps_the_source_outside(pack, demo, inverted):
    _, sigmas, trajectory, _ = inverted
    clean = trajectory.latents[0] / demo[0].model.latent_format.scale_factor
    mask = torch.zeros(FRAMES, 1, 128, 128)
    mask[..., :64] = 1
    edited = edit(pack, demo, trajectory)[0]
    guider = comfy.samplers.CFGGuider(edited)
    guider.set_conds(text(demo[1], TARGET), text(demo[1], NEGATIVE))
    guider.set_cfg(CFG)
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(torch.ones_like(clean), clean, euler, sigmas[4:], denoise_mask=mask, disable_pbar=True, seed=0)
    assert float((out - clean)[..., 8:].norm() / clean[..., 8:].norm()) < 1e-5 and not torch.allclose(out, clean, atol=0.05)


# ------------------------------------------------------------------------------------------------- words and tokens


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red star", [("a", 1, 1, 1), ("red", 2, 1, 1), ("star", 3, 1, 1)]),
        ("a photorealistic star", [("a", 1, 1, 1), ("photorealistic", 2, 2, 2), ("star", 4, 1, 1)]),
        ("a star, on grass", [("a", 1, 1, 1), ("star", 2, 2, 1), ("on", 4, 1, 1), ("grass", 5, 1, 1)]),
        ("a (red star:1.3) here", [("a", 1, 1, 1), ("red", 2, 1, 1), ("star", 3, 1, 1), ("here", 4, 1, 1)]),
        (r"star \(style\)", [("star", 1, 1, 1), ("(style)", 2, 3, 3)]),
        ("", []),
    ],
)
def test_words_lie_where_the_tokenizer_puts_them(pack, demo, prompt, words):
    found = pack.nodes.bridge.prompts.read_prompt(demo[1], prompt, "source_prompt")
    assert [tuple(word) for word in found.words] == words
    assert found.tokens[0] == 49406 and found.tokens[-1] == 49407
    assert len(found.tokens) == 2 + sum(word.tokens for word in found.words)


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
def test_wrong_words_are_named(pack, demo, inverted, changes, message):
    with pytest.raises(ValueError, match=f"STEMFateZero: .*{message}"):
        edit(pack, demo, inverted[2], **changes)


def test_a_sampler_with_another_prompt_is_refused(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    with pytest.raises(ValueError, match=r"STEMFateZero: none of the sampler's prompts is its target_prompt"):
        sample(demo, edit(pack, demo, trajectory)[0], noise["samples"], sigmas[:2], "a blue star on water")


def test_two_editors_and_other_models_are_refused(pack, demo, inverted):
    trajectory = inverted[2]
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


def test_an_adapter_in_the_same_place_is_refused(pack, demo, inverted):
    model = demo[0].clone()
    model.set_model_attn2_replace(lambda q, k, v, options: q, "output", 5)
    with pytest.raises(
        ValueError, match=r"cross-attention of block output_5 is already replaced by .*lambda.*blend_words empty"
    ):
        edit(pack, demo, inverted[2], model)


def test_an_adapter_that_comes_later_is_refused(pack, demo, inverted):
    """In any of its ways to name the place."""
    noise, sigmas, trajectory, _ = inverted
    for kind, place in (("attn2", ("output", 5)), ("attn2", ("output", 5, 0)), ("attn1", ("middle", 0, 0))):
        later = edit(pack, demo, trajectory)[0]
        later.set_model_patch_replace(lambda q, k, v, options: q, kind, *place)
        with pytest.raises(
            ValueError, match=rf"STEMFateZero: .*lambda.* comes after it and replaces the .* of block {place[0]}"
        ):
            sample(demo, later, noise["samples"], sigmas[:2])


def stem_attention(pack, model, blocks):
    return pack.nodes.patch.STEMPatchModel.execute(
        model=model, num_bases=16, em_iterations=1, seed=0, start_percent=0.0, end_percent=1.0, temperature=1.0, blocks=blocks
    ).result[0]


def test_stem_attention_on_its_blocks_is_refused_in_both_orders(pack, demo, inverted):
    remedy = r"Leave this block out of `blocks` and set context to own"
    with pytest.raises(ValueError, match=rf"STEMFateZero: .*already replaced by STEMPatchModel.*{remedy}"):
        edit(pack, demo, inverted[2], stem_attention(pack, demo[0], "all"))
    with pytest.raises(ValueError, match=r"STEMPatchModel: .*already replaced by STEMFateZero"):
        stem_attention(pack, edit(pack, demo, inverted[2])[0], "all")


def test_a_clip_inverted_with_several_prompts_is_refused(pack, demo, inverted):
    trajectory = inverted[2]._replace(conditioning=inverted[2].conditioning * 2)
    with pytest.raises(ValueError, match=r"STEMFateZero: the clip was inverted with 2 prompts.* source_prompt alone"):
        edit(pack, demo, trajectory)


def test_words_without_spaces_are_refused(pack, demo, inverted):
    with pytest.raises(ValueError, match=r"the words of target_prompt cannot be told apart: .*Put spaces between them"):
        edit(pack, demo, inverted[2], target_prompt="(a:1.2)(b:1.1) star", reweight="star: 2")


def test_context_windows_are_refused(pack, demo, inverted):
    from comfy import context_windows as windows

    noise, sigmas, trajectory, _ = inverted
    edited = edit(pack, demo, trajectory)[0]
    schedule = windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD)
    fuse = windows.get_matching_fuse_method("pyramid")
    edited.model_options["context_handler"] = windows.IndexListContextHandler(
        schedule, fuse, context_length=3, context_overlap=1
    )
    windows.create_prepare_sampling_wrapper(edited)
    with pytest.raises(ValueError, match=r"STEMFateZero: the model is called with 3 frames, and it needs all 5"):
        sample(demo, edited, noise["samples"], sigmas[:2])


def test_other_samplers_are_refused_where_latents_are_blended(pack, demo, inverted):
    noise, sigmas, trajectory, _ = inverted
    blending = {"blend_words": "red star | blue star", "blend_latents": True}
    guider = comfy.samplers.CFGGuider(edit(pack, demo, trajectory, **blending)[0])
    guider.set_conds(text(demo[1], TARGET), text(demo[1], NEGATIVE))
    start = noise["samples"]
    with pytest.raises(ValueError, match=r"STEMFateZero: blend_latents works on the straight steps of euler and ddim"):
        guider.sample(torch.zeros_like(start), start, comfy.samplers.sampler_object("heun"), sigmas[:3], disable_pbar=True)
    guider = comfy.samplers.CFGGuider(edit(pack, demo, trajectory)[0])
    guider.set_conds(text(demo[1], TARGET), text(demo[1], NEGATIVE))
    out = guider.sample(torch.zeros_like(start), start, comfy.samplers.sampler_object("heun"), sigmas[:3], disable_pbar=True)
    assert out.isfinite().all()
