"""Every cell of doc/compatibility.md, with small models, in both orders of two nodes on a model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import comfy.hooks
import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.controlnet import ControlNet
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import DualCFGGuider
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_tomesd import TomePatchModel
from fatezero_card import DEFAULTS as FATEZERO
from fatezero_card import NEGATIVE, SOURCE, TARGET, text
from models import clip_latents, prompt, tiny_clip, tiny_controlnet, tiny_model

import nodes as core

DOCUMENT = Path(__file__).parents[2] / "doc" / "compatibility.md"
FRAMES, STEPS, CFG = 5, 3, 3.0
EM = {"num_bases": 8, "em_iterations": 2, "seed": 0, "temperature": 0.1, "blocks": "all"}
TOKENFLOW = {
    "mode": "pnp", "keyframe_every": 2, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all", "blend": "official",
    "keyframes": "fixed",
}  # fmt: skip
NODES = {
    "STEM Invert Latents": "STEMInvertLatents", "STEM Patch Model": "STEMPatchModel", "STEM TokenFlow": "STEMTokenFlow",
    "STEM FateZero": "STEMFateZero",
}  # fmt: skip


def table(text: str) -> dict[tuple[str, str], str]:
    """The cells of the document's first table, by row and column."""
    lines = text.split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *columns), _, *rows = rows
    return {(row[0], column): cell for row in rows for column, cell in zip(columns, row[1:], strict=True)}


CELLS = table(DOCUMENT.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- what others do


def scaled(factor: float, place: tuple, kind: str) -> Callable:
    def replaced(q, k, v, extra_options):
        return factor * optimized_attention(q, k, v, extra_options["n_heads"], transformer_options=extra_options)

    def put(model):
        model = model.clone()
        model.set_model_patch_replace(replaced, kind, *place)
        return model

    return put


def heavier(model, factor: float, *layers: str):
    """The weights of these layers of every self-attention times a factor."""
    model = model.clone()
    found = [n for n, _ in model.model.named_parameters() if any(f".attn1.{layer}." in n for layer in layers)]
    model.add_patches({name: ("diff", (torch.zeros(1),)) for name in found}, 0.0, factor)
    return model


def reading(factor: float) -> Callable:
    def put(model):
        model = model.clone()
        model.set_model_attn1_patch(lambda n, context, value, extra_options: (n, factor * context, factor * value))
        return model

    return put


def giving(factor: float) -> Callable:
    def put(model):
        model = model.clone()
        model.set_model_attn1_output_patch(lambda n, extra_options: factor * n)
        return model

    return put


def attending(factor: float) -> Callable:
    def override(function, *args, **kwargs):
        return factor * function(*args, **kwargs)

    def put(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    return put


def tiled(size: int) -> Callable:
    return lambda model: HyperTile.execute(model, tile_size=size, swap_size=1, max_depth=0, scale_depth=False)[0]


def compiled(model):
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    return model


def windows(length: int) -> Callable:
    return lambda model: ContextWindowsManualNode.execute(
        model, context_length=length, context_overlap=1, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    ).result[0]  # fmt: skip


def hooked(strength: float) -> Callable:
    """A LoRA hook on a prompt, as core's nodes make it."""
    name, g = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k", torch.Generator().manual_seed(0)
    parts = {"up": (32, 4), "down": (4, 32)}
    lora = {f"{name}.lora_{part}.weight": torch.randn(shape, generator=g) for part, shape in parts.items()}
    group = comfy.hooks.create_hook_lora(lora, strength, 0.0)
    return lambda conditioning: [[text, {**options, "hooks": group}] for text, options in conditioning]


def controlled(strength: float, kind: type = ControlNet) -> Callable:
    hint = torch.rand(FRAMES, 64, 128, 3, generator=torch.Generator().manual_seed(5))

    def put(conditioning):
        net = tiny_controlnet()
        net.__class__ = kind
        [changed], _ = core.ControlNetApplyAdvanced().apply_controlnet([conditioning[0]], [], net, hint, strength, 0.0, 1.0)
        return [changed]

    return put


class AdvancedControl(ControlNet):
    """What Advanced-ControlNet's ControlNets read of a call, and how they choose their hints."""

    sub_idxs = full_latent_length = context_length = None

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        told = transformer_options.get("ad_params")
        if told is not None:
            self.sub_idxs, self.full_latent_length = told["sub_idxs"], told["full_length"]
            self.context_length = told["context_length"]
        whole, self.cond_hint = self.cond_hint_original, None
        try:
            if self.sub_idxs is not None:
                self.cond_hint_original = whole[self.sub_idxs]
            return super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        finally:
            self.cond_hint_original, self.sub_idxs = whole, None

    def copy(self):
        copied = super().copy()
        copied.__class__ = AdvancedControl
        return copied


def animatediff(length: int | None) -> Callable:
    """AnimateDiff-Evolved: it tells every call its frames, and with context options calls for one window after the other."""

    def predict(executor, x, timestep, model_options, seed=None):
        told = {"full_length": len(x), "context_length": length, "sub_idxs": None}
        options = {**model_options.get("transformer_options", {}), "ad_params": told}
        return executor(x, timestep, {**model_options, "transformer_options": options}, seed)

    def one_by_one(executor, model, conds, x, timestep, model_options):
        told = model_options["transformer_options"]["ad_params"]
        starts = range(0, len(x), length)
        outs = [torch.empty_like(x) for _ in conds]
        for start in starts:
            ids = list(range(len(x)))[start : start + length]
            told.update(sub_idxs=ids, context_length=len(ids))
            parts = executor(model, conds, x[ids], timestep[ids], model_options)
            for out, part in zip(outs, parts, strict=True):
                out[ids] = part
        told["sub_idxs"] = None
        return outs

    def put(model):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "ADE", predict)
        if length is not None:
            model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "ADE", one_by_one)
        return model

    return put


