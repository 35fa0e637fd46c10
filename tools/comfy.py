"""A real ComfyUI in this process, for tests, benchmarks and training; `tools.server` has one as a server."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tools import places

ALIAS = "stem_video_inversion"
PYTORCH_ATTENTION = "--use-pytorch-cross-attention"  # what ComfyUI takes on most GPUs, but not by itself on a CPU


def start(argv: Sequence[str] = ("--cpu",)) -> ModuleType:
    """Make ComfyUI importable in this process and return the pack, loaded by path as ComfyUI does.

    Args:
        argv: ComfyUI's options, read once: a second call returns the same pack whatever it is given.
    """
    if ALIAS in sys.modules:
        return sys.modules[ALIAS]
    where = installed()
    put_first(where.comfyui)
    own, sys.argv = sys.argv, ["main.py", "--base-directory", str(where.base_directory), *argv]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # reads sys.argv while it is imported
    finally:
        sys.argv = own
    return load_pack(places.ROOT)


def installed() -> places.Locations:
    where = places.locations()
    if not (where.comfyui / "main.py").is_file():
        raise places.SetupError(f"There is no ComfyUI at {where.comfyui}. Run make setup.")
    places.make_base_directory(where.base_directory)
    return where


def put_first(comfyui: Path) -> None:
    """Put ComfyUI before all on sys.path and the checkout behind all: both have a top-level `nodes`."""
    root = places.ROOT
    taken = getattr(sys.modules.get("nodes"), "__file__", None)
    if taken and Path(taken).resolve().is_relative_to(root):
        raise ImportError(f"{taken} was imported as `nodes`, which is ComfyUI's name. Import it through start().")
    others = [entry for entry in sys.path if Path(entry).resolve() not in (root, comfyui.resolve())]
    sys.path[:] = [str(comfyui), *others, str(root)]


def load_pack(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(ALIAS, root / "__init__.py", submodule_search_locations=[str(root)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = pack
    try:
        spec.loader.exec_module(pack)
    except BaseException:
        del sys.modules[ALIAS]
        raise
    return pack
