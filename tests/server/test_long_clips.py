"""A clip of 256 frames on a running server, its memory watched from outside."""

import threading

import psutil

from tools.server import Graph, Server

FRAMES, STEPS = 256, 2
EM = {"num_bases": 256, "em_iterations": 5, "seed": 0, "temperature": 0.01, "blocks": "all", "steps": STEPS}


class Watch:
    """Growth of a process's resident memory in a `with` block, at its highest, in bytes."""

    def __init__(self, pid: int):
        self._process, self._done, self.growth = psutil.Process(pid), threading.Event(), 0

    def __enter__(self) -> "Watch":
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)


def clip(frames: int) -> Graph:
    """A clip in latents, its basis, and something that wants them."""
    size = {"frames": frames, "size": 128, "seed": 33, "colour": "red", "shape": "star", "background": "grass"}
    inputs = {"model": ["demo", 0], "latents": ["encode", 0], "positive": ["positive", 0], **EM}
    return {
        "demo": {"class_type": "STEMDemoModel", "inputs": {}},
        "clip": {"class_type": "STEMDemoClip", "inputs": size},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["clip", 0], "vae": ["demo", 2]}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": ["clip", 2]}},
        "basis": {"class_type": "STEMBasisEstimate", "inputs": {**inputs, "keyframes": 16}},
        "patch": {
            "class_type": "STEMPatchModel",
            "inputs": {
                "model": ["demo", 0], "basis": ["basis", 0], "start_percent": 0.0, "end_percent": 1.0,
                **{name: EM[name] for name in ("num_bases", "em_iterations", "seed", "temperature", "blocks")},
            },
        },
        "scheduled": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["patch", 0], "scheduler": "normal", "steps": 2, "denoise": 1.0},
        },
        "levels": {"class_type": "PreviewAny", "inputs": {"source": ["scheduled", 0]}},
        "kept": {"class_type": "SaveLatent", "inputs": {"samples": ["encode", 0], "filename_prefix": "stem/long"}},
    }  # fmt: skip


def inverted(frames: int, batch: int) -> Graph:
    inputs = {"model": ["demo", 0], "latents": ["encode", 0], "positive": ["positive", 0], "basis": ["basis", 0], **EM}
    inputs |= {"method": "stem", "frames_per_em": 0, "frames_per_batch": batch}
    return {
        **clip(frames),
        "invert": {"class_type": "STEMInvertLatents", "inputs": inputs},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["invert", 0], "filename_prefix": "stem/long_inverted"}},
    }


def growth(server: Server, frames: int, batch: int) -> int:
    """Of the server's memory in an inversion, when the clip and its basis are there."""
    server.run(clip(frames))
    with Watch(server.pid) as watch:
        entry = server.run(inverted(frames, batch))
    for node in ("save", "kept"):
        for file in entry["outputs"].get(node, {}).get("latents", []):
            (server.output_directory / file["subfolder"] / file["filename"]).unlink(missing_ok=True)
    return watch.growth


def test_memory_grows_with_the_batch_and_not_with_the_clip():
    """What the run leaves behind aside: its trajectory, its latents and the file of these."""
    with Server() as server:
        growth(server, 16, 8)  # what a first run loads
        short = growth(server, 16, 16)
        long = growth(server, FRAMES, 16)
        whole = growth(server, FRAMES, FRAMES)
    results = 4 * FRAMES * 16 * 16 * 4 * (STEPS + 1 + 3)
    assert long < 1.2 * short + results + 50e6, (short, long, whole)
    assert long < whole / 3, (short, long, whole)
