"""The forecast of a row, by the tuner's model; the cache by the account of the row's version."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from bench.accuracy.cards import machine_of
from bench.accuracy.forecast import forecast as memory_forecast
from bench.accuracy.inputs import inputs_of
from bench.accuracy.models import MissingError, model_of
from bench.accuracy.rows import Row as MemoryRow
from bench.speed.rows import Load, Row, load_of
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct, known
from turbofit.memory.engine import default_batch_size
from turbofit.memory.engines import engine_named
from turbofit.tuner.speed.all_reduce import all_reduce_of
from turbofit.tuner.speed.rates import Rates, card_of
from turbofit.tuner.speed.throughput import (
    BatchLimits,
    ClosedLoad,
    GroupRates,
    Speed,
    speed_of,
)
from turbofit.tuner.speed.work import StepWork, work_of

__all__ = ["MissingError", "Setup", "forecast", "setup_of"]

#: Share of a card that vLLM and SGLang take, and what of it is neither weights nor cache.
_SHARE, _BESIDE = 0.9, 3 << 29
_CHUNK = 8192
#: What a name says of packed weights.
_STORED = {"awq": "awq", "gptq": "gptq", "fp8": "fp8", "w4a16": "awq", "4bit": "awq"}
#: TurboQuant: keys of 4 bits with a scale and a zero, values of 2 bits with a scale, of 16 bits
#: each. Source: LMDeploy 0.18, pytorch/engine/cache_engine/schema.py. Plans do not offer it.
_TURBO_QUANT = 42
_TURBO_BITS, _TURBO_SCALES = 4 + 2, 3 * 16


class Setup(Struct):
    """What the forecast of a row takes; ``kv_tokens`` are what its cache holds."""

    row: Row
    load: Load
    machine: Machine
    work: StepWork
    at_once: int
    batch: int
    prompt: float
    output: float
    kv_tokens: int


def setup_of(row: Row) -> Setup:
    """All that a row and its source say, and what follows from them.

    Raises:
        MissingError: the row names no model or card that is known here.
    """
    load = load_of(row)
    memory_row = _memory_row(row, load)
    model, machine = model_of(memory_row), machine_of(memory_row, [])
    try:
        work, kv_tokens = _work(row, model), _kv_tokens(memory_row, row, model, machine)
    except TurbofitError as exc:
        raise MissingError(exc.message) from None
    batch = row.max_batch_size or default_batch_size(machine.gpus[0].name)
    return Setup(
        row=row, load=load, machine=machine, work=work, kv_tokens=kv_tokens, batch=batch,
        at_once=row.concurrency or batch, prompt=_prompt(row, load), output=_output(row, load),
    )  # fmt: skip


def forecast(setup: Setup, figures: Rates) -> Speed:
    """The forecast of a row under these constants."""
    machine, gpus = setup.machine, setup.machine.gpus
    group = GroupRates(
        work=setup.work,
        card=card_of(gpus, figures),
        reduce=all_reduce_of(machine, gpus, figures),
    )
    load = ClosedLoad(
        prompt=setup.prompt,
        output=setup.output,
        at_once=setup.at_once,
        spread=setup.load.spread,
    )
    limits = BatchLimits(batch=setup.batch, kv_tokens=setup.kv_tokens, chunk=_CHUNK)
    return speed_of(group, figures, load, limits)


def _prompt(row: Row, load: Load) -> float:
    if row.prompt_tokens is not None:
        return row.prompt_tokens
    if load.prompt is None:
        raise MissingError("how long prompts are")
    return load.prompt


def _output(row: Row, load: Load) -> float:
    if row.output_tokens is not None:
        return row.output_tokens
    if row.requests_per_second and row.output_tokens_per_second:
        return row.output_tokens_per_second / row.requests_per_second
    if load.output is None:
        raise MissingError("how long answers are")
    return load.output


def _memory_row(row: Row, load: Load) -> MemoryRow:
    settings: dict[str, float] = {}
    if row.cache_max_entry_count is not None:
        settings["cache_max_entry_count"] = row.cache_max_entry_count
    if row.max_batch_size is not None:
        settings["max_batch_size"] = row.max_batch_size
    found = MemoryRow(
        id=row.id, source=row.source, engine=row.engine, version=row.engine_version,
        model=load.model or row.model, gpu=load.card or row.card, gpus=row.tp, tp=row.tp,
        settings=settings, outcome="ran",
        quant="+".join(_quantised(load.model or row.model, row.quant_policy)),
    )  # fmt: skip
    try:
        model_of(found)
    except MissingError:  # perhaps known without the word for its tuning
        return replace(found, model=found.model.replace("-chat", ""))
    return found


def _quantised(model: str, quant_policy: int) -> Iterator[str]:
    """How weights and cache are stored, in the words of `bench/accuracy`."""
    for word, method in _STORED.items():
        if word in model.lower():
            yield method
            break
    if quant_policy in (4, 8):
        yield f"kv{quant_policy}"


def _work(row: Row, model: Model) -> StepWork:
    engine = engine_named("pytorch" if row.engine == "pytorch" else "turbomind")
    policy = 0 if row.quant_policy == _TURBO_QUANT else row.quant_policy
    work = work_of(model, Settings(tp=row.tp, quant_policy=policy), engine)
    return replace(work, kv_bytes=work.kv_bytes * _turbo_quant(row, model))


def _turbo_quant(row: Row, model: Model) -> float:
    """Bytes of a TurboQuant token over those of a 16-bit one."""
    if row.quant_policy != _TURBO_QUANT:
        return 1.0
    bits = _TURBO_BITS * model.text.head_dim + _TURBO_SCALES
    return bits / (2 * 16 * model.text.head_dim)


def _kv_tokens(memory_row: MemoryRow, row: Row, model: Model, machine: Machine) -> int:
    """Tokens of the cache: by the account of the engine's version, or as vLLM shares a card."""
    if row.of_lmdeploy:
        tokens = memory_forecast(inputs_of(memory_row)).tokens
        return int(tokens / _turbo_quant(row, model))
    work = _work(row, model)
    room = known(machine.gpus[0].total, 0) * _SHARE - _BESIDE - work.weights - work.experts
    return max(0, int(room / work.kv_bytes))
