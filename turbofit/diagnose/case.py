"""A log with what it is about: model and machine, as named in it or by the user."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.struct import NA
from turbofit.core.units import MIB, format_bytes
from turbofit.diagnose.lines.events import PeerMissing, SmiGpu, TorchMemory
from turbofit.diagnose.spellings import preset_of
from turbofit.machine.presets import find_preset as find_gpu
from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.planning.plan import predict
from turbofit.planning.predict_request import PredictRequest

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.diagnose.facts import LogFacts

__all__ = ["LogCase", "usable", "with_used"]


class LogCase:
    """What the rules look at.

    Args:
        facts: the log.
        model: the user's name of the model; it goes before the log's.
        on: the user's SPEC or snapshot; it goes before the log's.
    """

    def __init__(self, facts: LogFacts, *, model: str | None = None, on: str | None = None) -> None:
        self.facts = facts
        self.model = self._model(model)
        self.on = on
        self.machine = machine_from(on) if on else None
        if on is None:
            self._take_machine_of_log()
        self._forecast: Plan | None = None
        self._forecast_made = False

    @property
    def gpu(self) -> Gpu | None:
        """The first GPU of the machine."""
        return self.machine.gpu(self.machine.visible[0]) if self.machine else None

    @property
    def tp(self) -> int | None:
        """The tensor parallelism that the log names."""
        value = self.facts.subject.options.get("tp")
        return value if isinstance(value, int) else None

    @property
    def ratio(self) -> float | None:
        """The cache ratio that the log names."""
        value = self.facts.subject.options.get("cache_max_entry_count")
        return value if isinstance(value, float) else None

    def forecast(self) -> Plan | None:
        """What turbofit says of the settings that the log names, on the machine as it is known."""
        if not self._forecast_made and self.model is not None and self.machine is not None:
            self._forecast_made = True
            try:
                request = PredictRequest.of(
                    model=self.model, on=self.machine, **self.facts.subject.options
                )
                self._forecast = predict(request)
            except TurbofitError:
                self._forecast = None
        return self._forecast

    def _model(self, name: str | None) -> Model | None:
        if name is not None:
            known = preset_of(name)
            return preset_model(known) if known else resolve_model(name)
        found = self.facts.subject.model
        if found is None:
            return None
        preset = preset_of(found[0])
        if preset is None:
            return None
        try:
            return preset_model(preset)
        except TurbofitError:
            return None

    def _take_machine_of_log(self) -> None:
        """The cards that the log names, where they make a machine."""
        spec = self._spec()
        if spec is not None:
            with suppress(UsageError):
                self.machine, self.on = machine_from(spec), spec

    def _spec(self) -> str | None:
        """The machine of the log as a SPEC: cards of an nvidia-smi table, else named cards."""
        table = {
            event.index: find_gpu(event.name) for _, event in self.facts.every(SmiGpu) if event.name
        }
        peers = [max(event.a, event.b) + 1 for _, event in self.facts.every(PeerMissing)]
        lonely = ",p2p=none" if peers else ""
        if table and all(table.values()):
            names = [str(table[index]) for index in sorted(table)]
            return "+".join(_grouped(names)) + (lonely if len(names) > 1 else "")
        cards = self.facts.subject.cards
        if len(cards) != 1:
            return None
        key, (count, _) = next(iter(cards.items()))
        seen = [event.gpu + 1 for _, event in self.facts.every(TorchMemory) if event.gpu]
        number = count or max([1, *peers, self.tp or 1, *seen])
        return f"{number}x{key}" + (lonely if number > 1 else "")


def usable(gpu: Gpu) -> int | None:
    """Bytes that CUDA can hand out on a GPU."""
    if gpu.total == NA or gpu.reserved == NA:  # noqa: PLR1714 - mypy narrows by these
        return None
    return gpu.total - gpu.reserved


def with_used(machine: Machine, on: str, used: int) -> tuple[Machine, str]:
    """A machine on each card of which others hold so much, all of it at most, and its name.

    The name is a SPEC where ``on`` is one of equal cards without sizes.
    """
    from msgspec.structs import replace

    gpus = []
    for gpu in machine.gpus:
        most = usable(gpu)
        if most is not None:
            held = min(most, max(used, 0 if gpu.used == NA else gpu.used))
            gpu = replace(gpu, used=held, free=most - held)  # noqa: PLW2901 - the same card
        gpus.append(gpu)
    group, comma, rest = on.partition(",")
    if any(mark in group for mark in ":+/") or group.endswith(".json"):
        name = f"{on}, {format_bytes(used)} of each card held by others"
    else:
        name = f"{group}:used={used // MIB}MiB{comma}{rest}"
    return replace(machine, gpus=tuple(gpus)), name


def _grouped(names: list[str]) -> list[str]:
    groups: list[tuple[str, int]] = []
    for name in names:
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1] + 1)
        else:
            groups.append((name, 1))
    return [f"{count}x{name}" for name, count in groups]
