"""What the demo model is trained on: generated scenes and the three real clips, as images with captions."""

from pathlib import Path

import av
import torch
from einops import rearrange
from torch import Tensor

from stem.scenes import caption, random_scene, render

TRAINING_SEEDS = 1_000_000  # scenes of tests, benchmarks and examples have smaller seeds, so that none was trained on
REAL_CLIPS = {
    "bikes.mp4": ("a street with bikes and cars", "a video of bikes in a city street", "bikes in a street"),
    "carphone_pristine.mp4": ("a man in a car", "a man with a red tie talking in a car", "a man talking in a car"),
    "bigbuckbunny.mp4": ("a cartoon rabbit on a green hill", "a fat grey rabbit, a cartoon", "a cartoon rabbit"),
}


def scene_frames(count: int, first_seed: int, height: int = 128, width: int = 128) -> tuple[Tensor, list[str]]:
    """Frames (count, 3, height, width) as bytes, each of a scene of its own, and their captions."""
    images, captions = [], []
    for seed in range(first_seed, first_seed + count):
        scene = random_scene(seed, frames=9, height=height, width=width)
        moment = seed % 9
        clip = render(scene, moments=[moment])
        images.append(as_bytes(clip.images)[0])
        captions.append(caption(scene, wording=seed // 9))
    return torch.stack(images), captions


def real_frames(folder: Path, name: str, height: int, every: int = 1) -> Tensor:
    """Every n-th frame of a clip as bytes (f, 3, height, width), scaled to a height, its aspect kept."""
    frames = []
    with av.open(str(folder / name)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % every == 0:
                width = round(frame.width * height / frame.height / 8) * 8
                image = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
                frames.append(rearrange(torch.from_numpy(image), "y x c -> c y x"))
    return torch.stack(frames)


def as_bytes(images: Tensor) -> Tensor:
    """(f, y, x, 3) in 0..1 to (f, 3, y, x) in 0..255."""
    return rearrange((images * 255).round().to(torch.uint8), "f y x c -> f c y x").contiguous()
