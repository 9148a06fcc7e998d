"""Accounts of preset models on the pretend card of the rehearsals: 24268 MiB, 300 used."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from turbofit.core.machine import Gpu, Link, Machine
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.turbomind.account import TurbomindAccount
from turbofit.memory.turbomind.constants import EngineConstants, load_constants
from turbofit.memory.vision_load import NO_IMAGES, VisionLoad
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


def machine_of(count: int, *, peers: bool = False, nvlinks: int = 0, **kw: int) -> Machine:
    gpus = tuple(card(i, **kw) for i in range(count))
    links = tuple(
        Link(a=a, b=b, p2p_read=peers, p2p_write=peers, nvlinks=nvlinks)
        for b in range(count)
        for a in range(b)
    )
    return Machine(
        name="test", source="preset", gpus=gpus, links=links, visible=tuple(range(count))
    )


@dataclass
class Case:
    """An account to be made, with what a test changes."""

    model: str
    tp: int = 1
    margin: int = 0
    #: MiB by which the driver's pools grow; the engine's own figure where it is None.
    step: int | None = None

    def settings(self, **changes: object) -> Settings:
        base = {"tp": self.tp, "max_batch_size": 128, "session_len": 32768}
        return Settings(**{**base, **changes})

    def account(self, units: int = 0, **changes: object) -> TurbomindAccount:
        model = resolve_model(self.model)
        vision_load = NO_IMAGES
        if units:
            assert model.image_rule is not None
            vision_load = VisionLoad(
                units_per_image=units,
                images_per_request=1,
                tokens_per_request=model.image_rule.unit_tokens(units),
            )
        machine = machine_of(self.tp)
        launch = EngineLaunch(
            model=model,
            settings=self.settings(**changes),
            gpus=machine.gpus,
            machine=machine,
            vision_load=vision_load,
            margins=(self.margin * MIB,) * self.tp,
        )
        constants = load_constants()
        if self.step is not None:
            constants = replace(constants, pool_granularity=self.step * MIB)
        return TurbomindAccount(launch, constants)
