"""The demo's graphs on a running server, short and small; and graphs with something wrong in them."""

from itertools import count

import av
import pytest
import torch

from stem.metrics import psnr
from tools.demo import load_graph, previews, provide_real_clip
from tools.server import Graph, GraphError, GraphInterrupted

STEPS, FRAMES, SIZE = 3, 4, 64
SHORT = {  # inputs of a class of nodes that keep a test quick
    "STEMDemoClip": {"frames": FRAMES, "size": SIZE},
    "STEMBasisEstimate": {"keyframes": 3},
    "STEMTokenFlow": {"keyframe_every": 2},
    "ImageFromBatch": {"length": FRAMES},
    "ImageScale": {"width": 2 * SIZE, "height": SIZE},
}
attempts = count()


def short(name: str) -> Graph:
    """A graph of the demo with few steps and frames."""
    graph = load_graph(name, STEPS)
    for node in graph.values():
        node["inputs"] |= SHORT.get(node["class_type"], {})
    return graph


def fresh(graph: Graph) -> Graph:
    """The graph with an input that no node reads: the server's cache, which compares inputs, misses it."""
    graph["clip"]["inputs"]["attempt"] = next(attempts)
    return graph


def node(class_type: str, **inputs) -> Graph:
    return {"wrong": {"class_type": class_type, "inputs": inputs}}


@pytest.mark.parametrize(
    ("name", "clips", "width", "near"),
    [  # near: dB of the reconstruction; noise added, or the source in place of its noise, cost 4 dB and more each
        ("reconstruct", {"source", "autoencoder", "reconstruction"}, SIZE, 30),
        ("edit", {"source", "edit"}, SIZE, None),
        ("tokenflow", {"source", "edit"}, SIZE, None),
        ("fatezero", {"source", "edit"}, SIZE, None),
        ("controlnet", {"source", "edges", "edit"}, SIZE, None),
        ("long_clip", {"source", "autoencoder", "reconstruction"}, SIZE, 30),
        ("real_clip", {"source", "autoencoder", "reconstruction"}, 2 * SIZE, 22.5),
    ],
)
def test_frames_come_out(server, name, clips, width, near):
    provide_real_clip(server)
    seen = []
    entry = server.run(fresh(short(name)), seen.append)
    previewed = previews(server, entry)
    assert previewed.keys() == clips
    for clip in previewed.values():
        assert clip.shape == (FRAMES, SIZE, width, 3)
        assert clip.std(dim=(1, 2, 3)).min() > 0.01  # what is not finite becomes a black frame
    if near is not None:
        assert psnr(previewed["reconstruction"], previewed["autoencoder"]) > near
    (file,) = entry["outputs"]["save"]["images"]
    saved = server.output_directory / file["subfolder"] / file["filename"]
    with av.open(str(saved)) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(width, SIZE)] * FRAMES
    saved.unlink()
    for class_type in ("STEMInvertLatents", "SamplerCustom"):
        told = [(step.value, step.maximum) for step in seen if step.class_type == class_type]
        assert (1, STEPS) in told and told[-1] == (STEPS, STEPS)


def test_inversions_are_compared(server):
    shown = previews(server, server.run(fresh(short("compare"))))
    assert shown.keys() == {"compared", "plot", "plot_ddim", "painted", "chart"}
    assert shown["painted"].shape == (FRAMES, SIZE, SIZE, 3)
    assert all(picture.std() > 0.01 for picture in shown.values())
    sheet = shown["compared"]  # source and VAE alone above, STEM and DDIM below; names above each
    assert len(sheet) == FRAMES and sheet.shape[1] > 2 * SIZE and sheet.shape[2] >= 2 * SIZE
    band = sheet.shape[1] // 2 - SIZE
    gap = sheet.shape[2] - 2 * SIZE
    band = (sheet.shape[1] + gap) // 2 - SIZE - gap
    alone, stem, ddim = sheet[:, band : band + SIZE, -SIZE:], sheet[:, -SIZE:, :SIZE], sheet[:, -SIZE:, -SIZE:]
    assert min(psnr(stem, alone), psnr(ddim, alone)) > 30 and not torch.equal(stem, ddim)


