"""Weights are read ahead within the host's memory, and never on pretend GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.machine import Host
from turbofit.core.plan import Plan
from turbofit.launch.engine import read_ahead


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Files that the kernel was told of, with what."""
    told: list[tuple[str, int, int, int]] = []

    def advise(descriptor: int, begin: int, length: int, advice: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        told.append((name, begin, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return told


def plan_at(folder: Path | None) -> Plan:
    plan = plausible_plan()
    source = replace(plan.model.source, checkpoint=None if folder is None else str(folder))
    host: Any = replace(plan.host, pinned=100, pageable=50)
    return replace(plan, model=replace(plan.model, source=source), host=host)


def test_as_much_as_the_host_has_beside_the_engines(tmp_path: Path, advised: list[Any]) -> None:
    for name in ("model-2.safetensors", "model-1.safetensors", "model-3.safetensors", "x.json"):
        (tmp_path / name).write_bytes(b"0" * 1000)
    for available, count in ((3150, 3), (3149, 2), (1149, 0)):
        advised.clear()
        thread = read_ahead.begin(plan_at(tmp_path), Host(ram_available=available))
        if thread is not None:
            thread.join()
        whole = (0, 0, os.POSIX_FADV_WILLNEED)
        assert advised == [(f"model-{n}.safetensors", *whole) for n in range(1, count + 1)]
    assert read_ahead.begin(plan_at(tmp_path), Host()) is None


def test_nothing_of_a_checkpoint_that_is_not_there(tmp_path: Path, advised: list[Any]) -> None:
    for folder in (None, tmp_path / "gone"):
        assert read_ahead.begin(plan_at(folder), Host(ram_available=1 << 40)) is None
    assert not advised
