"""What is recorded is found again by block and noise level, and refused where it does not fit."""

import pytest
import torch

from stem.basis import Basis, BasisSettings, BlockLayout, ModelFingerprint, bases_at, check_basis
from stem.trajectory import InversionSettings, Trajectory, latents_between

MODEL = ModelFingerprint("SD15", "eps", (BlockLayout("input_1", 2, 4), BlockLayout("middle_0", 2, 8)))
SETTINGS = BasisSettings(num_bases=6, iterations=5, temperature=0.01, seed=0, frames_per_em=0)


@pytest.fixture
def basis():
    keys = tuple(torch.randn(3, 2, 6, d, generator=torch.Generator().manual_seed(d)) for d in (4, 8))
    values = tuple(-x for x in keys)
    sigmas = torch.tensor([0.1, 1.0, 10.0])
    return Basis(keys, values, ("input_1", "middle_0"), sigmas, (0, 4, 8), 9, SETTINGS, MODEL)


@pytest.fixture
def trajectory():
    latents = torch.arange(3.0).reshape(3, 1, 1, 1, 1).expand(3, 2, 4, 8, 8)
    settings = InversionSettings("stem", 2, SETTINGS)
    return Trajectory(latents, torch.tensor([0.1, 1.0, 10.0]), [], settings, MODEL)


@pytest.mark.parametrize("block, index", [("input_1", 0), ("middle_0", 1)])
@pytest.mark.parametrize("sigma, level", [(0.1, 0), (0.3, 0), (0.33, 1), (torch.tensor(9.0), 2), (0.0, 0)])
def test_bases_are_found_by_block_and_nearest_noise_level(basis, block, index, sigma, level):
    keys, values = bases_at(basis, block, sigma)
    assert keys.equal(basis.keys[index][level]) and values.equal(-keys)


def test_a_block_that_was_not_recorded_is_told(basis):
    with pytest.raises(ValueError, match='nothing for block "output_3", only for input_1, middle_0'):
        bases_at(basis, "output_3", 1.0)


def test_the_model_that_made_a_basis_can_read_it(basis):
    check_basis(basis, MODEL)
    check_basis(basis, MODEL, ("middle_0",))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "SDXL"}, r"SD15 model \(eps prediction\), this model is SDXL"),
        ({"prediction": "v"}, r"this model is SD15 \(v prediction\)"),
        ({"blocks": MODEL.blocks[:1]}, 'no self-attention block "middle_0"'),
        (
            {"blocks": (MODEL.blocks[0], BlockLayout("middle_0", 4, 8))},
            '"middle_0".* 2 heads of 8.* 4 heads of 8',
        ),
        (
            {"blocks": (MODEL.blocks[0], BlockLayout("middle_0", 2, 5))},
            '"middle_0".* 2 heads of 8.* 2 heads of 5',
        ),
    ],
)
def test_another_model_is_refused(basis, change, message):
    with pytest.raises(ValueError, match=message):
        check_basis(basis, MODEL._replace(**change))


def test_a_block_is_refused_that_the_basis_lacks_and_the_model_has(basis):
    model = MODEL._replace(blocks=(*MODEL.blocks, BlockLayout("output_3", 2, 8)))
    check_basis(basis, model)
    with pytest.raises(ValueError, match='nothing for block "output_3"'):
        check_basis(basis, model, ("input_1", "output_3"))


def test_only_the_blocks_that_are_read_need_to_fit(basis):
    model = MODEL._replace(blocks=(MODEL.blocks[0], BlockLayout("middle_0", 4, 4)))
    check_basis(basis, model, ("input_1",))


def test_memory_of_both_is_seen_by_a_cache_that_counts_lists_tuples_and_cpu_tensors(basis, trajectory):
    def counted(x):
        if isinstance(x, (list, tuple)):
            return sum(counted(y) for y in x)
        return x.numel() if torch.is_tensor(x) and x.device.type == "cpu" else 0

    assert counted(basis) == 3 * 2 * 6 * (4 + 8) * 2 + 3
    assert counted(trajectory) == 3 * 2 * 4 * 8 * 8 + 3


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0.1, 0.0), (1.0, 1.0), (10.0, 2.0), (0.55, 0.5), (torch.tensor(4.0), 1 + 1 / 3), (10.005, 2.0), (0.01, -0.1)],
)
def test_between_two_levels_a_trajectory_is_straight(trajectory, sigma, expected):
    """The latents of the fixture are 0, 1 and 2 at the levels 0.1, 1 and 10; below the first it goes on the same way."""
    assert latents_between(trajectory, sigma).unique().item() == pytest.approx(expected, abs=1e-6)


def test_above_its_end_a_trajectory_is_not_known(trajectory):
    with pytest.raises(ValueError, match=r"the trajectory ends at sigma 10, latents are needed at 10\.1; sample on the sigmas"):
        latents_between(trajectory, 10.1)