def test_tokenflow_with_a_controlnet(server):
    graph = short("tokenflow")
    without = previews(server, server.run(fresh(graph)))["edit"]
    graph["control"] = {"class_type": "STEMTestControlNet", "inputs": {"model": ["demo", 0]}}
    graph["hints"] = {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {
            "positive": ["edited", 0], "negative": ["negative", 0], "control_net": ["control", 0], "image": ["clip", 0],
            "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
        },
    }  # fmt: skip
    graph["sample"]["inputs"] |= {"positive": ["hints", 0], "negative": ["hints", 1]}
    found = previews(server, server.run(graph))["edit"]
    assert found.shape == without.shape and found.std(dim=(1, 2, 3)).min() > 0.01
    assert not torch.allclose(found, without, atol=0.02), "the ControlNet acts"
    again = previews(server, server.run(fresh(graph)))["edit"]
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("name", "wrong", "changes", "message"),
    [
        pytest.param(
            "reconstruct",
            node("STEMTestEmptyLatent"),
            {"invert": {"latents": ["wrong", 0]}},
            r"no frames \(shape \(0, 4, 8, 8\)\)\. Connect",
            id="empty batch",
        ),
        pytest.param(
            "reconstruct",
            node("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=FRAMES),
            {"invert": {"latents": ["wrong", 0]}},
            r"16 channels, this model needs 4\. Encode the frames with the model's own VAE",
            id="channels of another family",
        ),
        pytest.param(
            "reconstruct",
            node("EmptyHunyuanLatentVideo", width=SIZE, height=SIZE, length=5, batch_size=1),
            {"invert": {"latents": ["wrong", 0]}},
            r"\(1, 16, 2, 8, 8\) found, needed are frames on the batch axis .*\. Encode",
            id="latents of a video model",
        ),
        pytest.param(
            "reconstruct",
            node("STEMTestModel", layout="svd"),
            {"invert": {"model": ["wrong", 0]}},
            r"video family SVD_img2vid .*\. Use a checkpoint of SD1",
            id="video model inverted",
        ),
        pytest.param(
            "reconstruct",
            node("STEMTestModel", layout="svd"),
            {"patch": {"model": ["wrong", 0]}},
            r"video family SVD_img2vid .*\. Use a checkpoint of SD1",
            id="video model patched",
        ),
        pytest.param(
            "long_clip",
            node("STEMTestModel", layout="dit"),
            {"basis": {"model": ["wrong", 0]}},
            r"family PixArtAlpha .*no UNet blocks.*\. Use a checkpoint of SD1",
            id="transformer without a UNet",
        ),
        pytest.param(
            "long_clip",
            node("STEMTestModel", layout="sdxl"),
            {"invert": {"model": ["wrong", 0]}},
            r"basis was estimated with .*, this model is SDXL .*; estimate a basis with this model",
            id="basis of another model in the inversion",
        ),
        pytest.param(
            "reconstruct",
            node("STEMTestModel", layout="sd2"),
            {"patch": {"model": ["wrong", 0]}},
            r"basis was estimated with .*, this model is SD20 \(v .*; estimate a basis with this model",
            id="basis of another model in the patch",
        ),
        pytest.param(
            "long_clip",
            {},
            {"invert": {"method": "ddim"}},
            r'basis is connected, which method "ddim" does not read\. Choose stem, or unplug it',
            id="basis for a method without one",
        ),
        pytest.param(
            "tokenflow",
            node("STEMTestModel", layout="sd2"),
            {"tokenflow": {"model": ["wrong", 0]}},
            r"trajectory was recorded with a .* this model is SD20 \(v .*; invert the clip with this model",
            id="trajectory of another model",
        ),
        pytest.param(
            "reconstruct",
            {},
            {"invert": {"blocks": "middle, output_99"}},
            r'"output_99", which this model does not have\. It has: input_1, ',
            id="block that does not exist",
        ),
    ],
)
def test_wrong_input_is_named_and_the_queue_goes_on(server, name, wrong, changes, message):
    graph = {**short(name), **wrong}
    ((at_fault, inputs),) = changes.items()
    graph[at_fault]["inputs"] |= inputs
    class_type = graph[at_fault]["class_type"]
    with pytest.raises(GraphError, match=f"{class_type}: .*{message}") as error:
        server.run(graph)
    assert (error.value.node_id, error.value.class_type) == (at_fault, class_type)
    assert previews(server, server.run(fresh(short("reconstruct"))))["reconstruction"].std() > 0.01


def test_another_clip_is_refused_by_the_editor_while_the_sampler_runs(server):
    graph = {**short("tokenflow"), **node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=3)}
    graph["sample"]["inputs"]["latent_image"] = ["wrong", 0]
    message = r"STEMTokenFlow: the sampler's latents have the shape \(3, 4, 8, 8\), those of the trajectory \(4, 4, 8, 8\)"
    with pytest.raises(GraphError, match=message) as error:
        server.run(graph)
    assert error.value.node_id == "sample"


def test_zero_steps_are_refused(server):
    graph = short("reconstruct")
    graph["invert"]["inputs"]["steps"] = 0
    with pytest.raises(GraphError, match="smaller than min of 1: steps") as error:
        server.run(graph)
    assert error.value.node_id == "invert"


def test_basis_of_a_method_without_one_is_told_to_the_node_that_asks_for_it(server):
    graph = short("reconstruct")
    graph["invert"]["inputs"]["method"] = "ddim"
    message = r"STEMInvertLatents: method ddim has no basis\. Choose stem, or unplug"
    with pytest.raises(GraphError, match=message) as error:
        server.run(graph)
    assert (error.value.node_id, error.value.class_type) == ("patch", "STEMPatchModel")


def test_method_without_a_basis_needs_none(server):
    graph = short("reconstruct")
    graph["invert"]["inputs"]["method"] = "ddim"
    graph["sample"]["inputs"]["model"] = ["demo", 0]
    del graph["patch"]
    assert previews(server, server.run(graph))["reconstruction"].std() > 0.01


def test_cancelled_inversion_leaves_the_queue_as_it_was(server):
    before = previews(server, server.run(fresh(short("reconstruct"))))

    def cancel(step):
        if step.class_type == "STEMInvertLatents" and step.value >= 1:
            server.interrupt()

    long = fresh(short("reconstruct"))
    long["invert"]["inputs"]["steps"] = 200
    with pytest.raises(GraphInterrupted) as error:
        server.run(long, cancel)
    assert error.value.class_type == "STEMInvertLatents"
    seen = []
    after = previews(server, server.run(fresh(short("reconstruct")), seen.append))
    assert "STEMInvertLatents" in {step.class_type for step in seen}  # it ran again
    assert torch.equal(before["reconstruction"], after["reconstruction"])
