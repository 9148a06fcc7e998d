"""The programs for a real GPU, run to their end on a pretend one."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import ballast, constants, stages
from bench.gpu.__main__ import main
from tests.pretend.cuda_torch import CUDA_PATH
from turbofit.observe.sampler import Memory, Sampler

cuda = pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")


class Driver:
    """A driver pool in blocks of 32 MiB that gives back once it was waited for."""

    def __init__(self) -> None:
        self.used, self.waiting = 0, 0

    def cuMemAllocAsync(self, pointer: Any, size: Any, _: object) -> int:  # noqa: N802
        blocks = -(-size.value // (32 << 20)) * (32 << 20)
        pointer._obj.value = blocks
        self.used += blocks
        return 0

    def cuMemFreeAsync(self, pointer: Any, _: object) -> int:  # noqa: N802
        self.waiting += pointer.value
        return 0

    def cuStreamSynchronize(self, _: object) -> int:  # noqa: N802
        self.used, self.waiting = self.used - self.waiting, 0
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = (8 << 30) - self.used, 8 << 30
        return 0


def test_the_pool_tells_what_it_rounds_to_and_when_it_gives_back(capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants.time, "sleep", lambda _: None)
    constants.pool_steps(constants.Pool(Driver()))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["mark"] for line in lines] == [f"pool_{n}_mib" for n in constants.POOL_SIZES]
    for line in lines:
        assert line["taken"] == line["kept_at_once"] == -(-line["asked"] // (32 << 20)) * (32 << 20)
        assert line["kept_after_wait"] == 0
    lost = Driver()
    lost.cuMemAllocAsync = lambda *_: 2  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cuMemAllocAsync gave 2"):
        constants.pool_steps(constants.Pool(lost))


def stub(monkeypatch, samples: list[tuple[float, int]]) -> None:
    monkeypatch.setattr(stages, "memory_now", lambda _: Memory(total=0, used=100, free=0))
    whole = Sampler([0])
    whole._samples[0] = samples
    monkeypatch.setattr(stages, "Sampler", lambda _: nullcontext(whole))


def test_marks_are_read_beside_nvml(monkeypatch) -> None:
    stub(monkeypatch, [(9.0, 100), (9.95, 150), (10.5, 900), (10.95, 400), (11.05, 7)])
    program = """
import json
print(json.dumps({"mark": "one", "at": 10.0}))
print("noise")
print(json.dumps({"mark": "two", "at": 11.0, "reserved": 50}))
"""
    seen = stages.run_stage(
        [sys.executable, "-c", program], index=0, seconds=30, environ=os.environ
    )
    assert seen["code"] == 0
    assert [(m["mark"], m["peak"], m["used"]) for m in seen["marks"]] == [
        ("one", 50, 50), ("two", 800, 300),
    ]  # fmt: skip


def test_a_stage_that_fails_says_its_last_words_and_one_that_hangs_is_ended(monkeypatch) -> None:
    stub(monkeypatch, [])
    words = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    seen = stages.run_stage(words, index=0, seconds=30, environ=os.environ)
    assert (seen["code"], seen["said"]) == (1, ["no such thing"])
    # What it started holds its output open, and ends with it.
    hangs = "import subprocess, sys, threading; subprocess.Popen([sys.executable, '-c',"
    hangs += " 'import threading; threading.Event().wait()']); threading.Event().wait()"
    words = [sys.executable, "-c", hangs]
    late = stages.run_stage(words, index=0, seconds=0.5, environ=os.environ)
    assert (late["code"], late["outcome"]) == (-9, "out_of_time")


def test_stages_of_one_program_heed_the_limit_of_the_whole_run(tmp_path, monkeypatch) -> None:
    for name in ("XDG_STATE_HOME", "TURBOFIT_LEASES", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "machine.json").write_text('{"code": 0}')
    given: list[float] = []
    stand_in = {"code": -9, "outcome": "out_of_time"}
    monkeypatch.setattr(
        "bench.gpu.__main__.constants", lambda _, seconds, __: given.append(seconds) or stand_in
    )
    monkeypatch.setattr(
        "bench.gpu.__main__.engine", lambda *a: given.append(a[3]) or {"code": 0, "marks": []}
    )
    words = ["--stages", "a,p", "--only", "a-constants|p-qwen2-vl-2b-auto", "--seconds", "9999"]
    assert main(["--out", str(tmp_path), "--limit", "50", *words]) == 1
    assert len(given) == 2
    assert all(0 < seconds <= 50 for seconds in given)
    assert json.loads((tmp_path / "not-run.json").read_text()) == {"a-constants": "out_of_time"}


def test_what_is_held_back_leaves_what_was_promised() -> None:
    taken: list[int] = []
    mib = 1 << 20
    held = ballast.hold(24000 * mib, 143157 * mib - 560 * mib + 12345, taken.append)
    assert sum(taken) == held
    left = 143157 * mib - 560 * mib + 12345 - held
    assert 24000 * mib <= left < 24002 * mib
    assert ballast.hold(24000 * mib, 24000 * mib, taken.append) == 0


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("XDG_STATE_HOME", "TURBOFIT_LEASES", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, str(tmp_path))  # main sets them; they come back after the test
    for name in ("machine", "a-constants"):
        (tmp_path / f"{name}.json").write_text('{"code": 0}')
    words = ["--out", str(tmp_path), "--stages", "a", "--only", "a-constants"]
    assert main(words) == 0
    assert capsys.readouterr().out == "a-constants: there already\n"
    (tmp_path / "a-constants.json").unlink()
    monkeypatch.setattr(
        "bench.gpu.__main__.constants", lambda *_: (_ for _ in ()).throw(OSError("x"))
    )
    assert main(words) == 1
    assert "OSError: x" in json.loads((tmp_path / "a-constants.json").read_text())["not_run"]
    assert "`a-constants`: OSError: x" in (tmp_path / "SUMMARY.md").read_text()
