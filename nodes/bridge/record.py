"""Collects the bases of one inversion as its patches estimate them."""

from collections.abc import Callable
from itertools import chain
from threading import Lock

import torch
from comfy.model_management import intermediate_device
from torch import Tensor

from ...stem.basis import Basis, BasisSettings, ModelFingerprint
from ...stem.ddim import nearest_level

RECORD = "stem_record"
"""Key in `transformer_options`, where a run's recorder is; core passes objects there by reference."""


class BasisRecord:
    """Bases of every block and noise level of one run.

    Where several conditionings are sampled, the bases are those of the first. Where a step estimates bases for several groups
    of frames, none of them stands for the clip, and they are not kept.
    """

    def __init__(self, levels: Tensor, blocks: tuple[str, ...], uuids: list):
        self.levels, self.blocks = levels, blocks
        self.rank = {uuid: rank for rank, uuid in enumerate(uuids)}
        self.found: dict[tuple[str, int], tuple[int, int, Tensor, Tensor]] = {}
        self.grouped = False
        self._latest: dict[float, dict[tuple, Tensor]] = {}  # of this level and the one before
        self._lock = Lock()  # core samples conditionings on several devices at a time

    def add(self, block: str, sigma: float, uuid: object, first_frame: int, keys: Tensor, values: Tensor) -> None:
        place, rank = (block, nearest_level(self.levels, sigma)), self.rank.get(uuid, 0)
        with self._lock:
            known = self.found.get(place)
            if known is not None and known[1] != first_frame:
                self.grouped = True
                self.found.clear()
            if not self.grouped and (known is None or rank < known[0]):
                self.found[place] = (rank, first_frame, keys.to(intermediate_device()), values.to(intermediate_device()))

    def latest(self, block: str, sigma: float, uuid: object, frames: list[int]) -> Tensor | None:
        """Bases of the keys (h, m, d) on the CPU that these frames had at the level before, where the run keeps them."""
        with self._lock:
            before = next((found for level, found in reversed(self._latest.items()) if level != sigma), {})
            return before.get((block, uuid, tuple(frames)))

    def keep_latest(self, block: str, sigma: float, uuid: object, frames: list[int], keys: Tensor) -> None:
        """Those of the level before stay beside them: a call that memory ran out in is made again."""
        with self._lock:
            self._latest.setdefault(sigma, {})[block, uuid, tuple(frames)] = keys.to(intermediate_device())
            if len(self._latest) > 2:
                del self._latest[next(iter(self._latest))]

    def state(self, level: int) -> tuple[dict, dict[str, Tensor]]:
        """What was recorded at a level, as JSON and tensors: what `restore` takes."""
        document, tensors = {"grouped": self.grouped, "found": [], "latest": []}, {}
        for (block, at), (rank, first_frame, keys, values) in self.found.items():
            if at == level:
                document["found"].append([block, rank, first_frame])
                tensors |= {f"keys.{block}": keys, f"values.{block}": values}
        latest = [found for sigma, found in self._latest.items() if nearest_level(self.levels, sigma) == level]
        for number, ((block, uuid, frames), keys) in enumerate(chain(*(found.items() for found in latest))):
            document["latest"].append([block, self.rank.get(uuid), frames])
            tensors[f"latest.{number}"] = keys
        return document, tensors

    def restore(self, level: int, document: dict, read: Callable[[str], Tensor]) -> None:
        """What another run of the same inputs recorded at a level; the levels below come first.

        Args:
            read: Gives the tensors by their names.
        """
        sigma, uuids = float(self.levels[level]), {rank: uuid for uuid, rank in self.rank.items()}
        for block, rank, first_frame in document["found"]:
            keys, values = (read(f"{part}.{block}").to(intermediate_device()) for part in ("keys", "values"))
            self.found[block, level] = (rank, first_frame, keys, values)
        if document["grouped"]:
            self.grouped = True
            self.found.clear()
        for number, (block, rank, frames) in enumerate(document["latest"]):
            self.keep_latest(block, sigma, uuids.get(rank), frames, read(f"latest.{number}"))

    def basis(self, frame_ids: tuple[int, ...], total_frames: int, settings: BasisSettings, model: ModelFingerprint) -> Basis:
        """All that was recorded; the record is empty afterwards.

        Raises:
            ValueError: There were several groups of frames, or a block was not called at some level.
        """
        if self.grouped:
            raise ValueError(
                "each group of frames has bases of its own (frames_per_em, context windows), so there is no one basis for the "
                "clip. Take the context windows off this model, and set frames_per_em to 0 where the node has it."
            )
        keys, values = [], []
        for block in self.blocks:
            levels = []
            for level, sigma in enumerate(self.levels.tolist()):
                found = self.found.pop((block, level), None)
                if found is None:
                    raise ValueError(
                        f"block {block} was not called at sigma {sigma:.4g}, so there is no basis for it. Another node "
                        "replaces it: leave the block out of `blocks`."
                    )
                levels.append(found[2:])
            k, v = zip(*levels, strict=True)
            keys.append(torch.stack(k).cpu())
            values.append(torch.stack(v).cpu())
        return Basis(tuple(keys), tuple(values), self.blocks, self.levels, frame_ids, total_frames, settings, model)
