"""Saved inversions and bases: what comes back, and what is refused before it is read."""

import copy
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem.archive import ArchivedLevels, open_archive
from stem.basis import Basis, BasisSettings, BlockLayout, ModelFingerprint
from stem.level_files import LevelFiles
from stem.plain import pack, unpack
from stem.saved import Inversion, load_basis, load_inversion, parts_of_basis, parts_of_inversion, write_parts
from stem.trajectory import InversionSettings, Trajectory, latents_between

MODEL = ModelFingerprint("SD15", "eps", (BlockLayout("input_1", 2, 4), BlockLayout("output_3", 1, 8)))
SETTINGS = BasisSettings(5, 3, 0.01, 2**64 - 1, 0, 1)
SIGMAS = torch.tensor([0.029167, 0.041310, 1.0, 14.6146])
FRAMES = 3


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_basis(dtype=torch.float32):
    keys = tuple(random(3, b.heads, 5, b.head_dim, seed=i, dtype=dtype) for i, b in enumerate(MODEL.blocks))
    values = tuple(k.flip(2) for k in keys)
    return Basis(keys, values, ("input_1", "output_3"), SIGMAS[1:], (0, 2), FRAMES, SETTINGS, MODEL)


def some_inversion(dtype=torch.float32, latents=None, basis=None, **options):
    levels = random(4, FRAMES, 4, 5, 6, seed=1, dtype=dtype) if latents is None else latents
    conditioning = [[random(1, 7, 8, seed=2), options], [random(FRAMES, 7, 8, seed=3, dtype=torch.float16), {}]]
    trajectory = Trajectory(levels, SIGMAS, conditioning, InversionSettings("stem", 3, SETTINGS), MODEL)
    return Inversion({"samples": random(FRAMES, 4, 5, 6, seed=4, dtype=dtype), "batch_index": [0, 1, 2]}, trajectory, basis)


def save(path, parts, **more):
    write_parts([path], parts, more, lambda written: None)
    return path


def same(a, b):
    """Of all that may be in an inversion; tensors by their bits."""
    if isinstance(b, ArchivedLevels):
        b = torch.stack([b[i] for i in range(len(b))])
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        x, y = (each.reshape(-1).view(torch.uint8) for each in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(x, y)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_basis", [True, False])
def test_an_inversion_comes_back_bit_by_bit(tmp_path, dtype, with_basis):
    inversion = some_inversion(dtype, basis=some_basis(dtype) if with_basis else None, pooled_output=random(1, 9), strength=0.7)
    found = load_inversion(save(tmp_path / "x", parts_of_inversion(inversion)))
    assert same(inversion.latents, found.latents) and same(inversion.basis, found.basis)
    assert all(same(a, b) for a, b in zip(inversion.trajectory, found.trajectory, strict=True))
    for sigma in (0.03, 0.5, 14.6146):
        assert torch.equal(latents_between(found.trajectory, sigma), latents_between(inversion.trajectory, sigma))


def test_a_basis_comes_back_bit_by_bit(tmp_path):
    assert same(some_basis(), load_basis(save(tmp_path / "x", parts_of_basis(some_basis()))))


def test_levels_on_disk_are_saved_without_being_read_together(tmp_path, monkeypatch):
    inversion = some_inversion()
    levels = LevelFiles(tmp_path / "levels", inversion.trajectory.latents.shape)
    for i, level in enumerate(inversion.trajectory.latents):
        levels[i] = level
    read, usual = [], LevelFiles.__getitem__
    monkeypatch.setattr(LevelFiles, "__getitem__", lambda self, level: read.append(level) or usual(self, level))
    path = save(tmp_path / "x", parts_of_inversion(some_inversion(latents=levels)))
    assert read == [0, 1, 2, 3]
    assert same(inversion.trajectory.latents, load_inversion(path).trajectory.latents)


def test_what_was_loaded_can_be_saved_again(tmp_path):
    first = save(tmp_path / "1", parts_of_inversion(some_inversion(basis=some_basis())))
    second = save(tmp_path / "2", parts_of_inversion(load_inversion(first)))
    assert first.read_bytes() == second.read_bytes()


def test_only_latents_and_conditioning_are_read_at_once(tmp_path, monkeypatch):
    import stem.archive

    inversion = some_inversion()
    path = save(tmp_path / "x", parts_of_inversion(inversion))
    taken, usual = [], torch.empty
    monkeypatch.setattr(stem.archive.torch, "empty", lambda *given, **more: taken.append(given[0]) or usual(*given, **more))
    trajectory = load_inversion(path).trajectory
    at_once = [*(cond[0] for cond in inversion.trajectory.conditioning), inversion.latents["samples"]]
    assert sorted(taken) == sorted(tuple(tensor.shape) for tensor in at_once)
    assert copy.deepcopy(trajectory).latents is trajectory.latents


# ------------------------------------------------------------------------------------------------------------ plain values

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TENSORS = st.integers(0, 9).map(lambda n: random(n, 2, seed=n))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | FINITE | st.text() | TENSORS,
    lambda inside: (
        st.lists(inside, max_size=3).flatmap(lambda found: st.sampled_from([found, tuple(found)]))
        | st.dictionaries(st.text(), inside, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_plain_values_come_back(value):
    tensors = {}
    document = json.loads(json.dumps(pack(value, "x", tensors)))
    assert same(value, unpack(document, tensors.pop)) and not tensors


def deep(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "x.mine is a object, which cannot be stored"),
        (math.inf, "x.mine is inf, which cannot be stored"),
        (2**64, "x.mine is a int, which"),
        ({1: 2}, "x.mine is a dict, which"),
        (MODEL, "x.mine is a ModelFingerprint, which"),
        ([1, (2, {3})], r"x\.mine\.1\.1 is a set, which"),
        (deep(17), "nested too deeply"),
    ],
)
def test_other_values_are_refused_by_their_place(value, message):
    with pytest.raises(ValueError, match=message):
        pack({"mine": value}, "x", {})


def test_tensors_of_the_same_place_have_names_of_their_own():
    tensors, value = {}, {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}}
    assert same(value, unpack(pack(value, "x", tensors), tensors.__getitem__)) and len(tensors) == 2


