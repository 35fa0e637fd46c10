"""Latents of a trajectory on disk, a file for each noise level: memory holds those levels alone that are read."""

import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .archive import ArchivedLevels

NAME = "latents"
REMEDY = "Invert the clip again: change an input of the inversion, or free ComfyUI's cache (Unload Models and Execution Cache)."


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
        """(f, c, height, width) on the CPU.

        Raises:
            ValueError: The file is not there any more, or is damaged.
        """
        file = self._file(level)
        try:
            return load_file(file)[NAME].clone()  # what is loaded is the file, mapped; it could not be removed on Windows
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            raise ValueError(f"the trajectory's file {file} is gone or damaged ({error}). {REMEDY}") from error

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
            raise OSError(
                f"the trajectory's file {part} cannot be written: {error}. Free space on that disk, or switch "
                "trajectory_on_disk off."
            ) from error
        part.replace(file)

    def __deepcopy__(self, _: dict) -> "LevelFiles":
        return self  # the files are one's own, and they are not changed any more

    def __reduce__(self) -> tuple:
        raise TypeError("latents on disk go with this process; keep the trajectory in memory to hand it on.")

    def _file(self, level: int) -> Path:
        return self.folder / f"{range(len(self))[level]:04}.safetensors"


Levels = Tensor | LevelFiles | ArchivedLevels  # (t+1, f, c, height, width), indexed by level
