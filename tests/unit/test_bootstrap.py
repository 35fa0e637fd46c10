import hashlib
import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath

import pytest

from tools import bootstrap, places, processes
from tools.bootstrap import Stage
from tools.places import Archive, SetupError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees or changes the real cache, or an existing ComfyUI of the machine."""
    monkeypatch.setenv("STEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)


@pytest.fixture
def where():
    found = places.locations()
    found.environment.mkdir(parents=True)
    return found


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.1"\n', encoding="utf-8")
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    return folder


def fake_python(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# --- the key


@pytest.mark.parametrize("name", ["FORMAT", "TORCHAUDIO"])
def test_key_changes_with_a_pin(monkeypatch, name):
    before = places.key(places.recipe())
    monkeypatch.setattr(places, name, "another")
    assert places.key(places.recipe()) != before


def test_key_changes_with_torch(monkeypatch):
    before = places.key(places.recipe())
    monkeypatch.setattr(places, "TORCH", ("torch==0.1", *places.TORCH[1:]))
    assert places.key(places.recipe()) != before


@pytest.mark.parametrize("name", ["COMFYUI", "CLIPS"])
@pytest.mark.parametrize("field", ["requirement", "file", "sha256"])
def test_key_changes_with_an_archive(monkeypatch, name, field):
    before = places.key(places.recipe())
    monkeypatch.setattr(places, name, getattr(places, name)._replace(**{field: "another"}))
    assert places.key(places.recipe()) != before


def test_key_changes_with_the_tools(monkeypatch, tmp_path):
    before = places.key(places.recipe())
    changed = tmp_path / "requirements.txt"
    changed.write_text(places.REQUIREMENTS.read_text(encoding="utf-8") + "einops==0.8.2\n", encoding="utf-8")
    monkeypatch.setattr(places, "REQUIREMENTS", changed)
    assert places.key(places.recipe()) != before


def test_key_changes_with_python_and_platform(monkeypatch):
    before = places.key(places.recipe())
    monkeypatch.setattr(places.sysconfig, "get_platform", lambda: "another")
    on_another_platform = places.key(places.recipe())
    monkeypatch.setattr(places.sys, "version_info", (3, 99, 0))
    assert len({before, on_another_platform, places.key(places.recipe())}) == 3


def test_key_is_the_same_for_another_checkout(monkeypatch, tmp_path):
    here = places.locations()
    monkeypatch.setattr(places, "ROOT", tmp_path)
    there = places.locations()
    assert here.environment == there.environment
    assert here.base_directory != there.base_directory


# --- stages


def test_failed_setup_resumes_with_the_stage_that_failed(where):
    calls, broken = [], [True]

    def second(_):
        calls.append("second")
        if broken:
            raise SetupError("no")

    stages = [
        Stage("first", "first", 0, lambda _: calls.append("first")),
        Stage("second", "second", 0, second),
        Stage("third", "third", 0, lambda _: calls.append("third")),
    ]
    with pytest.raises(SetupError):
        bootstrap.run_stages(stages, where, io.StringIO())
    broken.clear()
    out = io.StringIO()
    bootstrap.run_stages(stages, where, out)
    bootstrap.run_stages(stages, where, io.StringIO())
    assert calls == ["first", "second", "second", "third"]
    assert "[2/3] second" in out.getvalue() and "[1/3]" not in out.getvalue()


def test_interrupted_stage_leaves_no_stamp(where):
    def interrupt(_):
        raise KeyboardInterrupt

    stage = Stage("slow", "slow", 0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.run_stages([stage], where, io.StringIO())
    assert not bootstrap.stamp(stage, where.environment).exists()


def test_full_disk_is_told_before_anything_runs(where):
    stage = Stage("huge", "huge", 1e9, lambda _: pytest.fail("ran"))
    with pytest.raises(SetupError, match=r"GB of free disk.*needs 1000000000\.0 GB(.|\n)*STEM_CACHE"):
        bootstrap.run_stages([stage], where, io.StringIO())


def test_space_of_finished_stages_is_not_asked_for(where):
    stage = Stage("huge", "huge", 1e9, lambda _: None)
    bootstrap.stamp(stage, where.environment).parent.mkdir()
    bootstrap.stamp(stage, where.environment).touch()
    bootstrap.run_stages([stage], where, io.StringIO())


def test_second_setup_waits_for_the_first(where):
    code = (
        "import pathlib, sys; from tools import processes\n"
        f"with processes.locked(pathlib.Path({str(where.environment / 'lock')!r}), sys.stdout):\n"
        "    print('in')"
    )
    with processes.locked(where.environment / "lock", io.StringIO()):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=places.ROOT)
        assert "waiting" in other.stdout.readline()
        assert other.poll() is None
    assert other.communicate(timeout=30)[0].strip() == "in"


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("Failed to establish a new connection: NewConnectionError", "Check the network"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", "another file"),
        ("The virtual environment was not created because ensurepip is not available", "python3-venv"),
    ],
)
def test_failing_command_shows_the_end_of_its_output_and_what_to_do(where, output, advice):
    with pytest.raises(SetupError) as error:
        processes.run([sys.executable, "-c", f"print({output!r}); raise SystemExit(3)"], where)
    assert output in str(error.value) and "code 3" in str(error.value)
    assert advice in str(error.value) and "setup.log" in str(error.value)


def test_advice_is_for_the_last_command_only(where):
    processes.run([sys.executable, "-c", "print('No space left')"], where)
    with pytest.raises(SetupError) as error:
        processes.run([sys.executable, "-c", "raise SystemExit(1)"], where)
    assert "disk" not in str(error.value)


def test_interrupt_ends_a_command_and_all_that_it_started(where, monkeypatch):
    begun, survived = where.environment / "begun", where.environment / "survived"
    grandchild = f"(touch {begun}; sleep 1; touch {survived}) & wait"

    def interrupt_once_begun(process, *limit):
        if limit:  # the wait of end_process
            return wait(process, *limit)
        while not begun.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    wait = subprocess.Popen.wait
    monkeypatch.setattr(processes.subprocess.Popen, "wait", interrupt_once_begun)
    with pytest.raises(KeyboardInterrupt):
        processes.run(["sh", "-c", grandchild], where)
    time.sleep(1.2)
    assert not survived.exists()


# --- archives


def test_file_with_another_hash_is_refused_and_removed(where, monkeypatch):
    archive = Archive("thing==1", "thing-1.tar.gz", hashlib.sha256(b"good").hexdigest(), ())

    def fake_pip(arguments, _):
        Path(arguments[arguments.index("--dest") + 1], archive.file).write_bytes(served)

    monkeypatch.setattr(bootstrap, "pip", fake_pip)
    served = b"bad"
    with pytest.raises(SetupError, match=hashlib.sha256(b"bad").hexdigest()):
        bootstrap.download(archive, where)
    served = b"good"
    assert bootstrap.download(archive, where).read_bytes() == b"good"


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 4 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"text") if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_only_the_asked_folder_is_extracted(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", member("a/setup.py"), member("a/tree/x/file"), member("a/tree2/file"))
    bootstrap.extract_folder(archive, PurePosixPath("a/tree"), tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out/x/file"]


@pytest.mark.parametrize(
    "bad",
    [
        member("a/tree/../../../evil"),
        member("../evil"),
        member("a/tree/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("a/tree/link", tarfile.LNKTYPE, "a/tree/file"),
        member("a/tree/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_unsafe_members_are_refused(tmp_path, bad):
    archive = tar_of(tmp_path / "a.tar.gz", bad)
    (tmp_path / "out").mkdir()
    with pytest.raises(SetupError, match="unsafe"):
        bootstrap.extract_folder(archive, PurePosixPath("a/tree"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "evil").exists()


def test_absolute_members_are_not_extracted(tmp_path):
    archive = tar_of(tmp_path / "a.tar.gz", member(str(tmp_path / "evil")))
    bootstrap.extract_folder(archive, PurePosixPath("a/tree"), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


# --- Python


@pytest.mark.parametrize(("version", "bits"), [((3, 10), 64), ((3, 15), 64), ((3, 12), 32)])
def test_unsupported_python_is_told_what_is_needed(version, bits):
    found = ".".join(map(str, version))
    with pytest.raises(SetupError, match=rf"Python {found} with {bits} bits(.|\n)*3\.11 to 3\.14(.|\n)*PYTHON3="):
        bootstrap.check_python(version, bits)


@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_supported_python_passes(version):
    bootstrap.check_python(version, 64)


# --- an existing ComfyUI


def test_existing_comfyui_and_its_venv_are_used(comfyui):
    python = fake_python(places.venv_python(comfyui / ".venv"), "")
    where = places.locations()
    assert (where.comfyui, where.python) == (comfyui, python)


def test_named_python_goes_before_the_venv(comfyui, tmp_path, monkeypatch):
    fake_python(places.venv_python(comfyui / "venv"), "")
    named = fake_python(tmp_path / "named", "")
    monkeypatch.setenv("COMFYUI_PYTHON", str(named))
    assert places.locations().python == named


def test_portable_build_is_found(comfyui):
    python = fake_python(comfyui.parent / "python_embeded" / "python.exe", "")
    assert places.locations().python == python


def test_this_python_is_used_when_comfyui_has_none(comfyui):
    assert places.locations().python == Path(sys.executable)


def test_wrong_comfyui_path_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no ComfyUI(.|\n)*unset it"):
        places.locations()


@pytest.mark.parametrize(("told", "version"), [('__version__ = "0.9.2"\n', "0.9"), ("", "unknown"), (None, "unknown")])
def test_old_comfyui_is_refused(comfyui, told, version):
    file = comfyui / "comfyui_version.py"
    file.unlink() if told is None else file.write_text(told, encoding="utf-8")
    with pytest.raises(SetupError, match=rf"version {version}; the pack needs 0\.30 or later\.\nUpdate it"):
        places.locations()


def test_wrong_comfyui_python_is_refused(comfyui, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", str(comfyui / "none"))
    with pytest.raises(SetupError, match="COMFYUI_PYTHON"):
        places.locations()


def test_python_without_torch_is_refused(comfyui):
    fake_python(places.venv_python(comfyui / "venv"), "echo \"No module named 'torch'\" >&2; exit 1")
    with pytest.raises(SetupError, match=r"cannot import torch(.|\n)*COMFYUI_PYTHON"):
        bootstrap.check_existing(places.locations(), tests=False)


def test_missing_tools_are_named_and_only_for_tests(comfyui):
    fake_python(places.venv_python(comfyui / "venv"), "echo ruff")
    where = places.locations()
    bootstrap.check_existing(where, tests=False)
    with pytest.raises(SetupError, match=r"-m pip install ruff==[\d.]+$"):
        bootstrap.check_existing(where, tests=True)


# --- commands


def test_which_python_prints_one_line_before_setup(capsys):
    assert bootstrap.main(["which-python"]) == 0
    assert capsys.readouterr() == (f"{places.locations().python}\n", "")
    assert not places.cache_folder().exists()


def test_env_names_the_places(capsys):
    bootstrap.main(["env"])
    names = [line.partition("=")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["COMFYUI_PATH", "STEM_BASE_DIRECTORY", "STEM_CLIPS"]


def test_errors_go_to_stderr_with_a_code(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert bootstrap.main(["which-python"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "COMFYUI_PATH" in err


def test_interrupt_tells_that_setup_resumes(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap.signal, "signal", lambda *_: None)
    monkeypatch.setattr(bootstrap, "setup", interrupt)
    assert bootstrap.main(["setup"]) == 130
    assert "it goes on" in capsys.readouterr().err


def test_base_directory_links_the_checkout_and_can_be_made_again(tmp_path):
    for _ in range(2):
        places.make_base_directory(tmp_path / "base")
    link = tmp_path / "base" / "custom_nodes" / "stem-video-inversion"
    assert link.samefile(places.ROOT)


def test_stale_link_is_renewed(tmp_path):
    link = tmp_path / "custom_nodes" / "stem-video-inversion"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "gone")
    places.make_base_directory(tmp_path)
    assert link.samefile(places.ROOT)
