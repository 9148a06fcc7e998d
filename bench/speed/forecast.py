"""Forecasts the speed of a row, with the cache by the account of the row's version."""

from __future__ import annotations

from msgspec.structs import replace

from bench.accuracy.forecast import forecast as memory_forecast
from bench.accuracy.rows import Row as MemoryRow
from bench.accuracy.rows import machine_of, model_of
from bench.speed.rows import Row
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct, known
from turbofit.memory.account import VisionLoad
from turbofit.memory.engines import engine_named
from turbofit.model.source import resolve_model as model_of_name
from turbofit.planning.speed import (
    ClosedLoad,
    GroupRates,
    Rates,
    Speed,
    StepWork,
    all_reduce_of,
    card_of,
    speed_of,
    work_of,
)
from turbofit.planning.throughput import HostRate, image_seconds, kind_of, with_host

#: Share of a card that vLLM and SGLang take, and what of it is neither weights nor cache.
_SHARE, _BESIDE = 0.9, 3 << 29
_CHUNK = 8192
#: TurboQuant: keys of 4 bits with a scale and a zero, values of 2 bits with a scale, of 16 bits
#: each. Source: LMDeploy 0.18, pytorch/engine/cache_engine/schema.py. Plans do not offer it.
_TURBO_QUANT = 42
_TURBO_BITS, _TURBO_SCALES = 4 + 2, 3 * 16


class Setup(Struct):
    """The inputs of a row's forecast; ``kv_tokens``: the tokens that its cache holds.

    ``kind`` is the forecast's, as `presets/engines/surety.yaml` names it.
    """

    row: Row
    kind: str
    machine: Machine
    work: StepWork
    at_once: int
    batch: int
    kv_tokens: int


def setup_of(row: Row) -> Setup:
    """Return the inputs of a row's forecast."""
    memory_row = MemoryRow(
        id=row.id, source=row.source, engine=row.engine, version=row.account or row.version,
        model=row.model, packed=row.packed, on=row.on, tp=row.tp, settings=row.settings,
        quant_policy=0 if row.quant_policy == _TURBO_QUANT else row.quant_policy,
    )  # fmt: skip
    model, machine = model_of(memory_row), machine_of(memory_row)
    batch = row.batch or engine_named("turbomind").defaults(machine.gpus[0].name)["max_batch_size"]
    return Setup(
        row=row, machine=machine, work=_work(row, model), batch=batch,
        kind=kind_of(model, row.engine, machine.gpus, images=bool(row.sizes)),
        at_once=row.concurrency or batch,
        kv_tokens=_kv_tokens(memory_row, row, model, machine),
    )  # fmt: skip


def group_of(setup: Setup, figures: Rates) -> GroupRates:
    """Return the rates of a row's cards with these constants."""
    machine, gpus = setup.machine, setup.machine.gpus
    return GroupRates(
        work=setup.work,
        card=card_of(gpus, figures),
        reduce=all_reduce_of(machine, gpus, figures),
    )


def images_forecast(setup: Setup, figures: Rates) -> float:
    """Return the requests a second of a row of images, over all its sizes, with the host.

    For a row of the tower alone, these are images a second.
    """
    row, rule = setup.row, model_of_name(setup.row.model).image_rule
    assert rule is not None
    group, seconds = group_of(setup, figures), 0.0
    settings = Settings(
        max_batch_size=setup.batch, max_prefill_token_num=row.prefill, session_len=row.context
    )
    for size in row.sizes:
        units = rule.units(*size, row.limit)
        if row.tower:
            seconds += group.tower_seconds(units)
            continue
        tokens = rule.unit_tokens(units)
        images = VisionLoad(units_per_image=units, images_per_request=1, tokens_per_request=tokens)
        load = ClosedLoad(
            prompt=row.prompt + tokens, output=row.output, at_once=setup.at_once, images=images
        )
        rate = speed_of(group, figures, load, settings, setup.kv_tokens).requests_per_second
        if row.threads:
            sent = (0, 0) if row.decoded else size
            one = image_seconds(rule, units, sent, by_float=row.by_float)
            rate, _ = with_host(rate, setup.at_once, HostRate(cores=row.threads, seconds=one), 1)
        seconds += 1 / rate
    return len(row.sizes) / seconds


def forecast(setup: Setup, figures: Rates) -> Speed:
    """Return the forecast of a row with these constants."""
    group = group_of(setup, figures)
    load = ClosedLoad(
        prompt=setup.row.prompt,
        output=setup.row.output,
        at_once=setup.at_once,
        spread=setup.row.spread,
    )
    settings = Settings(max_batch_size=setup.batch, max_prefill_token_num=_CHUNK)
    return speed_of(group, figures, load, settings, setup.kv_tokens)


def _work(row: Row, model: Model) -> StepWork:
    engine = engine_named("pytorch" if row.engine == "pytorch" else "turbomind")
    policy = 0 if row.quant_policy == _TURBO_QUANT else row.quant_policy
    work = work_of(model, Settings(tp=row.tp, quant_policy=policy), engine)
    share = _turbo_quant(row, model)
    return replace(work, kv_bytes=work.kv_bytes * share, kv_read_bytes=work.kv_read_bytes * share)


def _turbo_quant(row: Row, model: Model) -> float:
    """Return the bytes of a TurboQuant token as a share of a 16-bit token's."""
    if row.quant_policy != _TURBO_QUANT:
        return 1.0
    bits = _TURBO_BITS * model.text.head_dim + _TURBO_SCALES
    return bits / (2 * 16 * model.text.head_dim)


def _kv_tokens(memory_row: MemoryRow, row: Row, model: Model, machine: Machine) -> int:
    """Return the tokens of the cache, by the engine's account or as vLLM divides a card."""
    if row.of_lmdeploy:
        return int(memory_forecast(memory_row).tokens / _turbo_quant(row, model))
    work = _work(row, model)
    room = known(machine.gpus[0].total, 0) * _SHARE - _BESIDE - work.weights - work.experts
    return max(0, int(room / work.kv_bytes))
