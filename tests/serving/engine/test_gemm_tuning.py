"""TurboMind's GEMM tuning from one start to the next."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit.core.plan import Plan
from turbofit.planning.commands import commands
from turbofit.serving.engine.gemm_tuning import GemmTuning, give_tuning, records_of
from turbofit.serving.engine.launches import Launch

PLAN = plausible_plan(gpus=1, tp=1)
EXPORT, IMPORT = "TM_GEMM_EXPORT", "TM_GEMM_IMPORT"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "turbofit" / "gemm-tuning"


def exported(records: int = 3, word: bytes = b"TMGEMM2\0") -> bytes:
    """A file as 0.18's library writes it."""
    return struct.pack("<8sIIQ", word, 6, 304, records) + bytes(304 * records)


def tuning(plan: Plan = PLAN, lmdeploy: str = "0.18.0", *, imports: bool = True) -> GemmTuning:
    return GemmTuning(plan, 0, lmdeploy, imports=imports)


def test_the_next_start_reads_what_one_wrote() -> None:
    first = tuning(imports=False)
    path = Path(first.environment()[EXPORT])
    assert not path.exists()
    path.write_bytes(exported())
    first.keep()
    assert not path.exists()
    # Its own restarts, and a start whose peak need not be measured.
    for after in (first, tuning()):
        kept = after.environment()
        assert list(kept) == [IMPORT]
        assert records_of(Path(kept[IMPORT])) == 3
    # A start that is measured warms up.
    assert list(tuning(imports=False).environment()) == [EXPORT]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        exported()[:20],
        exported()[:-1],
        exported() + b"x",
        exported(0),
        exported(2, b"TMGEMM1\0"),
    ],
)
def test_a_file_that_is_not_whole_is_not_taken(data: bytes) -> None:
    one = tuning()
    Path(one.environment()[EXPORT]).write_bytes(data)
    one.keep()
    assert list(tuning().environment()) == [EXPORT]


def test_another_version_card_or_model_has_another_file() -> None:
    one = tuning()
    Path(one.environment()[EXPORT]).write_bytes(exported())
    one.keep()
    gpu = replace(PLAN.machine.gpus[0], name="NVIDIA L4")
    others = [
        tuning(lmdeploy="0.18.1"),
        tuning(replace(PLAN, machine=replace(PLAN.machine, gpus=(gpu,)))),
        tuning(replace(PLAN, model=replace(PLAN.model, name="other"))),
        tuning(
            changed(PLAN, settings=replace(PLAN.engines[0].settings, max_prefill_token_num=1024))
        ),
    ]
    assert [list(other.environment()) for other in others] == [[EXPORT]] * len(others)
    # A cache of another size takes the same products.
    same = changed(PLAN, settings=replace(PLAN.engines[0].settings, cache_max_entry_count=0.123))
    assert list(tuning(same).environment()) == [IMPORT]


def test_the_users_own_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPORT, "/mine")
    assert tuning().environment() == {}


def test_an_engine_is_told_and_so_are_people() -> None:
    told: list[str] = []
    launch = Launch(commands(PLAN)[0], [sys.executable, "-m", "lmdeploy"])
    give_tuning([launch], PLAN, "0.18.0", told.append, imports=True)
    path = Path(launch.start_command(0).env[EXPORT])
    assert told == []
    path.write_bytes(exported())
    assert launch.tuning is not None
    launch.tuning.keep()
    give_tuning([launch], PLAN, "0.18.0", told.append, imports=True)
    assert IMPORT in launch.start_command(1).env
    assert told == ["kernels: the choices of an earlier start, without a warm-up"]


def test_an_engine_that_measures_none_is_left_alone() -> None:
    plan = changed(PLAN, engine="pytorch")
    launch = Launch(commands(PLAN)[0], [sys.executable, "-m", "lmdeploy"])
    give_tuning([launch], plan, "0.18.0", print, imports=True)
    assert launch.tuning is None
