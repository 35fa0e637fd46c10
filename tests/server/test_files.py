"""Inversions and bases that one graph saves and another loads, on a running server."""

import json
import os
import re
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tools.demo import load_graph, previews
from tools.server import Graph, GraphError

attempts = count()


@pytest.fixture
def saved(server):
    """A folder in the output folder, of this test alone, by its name."""
    name = f"stem/test-{os.getpid()}-{next(attempts)}"
    yield name
    folder = server.output_directory / name
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def short_edit() -> Graph:
    """An edit by TokenFlow, with stem attention's basis along."""
    graph = load_graph("tokenflow", 3)
    graph["clip"]["inputs"] |= {"frames": 4, "size": 64, "attempt": next(attempts)}
    graph["tokenflow"]["inputs"]["keyframe_every"] = 2
    graph["invert"]["inputs"]["method"] = "stem"
    del graph["save"], graph["video"]
    return graph


def node(class_type: str, **inputs) -> Graph:
    return {"class_type": class_type, "inputs": inputs}


def test_what_one_graph_saved_another_edits_and_unchanged_it_is_not_read_again(server, saved):
    graph = short_edit()
    found = {"latents": ["invert", 0], "trajectory": ["invert", 2], "basis": ["invert", 3]}
    graph["kept"] = node("STEMSaveInversion", **found, filename_prefix=f"{saved}/clip")
    graph["kept_basis"] = node("STEMSaveBasis", basis=["invert", 3], filename_prefix=f"{saved}/clip")
    entry = server.run(graph)
    edited = previews(server, entry)["edit"]
    file, basis = (entry["outputs"][name]["text"][0].partition("\n")[0] for name in ("kept", "kept_basis"))
    assert re.fullmatch(rf"{saved}/clip_0000[12]_\.stem\.safetensors \[output\]", file)
    assert re.fullmatch(rf"{saved}/clip_0000[12]_\.stem-basis\.safetensors \[output\]", basis)
    info = server.object_info()
    for class_type, name in (("STEMLoadInversion", file), ("STEMLoadBasis", basis)):
        assert name in info[class_type]["input"]["required"]["file"][1]["options"]
    path = server.output_directory / file.removesuffix(" [output]")
    with safe_open(path, "pt") as opened:
        texts = opened.metadata()
    assert json.loads(texts["prompt"])["invert"]["class_type"] == "STEMInvertLatents"

    loading = {name: each for name, each in graph.items() if name not in ("invert", "kept", "kept_basis")}
    loading["invert"] = node("STEMLoadInversion", file=file)
    loading["basis"] = node("STEMLoadBasis", file=basis)
    loading["patch"] = node(
        "STEMPatchModel", model=["demo", 0], basis=["basis", 0], num_bases=256, em_iterations=5, seed=0, start_percent=0.0,
        end_percent=1.0, temperature=0.01, blocks="all",
    )  # fmt: skip
    loading["scheduled"] = node("BasicScheduler", model=["patch", 0], scheduler="normal", steps=2, denoise=1.0)
    loading["levels"] = node("PreviewAny", source=["scheduled", 0])
    assert torch.equal(previews(server, server.run(loading))["edit"], edited)

    def read_again(change: Graph) -> bool:
        seen = []
        loading["negative"]["inputs"] |= change
        assert previews(server, server.run(loading, seen.append))["edit"].shape == edited.shape
        assert "SamplerCustom" in {step.class_type for step in seen}
        return "STEMLoadInversion" in {step.class_type for step in seen}

    assert not read_again({"text": "a circle"})
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert read_again({"text": "a square"})


def test_what_cannot_be_loaded_is_refused_and_the_queue_goes_on(server, saved):
    folder: Path = server.output_directory / saved
    folder.mkdir(parents=True)
    (folder / "x.stem.safetensors").write_bytes(b"no tensors")
    shown = {"shown": node("PreviewAny", source=["load", 0])}
    for file, message in (
        ("none.stem.safetensors [output]", "is not there. Choose a file of the list"),
        ("../x.stem.safetensors [output]", "is not there"),
        ("model.safetensors", r"is no name of a \*\.stem\.safetensors file"),
        (7, "the name of a file is needed"),
    ):
        with pytest.raises(GraphError, match=f"file - .*{message}") as error:
            server.run({"load": node("STEMLoadInversion", file=file), **shown})
        assert error.value.node_id == "load"
    with pytest.raises(GraphError, match=r"STEMLoadInversion: x\.stem\.safetensors: it is no safetensors file"):
        server.run({"load": node("STEMLoadInversion", file=f"{saved}/x.stem.safetensors [output]"), **shown})
    graph = {
        "demo": node("STEMDemoModel"),
        "clip": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "text": node("CLIPTextEncode", clip=["demo", 1], text="a red star"),
        "basis": node(
            "STEMBasisEstimate", model=["demo", 0], latents=["clip", 0], positive=["text", 0], steps=1, num_bases=2,
            em_iterations=1, keyframes=1, seed=next(attempts), temperature=1.0, blocks="middle",
        ),
        "kept": node("STEMSaveBasis", basis=["basis", 0], filename_prefix=f"../{saved}/x"),
    }  # fmt: skip
    with pytest.raises(GraphError, match=r"STEMSaveBasis: filename_prefix .* is no name in ComfyUI's output folder"):
        server.run(graph)
    graph["kept"]["inputs"]["filename_prefix"] = f"{saved}/x"
    server.run(graph)
    assert (folder / "x_00001_.stem-basis.safetensors").is_file()