# ----------------------------------------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda i: i._replace(latents={"samples": i.latents["samples"][:2]}), r"shape \(2, 4, 5, 6\), .* same STEM Invert"),
        (lambda i: i._replace(latents={}), "the latents have the shape None"),
        (lambda i: i._replace(latents={**i.latents, "type": object()}), r"latents\.type is a object"),
        (lambda i: i._replace(trajectory=i.trajectory._replace(sigmas=SIGMAS.double())), "float64, only float32 is stored"),
        (lambda i: i._replace(trajectory=i.trajectory._replace(sigmas=SIGMAS[:3])), "3 steps have 3 noise levels"),
        (lambda i: i._replace(trajectory=i.trajectory._replace(sigmas=SIGMAS.flip(0))), "noise levels do not ascend"),
        (lambda i: i._replace(trajectory=i.trajectory._replace(conditioning=[])), "no list of prompts"),
        (lambda i: i._replace(basis=i.basis._replace(frame_ids=(3,))), "no frames that are among 3"),
        (lambda i: i._replace(basis=i.basis._replace(blocks=("input_1", "middle_0"))), "blocks that its model has not"),
        (lambda i: i._replace(basis=i.basis._replace(keys=i.basis.values[::-1])), "are missing, or are not alike"),
    ],
)
def test_what_does_not_fit_together_is_not_saved(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "x", parts_of_inversion(changed(some_inversion(basis=some_basis()))))
    assert not list(tmp_path.iterdir())


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda texts: texts.pop("stem.kind"), "a file of another kind .* Choose one that STEM Save Inversion wrote"),
        (lambda texts: texts.update({"stem.kind": "basis"}), "it is a saved basis, not a saved inversion"),
        (lambda texts: texts.update({"stem.kind": "x\ny" * 100}), "a file of another kind"),
        (lambda texts: texts.update({"stem.version": "2"}), "format version '2', this pack reads 1. Update the pack"),
        (lambda texts: texts.pop("stem.trajectory"), "its description is not complete .*stem.trajectory"),
        (lambda texts: texts.pop("stem.latents"), "its description is not complete"),
        (lambda texts: texts.pop("stem.basis"), "the tensor 'basis.keys.input_1' belongs to nothing"),
        (lambda texts: texts.update({"stem.latents": "[" * 100_000}), "nested too deeply"),
        (lambda texts: texts.update({"stem.latents": "{}"}), "is no kind of plain value"),
        (lambda texts: texts.update({"stem.trajectory": "[]"}), "is no JSON object"),
    ],
)
def test_texts_that_are_not_ours_are_told_in_one_line(tmp_path, change, message):
    path = save(tmp_path / "clip.safetensors", parts_of_inversion(some_inversion(basis=some_basis())))
    header, data = header_of(path)
    change(header["__metadata__"])
    with pytest.raises(ValueError, match=message) as error:
        load_inversion(with_header(path, header, data))
    assert str(error.value).startswith("clip.safetensors: ") and "\n" not in str(error.value) and len(str(error.value)) < 300


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**20,
    0.5,
    -0.0,
    1e300,
    "",
    "x",
    "latents.samples",
    "conditioning.0.0",
    [],
    [1],
    {},
    {"a": 1},
]
JUNK += [{"tensor": "latents.samples"}, {"tensor": 1}, {"tuple": 3}, {"dict": []}, [[[]]], ["SD15", "eps", [["a", 1, 1]]]]


