"""Tunings on disk: real and pretend apart, one a model, promise, load, cards and LMDeploy."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import machine
from turbofit.core.tuning import Tuning
from turbofit.observe import tuned

pytestmark = pytest.mark.usefixtures("state")


ONE = Tuning(
    turbofit_version="0", created="2026-11-20T00:00:00+00:00", model="m (A, 1)",
    gpus=("NVIDIA GeForce RTX 3090",), driver="570.1", lmdeploy="0.18.0", promise={"images": 2},
    load={"image_size": [[64, 64]]}, goal="throughput", slo={},
)  # fmt: skip


def test_the_same_kind_replaces_and_another_stays() -> None:
    path = tuned.keep_tuned(ONE)
    newer = replace(ONE, created="2026-11-21T00:00:00+00:00")
    assert tuned.keep_tuned(newer) == path
    assert tuned.recall_tuned(pretend=False) == (newer,)
    other = replace(ONE, lmdeploy="0.19.0")
    tuned.keep_tuned(other)
    assert tuned.recall_tuned(pretend=False) == (newer, other)
    assert tuned.forget_tuned(ONE.model, pretend=False) == 2
    assert tuned.recall_tuned(pretend=False) == ()


def test_pretend_ones_never_reach_a_real_plan(state: Path) -> None:
    path = tuned.keep_tuned(replace(ONE, pretend=True))
    assert tuned.recall_tuned(pretend=False) == ()
    (state / "tuned").mkdir()
    path.rename(state / "tuned" / path.name)
    assert tuned.recall_tuned(pretend=False) == ()


def test_what_cannot_be_read_is_left_out(state: Path) -> None:
    path = tuned.keep_tuned(ONE)
    (path.parent / "half.json").write_bytes(path.read_bytes()[:40])
    (path.parent / "other.json").write_text('{"schema": "x"}')
    (path.parent / "bytes.json").write_bytes(b"\xff\xfe")
    assert tuned.recall_tuned(pretend=False) == (ONE,)


def test_a_promise_is_what_settings_depend_on() -> None:
    given = {"model": "m", "on": "x", "engine": "auto", "image_size": (4, 5), "margin": 7}
    assert tuned.promise_of(given) == {"image_size": [4, 5]}
    assert tuned.cards_of(machine(2)) == tuple(gpu.name for gpu in machine(2).gpus)
