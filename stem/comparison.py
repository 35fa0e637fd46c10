"""Clips beside each other, each under its name."""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .chart import font

PAPER, INK = (24, 24, 24), (240, 240, 240)
ELLIPSIS = "..."
NO_LETTER = "\U0010ffff"
FONTS = (
    *("DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "NotoSans-Regular.ttf"),
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
)
"""Of Linux, Windows and macOS; Pillow's own font has the letters of English alone."""

LEAST_BAND = 28  # height of a strip in pixels


def compare_clips(
    clips: Sequence[Tensor], labels: Sequence[str], columns: int = 0, done: Callable[[], None] = lambda: None
) -> Tensor:
    """Clips in a grid, (f, height, width, 3) with an even height and width, on the CPU.

    All are scaled to the height of the first. Shorter ones hold their last frame. The names stand in strips above the
    pictures, where there are any names.

    Args:
        clips: (f, height, width, 3) each, 0..1.
        labels: One for each; "" for none.
        columns: Clips in a row; 0 for all.
        done: Called once for each frame; a host can raise from it to cancel.
    """
    columns = min(columns or len(clips), len(clips))
    height = clips[0].shape[1]
    widths = [max(1, round(clip.shape[2] * height / clip.shape[1])) for clip in clips]
    gap = max(2, height // 64)
    band = max(LEAST_BAND, height // 10) if any(label.strip() for label in labels) else 0
    across = [max(widths[column::columns]) for column in range(columns)]
    rows = -(-len(clips) // columns)
    frames = max(len(clip) for clip in clips)
    size = (_even(rows * (band + height + gap) - gap), _even(sum(across) + gap * (columns - 1)))
    places = [
        (row * (band + height + gap), sum(across[:column]) + gap * column + (across[column] - width) // 2)
        for (row, column), width in zip((divmod(i, columns) for i in range(len(clips))), widths, strict=True)
    ]
    sheet = Image.new("RGB", (size[1], size[0]), PAPER)
    for (top, left), width, label in zip(places, widths, labels, strict=True):
        if label.strip():
            _write(sheet, label, left, top, width, band)
    empty = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(*size, 3) / 255
    out = empty.expand(frames, *size, 3).clone()
    for number in range(frames):
        for clip, (top, left), width in zip(clips, places, widths, strict=True):
            area = (slice(top + band, top + band + height), slice(left, left + width))
            out[number][area] = _scaled(clip[number], height, width) if number < len(clip) else out[number - 1][area]
        done()
    return out


def _scaled(picture: Tensor, height: int, width: int) -> Tensor:
    """(height, width, 3) of any."""
    picture = picture[..., :3].float().cpu()
    if picture.shape[:2] == (height, width):
        return picture
    picture = rearrange(picture, "y x c -> 1 c y x")
    picture = torch.nn.functional.interpolate(picture, (height, width), mode="bicubic", antialias=True)
    return rearrange(picture, "1 c y x -> y x c").clamp(0, 1)


def _write(sheet: Image.Image, label: str, left: int, top: int, width: int, band: int) -> None:
    """In the middle of the strip above a picture; letters smaller where it is long, and cut where it is too long."""
    label, size = " ".join(label.split()), round(0.7 * band)
    room, least = width - band // 4, round(0.45 * band)
    while size > least and letters(label, size).getlength(label) > room:
        size -= 1
    face = letters(label, size)
    if face.getlength(label) > room:
        while label and face.getlength(label + ELLIPSIS) > room:
            label = label[:-1].rstrip()
        label += ELLIPSIS
    ImageDraw.Draw(sheet).text((left + width // 2, top + band // 2), label, INK, face, "mm")


def letters(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own letters where they suffice; else the first of the computer's fonts that has all of the text's."""
    own = font(size)
    if _has(own, text):
        return own
    for name in FONTS:
        try:
            face = ImageFont.truetype(name, size)
        except OSError:  # not on this computer
            continue
        if _has(face, text):
            return face
    return own


def _has(face: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has all letters: for what it lacks, it draws what it draws where there is no letter at all."""
    missing = bytes(face.getmask(NO_LETTER))
    return all(letter.isspace() or bytes(face.getmask(letter)) != missing for letter in text)


def _even(edge: int) -> int:
    return edge + edge % 2
