"""Clips as people look at them: beside each other in a video, and as a contact sheet.

Clips are as in ComfyUI, (f, height, width, 3) in 0..1, all of one length and size, by their labels.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 2  # enlargement: the demo model's clips are small
GAP = 8  # pixels between pictures
BAND = 32  # height of a line of labels; even, as H.264 wants it
TEXT_SIZE = 18
PAPER, INK = "white", "black"


def side_by_side(clips: dict[str, Tensor]) -> list[Image.Image]:
    """One picture for every frame: that frame of all clips in a row, under the clips' names."""
    width, height = _size(clips)
    canvas = Image.new("RGB", (len(clips) * (width + GAP) - GAP, height + BAND), PAPER)
    for column, name in enumerate(clips):
        _label(canvas, name, (column * (width + GAP) + width // 2, BAND // 2), "mm")
    pictures = []
    for frames in zip(*clips.values(), strict=True):
        picture = canvas.copy()
        for column, frame in enumerate(frames):
            picture.paste(_enlarged(frame), (column * (width + GAP), BAND))
        pictures.append(picture)
    return pictures


def contact_sheet(clips: dict[str, Tensor], width: int = 2000) -> Image.Image:
    """A row for each clip, its name in front; evenly spaced frames, as many as fit into the width."""
    frame_width, frame_height = _size(clips)
    frames = len(next(iter(clips.values())))
    margin = round(max(_font().getlength(name) for name in clips)) + 2 * GAP
    columns = max(1, min(frames, (width - margin) // (frame_width + GAP)))
    moments = _moments(frames, columns)
    size = (margin + columns * (frame_width + GAP), BAND + len(clips) * (frame_height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    for column, moment in enumerate(moments):
        left = margin + column * (frame_width + GAP)
        _label(sheet, f"frame {moment}", (left + frame_width // 2, BAND // 2), "mm")
        for row, clip in enumerate(clips.values()):
            sheet.paste(_enlarged(clip[moment]), (left, BAND + row * (frame_height + GAP)))
    for row, name in enumerate(clips):
        _label(sheet, name, (GAP, BAND + row * (frame_height + GAP) + frame_height // 2), "lm")
    return sheet


def thumbnail(clips: dict[str, Tensor], columns: int = 4) -> Image.Image:
    """A row of evenly spaced frames for each clip, without words."""
    width, height = _size(clips)
    moments = _moments(len(next(iter(clips.values()))), columns)
    picture = Image.new("RGB", (columns * (width + GAP) - GAP, len(clips) * (height + GAP) - GAP), PAPER)
    for row, clip in enumerate(clips.values()):
        for column, moment in enumerate(moments):
            picture.paste(_enlarged(clip[moment]), (column * (width + GAP), row * (height + GAP)))
    return picture


def save_video(path: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    """Writes pictures of one even size as an H.264 video."""
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate, options={"crf": "12"})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def save_animation(path: Path, pictures: Sequence[Image.Image], fps: float, quality: int = 80) -> None:
    """Writes pictures of one size as an animated WebP that repeats for ever."""
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=quality, method=6)


def _moments(frames: int, columns: int) -> list[int]:
    """Numbers of evenly spaced frames, the first and the last among them."""
    return torch.linspace(0, frames - 1, columns).round().int().tolist()


def _size(clips: dict[str, Tensor]) -> tuple[int, int]:
    """Width and height of an enlarged frame."""
    shapes = {name: tuple(clip.shape) for name, clip in clips.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the clips have the shapes {shapes}; give clips of one length and size.")
    _, height, width, _ = next(iter(shapes.values()))
    return SCALE * width, SCALE * height


def _enlarged(frame: Tensor) -> Image.Image:
    picture = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().numpy())
    return picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.LANCZOS)


def _label(canvas: Image.Image, text: str, at: tuple[int, int], anchor: str) -> None:
    ImageDraw.Draw(canvas).text(at, text, INK, _font(), anchor)


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT_SIZE)