def adapted(strength: float) -> Callable:
    """IPAdapter_plus: an object on every cross-attention, but that of the middle has a number that core does not ask for."""
    places = [("input", i) for i in (1, 2, 4, 5, 7, 8)] + [("output", i) for i in range(3, 12)] + [("middle", 1)]

    class Adapter:
        def __init__(self):
            self.times = 1

        def add(self):
            self.times += 1

        def __call__(self, q, k, v, extra_options):
            heads, ids = extra_options["n_heads"], (extra_options.get("ad_params") or {}).get("sub_idxs")
            rows = len(q) // len(extra_options["cond_or_uncond"])
            picture = torch.randn(FRAMES, 4, k.shape[-1], generator=torch.Generator().manual_seed(1))
            picture = (picture if ids is None else picture[ids])[:rows].repeat(len(q) // rows, 1, 1).to(q)
            return optimized_attention(q, k, v, heads) + self.times * strength * optimized_attention(q, picture, picture, heads)

    def put(model):
        model = model.clone()
        taken = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for place in places:
            if place in taken:
                taken[place].add()
            else:
                model.set_model_attn2_replace(Adapter(), *place)
        return model

    return put


def same(thing):
    return thing


@dataclass(frozen=True)
class Other:
    """Another node, in a setting that acts and one that does nothing; and another way to what it does."""

    model: Callable = same  # of a model
    idle_model: Callable | None = None
    positive: Callable = same  # of the prompt that is inverted with or edited to
    idle_positive: Callable | None = None
    guider: Callable | None = None  # of model, positive and negative
    idle_guider: Callable | None = None
    equal: "Other | None" = None  # does the same
    message: str = ""  # when refused
    rounding: float = 0.0  # of the idle setting and the other way

    @property
    def idle(self) -> "Other | None":
        given = self.idle_model, self.idle_positive, self.idle_guider
        if not any(given):
            return None
        return Other(self.idle_model or same, positive=self.idle_positive or same, guider=self.idle_guider)


PLAIN = Other()
PLACE, BLOCK = ("middle", 0), "middle_0"
TAKEN = f"block {BLOCK} is already replaced by .*scaled|scaled.* comes after it and replaces .* block {BLOCK}"
TOKENS = r"another node changes its tokens \(HyperTile, ToMe patch"
OTHERS = {
    "another replacement of self-attention, for a block": Other(scaled(1.1, PLACE, "attn1"), message=TAKEN),
    "another replacement of self-attention, for one transformer of a block": Other(
        scaled(1.1, (*PLACE, 0), "attn1"), message=TAKEN
    ),
    "another replacement of cross-attention, for a block": Other(
        scaled(2.0, PLACE, "attn2"),
        scaled(1.0, PLACE, "attn2"),
        message=f"cross-attention of block {BLOCK} is already replaced by .*scaled|.*scaled.* replaces the cross-attention",
    ),
    "a change of what self-attention reads (`attn1_patch`)": Other(
        reading(0.5), reading(1.0), equal=Other(lambda m: heavier(m, 0.5, "to_k", "to_v")), rounding=1e-4
    ),
    "a change of what self-attention gives (`attn1_output_patch`)": Other(
        giving(0.5), giving(1.0), equal=Other(lambda m: heavier(m, 0.5, "to_out.0")), rounding=1e-4
    ),
    "another attention function (`optimized_attention_override`)": Other(attending(0.8), attending(1.0)),
    "HyperTile": Other(tiled(1), tiled(2048), message=TOKENS),
    "ToMe Patch Model": Other(
        lambda m: TomePatchModel.execute(m, ratio=0.5).result[0],
        lambda m: TomePatchModel.execute(m, ratio=0.0).result[0],
        message=TOKENS,
    ),
    "FreeU": Other(
        lambda m: FreeU.execute(m, b1=1.2, b2=1.4, s1=0.9, s2=0.2).result[0],
        lambda m: FreeU.execute(m, b1=1.0, b2=1.0, s1=1.0, s2=1.0).result[0],
        rounding=1e-4,  # it goes to frequencies and back
    ),
    "Perturbed-Attention Guidance": Other(
        lambda m: PerturbedAttentionGuidance.execute(m, 3.0).result[0],
        lambda m: PerturbedAttentionGuidance.execute(m, 0.0).result[0],
    ),
    "Self-Attention Guidance": Other(
        lambda m: SelfAttentionGuidance.execute(m, 0.5, 2.0).result[0],
        message=f"block {BLOCK} is already replaced by .*nodes_sag|nodes_sag comes after it and replaces .* block {BLOCK}",
    ),
    "Skip Layer Guidance (of DiT models)": Other(
        lambda m: SkipLayerGuidanceDiT.execute(m, scale=3.0, start_percent=0.0, end_percent=1.0, double_layers="1").result[0]
    ),
    "a LoRA hook on one prompt": Other(positive=hooked(0.5), idle_positive=hooked(0.0), rounding=1e-4),  # calls are apart
    "ControlNet": Other(positive=controlled(0.8), idle_positive=controlled(0.0), rounding=1e-4),
    "torch.compile (backend eager)": Other(idle_model=compiled),
    "Context Windows (Manual)": Other(
        windows(3), windows(FRAMES), message="context windows would tear|the model is called with 3 frames, and it needs all 5"
    ),
    "Dual CFG Guider": Other(
        guider=lambda m, p, n: DualCFGGuider.execute(m, p, prompt(9), n, CFG, 1.5, "regular").result[0],
        idle_guider=lambda m, p, n: DualCFGGuider.execute(m, p, n, n, CFG, 1.5, "regular").result[0],
        rounding=1e-3,
    ),
    "Perp-Neg Guider": Other(
        guider=lambda m, p, n: PerpNegGuider.execute(m, p, n, prompt(9), CFG, 1.0).result[0],
        idle_guider=lambda m, p, n: PerpNegGuider.execute(m, p, prompt(9), n, CFG, 0.0).result[0],
        rounding=1e-4,
    ),
    "AnimateDiff-Evolved, whole clip": Other(idle_model=animatediff(None), message="AnimateDiff's motion modules need all"),
    "AnimateDiff-Evolved, context options": Other(
        animatediff(3),
        animatediff(FRAMES),
        message="AnimateDiff's motion modules need all|the model is called with 3 frames, and it needs all 5",
    ),
    "Advanced-ControlNet": Other(
        positive=controlled(0.8, AdvancedControl),
        idle_positive=controlled(0.0, AdvancedControl),
        equal=Other(positive=controlled(0.8)),
        rounding=1e-4,
    ),
    "IPAdapter_plus": Other(
        adapted(0.5),
        adapted(0.0),
        message="is already replaced by .*Adapter|IPAdapter comes after it and adds to the cross-attention of block input_4",
    ),
}


# ------------------------------------------------------------------------------------------------- what ours do


@dataclass(frozen=True)
class Graph:
    """The inversion and the three nodes that act while a sampler runs, with what they need."""

    pack: object
    model: object
    clip: object
    prompts: dict
    trajectory: object
    start: torch.Tensor
    sigmas: torch.Tensor

    def run(self, node: str, other: Other, order: str = "before") -> torch.Tensor:
        """Latents; `order` is that of the other node, before or after ours."""
        model, source = self.model, self.prompts[SOURCE]
        if node == "STEMInvertLatents":
            return invert(self.pack, other.model(model), other.positive(source), method="stem")[0]["samples"]
        model = self.put(node, other.model(model)) if order == "before" else other.model(self.put(node, model))
        return self.sample(model, other)

    def put(self, node: str, model):
        nodes = self.pack.nodes
        if node == "STEMPatchModel":
            return nodes.patch.STEMPatchModel.execute(model=model, start_percent=0.0, end_percent=1.0, **EM).result[0]
        if node == "STEMTokenFlow":
            return nodes.tokenflow.STEMTokenFlow.execute(model=model, trajectory=self.trajectory, **TOKENFLOW).result[0]
        given = {"model": model, "trajectory": self.trajectory, "clip": self.clip, **FATEZERO}
        return nodes.fatezero.STEMFateZero.execute(**given).result[0]

    def sample(self, model, other: Other) -> torch.Tensor:
        positive, negative = other.positive(self.prompts[TARGET]), self.prompts[NEGATIVE]
        guider = other.guider(model, positive, negative) if other.guider else comfy.samplers.CFGGuider(model)
        if not other.guider:
            guider.set_conds(positive, negative)
            guider.set_cfg(CFG)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(torch.zeros_like(self.start), self.start, euler, self.sigmas, disable_pbar=True, seed=0)

    def without_ours(self, node: str, other: Other) -> torch.Tensor:
        if node == "STEMInvertLatents":
            positive = other.positive(self.prompts[SOURCE])
            return invert(self.pack, other.model(self.model), positive, method="ddim")[0]["samples"]
        return self.sample(other.model(self.model), other)


def invert(pack, model, positive, method):
    given = {"latents": clip_latents(FRAMES), "positive": positive, "steps": STEPS, "method": method, "frames_per_em": 0}
    return pack.nodes.invert.STEMInvertLatents.execute(model=model, **given, **EM).result


@pytest.fixture(scope="module")
def graph(pack):
    with torch.inference_mode():
        model, clip = tiny_model(), tiny_clip()
        prompts = {words: text(clip, words) for words in (SOURCE, TARGET, NEGATIVE)}
        latents, sigmas, trajectory, _ = invert(pack, model, prompts[SOURCE], method="ddim")
    yield Graph(pack, model, clip, prompts, trajectory, latents["samples"], sigmas)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def plain(graph):
    """What our nodes give alone."""
    with torch.inference_mode():
        return {node: graph.run(node, PLAIN) for node in NODES.values()}


def near(a: torch.Tensor, b: torch.Tensor, rounding: float) -> bool:
    return torch.equal(a, b) if not rounding else bool((a - b).norm() <= rounding * b.norm())


def cells(*kinds: str) -> list:
    """Row, node and order of the document's cells of some kinds."""
    found = []
    for (row, column), cell in CELLS.items():
        other, node = OTHERS[row], NODES[column]
        changes_model = other.model is not same or other.idle_model is not None
        orders = ("before", "after") if changes_model and node != "STEMInvertLatents" else ("before",)
        found += [pytest.param(row, node, order, id=f"{row}-{node}-{order}") for order in orders if cell in kinds]
    return found


def test_the_document_has_all_rows_and_columns():
    assert set(CELLS) == set(product(OTHERS, NODES)) and set(CELLS.values()) <= {"yes", "nothing", "refused", "–"}


@pytest.mark.parametrize(("row", "node", "order"), cells("yes"))
def test_both_act(graph, plain, row, node, order):
    other = OTHERS[row]
    if other.idle is not None:
        found = graph.run(node, other.idle, order)
        assert near(found, plain[node], other.rounding), "a setting that does nothing"
        assert not near(found, graph.without_ours(node, other.idle), 1e-3), "ours acts"
    if changes_nothing(other):
        return
    found = graph.run(node, other, order)
    assert found.isfinite().all()
    assert not near(found, plain[node], 1e-3), "the other acts"
    assert not near(found, graph.without_ours(node, other), 1e-3), "ours acts"
    if other.equal is not None:
        assert near(found, graph.run(node, other.equal, order), other.rounding)


@pytest.mark.parametrize(("row", "node", "order"), cells("nothing"))
def test_the_other_has_no_part_in_it(graph, plain, row, node, order):
    assert near(graph.run(node, OTHERS[row], order), plain[node], 1e-4)


@pytest.mark.parametrize(("row", "node", "order"), cells("refused"))
def test_it_is_refused(graph, row, node, order):
    with pytest.raises(ValueError, match=OTHERS[row].message) as refused:
        graph.run(node, OTHERS[row] if OTHERS[row].model is not same else OTHERS[row].idle, order)
    assert str(refused.value).startswith(f"{node}: ")


def changes_nothing(other: Other) -> bool:
    """Whether nothing of it changes a result."""
    return other.model is same and other.positive is same and other.guider is None
