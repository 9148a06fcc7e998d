"""A few lives of `bench/faults/allocations`, and a few failing calls of `bench/faults/calls`."""

from __future__ import annotations

import errno
import importlib.util
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench.faults.allocation_configs import CONFIGS, Point
from bench.faults.allocation_lives import TurboMindLives
from bench.faults.allocations import sample
from bench.faults.calls import Failure, attempt
from bench.faults.torch_lives import TorchLives
from tests.pretend.cuda_torch import CUDA_PATH

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_a_sample_has_the_ends_of_each_phase_and_is_drawn_by_its_seed() -> None:
    phases = [("weights", 500), ("warm-up", 400), ("case worst", 100)]
    names = [(phase, f"call {number % 7}") for phase, count in phases for number in range(count)]
    points = [Point(number, False, *name) for number, name in enumerate(names, 1)]
    drawn = [point.number for point in sample(points, 20, random.Random(1))]
    assert drawn == [point.number for point in sample(points, 20, random.Random(1))]
    assert len(drawn) == len(set(drawn)) == 20
    assert {1, 500, 501, 900, 901, 1000} <= set(drawn)
    assert sample(points[:9], 20, random.Random(1)) == points[:9]


@needs_compiler
@pytest.mark.lmdeploy
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmdeploy") is None, reason="needs LMDeploy")
def test_allocations_of_turbomind_fail_and_are_named(tmp_path: Path) -> None:
    config = replace(CONFIGS[0], lives=5)
    with TurboMindLives(config, tmp_path) as lives:
        points = lives.whole()
        device = [point for point in points if not point.pinned]
        guarded = next(point for point in device if "CacheFlushing" in point.site)
        chosen = (device[0], guarded, device[-40], next(one for one in points if one.pinned))
        ended = [lives.fail(point.number, pinned=point.pinned) for point in chosen]
    first, cache, late, pinned = ended
    assert [(one.kind, one.why) for one in (first, cache, pinned)] == [("named", "")] * 3
    # A step that TurboMind computes ahead may fail when the answer is out already.
    assert late.kind in ("named", "recovered")
    assert not late.why


@needs_compiler
@pytest.mark.lmdeploy
@pytest.mark.slow
@pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")
def test_an_allocation_of_transformers_fails_and_is_named(tmp_path: Path) -> None:
    config = next(one for one in CONFIGS if one.engine == "transformers")
    with TorchLives(config, tmp_path) as lives:
        point = lives.whole()[1]  # torch asks again: of the first one it has another try
        ended = lives.fail(point.number, pinned=point.pinned)
    assert (ended.kind, ended.why) == ("named", "")


@needs_compiler
@pytest.mark.parametrize(
    "failure",
    [
        Failure("files", 1, errno.EROFS),
        Failure("files", 20, errno.ENOSPC, stays=True),
        Failure("fork", 1, errno.EAGAIN),
        Failure("pipe", 1, errno.EMFILE),
        Failure("kill", 1, errno.ESRCH),
    ],
    ids=str,
)
def test_a_call_that_fails_is_typed_or_costs_nothing(failure: Failure) -> None:
    tried = attempt("serve (stand-in engine)", failure)
    assert "SIMULATED" not in tried.run.said
    assert (tried.wrong, bool(tried.hit)) == ("", True)
