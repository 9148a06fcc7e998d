"""Real deaths of LMDeploy's engine on pretend GPUs: their steps, and what these lacked in all.

One at an image is in `tests/rehearse/test_rehearsal.py`; 30 random ones are in
bench/faults/DIAGNOSE_RESULTS.md.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbofit.core.errors import PackageError
from turbofit.core.struct import decode
from turbofit.core.units import MIB
from turbofit.diagnose.answer import Diagnosis
from turbofit.diagnose.explain import diagnose
from turbofit.rehearse.checkpoint.twin import write_checkpoint
from turbofit.rehearse.document import rehearse
from turbofit.rehearse.packages import engine_library
from turbofit.rehearse.spec import Spec

pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        engine_library()
    except PackageError as error:
        pytest.skip(error.message)
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return tmp_path_factory.mktemp("rehearsed")


def die(
    folder: Path, model: str, cases: list[dict[str, Any]], total: int = 24268, **settings: Any
) -> tuple[dict[str, Any], Diagnosis]:
    """Rehearse a start that ends badly, and diagnose its log."""
    write_checkpoint(model, folder / model)
    options = {"tp": 1, "max_batch_size": 128, "session_len": 32768, **settings}
    card = {"name": "NVIDIA GeForce RTX 3090", "total": total * MIB, "used": 300 * MIB,
            "sm": [8, 6], "sm_count": 82, "l2": 6 * MIB}  # fmt: skip
    spec = {
        "machine": {"gpus": [card] * options["tp"]},
        "model_dir": str(folder / model),
        "settings": options,
        "cases": cases,
    }
    document = rehearse(decode(json.dumps(spec), Spec, what="spec"), folder / "kept")
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    log = f"$ lmdeploy serve api_server {model} {words}\n".encode()
    log += (folder / "kept" / "log").read_bytes()
    on = f"{options['tp']}xrtx3090:total={total}MiB:used=300MiB"
    return document, diagnose([log], on=on)


def test_in_the_warm_up(folder: Path) -> None:
    document, found = die(folder, "internvl2-1b", [], tp=2, cache_max_entry_count=0.992)
    assert document["outcome"] == "out_of_memory"
    assert (found.kind, found.phase) == ("out_of_memory", "warm-up")
    assert found.missing_in_all is not None
    assert found.missing_in_all.bytes is not None
    assert found.missing_in_all.bytes >= document["death"]["missing"]
    assert found.would_work is not None
    assert found.would_work.fits


def test_while_loading_the_log_has_no_sizes(folder: Path) -> None:
    document, found = die(folder, "internvl2-1b", [], total=1700)
    assert document["outcome"] == "out_of_memory"
    assert (found.kind, found.phase) == ("out_of_memory", "weights")
    assert found.missing is not None
    assert found.missing.bytes is None
    assert found.missing_in_all is not None
    assert found.missing_in_all.bytes > 0
