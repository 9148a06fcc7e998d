"""A formula of a newer LMDeploy reaches everybody: plan, predict, rehearse, diagnose, and so on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.plan import Plan
from turbofit.core.units import GIB, MIB, round_up
from turbofit.diagnose.explain import diagnose
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.launch.engine.worst_requests import every_worst
from turbofit.memory import engines, versions
from turbofit.memory.engines import engine_of
from turbofit.memory.turbomind import account
from turbofit.memory.turbomind.pool import PoolModel
from turbofit.observe.calibration import (
    CalibratedGpu,
    Observation,
    cache_beside,
    learn,
    phase_rows,
    tokens_beside,
)
from turbofit.observe.log_events import CacheBudget, Slab
from turbofit.rehearse.engines import ADAPTERS

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

Register = Callable[..., None]


class _Tower(PoolModel):
    def _vision(self, units: int) -> int:
        return MANY * super()._vision(units)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Make 0.19 the reference, an engine whose account has these formulas."""

    def newer(**formulas: Any) -> None:
        module = ModuleType("v0_19")
        made = type("TurbomindAccount", (account.TurbomindAccount,), formulas)
        module.Turbomind = type(  # type: ignore[attr-defined]
            "Turbomind", (account.Turbomind,), {"account_class": made}
        )
        name = "turbofit.memory.turbomind.v0_19"
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(versions, "_formulas", lambda kind: (NEWER,) * (kind == "turbomind"))
        for room in (versions, engines):
            monkeypatch.setattr(room, "REFERENCE", NEWER)

    return newer


def planned(model: str = MODEL) -> Plan:
    return turbofit.plan(model, on=ON, engine="turbomind", images=1)


def launched(plan: Plan) -> Observation:
    """A launch that held what 0.18's account says of it."""
    gpu = plan.gpus[0]
    used = {"steady": gpu.steady, "vision_forward": gpu.peak}
    cards = (CalibratedGpu(index=0, before=gpu.used, used=used),)
    region = plan.kv.region_bytes
    return Observation(group=0, free=None, region=region, cards=cards)


def missing(version: str) -> int:
    found = diagnose([LOG.replace("VERSION", version).encode()], on=ON).missing_in_all
    return (found.bytes or 0) if found else 0


def test_a_tower_200_times_as_large_moves_everybody(register: Register) -> None:
    """Whoever asks for a plan, a prediction, a worst mix, a cause, a correction, a comparison."""
    settings = {"tp": 1, "max_batch_size": 8, "session_len": 8192, "max_prefill_token_num": 8192}

    def told(plan: Plan) -> dict[str, object]:
        predicted = turbofit.predict(MODEL, on=ON, engine="turbomind", **settings)
        budget = CacheBudget(budget=50_000 * MIB, free=60_000 * MIB, ratio=5 / 6)
        seen = replace(launched(plan), region=50_000 * MIB)
        return {
            "plan": (plan.engine.version, plan.kv.tokens, plan.limits),
            "predict": [term for term in predicted.gpus[0].ledger if term.phase == "transient"],
            "rehearse": ADAPTERS["turbomind"].worst(plan),
            "diagnose": missing(plan.engine.version),
            "calibrate": [row["forecast"] for row in phase_rows(plan, [seen])],
            "live comparison": cache_beside(plan, budget),
        }

    before = told(planned())
    register(pool_model=_Tower)
    after = told(planned())
    assert [name for name in before if before[name] == after[name]] == []
    assert missing(NEWER) > MANY * missing("0.18") // 2
    # 0.18 is 0.18 whatever the reference is.
    assert missing("0.18") == before["diagnose"]


def _twice(formula: Callable[..., int]) -> Any:
    return staticmethod(lambda *given: 2 * formula(*given))


def _other_cut(*given: Any) -> Any:
    shape = account.TurbomindAccount.cache_shape(*given)
    return replace(shape, step=2 * shape.step, page=8 * shape.page)


FORMULAS: list[tuple[str, Any, Callable[[Plan], object]]] = [
    ("units_bound", _twice(account.TurbomindAccount.units_bound), lambda p: bounds_of(p).gate),
    ("forward_tokens", _twice(account.TurbomindAccount.forward_tokens),
     lambda p: [case for case in ADAPTERS["turbomind"].worst(p) if case.name == "vision_forward"]),
    ("cache_shape", staticmethod(_other_cut), lambda p: learn(
        p, [replace(launched(p), region=round_up(p.kv.region_bytes, GIB))],  # steps of both cuts
        lmdeploy="0.19.0", when="", pretend=True)[0].buffers),
    ("cache_shape", staticmethod(_other_cut), lambda p: tokens_beside(
        p, CacheBudget(budget=50_000 * MIB, free=60_000 * MIB, ratio=5 / 6),
        Slab(slab_size=512 * MIB, object_size=12 * MIB))),
    ("weight_classes", staticmethod(lambda *_: {"embedding": 0, "mlp": MIB}),
     lambda p: engine_of(p).weights(p.model, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "formula", "asked"), FORMULAS)
def test_a_plan_is_read_by_the_engine_of_its_version(
    register: Register, name: str, formula: Any, asked: Callable[[Plan], object]
) -> None:
    """The same document, of another version."""
    plan = planned("qwen3.5-9b") if name == "cache_shape" else planned()
    register(**{name: formula})
    newer = replace(plan, engine=replace(plan.engine, version=NEWER))
    assert asked(newer) != asked(plan)
    assert every_worst(plan, "m", 20)
