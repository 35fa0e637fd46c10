"""Latents of a trajectory on disk, a file for each noise level: memory holds one level at a time."""

import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "latents"


class LevelFiles:
    """Latents (t+1, f, c, height, width) in a folder of safetensors files, written and read level by level.

    Indexed as a tensor is by its first dimension. The folder is removed with the object.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32):
        """
        Args:
            folder: Made here; none may be there yet.
            shape: (t+1, f, c, height, width).
            dtype: Of the files, and of what is read.

        Raises:
            OSError: The folder cannot be made.
        """
        self.folder, self.shape, self.dtype = folder, torch.Size(shape), dtype
        folder.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, level: int) -> Tensor:
        """(f, c, height, width) on the CPU; KeyError for a level that has not been written."""
        file = self._file(level)
        if not file.exists():
            raise KeyError(f"{file} is not there: level {level} was not written, or its folder was emptied.")
        return load_file(file)[NAME]

    def __setitem__(self, level: int, latents: Tensor) -> None:
        """Whole or not at all.

        Raises:
            ValueError: Latents of another shape.
            OSError: They cannot be written.
        """
        if latents.shape != self.shape[1:]:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; give that of a level, {tuple(self.shape[1:])}.")
        file = self._file(level)
        part = file.with_suffix(".part")
        try:
            save_file({NAME: latents.to("cpu", self.dtype).contiguous()}, part)
        except Exception as error:  # safetensors has errors of its own for what the disk refuses
            raise OSError(f"{part} cannot be written: {error}") from error
        part.replace(file)

    def _file(self, level: int) -> Path:
        return self.folder / f"{range(len(self))[level]:04}.safetensors"
