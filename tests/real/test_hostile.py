"""Hostile inputs through ComfyUI's own validation and execution: a right result, or one line that names the node and input."""

import asyncio
import copy
import math
from typing import Any, NamedTuple

import execution
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom
from fatezero_card import DEFAULTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_clip, tiny_model

import nodes as core

LINE = 600  # characters of a message
OBJECTS: dict[str, Any] = {}
"""What `Emit` gives, by name."""

RESULTS: dict[str, Any] = {}
"""What `Keep` was given, by the id of its node."""


class Emit(io.ComfyNode):
    """Stands for another pack's node: any value, on a socket that fits anything."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestEmit", inputs=[io.String.Input("name")], outputs=[io.AnyType.Output()])

    @classmethod
    def execute(cls, name):
        return io.NodeOutput(OBJECTS[name])


class Keep(io.ComfyNode):
    """An output node that lets the test see what reached it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestKeep",
            inputs=[io.AnyType.Input("value")],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # another one each time: it always runs

    @classmethod
    def execute(cls, value):
        RESULTS[cls.hidden.unique_id] = value
        return io.NodeOutput()


class Events:
    """What the executor wants of a server: somebody to tell what happens."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.told, self.sockets_metadata = [], {}

    def send_sync(self, event, data, sid=None):
        self.told.append((event, data))

    def send_progress_text(self, *_, **__):
        pass


# --------------------------------------------------------------------------------------------------------- the good graph

EM = {"num_bases": 4, "em_iterations": 1, "seed": 0, "temperature": 1.0, "blocks": "all"}
SOURCE, TARGET = DEFAULTS["source_prompt"], DEFAULTS["target_prompt"]


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def good_graph(saved):
    fatezero = {
        **DEFAULTS,
        "blend_words": "star | star",
        "model": ["demo", 0],
        "trajectory": ["invert", 2],
        "clip": ["demo", 1],
    }
    tokenflow = {"mode": "pnp", "keyframe_every": 2, "qk_until": 0.5, "conv_until": 0.8, "seed": 0, "blocks": "all"}
    look = {"block": "output_8", "noise_level": 0.5, "opacity": 0.7, "head": 0}
    clips = {"images_1": ["clip", 0], "images_2": ["clip", 0], "images_3": ["clip", 0]}
    labels = {"label_1": "source", "label_2": "", "label_3": "", "label_4": ""}
    clip = {"seed": 7, "frames": 3, "size": 64, "colour": "red", "shape": "star", "background": "grass"}
    how = {"steps": 2, "method": "stem", "frames_per_em": 0, "frames_per_batch": 0, "trajectory_dtype": "float32"}
    how |= {"trajectory_on_disk": False, "warm_iterations": 0, "resume": ""}
    source = {"model": ["demo", 0], "latents": ["encode", 0], "positive": ["text", 0]}
    graph = {
        "demo": node("STEMDemoModel"),
        "clip": node("STEMDemoClip", **clip),
        "text": node("CLIPTextEncode", text=SOURCE, clip=["demo", 1]),
        "target": node("CLIPTextEncode", text=TARGET, clip=["demo", 1]),
        "encode": node("VAEEncode", pixels=["clip", 0], vae=["demo", 2]),
        "estimate": node("STEMBasisEstimate", **source, **EM, steps=2, keyframes=2, warm_iterations=0),
        "invert": node("STEMInvertLatents", **source, **EM, **how, basis=["estimate", 0]),
        "patch": node("STEMPatchModel", model=["demo", 0], basis=["estimate", 0], **EM, start_percent=0.0, end_percent=1.0),
        "tokenflow": node(
            "STEMTokenFlow", model=["demo", 0], trajectory=["invert", 2], **tokenflow, blend="official", keyframes="fixed"
        ),
        "fatezero": node("STEMFateZero", **fatezero),
        "preview": node(
            "STEMBasisPreview",
            model=["demo", 0],
            basis=["estimate", 0],
            trajectory=["invert", 2],
            images=["clip", 0],
            **look,
        ),
        "report": node("STEMInversionReport", trajectory=["invert", 2], source=["clip", 0], reconstruction=["clip", 0]),
        "compare": node("STEMCompareVideos", **clips, **labels, columns=0),
        "save": node(
            "STEMSaveInversion",
            latents=["invert", 0],
            trajectory=["invert", 2],
            basis=["invert", 3],
            filename_prefix="new/x",
        ),
        "save_basis": node("STEMSaveBasis", basis=["estimate", 0], filename_prefix="new/x"),
        "load": node("STEMLoadInversion", file=saved["inversion"]),
        "load_basis": node("STEMLoadBasis", file=saved["basis"]),
        "euler": node("KSamplerSelect", sampler_name="euler"),
    }
    for name in ("patch", "tokenflow", "fatezero"):
        graph[f"sample_{name}"] = node(
            "SamplerCustom", model=[name, 0], add_noise=False, noise_seed=0, cfg=2.0, positive=["target", 0],
            negative=["text", 0], sampler=["euler", 0], sigmas=["invert", 1], latent_image=["invert", 0],
        )  # fmt: skip
    for name in list(graph):
        kind = core.NODE_CLASS_MAPPINGS[graph[name]["class_type"]]
        if name in NODES:
            for slot in range(len(kind.RETURN_TYPES)):
                graph[f"keep {name} {slot}"] = node("TestKeep", value=[name, slot])
        elif name.startswith("sample_"):
            graph[f"keep {name.removeprefix('sample_')} sample"] = node("TestKeep", value=[name, 0])
    return graph


NODES = ["clip", "estimate", "invert", "patch", "tokenflow", "fatezero", "preview", "report", "compare", "save", "save_basis"]
NODES += ["load", "load_basis"]


class Outcome(NamedTuple):
    """Of one graph."""

    refused: dict  # errors of the validation, by node
    failures: list[dict]  # errors of the execution
    results: dict[str, Any]


class Host:
    """ComfyUI's validation and execution, with its cache."""

    def __init__(self):
        self.server = Events()
        self.executor = execution.PromptExecutor(self.server, cache_args={"ram": 0, "ram_inactive": 0})

    def run(self, graph, name):
        """The outputs of one node of a graph."""
        graph = copy.deepcopy(graph)
        wanted = [each for each in graph if each.startswith(f"keep {name} ")]
        valid, error, outputs, refused = asyncio.run(execution.validate_prompt("x", graph, wanted))
        if not valid:
            return Outcome(refused or {"": error}, [], {})
        RESULTS.clear()
        self.server.told.clear()
        self.executor.execute(graph, "x", {"client_id": "x"}, outputs)
        failures = [data for event, data in self.server.told if event == "execution_error"]
        return Outcome(refused, failures, dict(RESULTS))


