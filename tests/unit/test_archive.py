"""Files that are written whole or not at all, and headers that may say anything."""

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import stem.archive
from stem.archive import DTYPES, HEADER_LIMIT, ArchivedLevels, open_archive, plan_archive, read_tensor, write_archive

ROOT = Path(__file__).parents[2]
METADATA = {"kind": "test", "text": 'Zeichen: ä, 雨, " and \\'}
BYTES = bytes(range(240))


def some_tensors():
    """Of every type and rank; the numbers are any bits, NaN among them."""
    found = {}
    for name, dtype in DTYPES.items():
        bits = torch.tensor(list(BYTES), dtype=torch.uint8)
        found[name] = (bits % 2).bool() if dtype is torch.bool else bits.view(dtype)
    shapes = {"scalar": (), "empty": (0, 3), "matrix": (4, 5), "clip": (3, 2, 4, 5)}
    g = torch.Generator().manual_seed(0)
    return found | {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def write(path, tensors, pause=lambda written: None):
    return write_archive([path], METADATA, tensors, pause)


def file_of(path, header, data=b"", length=None):
    """A file with a header as it is given: an object, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_bit_comes_back_and_safetensors_reads_the_same(tmp_path):
    path, tensors = tmp_path / "some.safetensors", some_tensors()
    assert write(path, tensors) == path
    archive = open_archive(path)
    assert archive.metadata == METADATA and archive.entries.keys() == tensors.keys()
    assert all(same(read_tensor(archive, name), tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as other:
        assert other.metadata() == METADATA
        assert all(same(other.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_files_of_safetensors_are_read(tmp_path):
    path, tensors = tmp_path / "other.safetensors", some_tensors()
    save_file(tensors, path, METADATA)
    archive = open_archive(path)
    assert archive.metadata == METADATA
    assert all(same(read_tensor(archive, name), tensor) for name, tensor in tensors.items())


def test_other_layouts_are_written_as_they_look(tmp_path):
    path, square = tmp_path / "x.safetensors", torch.arange(12.0).reshape(3, 4)
    write(path, {"turned": square.T, "cut": square[:, 1:3], "same": square[:1].expand(5, 4)})
    archive = open_archive(path)
    assert torch.equal(read_tensor(archive, "turned"), square.T) and torch.equal(read_tensor(archive, "cut"), square[:, 1:3])
    assert torch.equal(read_tensor(archive, "same"), square[:1].expand(5, 4))


def test_levels_are_read_one_by_one(tmp_path, monkeypatch):
    path, clip = tmp_path / "x.safetensors", some_tensors()["clip"]
    write(path, {"clip": clip, "more": clip[0]})
    levels = ArchivedLevels(open_archive(path), "clip")
    taken, usual = [], torch.empty
    monkeypatch.setattr(stem.archive.torch, "empty", lambda *given, **more: taken.append(given[0]) or usual(*given, **more))
    assert len(levels) == 3 and levels.shape == clip.shape and levels.dtype == clip.dtype
    assert all(same(levels[i], clip[i]) for i in (0, 2, -1, -3))
    assert taken == [clip.shape[1:]] * 4
    with pytest.raises(IndexError):
        levels[3]


def test_levels_can_be_copied_from_file_to_file(tmp_path):
    first, second, clip = tmp_path / "1.safetensors", tmp_path / "2.safetensors", some_tensors()["clip"]
    write(first, {"clip": clip})
    write(second, {"clip": ArchivedLevels(open_archive(first), "clip")})
    assert same(read_tensor(open_archive(second), "clip"), clip)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2).to(torch.float8_e4m3fn)]
)
def test_other_types_are_refused(tensor):
    with pytest.raises(ValueError, match=r"'x' is a tensor of torch.*, which is not stored"):
        plan_archive({}, {"x": tensor})


def test_a_header_beyond_the_limit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"the header takes .* Save a smaller workflow"):
        write_archive([tmp_path / "x.safetensors"], {"workflow": "x" * HEADER_LIMIT}, {}, lambda written: None)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- whole or not at all


class Stop(BaseException):
    pass


def old_file(folder):
    path = folder / "x.safetensors"
    write(path, {"clip": torch.zeros(3, 4)})
    return path, path.read_bytes()


def test_what_ends_the_writing_leaves_the_old_file_and_no_other(tmp_path):
    path, before = old_file(tmp_path)

    def stop(written):
        if written > 3000:
            raise Stop

    with pytest.raises(Stop):
        write(path, {"clip": torch.ones(10, 500)}, stop)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_takes_no_more_leaves_the_old_file_and_no_other(tmp_path):
    path, before = old_file(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=r"x\.safetensors cannot be written: .*File too large.*\. Free space there"):
            write(path, {"clip": torch.ones(10, 500)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_levels_that_change_while_they_are_written_are_no_file(tmp_path):
    path, before = old_file(tmp_path)

    class Shrinking:
        shape, dtype = torch.Size((3, 4)), torch.float32

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return torch.zeros(4 - i)

    with pytest.raises(ValueError, match="changed their size while they were written"):
        write(path, {"clip": Shrinking()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path, before = old_file(tmp_path)
    writer = (
        "import sys, time, torch\nfrom pathlib import Path\nfrom stem.archive import write_archive\n"
        "def pause(written):\n    if written > 3000: print(flush=True); time.sleep(600)\n"
        "write_archive([Path(sys.argv[1])], {}, {'clip': torch.ones(10, 5000)}, pause)"
    )
    with subprocess.Popen([sys.executable, "-c", writer, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == before
    (half,) = set(tmp_path.iterdir()) - {path}
    assert half.name.startswith(".") and half.suffix == ".part", "no list shows it"
    others = [tmp_path / "y.safetensors", tmp_path / "z.safetensors"]
    write(others[0], {"clip": torch.ones(3)})
    assert half.exists(), "its writer might still be at it"
    os.utime(half, (0, 0))
    other = tmp_path / ".mine.part"
    other.write_bytes(b"")
    os.utime(other, (0, 0))
    write(others[1], {"clip": torch.ones(3)})
    assert set(tmp_path.iterdir()) == {path, other, *others}


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_a_file_that_is_there_is_never_touched(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (path, before), other = old_file(tmp_path), tmp_path / "y.safetensors"
    names = iter([path, path, other, tmp_path / "z.safetensors"])
    assert write_archive(names, METADATA, {"clip": torch.ones(3)}, lambda written: None) == other
    assert path.read_bytes() == before and set(tmp_path.iterdir()) == {path, other}
    assert torch.equal(read_tensor(open_archive(other), "clip"), torch.ones(3))


def refuse(*_):
    raise PermissionError("no hard links here")


def test_what_is_read_later_is_the_file_that_was_opened(tmp_path):
    path, clip = tmp_path / "x.safetensors", torch.ones(3, 4)
    write(path, {"clip": clip})
    levels = ArchivedLevels(open_archive(path), "clip")
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"x\.safetensors: it was changed after it had been loaded\. Queue"):
        levels[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.safetensors: it cannot be read \(No such file"):
        levels[0]


# --------------------------------------------------------------------------------------------------- what headers may say


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "its header is no JSON object"),
        (b"{", b"", "no safetensors file|no JSON"),
        (b'{"a": ', b"", "its header is no JSON"),
        (b"\xff\xfe{}", b"", "its header is no text"),
        (b"[" * 200_000, b"", "nested too deeply|no JSON"),
        (b'{"a": {}, "a": {}}', b"", "a name comes twice"),
        (b'{"a": NaN}', b"", "'NaN' is no finite number"),
        (b'{"a": 1e999}', b"", "'1e999' is no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "a number has too many digits"),
        ({"__metadata__": {"kind": 1}}, b"", "its metadata are not texts"),
        ({"__metadata__": []}, b"", "its metadata are not texts"),
        ({"a": 1}, b"", "'a' has no dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, bytes(8), "'a' has no dtype, shape and data_offsets"),
        ({"a": entry("F8_E4M3", (8,))}, bytes(8), "type 'F8_E4M3', which these nodes do not write"),
        ({"a": entry(["F32"])}, bytes(8), "has the type a list"),
        ({"a": entry(shape=(-2,))}, bytes(8), "no possible shape"),
        ({"a": entry(shape=(2.0,))}, bytes(8), "no possible shape"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "no possible shape"),
        ({"a": {**entry(), "shape": 2}}, bytes(8), "no possible shape"),
        ({"a": entry(shape=[1] * 8 + [2])}, bytes(8), "no possible shape"),
        ({"a": entry(shape=(0, 10**15), offsets=(0, 0))}, b"", "no possible shape"),
        ({"a": entry(offsets=(0, 8, 8))}, bytes(8), "has no place"),
        ({"a": entry(offsets=(-8, 0))}, bytes(8), "has no place"),
        ({"a": entry(shape=(10**12,), offsets=(0, 4 * 10**12))}, bytes(8), "bytes are needed, it has"),
        ({"a": entry(shape=(10**12,))}, bytes(8), "place of its tensor 'a' does not fit"),
        ({"a": entry(), "b": entry()}, bytes(8), "does not fit"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "does not fit"),
        ({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24), "does not fit"),
        ({"a": entry()}, bytes(7), "cut off or damaged"),
        ({"a": entry()}, bytes(9), "cut off or damaged"),
        ({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(10_001)}, b"", "10001 tensors, at most 10000"),
    ],
)
def test_a_header_that_does_not_hold_true_is_one_line_and_takes_no_memory(tmp_path, header, data, message):
    path = file_of(tmp_path / "clip.safetensors", header, data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        open_archive(path)
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert str(error.value).startswith("clip.safetensors: ") and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("length", [0, 1, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_headers_of_other_lengths_are_not_read(tmp_path, length):
    path = file_of(tmp_path / "x.safetensors", {}, b"", length)
    with path.open("r+b") as file:
        file.truncate(HEADER_LIMIT + 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        open_archive(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_other_files_are_told(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: it is no safetensors file"):
        open_archive(path)


def test_what_is_no_file_is_told(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match="it is no ordinary file"):
            open_archive(path)
    with pytest.raises(ValueError, match="it cannot be read"):
        open_archive(tmp_path / "none")


def test_booleans_that_are_neither_are_refused(tmp_path):
    path = file_of(tmp_path / "x.safetensors", {"a": entry("BOOL", (2,), (0, 2))}, b"\x01\x02")
    with pytest.raises(ValueError, match="a boolean is neither true nor false"):
        read_tensor(open_archive(path), "a")


def test_fifty_thousand_damaged_files_are_refused_or_read(tmp_path, monkeypatch):
    """Bytes changed, taken out, put in and doubled, in the header or anywhere; none takes more memory than it has bytes."""
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.zeros(1, 0)})
    good, rng = path.read_bytes(), random.Random(0)  # noqa: S311
    words = [b"0", b"9", b"-", b"[", b"]", b"{", b"}", b'"', b",", b":", b"F32", b"BOOL", b"null", b"1e9", b"\x00", b"\xff"]
    taken, usual = [], torch.empty

    def empty(shape, dtype, device):
        taken.append(usual(shape, dtype=dtype, device="meta").nbytes)
        return usual(shape, dtype=dtype, device=device)

    monkeypatch.setattr(stem.archive.torch, "empty", empty)
    outcomes = {"read": 0, "refused": 0}
    (length,) = struct.unpack("<Q", good[:8])
    for _ in range(50_000):
        in_header = rng.random() < 0.7  # whose length is told right then
        content = bytearray(good[8 : 8 + length] if in_header else good)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at, how = rng.randrange(len(content)), rng.randrange(4)
            if how == 0:
                content[at] = rng.randrange(256)
            elif how == 1:
                del content[at : at + rng.randrange(1, 9)]
            elif how == 2:
                content[at:at] = rng.choice(words)
            else:
                content[at : at + 1] = content[at : at + rng.randrange(2, 40)]
            content = content or bytearray(b"\x00")
        if in_header:
            content = struct.pack("<Q", len(content)) + content + good[8 + length :]
        path.write_bytes(content)
        taken.clear()
        try:
            archive = open_archive(path)
            for name in archive.entries:
                read_tensor(archive, name)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(error).startswith("x.safetensors: ")
            outcomes["refused"] += 1
        assert sum(taken) <= len(content)
    assert min(outcomes.values()) > 1000, outcomes
