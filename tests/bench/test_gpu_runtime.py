"""The stages of bench/gpu that read CUDA as TurboMind uses it, and that time an engine's parts."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import constants, runtime, speed, stages

MIB = 1 << 20


class Lib:
    """A CUDA runtime and cuBLAS: pools grow by ``step``, each handle takes ``handle`` when used."""

    def __init__(self, step: int = 2 * MIB, handle: int = 0) -> None:
        self.step, self.handle = step, handle
        self.used = 0
        #: Bytes in use and reserved, and whether all is kept; by pool.
        self.pools: dict[int, list[Any]] = {1: [0, 0, False]}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.touched: set[int] = set()

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:  # noqa: N802
        held = sum(pool[1] for pool in self.pools.values())
        free._obj.value = (64 << 30) - self.used - held
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:  # noqa: N802
        pointer._obj.value = 4096
        return 0

    def cudaDeviceGetDefaultMemPool(self, pool: Any, _: int) -> int:  # noqa: N802
        pool._obj.value = 1
        return 0

    def cudaMemPoolCreate(self, pool: Any, properties: Any) -> int:  # noqa: N802
        assert (properties._obj.allocation, properties._obj.location) == (1, 1)
        pool._obj.value = 2
        self.pools[2] = [0, 0, False]
        return 0

    def cudaMemPoolSetAttribute(self, pool: Any, which: int, value: Any) -> int:  # noqa: N802
        assert (which, value._obj.value) == (4, 2**64 - 1)
        self.pools[pool.value][2] = True
        return 0

    def cudaMallocFromPoolAsync(  # noqa: N802
        self, pointer: Any, size: Any, pool: Any, _: Any
    ) -> int:
        live = self.pools[pool.value]
        live[0] += size.value
        live[1] = max(live[1], -(-live[0] // self.step) * self.step)
        pointer._obj.value = len(self.sizes) + 1
        self.sizes[pointer._obj.value] = (pool.value, size.value)
        return 0

    def cudaFreeAsync(self, pointer: Any, _: Any) -> int:  # noqa: N802
        pool, size = self.sizes[pointer.value]
        self.pools[pool][0] -= size
        return 0

    def cudaStreamSynchronize(self, _: Any) -> int:  # noqa: N802
        for live in self.pools.values():
            if not live[2]:
                live[1] = -(-live[0] // self.step) * self.step
        return 0

    def cudaMemPoolTrimTo(self, pool: Any, _: Any) -> int:  # noqa: N802
        live = self.pools[pool.value]
        live[1] = -(-live[0] // self.step) * self.step
        return 0

    def cudaStreamCreateWithFlags(self, stream: Any, _: int) -> int:  # noqa: N802
        return 0

    def cudaDeviceSynchronize(self) -> int:  # noqa: N802
        return 0

    def cublasCreate_v2(self, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 + len(self.touched)
        self.touched.add(handle._obj.value)
        return 0

    def cublasGemmEx(self, *_: Any) -> int:  # noqa: N802
        self.used += self.handle
        return 0

    def cublasDestroy_v2(self, _: Any) -> int:  # noqa: N802
        return 0


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return {
        one["mark"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())
    }  # fmt: skip


def test_each_handle_of_cublas_is_seen(capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants.time, "sleep", lambda _: None)
    lib = Lib(handle=32 * MIB)
    runtime.handles(runtime.Cuda(lib), lib)
    marks = told(capsys)
    assert [marks[f"made_{n}"]["took"] for n in runtime.HANDLES] == [0] * 5
    assert [marks[f"used_{n}"]["took"] for n in runtime.HANDLES] == [
        n * 32 * MIB for n in runtime.HANDLES
    ]


def test_pools_tell_what_they_round_to_keep_and_grow_by(capsys, monkeypatch) -> None:
    monkeypatch.setattr(constants.time, "sleep", lambda _: None)
    runtime.pool(runtime.Cuda(Lib(step=32 * MIB)))
    marks = told(capsys)
    one = marks["default_1_mib"]
    assert (one["taken"], one["kept_at_once"], one["kept_after_wait"]) == (32 * MIB, 32 * MIB, 0)
    assert marks["growth"]["steps"] == [32 * MIB, 64 * MIB, 96 * MIB]
    assert marks["own_129_mib"]["kept_after_wait"] == marks["own_129_mib"]["taken"] > 0
    assert marks["trimmed"]["taken"] == 96 * MIB


def test_a_call_that_fails_says_so_and_the_parts_before_it_count(monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants.time, "sleep", lambda _: None)
    monkeypatch.setitem(runtime.PARTS, "plain", lambda: runtime.Cuda(Lost())("cudaFree", None))
    assert runtime.main(["plain"]) == 1
    assert told(capsys)["failed"]["failed"] == "RuntimeError: cudaFree gave 2"


def test_a_library_that_does_not_load_is_no_context_of_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants.time, "sleep", lambda _: None)
    hidden = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(runtime.importlib, "import_module", lambda _: hidden)
    assert runtime.main(["turbomind"]) == 1
    marks = told(capsys)
    assert marks["loaded"]["available"] is False
    assert "first" not in marks
    assert "lmdeploy.turbomind does not load" in marks["failed"]["failed"]


class Lost:
    def cudaFree(self, _: Any) -> int:  # noqa: N802
        return 2


def test_parts_are_processes_of_their_own_and_eager_ones_load_all(monkeypatch) -> None:
    seen: list[tuple[str, str | None, float]] = []

    def run_stage(command: Any, *, index: int, seconds: float, environ: Any) -> dict[str, Any]:
        seen.append((command[-1], environ.get("CUDA_MODULE_LOADING"), seconds))
        return {"code": 1 if "torch" in command else 0, "marks": []}

    monkeypatch.setattr(stages, "run_stage", run_stage)
    left = iter((9.0, 8.0, 7.0, 6.0))
    found = stages.runtime(stages.CONTEXTS, 0, lambda: next(left), {})
    assert found["code"] == 0
    assert found["torch_eager"]["code"] == 1
    assert seen == [
        ("plain", None, 9.0), ("turbomind", None, 8.0), ("torch", "EAGER", 7.0),
        ("turbomind", "EAGER", 6.0),
    ]  # fmt: skip
    late = {"code": -9, "outcome": "out_of_time", "marks": []}
    monkeypatch.setattr(
        stages, "run_stage", lambda command, **_: late if "torch" in command else {"code": 0}
    )
    assert stages.runtime(stages.CONTEXTS, 0, lambda: 1.0, {})["code"] != 0


def test_prefill_steps_and_images_are_asked_apart_and_one_that_fails_costs_itself() -> None:
    asked: list[tuple[int, int, bool]] = []
    marks: dict[str, dict[str, Any]] = {}

    def ask(what: list[Any], tokens: int, chat: bool) -> Any:
        asked.append((len(what), tokens, chat))
        if len(what) == 64:
            raise ValueError("no room")
        got = 0 if what == ["a" * 30000] else tokens  # more than the cache holds
        one = SimpleNamespace(input_token_len=7, generate_token_len=got, finish_reason="error")
        return [one] * len(what)

    speed.measure(ask, "picture", lambda name, **facts: marks.__setitem__(name, facts))
    names = [f"prefill_{n}" for n in speed.LENGTHS]
    names += [f"{kind}_{b}" for b in speed.BATCHES for kind in ("first", "decode")]
    assert list(marks) == [*names, "images_1", "images_8"]
    assert marks["decode_64"] == {"failed": "ValueError: no room"}
    assert marks["prefill_30000"] == {"failed": "RuntimeError: not answered whole: error"}
    assert marks["decode_16"]["answered"] == 16 * speed.TOKENS
    assert len(marks["decode_16"]["tries"]) == speed.TRIES + 1
    assert marks["decode_16"]["seconds"] == min(marks["decode_16"]["tries"][1:])
    assert (8, 1, True) in asked


def test_a_speed_that_was_cut_off_counts_where_it_has_a_decode_step(monkeypatch, tmp_path) -> None:
    marks = [{"mark": "prefill_512"}]
    late = {"code": -9, "outcome": "out_of_time", "marks": marks}
    monkeypatch.setattr(stages, "run_stage", lambda *_, **__: late)
    assert stages.speed("m", tmp_path, 0, 1.0, os.environ)["code"] == -9
    marks.append({"mark": "decode_1"})
    assert stages.speed("m", tmp_path, 0, 1.0, os.environ)["code"] == 0
