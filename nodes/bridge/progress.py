"""What people see while an inversion runs: core's progress bar, a moving preview, and a line of text at the node.

All of it goes through what ComfyUI has: no JavaScript. Core's own previews show the first frame of a batch alone. Here several
frames go out as one animated PNG, which a browser plays in an <img>. The canvas of the classic front end draws the first
picture of it, so every preview begins with another one.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO

import comfy.model_management
import comfy.utils
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

FRAMES = 8
"""Pictures of a preview, spread over the clip, which are shown in a second."""

SIZE = 192
"""Pixels of a preview's longer side: eight such pictures take about 50 ms and 0.5 MB, a quarter of what 512 would."""

PREVIEW_EVERY = 0.5
"""Seconds from one preview to the next, at least."""

PREVIEW_SHARE = 0.05
"""Of a run's time, that previews take at most."""

STATUS_EVERY = 1.0
"""Seconds from one line of text to the next."""

CORE = (latent_preview.Latent2RGBPreviewer, latent_preview.TAESDPreviewerImpl)
"""Previewers that give one picture for each frame; those of other packs may have ways of their own to show a clip."""


class AnimatedPng(PngImageFile):
    """An image that core's server saves with all its frames: it knows one frame of an image."""

    def __init__(self, encoded: bytes):
        super().__init__(BytesIO(encoded))
        self.encoded = encoded

    def save(self, fp, format=None, **params) -> None:
        if format == "PNG" and hasattr(fp, "write"):
            fp.write(self.encoded)
        else:
            super().save(fp, format, **params)


def animated(pictures: Sequence[Image.Image]) -> AnimatedPng:
    """One image of some pictures of one size, which plays them in a second, again and again."""
    file = BytesIO()
    first, *others = pictures
    first.save(file, "PNG", save_all=True, append_images=others, duration=1000 // len(pictures), loop=0, compress_level=1)
    return AnimatedPng(file.getvalue())


class Previews:
    """Previews of the clip in the way that the user chose for all samplers, or none."""

    def __init__(self, model: ModelPatcher):
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._next, self._first = 0.0, 0

    def of(self, x0: Tensor) -> tuple[str, Image.Image, int | None] | None:
        """What core's progress bar takes, of latents (f, c, height, width); None where there is none now."""
        began = time.perf_counter()
        if self._previewer is None or began < self._next:
            return None
        if len(x0) > 1 and isinstance(self._previewer, CORE):
            preview = "PNG", animated(self._pictures(x0)), None  # None: not to be resized, which would leave one frame
        else:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", x0)
        now = time.perf_counter()
        self._next = now + max(PREVIEW_EVERY, (now - began) / PREVIEW_SHARE)
        return preview

    def _pictures(self, x0: Tensor) -> list[Image.Image]:
        count = min(FRAMES, len(x0))
        chosen = [i * (len(x0) - 1) // (count - 1) for i in range(count)]
        chosen = [chosen[(i + self._first) % count] for i in range(count)]
        self._first += 1
        side = min(SIZE, latent_preview.MAX_PREVIEW_RESOLUTION)
        pictures = (self._previewer.decode_latent_to_preview(x0[i : i + 1]) for i in chosen)
        return [ImageOps.contain(picture, (side, side), Image.Resampling.BILINEAR) for picture in pictures]


class Progress:
    """Of one inversion, for the time of a `with` block; `callback` is a sampler's."""

    def __init__(self, model: ModelPatcher, levels: int):
        context = get_executing_context()
        self._node_id = context.node_id if context else None
        self._levels, self._done, self._resumed, self._line = levels, 0, 0, ""
        self._bar = comfy.utils.ProgressBar(levels)
        self._previews = Previews(model) if self._bar.hook else None
        self._began = self._level_began = self._first_done = time.perf_counter()
        self._told = float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error, *_: object) -> None:
        if error:
            self._send(f"stopped at level {min(self._done + 1, self._levels)} of {self._levels}")
        else:
            self._send(f"{self._levels} levels in {clock(time.perf_counter() - self._began)}")

    def resumed(self, levels: int) -> None:
        """So many levels are known from an earlier run."""
        self._done = self._resumed = levels

    def level(self, sigma: float) -> None:
        """The next noise level begins."""
        self._level_began = time.perf_counter()
        if self._done == self._resumed:  # loading the model is over
            self._began = self._level_began
        self._line = f"level {self._done + 1} of {self._levels} (sigma {sigma:.3g})"
        self._tell()

    def frames(self, ids: Sequence[int], frames: int) -> None:
        """A model call with some of a clip's frames begins."""
        which = f"frames {ids[0] + 1} to {ids[-1] + 1}" if len(ids) > 1 else f"frame {ids[0] + 1}"
        self._tell(f", {which} of {frames}")

    def callback(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        """A noise level is done. Core raises its interruption here."""
        self._done = step + 1
        if self._done == self._resumed + 1:
            self._first_done = time.perf_counter()
        self._bar.update_absolute(self._done, total, self._previews.of(x0) if self._previews else None)

    def _tell(self, more: str = "") -> None:
        now = time.perf_counter()
        if now < self._told + STATUS_EVERY:
            return
        self._told = now
        if (left := self._left(now)) is not None:
            more += f", {clock(left)} left"
        self._send(self._line + more)

    def _left(self, now: float) -> float | None:
        """Seconds, by the levels that are done; but for the first, which warms up, where there are others."""
        done = self._done - self._resumed
        if not done:
            return None
        if done > 1:
            each = (self._level_began - self._first_done) / (done - 1)
        else:
            each = self._first_done - self._began
        return max(each * (self._levels - self._done) - (now - self._level_began), 0.0)

    def _send(self, text: str) -> None:
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is None or self._node_id is None:  # nobody looks on
            return
        with suppress(Exception):  # a line of text is no reason to lose a run
            server.send_progress_text(text, self._node_id, sid=server.client_id)


def clock(seconds: float) -> str:
    """1:05, 1:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def per_frame(total: int) -> Callable[[], None]:
    """What to call with every piece of a node's own work that is done: moves its progress bar, and lets the user cancel."""
    bar = comfy.utils.ProgressBar(total)

    def done() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return done
