"""A formula of a newer LMDeploy reaches everybody: plan, predict, rehearse, diagnose, and so on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.plans import changed
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.logs.explain import diagnose
from turbofit.logs.log_events import CacheBudget, Slab
from turbofit.memory import engines, versions
from turbofit.memory.account import VisionLoad
from turbofit.memory.engines import engine_of
from turbofit.memory.pytorch.account import Pytorch
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import engine_bound as torch_bound
from turbofit.memory.turbomind import account
from turbofit.memory.turbomind.account import Turbomind
from turbofit.memory.turbomind.pool import PoolModel, engine_bound
from turbofit.planning.speed import group_rates, group_speed
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.serving.calibration import (
    CalibratedGpu,
    Observation,
    compare_cache,
    compare_tokens,
    phase_rows,
)
from turbofit.serving.engine.engine_log import StartupTracker
from turbofit.serving.engine.worst_requests import (
    cheaper_forward,
    check_seconds,
    other_worst_requests,
)
from turbofit.serving.plan_gateway import bounds_of

NEWER = "0.19"
MANY = 200
MODEL, ON = "internvl2-2b", "1xh100"
#: It died of 13 tiles in one forward.
LOG = """\
$ lmdeploy serve api_server internvl2-2b --tp 1 --session-len 32768  # lmdeploy==VERSION
[TM][INFO][1120.10:13:27.308315][turbomind.cc:338] Object cache budget: 60000.00 MB from free \
60500.00 MB and ratio 0.992
[TM][INFO][1120.10:13:27.308315][turbomind.cc:440] Warm-up lengths: 8, 16, 8320
[TM][INFO][1120.10:13:27.308315][turbomind.cc:492] Warm-up finished in 0.01 seconds.
[TM][INFO][1120.10:13:27.308315][internvit.cc:230] InternVit setup: mm_seqs=1 images_batched=1 \
images_skipped=0 patches=13
[TM][FATAL][1120.10:13:27.308500][allocator.cc:49] CUDA error: out of memory
*** stacktrace of thread 0x7fcc614ad6c0 ***
  [ 0] TM_CUDA_CHECK @ gemm.cu:50
"""
#: Its cache has three blocks in slabs of four, and its warm-up needs 130.
HANG = """\
$ lmdeploy serve api_server internvl2-2b --tp 1  # lmdeploy==VERSION
[TM][INFO][1120.10:13:27.308315][turbomind.cc:338] Object cache budget: 40.00 MB from free \
60500.00 MB and ratio 0.001
[TM][INFO][1120.10:13:27.308315][x.cc:1] slab_size 33554432, object_size 8388608, object_count 4, \
ratio 1
[TM][INFO][1120.10:13:27.308315][turbomind.cc:440] Warm-up lengths: 8, 16, 8320
[TM][INFO][1120.10:13:27.308315][x.cc:1] out of memory at 0/1
"""

Register = Callable[..., None]
Asker = Callable[[Plan], object]


class _Tower(PoolModel):
    def _vision(self, units: int) -> int:
        return MANY * super()._vision(units)


class _TorchTower(Activations):
    def _vision(self, forward: Prefill) -> int:
        return MANY * super()._vision(forward)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make 0.19 the reference, an engine that has these formulas, itself or in its account."""

    def newer(engine: str = "turbomind", **formulas: Any) -> None:
        base = {"turbomind": Turbomind, "pytorch": Pytorch}[engine]
        of_account = {name: formulas.pop(name) for name in {*formulas} & {*dir(base.account_class)}}
        made = type("Account", (base.account_class,), of_account)
        module = ModuleType("v0_19")
        setattr(module, base.__name__, type("Engine", (base,), {"account_class": made, **formulas}))
        monkeypatch.setitem(sys.modules, f"turbofit.memory.{engine}.v0_19", module)
        monkeypatch.setattr(versions, "_formulas", lambda kind: (NEWER,) * (kind == engine))
        for room in (versions, engines):
            monkeypatch.setattr(room, "REFERENCE", NEWER)

    return newer


