"""Commands that set-up runs: their output kept, their end made sure of, one set-up at a time, progress shown."""

from __future__ import annotations  # an older Python must get as far as check_python

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tools.places import Locations, SetupError

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


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
