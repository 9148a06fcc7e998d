"""Published figures of several shapes of one model on one machine: the forecast ranks them so."""

from __future__ import annotations

from functools import cache
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from turbofit.core.plan import Settings
from turbofit.core.struct import known
from turbofit.machine.spec import parse_spec
from turbofit.memory.engines import engine_for
from turbofit.model.source import resolve_model
from turbofit.tuner.speed import (
    ClosedLoad,
    GroupRates,
    all_reduce_of,
    card_of,
    rates,
    speed_of,
    work_of,
)

pytestmark = pytest.mark.slow

CASES = yaml.safe_load(Path(__file__).with_name("published_shapes.yaml").read_text())
#: Pairs of sources that say the opposite of the same cards.
CONTRADICTED = {
    one for case in CASES if "contradicts" in case for one in (case["id"], case["contradicts"])
}
JUDGED = [case for case in CASES if "left_out" not in case and case["id"] not in CONTRADICTED]
#: vLLM's defaults, which most sources ran: share of a card, bytes beside weights and cache, batch.
SHARE, BESIDE, SEQUENCES, CHUNK = 0.9, 3 << 29, 256, 8192

model = cache(resolve_model)


def machine(shape: dict[str, Any]) -> Any:
    found = parse_spec(shape["cards"])
    if "pcie" not in shape:
        return found
    generation, width = shape["pcie"]
    gpus = (
        replace(gpu, pcie=replace(gpu.pcie, generation=generation, width=width))
        for gpu in found.gpus
    )
    return replace(found, gpus=tuple(gpus))


def forecast(case: dict[str, Any], shape: dict[str, Any]) -> float:
    """Requests a second of all engines of a shape, by the constants that are shipped."""
    read, tp, host = model(case["model"]), shape["tp"], machine(shape)
    work = work_of(read, Settings(tp=tp), engine_for(read))
    work = replace(
        work,
        weights=work.weights * case.get("weights", 1.0),
        experts=work.experts * case.get("weights", 1.0),
        hidden_bytes=work.hidden_bytes * (1 + case.get("drafted", 0)),
    )
    groups = [host.gpus[at : at + tp] for at in range(0, len(host.gpus), tp)]
    room = known(host.gpus[0].total, 0) * SHARE - BESIDE - work.weights - work.experts
    load = ClosedLoad(
        prompt=case["input"], output=case["output"], at_once=-(-case["at_once"] // len(groups))
    )
    settings = Settings(max_batch_size=SEQUENCES, max_prefill_token_num=CHUNK)
    engines = (
        GroupRates(
            work=work, card=card_of(gpus, rates()), reduce=all_reduce_of(host, gpus, rates())
        )
        for gpus in groups
    )
    speeds = [speed_of(one, rates(), load, settings, room / work.kv_bytes) for one in engines]
    return sum(speed.requests_per_second for speed in speeds)


def test_the_measured_winner_is_first_where_no_source_contradicts_it() -> None:
    errors, lost = [], []
    for case in JUDGED:
        values = [shape["value"] for shape in case["shapes"]]
        found = [forecast(case, shape) for shape in case["shapes"]]
        if found.index(max(found)) != values.index(max(values)):
            lost.append(case["id"])
        errors += [
            abs(log(a / found[0] / (b / values[0])))
            for a, b in zip(found[1:], values[1:], strict=True)
        ]
    assert len(JUDGED) == 36
    assert lost == []
    assert median(errors) < 0.12
