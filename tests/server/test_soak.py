"""The short form of `make soak`: mixed runs on one server, some cancelled, some failing."""

import pytest

from tools import soak
from tools.server import Server

RUNS = 40


@pytest.fixture(scope="module")
def done():
    with Server(argv=("--cpu", "--cache-classic")) as server:
        return soak.soak(server, RUNS, seed=1)  # which sees that results stay and nothing is stuck


def test_all_ways_occur(done):
    assert {run.way for run in done} == set(soak.WAYS)
    assert any(run.outcome == "cancelled" for run in done)
    assert len({run.outcome for run in done if run.way == "whole"}) == len(soak.GRAPHS)


def test_memory_does_not_grow_after_the_first_runs(done):
    """Allocators keep some: a leak of one clip's trajectory and bases for each run would be more than that."""
    assert soak.growth(done) < 0.04


def test_growth_is_seen():
    flat = [soak.Run("a", "whole", "", 1.0, 1000)] * 60
    rising = [run._replace(resident=1000 + 5 * i) for i, run in enumerate(flat)]
    assert soak.growth(flat) == 0
    assert soak.growth(rising) == pytest.approx((1000 + 5 * 57.5) / (1000 + 5 * 21.5) - 1)
