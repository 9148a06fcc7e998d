"""Accounts of preset models on the pretend card of the rehearsals: 24268 MiB, 300 used."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.memory.account import NO_IMAGES, EngineLaunch, VisionLoad
from turbofit.memory.turbomind.account import TurbomindAccount
from turbofit.memory.turbomind.weights import EngineConstants, load_constants
from turbofit.model.source import resolve_model


@pytest.fixture(scope="session")
def constants() -> EngineConstants:
    return load_constants()


def card(index: int = 0, total: int = 24268, used: int = 300) -> Gpu:
    return Gpu(
        index=index,
        uuid=f"preset-{index}",
        name="NVIDIA GeForce RTX 3090",
        total=total * MIB,
        reserved=0,
        used=used * MIB,
        free=(total - used) * MIB,
        compute_capability=(8, 6),
        sm_count=82,
        l2=6291456,
    )


def machine_of(count: int, **kw: int) -> Machine:
    gpus = tuple(card(i, **kw) for i in range(count))
    links = tuple(
        Link(a=a, b=b, p2p_read=False, p2p_write=False) for b in range(count) for a in range(b)
    )
    return Machine(
        name="test", source="preset", gpus=gpus, links=links, visible=tuple(range(count))
    )


def cut(name: str, layers: int, experts: int = 0, *, packed: bool = True) -> Model:
    """A preset of fewer layers, and of fewer experts."""
    model = resolve_model(name)
    moe = model.text.moe
    if moe is not None:
        dense = model.text.layers - moe.layers
        moe = replace(moe, layers=layers - dense, experts=experts or moe.experts)
    quantization = model.quantization if packed else None
    text = replace(model.text, layers=layers, moe=moe)
    return replace(model, text=text, quantization=quantization)


def launch_on(
    on: str | Machine,
    model: str | Model,
    *,
    units: int | None = 0,
    images: int = 1,
    margin: int = 0,
    free: int | None = None,
    **settings: object,
) -> EngineLaunch:
    """An engine on the first cards of a machine; ``units`` are an image's, None the worst image's.

    ``margin``: MiB on each card. ``free``: bytes that a log says are free when the cache is sized.
    """
    read = resolve_model(model) if isinstance(model, str) else model
    machine = machine_from(on) if isinstance(on, str) else on
    options, rule, load = Settings(**settings), read.image_rule, NO_IMAGES
    if rule is not None and units is None:
        units = rule.worst_units()
    if rule is not None and units:
        tokens = rule.unit_tokens(units) * images
        load = VisionLoad(
            units_per_image=units, images_per_request=images, tokens_per_request=tokens
        )
    return EngineLaunch(
        model=read,
        settings=options,
        gpus=machine.gpus[: options.tp],
        machine=machine,
        vision_load=load,
        margins=(margin * MIB,) * options.tp,
        free_at_cache=free,
    )


@dataclass
class Case:
    """A TurboMind account to be made, with what a test changes."""

    model: str
    tp: int = 1
    margin: int = 0
    #: MiB by which the driver's pools grow; the engine's own figure where it is None.
    step: int | None = None

    def options(self, **changes: object) -> dict[str, object]:
        return {"tp": self.tp, "max_batch_size": 128, "session_len": 32768, **changes}

    def settings(self, **changes: object) -> Settings:
        return Settings(**self.options(**changes))

    def account(
        self, units: int = 0, machine: Machine | None = None, free: int | None = None, **changes
    ) -> TurbomindAccount:
        machine, options = machine or machine_of(self.tp), self.options(**changes)
        launch = launch_on(
            machine, self.model, units=units, margin=self.margin, free=free, **options
        )
        constants = load_constants()
        if self.step is not None:
            constants = replace(constants, pool_granularity=self.step * MIB)
        return TurbomindAccount(launch, constants)


def check_ledger(ledger: GpuLedger) -> None:
    """Its lines add up, and one transient is the worst."""
    body = [t for t in ledger.terms if t.phase != "transient"]
    (worst,) = (t.bytes for t in ledger.terms if t.worst)
    (warmup,) = (t.bytes for t in body if t.term == "pool_warmup")
    assert ledger.steady == sum(t.bytes for t in body)
    assert worst == max(t.bytes for t in ledger.terms if t.phase == "transient")
    assert ledger.peak == ledger.steady - warmup + max(warmup, worst)
    assert ledger.headroom == ledger.total - ledger.reserved - max(ledger.peak, ledger.load_peak)
    assert ledger.fits == (ledger.headroom >= ledger.margin)
