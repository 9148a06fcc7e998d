"""The programs for a real GPU, run to their end on a pretend one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import constants, stages
from bench.gpu.__main__ import main
from tests.pretend.cuda_torch import CUDA_PATH, ROOT
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
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert stages.run_stage(words, index=0, seconds=0.5, environ=os.environ)["code"] == -9


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("XDG_STATE_HOME", "TURBOFIT_LEASES", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, str(tmp_path))  # main sets them; they come back after the test
    for name in ("machine", "a-constants"):
        (tmp_path / f"{name}.json").write_text("{}")
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


def pretend(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turbofit", "pretend", "--on", "1xrtx3090", "--", sys.executable,
         "-m", "bench.gpu", "--out", str(tmp_path / "out"), *words],
        env={**os.environ, "PYTHONPATH": f"{CUDA_PATH}:{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip


@pytest.mark.slow
@cuda
def test_constants_run_to_their_end(tmp_path: Path) -> None:
    done = pretend(tmp_path, "--stages", "a", "--only", "constants")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "a-constants.json").read_text())
    took = {one["mark"]: one.get("took") for one in found["marks"]}
    assert took["context"] == 360 << 20  # what this pretend card's preset says
    assert sum(took[name] for name in ("first_kernel", "cublas_small", "convolution")) == 0
    machine = json.loads((tmp_path / "out" / "machine.json").read_text())
    assert machine["machine"]["gpus"][0]["name"] == "NVIDIA GeForce RTX 3090"
    assert "uuid" not in machine["machine"]["gpus"][0]


@pytest.mark.slow
@pytest.mark.lmdeploy
@cuda
def test_an_engine_is_measured_beside_its_plan_on_a_card_held_small(tmp_path: Path) -> None:
    done = pretend(
        tmp_path, "--stages", "p", "--only", "p-qwen2-vl-2b", "--left", "12000", "--seconds", "100"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "p-qwen2-vl-2b-pytorch-11g.json").read_text())
    assert found["held_back"] > 10 << 30
    assert [one["mark"] for one in found["marks"]] == [
        "begin", "ready", "one_image", "many_images", "end",
    ]  # fmt: skip
    assert found["marks"][3]["answered"] == 8
    assert 0 < found["measured_peak"] <= found["forecast_peak"]
    assert found["over"] == found["forecast_peak"] - found["measured_peak"]
    assert found["measured_peak"] + found["held_back"] < 24126 << 20