def places_in(document, place=()):
    yield place
    inside = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for name, each in inside:
        yield from places_in(each, (*place, name))


def replaced(document, place, value):
    if not place:
        return value
    document = copy.copy(document)
    document[place[0]] = replaced(document[place[0]], place[1:], value)
    return document


@pytest.mark.parametrize("text", ["stem.trajectory", "stem.latents", "stem.basis"])
def test_descriptions_with_anything_anywhere_are_refused_or_read(tmp_path, text):
    """Every place of every description, with every kind of junk in it."""
    inversion = some_inversion(basis=some_basis(), area=("percentage", 0.5), mask=random(1, 5, 6))
    path = save(tmp_path / "x.safetensors", parts_of_inversion(inversion))
    header, data = header_of(path)
    described = json.loads(header["__metadata__"][text])
    refused = 0
    for place in places_in(described):
        for junk in JUNK:
            texts = {**header["__metadata__"], text: json.dumps(replaced(described, place, junk))}
            try:
                load_inversion(with_header(path, {**header, "__metadata__": texts}, data))
            except ValueError as error:
                refused += 1
                assert str(error).startswith("x.safetensors: ") and "\n" not in str(error)
    assert refused > 100


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_headers_with_other_tensors_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "headers.safetensors"
    path.unlink(missing_ok=True)
    save(path, parts_of_inversion(some_inversion(basis=some_basis())))
    header, content = header_of(path)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([n for n in header if n != "__metadata__"]))
        how = data.draw(st.sampled_from(["dtype", "shape", "swap", "drop", "rename"]))
        if how == "dtype":
            header[name]["dtype"] = data.draw(st.sampled_from(["F32", "F16", "BF16", "I32", "U8", "BOOL", "F64"]))
        elif how == "shape":
            header[name]["shape"] = data.draw(st.permutations(header[name]["shape"]))
        elif how == "swap":
            other = data.draw(st.sampled_from([n for n in header if n != "__metadata__"]))
            header[name], header[other] = header[other], header[name]
        elif how == "drop" and len(header) > 3:
            del header[name]
        else:
            header[data.draw(st.text(max_size=5))] = header.pop(name)
    try:
        found = load_inversion(with_header(path, header, content))
    except ValueError as error:
        assert str(error).startswith("headers.safetensors: ")
    else:
        assert found.latents["samples"].shape == found.trajectory.latents.shape[1:] == (FRAMES, 4, 5, 6)
        assert all(k.shape == v.shape for k, v in zip(found.basis.keys, found.basis.values, strict=True))


def test_a_file_without_texts_is_foreign(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.tensor([])}, path)
    assert open_archive(path).metadata == {}
    for load, kind in ((load_inversion, "inversion"), (load_basis, "basis")):
        with pytest.raises(ValueError, match=rf"model\.safetensors: it is a file of another kind .*, not a saved {kind}"):
            load(path)
