"""Collects the bases of one inversion as its patches estimate them."""

import torch
from comfy.model_management import intermediate_device
from torch import Tensor

from ...stem.basis import Basis, BasisSettings, ModelFingerprint
from ...stem.ddim import nearest_level

RECORD = "stem_record"
"""Key in `transformer_options`, where a run's recorder is; core passes objects there by reference."""


class BasisRecord:
    """Bases of every block and noise level of one run.

    Where several conditionings are sampled, the bases are those of the first; where a call's frames fall into several groups,
    or a step into several context windows, they are those of all groups together.
    """

    def __init__(self, levels: Tensor, blocks: tuple[str, ...], uuids: list):
        self.levels, self.blocks = levels, blocks
        self.rank = {uuid: rank for rank, uuid in enumerate(uuids)}
        self.found: dict[tuple[str, int], dict[int, tuple[int, Tensor, Tensor]]] = {}

    def add(self, block: str, sigma: float, uuid: object, first_frame: int, keys: Tensor, values: Tensor) -> None:
        groups = self.found.setdefault((block, nearest_level(self.levels, sigma)), {})
        rank = self.rank.get(uuid, 0)
        if first_frame not in groups or rank < groups[first_frame][0]:
            groups[first_frame] = (rank, keys.to(intermediate_device()), values.to(intermediate_device()))

    def basis(self, frame_ids: tuple[int, ...], total_frames: int, settings: BasisSettings, model: ModelFingerprint) -> Basis:
        """All that was recorded.

        Raises:
            ValueError: A block was not called at some level, or the groups of frames changed from level to level.
        """
        keys, values = [], []
        for block in self.blocks:
            levels = []
            for level in range(len(self.levels)):
                groups = self.found.get((block, level))
                if groups is None:
                    raise ValueError(
                        f"block {block} was not called at sigma {float(self.levels[level]):.4g}, so there is no basis for it. "
                        "Another node replaces it, or no conditioning is active there: leave the block out of `blocks`, or "
                        "take the timestep range off the conditioning."
                    )
                levels.append([torch.cat(w, dim=1) for w in zip(*(groups[i][1:] for i in sorted(groups)), strict=True)])
            counts = {k.shape[1] for k, _ in levels}
            if len(counts) > 1:
                raise ValueError(
                    f"block {block} has {sorted(counts)} bases at different noise levels, because the context windows change "
                    "from step to step. Use the schedule 'standard static', or no windows."
                )
            k, v = zip(*levels, strict=True)
            keys.append(torch.stack(k).cpu())
            values.append(torch.stack(v).cpu())
        return Basis(tuple(keys), tuple(values), self.blocks, self.levels, frame_ids, total_frames, settings, model)
