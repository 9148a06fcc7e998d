from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import write_checkpoint
from turbofit.core.errors import PackageError
from turbofit.core.plan import Plan
from turbofit.core.struct import decode
from turbofit.core.units import MIB
from turbofit.rehearsal.packages import engine_library
from turbofit.rehearsal.planned import rehearse
from turbofit.rehearsal.spec import Spec

Rehearse = Callable[..., dict[str, Any]]

# The prototype's pretend card (shared/facts/rehearsal.md), with LMDeploy's defaults.
CARD = {
    "name": "NVIDIA GeForce RTX 3090",
    "total": 24268 * MIB,
    "used": 300 * MIB,
    "sm": [8, 6],
    "sm_count": 82,
    "l2": 6 * MIB,
}


def tiles(*numbers: int) -> list[dict[str, Any]]:
    """One case a number, of one image of so many tiles."""
    return [{"name": str(n), "requests": [{"units": [n], "text_tokens": 32}]} for n in numbers]


def mib(size: int | None) -> float | None:
    """MiB to two places."""
    return None if size is None else round(size / MIB, 2)


def forward_pool(plan: Plan, document: dict[str, Any]) -> tuple[int, int]:
    """What the fullest forward took of the first GPU's pool, and what the plan pays for."""
    cases = {case["name"]: case for case in document["cases"]}
    (seen,) = cases["vision_forward"]["transient"]
    (paid,) = (t.bytes for t in plan.ledgers[0].terms if t.term == "vision_forward")
    return seen, paid


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            write_checkpoint(name, folder / name)
        return folder / name

    return made


@pytest.fixture(scope="session")
def run(checkpoints: Callable[[str], Path]) -> Rehearse:
    """Rehearses a preset's twin on the prototype's card; skips without LMDeploy 0.18."""
    try:
        engine_library()
    except PackageError as error:
        pytest.skip(error.message)
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")

    def go(
        model: str,
        tp: int = 1,
        cases: list[dict[str, Any]] | None = None,
        card: dict[str, Any] | None = None,
        machine: dict[str, Any] | None = None,
        keep: Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        base = {
            "tp": tp, "max_batch_size": 128, "max_prefill_token_num": 8192,
            "cache_max_entry_count": 0.8, "session_len": 32768,
        }  # fmt: skip
        data = {
            "machine": {"gpus": [CARD | (card or {})] * tp} | (machine or {}),
            "model_dir": str(checkpoints(model)),
            "settings": base | settings,
            "cases": cases or [],
            # Only a rehearsal that hangs takes so long.
            "start_seconds": 600,
            "case_seconds": 600,
        }
        return rehearse(decode(json.dumps(data), Spec, what="spec"), keep)

    return go
