"""The forecast of a case's shapes, by the tuner's own model."""

from __future__ import annotations

from functools import cache

from msgspec.structs import replace

from bench.topology.cases import Case, Shape
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import known
from turbofit.machine.spec import parse_spec
from turbofit.memory.engines import engine_for
from turbofit.model.source import resolve_model
from turbofit.tuner.speed.all_reduce import all_reduce_of
from turbofit.tuner.speed.rates import Rates, card_of
from turbofit.tuner.speed.throughput import BatchLimits, ClosedLoad, GroupRates, speed_of
from turbofit.tuner.speed.work import StepWork, work_of

__all__ = ["forecast"]

#: Share of a card that the engines of the sources take, what of it is neither weights nor cache
#: (activations, graphs, context), and the sequences that they run together: vLLM's defaults.
_SHARE, _BESIDE, _SEQUENCES = 0.9, 3 << 29, 256
_CHUNK = 8192


def forecast(case: Case, shape: Shape, figures: Rates) -> float:
    """Requests a second of all engines of a shape."""
    machine = _machine(shape)
    work = _work(case, shape.tp)
    groups = [machine.gpus[at : at + shape.tp] for at in range(0, len(machine.gpus), shape.tp)]
    at_once = max(1, -(-case.at_once // len(groups)))
    room = known(machine.gpus[0].total, 0) * _SHARE - _BESIDE - work.weights - work.experts
    load = ClosedLoad(prompt=case.input, output=case.output, at_once=at_once)
    limits = BatchLimits(batch=_SEQUENCES, kv_tokens=room / work.kv_bytes, chunk=_CHUNK)
    rate = 0.0
    for gpus in groups:
        group = GroupRates(
            work=work, card=card_of(gpus, figures), reduce=all_reduce_of(machine, gpus, figures)
        )
        rate += speed_of(group, figures, load, limits).requests_per_second
    return rate


@cache
def _machine(shape: Shape) -> Machine:
    machine = parse_spec(shape.cards)
    if shape.pcie is None:
        return machine
    generation, width = shape.pcie
    slot = {"generation": generation, "width": width}
    gpus = tuple(replace(gpu, pcie=replace(gpu.pcie, **slot)) for gpu in machine.gpus)
    return replace(machine, gpus=gpus)


@cache
def _model(name: str) -> Model:
    return resolve_model(name)


@cache
def _work(case: Case, tp: int) -> StepWork:
    """A step of a drafted case runs its drafts too: more tokens through the same weights."""
    model = _model(case.model)
    work = work_of(model, Settings(tp=tp), engine_for(model))
    tokens = 1 + case.drafted
    return replace(
        work,
        weights=work.weights * case.weights,
        experts=work.experts * case.weights,
        token_flops=work.token_flops,
        hidden_bytes=work.hidden_bytes * tokens,
    )
