"""A log with what it is about: model and machine, as named in it or by the user."""

from __future__ import annotations

from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import PackageError, TurbofitError, UsageError
from turbofit.core.struct import known
from turbofit.core.units import MIB
from turbofit.diagnose.subject import preset_of
from turbofit.machine.card_words import as_large
from turbofit.machine.nvidia_smi import MigSlice, SmiGpu, groups
from turbofit.machine.presets import match_key
from turbofit.machine.source import machine_from
from turbofit.memory.engines import engine_named
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.observe.log_events import PeerMissing, TorchMemory
from turbofit.planning.plan import predict
from turbofit.planning.request import PredictRequest

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.diagnose.facts import LogFacts
    from turbofit.memory.account import Engine

#: Less than so much of a table is a display's, or the driver's own.
_IN_USE: Final = 256 * MIB


class LogCase:
    """What the rules look at.

    Args:
        facts: the log.
        model: the user's name of the model; it goes before the log's.
        on: the user's SPEC or snapshot; it goes before the log's.
    """

    def __init__(self, facts: LogFacts, *, model: str | None = None, on: str | None = None) -> None:
        self.facts = facts
        self.event = facts.deaths.event
        self.model = self._model(model)
        self.on = on
        self.machine = machine_from(on) if on else None
        #: Why the cards that the log names make no machine.
        self.no_machine = ""
        #: What was assumed of a card whose size the log leaves open.
        self.assumed = ""
        if on is None:
            self._take_machine_of_log()

    @property
    def gpu(self) -> Gpu | None:
        return self.machine.gpu(self.machine.visible[0]) if self.machine else None

    @property
    def tp(self) -> int | None:
        value = self.facts.subject.options.get("tp")
        return value if isinstance(value, int) else None

    @property
    def ratio(self) -> float | None:
        value = self.facts.subject.options.get("cache_max_entry_count")
        return value if isinstance(value, float) else None

    @cached_property
    def turbomind(self) -> Engine:
        """TurboMind of the log's version; the reference's where it names none that is known."""
        try:
            return engine_named("turbomind", self.facts.subject.version)
        except PackageError:
            return engine_named("turbomind")

    def forecast(self, **figures: float | None) -> Plan | None:
        """What turbofit says of the log's settings, release and figures, where all are known."""
        if self.model is None or self.machine is None:
            return None
        subject, session = self.facts.subject, self.facts.session_limit
        told = {"session_len": session} if session else {}
        given = subject.options | told | {"lmdeploy": subject.version} | figures
        try:
            return predict(
                PredictRequest.of(model=self.model, on=self.machine, engine="turbomind", **given)
            )
        except TurbofitError:
            return None

    def named(self, machine: Machine) -> str:
        """A machine as a SPEC that a user can type."""
        equal = groupby(map(_spec_of, machine.gpus))
        cards = "+".join(f"{len(list(group))}x{name}" for name, group in equal)
        return cards + self._peers(len(machine.gpus))

    def _model(self, name: str | None) -> Model | None:
        if name is not None:
            preset = preset_of(name)
            return preset_model(preset) if preset else resolve_model(name)
        found = self.facts.subject.model
        return preset_model(found[0]) if found else None

    def _take_machine_of_log(self) -> None:
        """The cards that the log names, where they make a machine; else why they make none."""
        spec = self._spec()
        if not spec:
            return
        try:
            self.machine = machine_from(spec)
        except UsageError as exc:
            self.no_machine = f"{exc.message} ({exc.hint})"
        else:
            self.on = self.named(self.machine)

    def _spec(self) -> str:
        """The machine of the log as `machine_from` reads it: a table, a list, or named cards."""
        gpus = self.facts.every(SmiGpu)
        table = {gpu.index: self._row(mark.line, gpu) for mark, gpu in gpus if gpu.total}
        found = table or {gpu.index: gpu for _, gpu in gpus}
        if not found:
            return self._named()
        cards = [gpu for _, gpu in sorted(found.items())]
        if not table and len({gpu.name for gpu in cards}) == 1:
            name = as_large(cards[0].name, self._printed_total)
            cards = [replace(gpu, name=name) for gpu in cards]
        slices = [event for _, event in self.facts.every(MigSlice)]
        return "+".join(groups(cards, slices)) + self._peers(sum(gpu.count for gpu in cards))

    def _named(self) -> str:
        """Cards that the text names, where they are of one kind."""
        found = self.facts.subject.cards.found
        if len(found) > 1:
            kinds = ", ".join(f"{max(1, cards.number)}x {name}" for name, cards in found.items())
            self.no_machine = f"the log names {kinds}; name the one that is meant with --on"
        if len(found) != 1:
            return ""
        name, cards = next(iter(found.items()))
        peers = [max(event.a, event.b) + 1 for _, event in self.facts.every(PeerMissing)]
        counts = [event.gpu + 1 for _, event in self.facts.every(TorchMemory) if event.gpu]
        if not self._printed_total:
            self.assumed = self.facts.subject.cards.assumed(name) or ""
        number = cards.number or max([1, *peers, self.tp or 1, *counts])
        return f"{number}x{as_large(name, self._printed_total)}" + self._peers(number)

    def _peers(self, number: int) -> str:
        return ",p2p=none" if number > 1 and self.facts.first(PeerMissing) else ""

    @property
    def _printed_total(self) -> int:
        """A card's bytes as torch printed them; 0: it did not."""
        totals = [event.total for _, event in self.facts.every(TorchMemory) if event.total]
        return totals[-1] if totals else 0

    def _row(self, line: int, gpu: SmiGpu) -> SmiGpu:
        """A GPU with nvidia-smi's memory; what is in use counts before the engine began.

        Torch's own text of who holds the card is nearer to the death, and goes before it.
        """
        begun = self.facts.begun_at
        before = begun is not None and line < begun and not self.facts.first(TorchMemory)
        used = gpu.used if before and gpu.used and gpu.used >= _IN_USE else 0
        return replace(gpu, used=used)


def with_used(machine: Machine, used: int) -> Machine:
    """A machine on each card of which others hold so many bytes, and all of it at most."""
    gpus = []
    for gpu in machine.gpus:
        taken = min(gpu.usable, max(used, known(gpu.used, 0)))
        gpus.append(replace(gpu, used=taken, free=gpu.usable - taken))
    return replace(machine, gpus=tuple(gpus))


def _spec_of(gpu: Gpu) -> str:
    name, used = match_key(gpu) or f"{gpu.name}:total={gpu.usable // MIB}MiB", known(gpu.used, 0)
    return f"{name}:used={used // MIB}MiB" if used else name
