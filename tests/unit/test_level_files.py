"""Levels of a trajectory on disk."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem.basis import ModelFingerprint
from stem.level_files import LevelFiles
from stem.trajectory import InversionSettings, Trajectory, latents_at, latents_between

SHAPE = (4, 3, 2, 5, 6)


def filled(folder, dtype=torch.float32):
    levels, latents = LevelFiles(folder, SHAPE, dtype), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for i, level in enumerate(latents):
        levels[i] = level
    return levels, latents


def trajectory(latents):
    sigmas = torch.tensor([0.03, 1.0, 4.0, 12.0])
    return Trajectory(latents, sigmas, [], InversionSettings("ddim", 3, None), ModelFingerprint("SD15", "eps", ()))


def test_levels_come_back_as_they_were_written(tmp_path):
    levels, latents = filled(tmp_path / "clip")
    assert len(levels) == 4 and levels.shape == SHAPE and levels.dtype == torch.float32
    assert all(torch.equal(levels[i], latents[i]) for i in range(-4, 4))
    with pytest.raises(IndexError):
        levels[4]
    assert sorted(p.name for p in levels.folder.iterdir()) == [f"000{i}.safetensors" for i in range(4)], "no half files"


def test_half_precision_takes_half_the_room(tmp_path):
    levels, latents = filled(tmp_path / "clip", torch.float16)
    assert levels[1].dtype == torch.float16 and torch.equal(levels[1], latents[1].half())
    numbers = latents[0].numel()
    assert 2 * numbers < (levels.folder / "0001.safetensors").stat().st_size < 2 * numbers + 200


@given(sigma=st.floats(0.01, 12.0))
@settings(max_examples=50, deadline=None)
def test_a_trajectory_reads_the_same_from_disk_as_from_memory(tmp_path_factory, sigma):
    levels, latents = filled(tmp_path_factory.mktemp("clips") / "clip")
    on_disk, in_memory = trajectory(levels), trajectory(latents)
    assert torch.equal(latents_between(on_disk, sigma), latents_between(in_memory, sigma))
    assert torch.equal(latents_at(on_disk, -1), latents[-1])


def test_half_precision_is_read_in_full():
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half()
    found = trajectory(latents)
    assert latents_between(found, 2.0).dtype == latents_at(found, 0).dtype == torch.float32
    assert torch.equal(latents_at(found, 2), latents[2].float())


def test_only_the_levels_that_are_needed_are_read(tmp_path, monkeypatch):
    levels, _ = filled(tmp_path / "clip")
    read, usual = [], LevelFiles.__getitem__
    monkeypatch.setattr(LevelFiles, "__getitem__", lambda self, level: read.append(level) or usual(self, level))
    for sigma, levels_read in ((2.0, [1, 2]), (4.0, [2]), (0.03, [0]), (12.0, [3]), (12.005, [3]), (0.01, [0, 1])):
        read.clear()
        latents_between(trajectory(levels), torch.tensor(sigma))
        assert read == levels_read


def test_the_folder_goes_with_the_object(tmp_path):
    levels, _ = filled(tmp_path / "clip")
    assert levels.folder.is_dir()
    kept = trajectory(levels)
    del levels
    gc.collect()
    assert (tmp_path / "clip").is_dir(), "a trajectory still has it"
    del kept
    gc.collect()
    assert not (tmp_path / "clip").exists()


def test_copies_share_the_files_and_other_processes_get_none(tmp_path):
    levels, latents = filled(tmp_path / "clip")
    other = copy.deepcopy(trajectory(levels))
    del levels
    gc.collect()
    assert torch.equal(latents_at(other, 1), latents[1])
    with pytest.raises(TypeError, match="latents on disk go with this process"):
        pickle.dumps(other)


def test_wrong_levels_are_refused(tmp_path):
    levels, latents = filled(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"the shape \(2, 2, 5, 6\); give that of a level, \(3, 2, 5, 6\)"):
        levels[0] = latents[0][:2]
    (levels.folder / "0002.safetensors").unlink()
    (levels.folder / "0003.safetensors").write_bytes(b"not a tensor")
    for level in (2, 3):
        with pytest.raises(ValueError, match=rf"000{level}.safetensors is gone or damaged .*Invert the clip again"):
            levels[level]
    with pytest.raises(FileExistsError):
        LevelFiles(tmp_path / "clip", SHAPE)


def test_a_level_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    import stem.level_files

    levels, latents = filled(tmp_path / "clip")

    def full_disk(tensors, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(stem.level_files, "save_file", full_disk)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device.*switch trajectory_on_disk off"):
        levels[1] = latents[1] + 1
    assert torch.equal(levels[1], latents[1])
