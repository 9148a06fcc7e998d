"""Random machines and asks, made from preset cards."""

from __future__ import annotations

import os
import random

import pytest

from tests.fixtures.clusters import filled
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan, Workload
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.model.source import resolve_model
from turbofit.planning import choose
from turbofit.planning.resolved_request import ResolvedRequest

CARDS = ["rtx3090", "rtx4090", "t4", "l4", "a100-40g", "v100-32g", "rtx3060", "l40s", "rtx2080ti"]
MODELS = [
    "internvl2-1b", "internvl2-2b", "internvl2-8b", "internvl2-8b-awq", "internvl2-26b-awq",
    "qwen2-vl-2b", "qwen2-vl-7b", "qwen2-vl-7b-awq", "qwen2.5-7b",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_other_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans say nothing of other image limits, which takes more than half of their time.

    A file with ``LIMITS_COMPARED`` has them, and each file in `./scripts/check --all`.
    """
    if not (hasattr(request.module, "LIMITS_COMPARED") or os.environ.get("CHECK_ALL")):
        monkeypatch.setattr(choose, "limit_costs", lambda *_: ())


def with_used(machine: Machine, used: list[int]) -> Machine:
    """The machine with so many bytes of each GPU held by others, as far as it has them."""
    pairs = zip(machine.gpus, used, strict=True)
    return filled(machine, [min(wanted, gpu.usable - 1) for gpu, wanted in pairs])


def random_machine(rng: random.Random, most: int = 4) -> Machine:
    count = rng.choice([n for n in (1, 2, 3, 4, 8) if n <= most])
    spec = f"{count}x{rng.choice(CARDS)}"
    if count >= 2 and "rtx3090" in spec and rng.random() < 0.4:
        spec += ",nvlink=0-1"
    used = [rng.choice([0, 0, 300, 1500, 4000, 9000]) * MIB for _ in range(count)]
    return with_used(machine_from(spec), used)


def random_request(
    rng: random.Random, *, context: bool = True, most: int = 4, machine: Machine | None = None
) -> ResolvedRequest:
    model = resolve_model(rng.choice(MODELS))
    longest = model.text.max_position_embeddings
    return ResolvedRequest(
        model=model,
        machine=machine or random_machine(rng, most),
        workload=Workload(
            images=rng.choice([0, 1, 1, 2]) if model.image_rule else 1,
            context=rng.choice([4096, 8192, 20000, min(32768, longest)]) if context else None,
            concurrency=rng.choice([1, 3, 8, 32]),
            goal=rng.choice(["throughput", "latency", "context"]),
            queue_images=False,
        ),
    )


def keeps_promises(plan: Plan) -> None:
    """What holds of each plan that fits."""
    assert Plan.from_json(plan.to_json()) == plan
    assert all(ledger.fits for ledger in plan.ledgers)
    assert plan.promise.context <= min(it.kv.tokens for it in plan.engines)
    for own in plan.engines:
        assert plan.promise.context == own.settings.session_len
        ratio = own.settings.cache_max_entry_count
        assert 0 < ratio < 1
        assert round(ratio * 1000) == pytest.approx(ratio * 1000)