def planned(model: str = MODEL, engine: str = "turbomind", **options: Any) -> Plan:
    return turbofit.plan(model, on=ON, engine=engine, images=1, **options)


usual = cache(planned)


def launched(plan: Plan) -> Observation:
    """A launch that held what 0.18's account says of it."""
    gpu = plan.ledgers[0]
    used = {"steady": gpu.steady, "vision_forward": gpu.peak}
    cards = (CalibratedGpu(index=0, before=gpu.used, used=used),)
    return Observation(group=0, free=None, region=plan.engines[0].kv.region_bytes, cards=cards)


def missing(version: str) -> int:
    found = diagnose([LOG.replace("VERSION", version).encode()], on=ON).missing_in_all
    return (found.bytes or 0) if found else 0


TOWERS: dict[str, dict[str, Any]] = {
    "turbomind": {"pool_model": _Tower},
    "pytorch": {"activations_of": staticmethod(_TorchTower)},
}


@pytest.mark.parametrize("engine", TOWERS)
def test_a_tower_200_times_as_large_moves_everybody(register: Register, engine: str) -> None:
    """Whoever asks for a plan, a prediction, a worst mix, a cause, a correction, a comparison."""
    settings = {"tp": 1, "max_batch_size": 8, "session_len": 8192, "max_prefill_token_num": 8192}

    def told(plan: Plan) -> dict[str, object]:
        predicted = turbofit.predict(MODEL, on=ON, engine=engine, **settings)
        budget = CacheBudget(budget=50_000 * MIB, free=60_000 * MIB, ratio=5 / 6)
        seen = replace(launched(plan), region=50_000 * MIB)
        return {
            "plan": (plan.backend.version, plan.engines[0].kv.tokens, plan.promise.limits),
            "predict": [term for term in predicted.ledgers[0].terms if term.phase == "transient"],
            "rehearse": REHEARSED_ENGINES[engine].worst(plan, plan.engines[0]),
            "calibrate": [row["forecast"] for row in phase_rows(plan, [seen])],
            "live comparison": compare_cache(plan.engines[0], budget),
            "limits": bounds_of(plan),
        }

    before, cause = told(planned(engine=engine)), missing("0.18")
    register(engine, **TOWERS[engine])
    after = told(planned(engine=engine))
    assert [name for name in before if before[name] == after[name]] == []
    # No rule asks PyTorch's account. 0.18 is 0.18 whatever the reference is.
    assert (missing(NEWER) > MANY * cause // 2) == (engine == "turbomind")
    assert missing("0.18") == cause


def _twice(formula: Callable[..., int]) -> Any:
    return staticmethod(lambda *given: 2 * formula(*given))


def _other_cut(*given: Any) -> Any:
    shape = account.TurbomindAccount.cache_shape(*given)
    return replace(shape, step=2 * shape.step, page=8 * shape.page)


def _other_blocks(*given: Any) -> Any:
    shape = account.TurbomindAccount.shape_of(*given)
    return replace(shape, block_tokens=shape.block_tokens // 2)


def hanging(plan: Plan) -> object:
    """What `diagnose` says that a cache lacks."""
    return diagnose([HANG.replace("VERSION", plan.backend.version).encode()], on=ON).missing


def waiting(plan: Plan) -> str:
    """What `serve` says of a warm-up that waits."""
    tracker = StartupTracker(plan, plan.engines[0], Path("engine.log"))
    tracker.enter("warm-up", 0.0)
    tracker.see("[TM][INFO][1120.09:18:10.597172][engine.cc:1] out of memory at 0/1", 1, 0.0)
    return tracker.death().message


def encoded(plan: Plan) -> float:
    """How often the forecast of speed encodes an image that is longer than a forward."""
    group = [plan.machine.gpu(0)]
    rates = group_rates(plan.model, plan.engines[0].settings, plan.machine, group, engine_of(plan))
    images = VisionLoad(units_per_image=65536, images_per_request=1, tokens_per_request=16384)
    return group_speed(rates, plan.engines[0].settings, images, 10**9, 1.0).encodings


def beside(plan: Plan) -> object:
    """The live comparison of the cache's tokens."""
    budget = CacheBudget(budget=50_000 * MIB, free=60_000 * MIB, ratio=5 / 6)
    return compare_tokens(
        plan, plan.engines[0], budget, Slab(slab_size=512 * MIB, object_size=12 * MIB)
    )


def probes(plan: Plan) -> object:
    """The check of a start."""
    return other_worst_requests(plan, plan.engines[0], "m", 20)


def cheaper(plan: Plan) -> object:
    """The check of a start that would take long."""
    return cheaper_forward(plan, plan.engines[0], "m", 20)


def let_in(plan: Plan) -> object:
    """What the gateway holds requests to, whose cache may run out."""
    more = changed(plan, settings=replace(plan.engines[0].settings, max_batch_size=1024))
    return bounds_of(more)


_FORWARD = _twice(account.TurbomindAccount.forward_tokens)
_ONCE = {"encodes_again": False}
#: An image is as long as two forwards and clients may send it as they like.
_LARGE = {"model": "qwen2-vl-2b", "max_prefill_token_num": 4096}
FORMULAS: list[tuple[str, str, dict[str, Any], dict[str, Any], Asker]] = [
    ("limits", "turbomind", {}, {"units_bound": _twice(engine_bound)}, lambda p: bounds_of(p).gate),
    ("limits", "turbomind", {"enable_prefix_caching": False}, {"blocks_ahead": 3}, let_in),
    ("start", "turbomind", _LARGE, {"forward_tokens": _FORWARD}, cheaper),
    ("start", "turbomind", _LARGE, {"forward_tokens": _FORWARD}, check_seconds),
    ("start", "turbomind", _LARGE, _ONCE, cheaper),
    ("start", "turbomind", {}, _ONCE, probes),
    ("start", "turbomind", _LARGE, _ONCE, check_seconds),
    ("launch", "turbomind", {}, {"forward_tokens": _FORWARD}, waiting),
    ("speed", "turbomind", _LARGE, {"forward_tokens": _FORWARD}, encoded),
    ("speed", "turbomind", _LARGE, _ONCE, encoded),
    ("live comparison", "turbomind", {"model": "qwen3.5-9b"},
     {"cache_shape": staticmethod(_other_cut)}, beside),
    ("live comparison", "turbomind", {}, {"shape_of": staticmethod(_other_blocks)}, beside),
    ("diagnose", "turbomind", {}, {"shape_of": staticmethod(_other_blocks)}, hanging),
    ("weights", "turbomind", {},
     {"weight_classes": staticmethod(lambda *_: {"embedding": 0, "mlp": MIB})},
     lambda p: engine_of(p).weights(p.model, 1)),
    ("limits", "pytorch", {}, {"units_bound": _twice(torch_bound)}, lambda p: bounds_of(p).gate),
    ("start", "pytorch", _LARGE, {"encodes_again": True}, check_seconds),
    ("speed", "pytorch", _LARGE, {"encodes_again": True}, encoded),
    ("weights", "pytorch", {}, {"weight_classes": staticmethod(lambda *_: {"embedding": MIB})},
     lambda p: engine_of(p).weights(p.model, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("asker", "engine", "of", "formulas", "asked"), FORMULAS)
def test_a_plan_is_read_by_the_engine_of_its_version(
    register: Register,
    asker: str,
    engine: str,
    of: dict[str, Any],
    formulas: dict[str, Any],
    asked: Asker,
) -> None:
    """The same document, of another version."""
    plan = usual(engine=engine, **of)
    register(engine, **formulas)
    newer = replace(plan, backend=replace(plan.backend, version=NEWER))
    assert asked(newer) != asked(plan), asker
