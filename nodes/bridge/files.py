"""Names of saved inversions and bases: nothing outside ComfyUI's output and input folders is written or read."""

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

INVERSION, BASIS = ".stem.safetensors", ".stem-basis.safetensors"
"""Ends of file names, by which the lists of the nodes know what is in a file without opening it."""

FOLDERS = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}


def saved_files(ending: str) -> list[str]:
    """Files of one kind in the output and input folders, named as core annotates them: "stem/clip_00001_.stem.safetensors
    [output]"."""
    found = []
    for kind, folder in FOLDERS.items():
        root = Path(folder())
        found += [f"{path.relative_to(root).as_posix()} [{kind}]" for path in sorted(_walk(root, ending))]
    return found


def _walk(folder: Path, ending: str) -> Iterator[Path]:
    """Ordinary files, in visible folders; links are left out, as core follows none out of its folders."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if name.endswith(ending) and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path