@pytest.fixture(scope="module")
def host(pack, tmp_path_factory):
    root = tmp_path_factory.mktemp("comfyui")
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        for name in ("output", "input", "temp"):
            (root / name).mkdir()
            patched.setattr(folder_paths, f"{name}_directory", str(root / name))
        kinds = [*pack.nodes.NODES, Emit, Keep, SamplerCustom, KSamplerSelect]
        for kind in kinds:
            patched.setitem(core.NODE_CLASS_MAPPINGS, kind.GET_SCHEMA().node_id, kind)
        yield Host()


@pytest.fixture(scope="module")
def graph(host):
    """The good graph, after its first run has made the files that it loads."""
    made = good_graph({"inversion": "", "basis": ""})
    saved = {
        "inversion": host.run(made, "save").results["keep save 0"],
        "basis": host.run(made, "save_basis").results["keep save_basis 0"],
    }
    with torch.inference_mode():
        OBJECTS.update(objects(host.run(made, "invert").results, host.run(made, "estimate").results))
    return good_graph(saved)


@pytest.fixture(scope="module")
def first(graph):
    """Results of the good graph by node, from a host of its own."""
    host = Host()
    return {name: numbers(host.run(graph, name).results) for name in NODES}


def numbers(result):
    """All tensors of a result, with texts other than names of files."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):  # core leaves the projection to the pooled vector uninitialised without weights
        return [one for name, each in sorted(result.items()) if name != "pooled_output" for one in numbers(each)]
    if isinstance(result, (tuple, list)):
        return [one for each in result for one in numbers(each)]
    if hasattr(result, "archive") or hasattr(result, "folder"):
        return [result[i] for i in range(len(result))]
    return []


# --------------------------------------------------------------------------------------------------- what is hostile in it


def objects(inverted, estimated):
    """Values of the right kind for a socket with wrong content: "KIND: what it is"."""
    latents, trajectory, basis = inverted["keep invert 0"], inverted["keep invert 2"], estimated["keep estimate 0"]
    [[text, options]], clean = trajectory.conditioning, latents["samples"]
    images, path = torch.full((3, 64, 64, 3), 0.5), trajectory.latents
    odd = {"nan": math.nan, "inf": math.inf, "huge": 3e38}
    other = basis.model._replace(family="SD20")

    def spoilt(x, value):
        return torch.where(torch.arange(x.numel()).reshape(x.shape) == x.numel() // 2, value, x)

    found = {
        "LATENT": {
            **{name: {"samples": spoilt(clean, value)} for name, value in odd.items()},
            "no frames": {"samples": clean[:0]},
            "no pixels": {"samples": clean[..., :0]},
            "video": {"samples": clean.transpose(0, 1)[None]},
            "three channels": {"samples": clean[:, :3]},
            "no samples": {},
            "samples of None": {"samples": None},
            "no dictionary": clean,
            "one pixel": {"samples": clean[..., :1, :1]},
            "odd": {"samples": clean[..., :3, :5]},
            "whole numbers": {"samples": clean.long()},
            "double": {"samples": clean.double()},
            "odd mask": {"samples": clean, "noise_mask": torch.ones(7, 3, 5)},
        },
        "IMAGE": {
            **{name: spoilt(images, value) for name, value in odd.items()},
            "no frames": images[:0],
            "no pixels": images[:, :0],
            "grey": images[..., :1],
            "alpha": torch.cat([images, images[..., :1]], -1),
            "one frame": images[0],
            "one pixel": images[:, :1, :1],
            "other size": images[:, :20, :50],
            "other length": images[:2],
            "bytes": (255 * images).to(torch.uint8),
        },
        "CONDITIONING": {
            "empty": [],
            **{name: [[spoilt(text, value), options]] for name, value in odd.items()},
            "other width": [[text[..., :10], options]],
            "no tokens": [[text[:, :0], options]],
            "odd mask": [[text, {**options, "mask": torch.ones(5, 3, 7)}]],
            "mask of nan": [[text, {**options, "mask": torch.full((1, 64, 64), math.nan)}]],
            "mask of nothing": [[text, {**options, "mask": torch.zeros(1, 64, 64)}]],
            "no options": [[text, {}]],
        },
        "MODEL": {name: tiny_model(name) for name in ("sd2", "sdxl", "svd", "dit")},
        "CLIP": {name: tiny_clip(name) for name in ("sd15", "sd2", "sdxl")},
        "STEM_TRAJECTORY": {
            **{name: trajectory._replace(latents=spoilt(path, value)) for name, value in odd.items()},
            "other model": trajectory._replace(model=other),
            "no prompt": trajectory._replace(conditioning=[]),
        },
        "STEM_BASIS": {
            "nan": basis._replace(keys=tuple(spoilt(keys, math.nan) for keys in basis.keys)),
            "nan in values": basis._replace(values=tuple(spoilt(values, math.nan) for values in basis.values)),
            "other model": basis._replace(model=other),
            "one block": basis._replace(keys=basis.keys[:1], values=basis.values[:1], blocks=basis.blocks[:1]),
            "other heads": basis._replace(keys=tuple(keys[:, :3] for keys in basis.keys)),
            "no blocks": basis._replace(keys=(), values=(), blocks=()),
        },
    }
    return {f"{kind}: {name}": value for kind, values in found.items() for name, value in values.items()}


WRONG = [None, "", " ", "abc", "nan", "\0", "ä雨\n", "x" * 10_000, "\ud800", {}, {"a": 1}, True, -1, 2**70, -(2**70)]
WRONG += [math.nan, math.inf, -math.inf, 1e300, -0.5, "7", "../../x", "output_4, nonsense", "999999999999", [], ["a"]]


def hostile_values(given_input):
    """Of a widget: what no widget would give, and its own limits where they are cheap."""
    limits = [getattr(given_input, edge, None) for edge in ("min", "max")]
    beyond = [limit + way for limit, way in zip(limits, (-1, 1), strict=True) if limit is not None]
    return st.one_of(st.sampled_from([*WRONG, *beyond, *limits[:1]]), st.text(max_size=30))


def inputs_of(kind):
    return core.NODE_CLASS_MAPPINGS[kind].GET_SCHEMA().inputs


def is_link(value):
    return isinstance(value, list) and len(value) == 2


# ------------------------------------------------------------------------------------------------------------- what is demanded


def check(outcome, name, kind, changed, is_widget):
    """A right result, or one line that names the node (and a widget's input)."""
    if outcome.refused:
        [(where, told)] = outcome.refused.items()
        assert where == name and told["class_type"] == kind
        named = [error["extra_info"].get("input_name", error["details"]) for error in told["errors"]]
        assert named and set(named) <= {changed}, told["errors"]
        return
    for failure in outcome.failures:
        text = failure["exception_message"].removeprefix("Execution Blocked: ").strip()
        if failure["node_type"] == "SamplerCustom" and changed == "model":
            continue  # core's word on latents and prompts of another family
        assert failure["exception_type"] in ("ValueError", "OSError", "ExecutionBlocked"), failure
        assert text.startswith(f"{kind}: "), text
        assert len(text) <= LINE and "\n" not in text, text
        assert not is_widget or changed in text, text
    if not outcome.failures:
        check_results(outcome.results)


def check_results(results):
    assert results
    for value in results.values():
        assert isinstance(value, (torch.Tensor, dict, tuple, str, ModelPatcher))
        assert all(tensor.isfinite().all() and tensor.numel() for tensor in numbers(value)), value
    for images in (value for value in results.values() if isinstance(value, torch.Tensor) and value.ndim == 4):
        assert images.shape[-1] == 3 and images.min() >= 0 and images.max() <= 1


def check_the_good_graph(host, graph, first, name):
    outcome = host.run(graph, name)
    assert not outcome.refused and not outcome.failures
    check_results(outcome.results)
    found = numbers(outcome.results)
    assert len(found) == len(first[name]) and all(map(torch.equal, found, first[name]))


@pytest.mark.parametrize("name", NODES)
def test_widgets(host, graph, first, name):
    kind = graph[name]["class_type"]
    widgets = [
        each for each in inputs_of(kind) if each.id in graph[name]["inputs"] and not is_link(graph[name]["inputs"][each.id])
    ]
    if not widgets:
        pytest.skip("it has sockets alone")
    drawn = st.sampled_from(widgets).flatmap(lambda each: st.tuples(st.just(each.id), hostile_values(each)))

    @settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(drawn)
    def one_widget(change):
        changed, value = change
        hostile = {**graph, name: node(kind, **{**graph[name]["inputs"], changed: value})}
        check(host.run(hostile, name), name, kind, changed, True)

    one_widget()
    check_the_good_graph(host, graph, first, name)


@pytest.mark.parametrize("name", [name for name in NODES if name not in ("clip", "load", "load_basis")])
def test_sockets(host, graph, first, name):
    kind, wrong = graph[name]["class_type"], []
    for each in inputs_of(kind):
        for what in (what for what in OBJECTS if what.startswith(f"{each.get_io_type()}: ")):
            emitted = {**graph, "emit": node("TestEmit", name=what)}
            emitted[name] = node(kind, **{**graph[name]["inputs"], each.id: ["emit", 0]})
            try:
                check(host.run(emitted, name), name, kind, each.id, False)
            except AssertionError as error:
                wrong.append(f"{each.id} = {what}: {str(error)[:700]}")
    assert not wrong, "\n\n".join(wrong)
    check_the_good_graph(host, graph, first, name)


def test_links_of_another_type_are_refused(host, graph):
    for name in NODES:
        kind = graph[name]["class_type"]
        for each in inputs_of(kind):
            if is_link(graph[name]["inputs"].get(each.id)):
                hostile = {**graph, name: node(kind, **{**graph[name]["inputs"], each.id: ["euler", 0]})}
                outcome = host.run(hostile, name)
                assert each.id in outcome.refused[name]["errors"][0]["details"]


def test_the_good_graph_is_as_it_was(host, graph, first):
    again = Host()
    for name in NODES:
        check_the_good_graph(again, graph, first, name)
