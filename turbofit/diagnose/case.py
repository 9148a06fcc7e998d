"""A log with what it is about: model, machine, engine and settings, as it or the user names them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Settings
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.core.version import REFERENCE
from turbofit.machine.nvidia_smi import MigSlice, SmiGpu, groups
from turbofit.machine.presets import assumed_note, card_of, find_preset
from turbofit.machine.source import machine_from, spec_of
from turbofit.memory.engines import engine_for, engine_named
from turbofit.model.model_words import preset_of
from turbofit.model.names import by_its_name
from turbofit.model.presets import HUB_ID, preset_model
from turbofit.model.source import resolve_model
from turbofit.observe.log_events import (
    CacheBudget,
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    Slab,
    Starting,
    TorchMemory,
)
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
_SIZING: Final = ("cache_block_seq_len", "max_batch_size", "session_len", "quant_policy")


class LogCase:
    """What the answer looks at.

    Args:
        facts: the log.
        model: the user's name of the model; it goes before the log's.
        on: the user's SPEC or snapshot; it goes before the log's.
        hangs: whether the user says that the program stands still.
    """

    def __init__(
        self, facts: LogFacts, *, model: str | None, on: str | None, hangs: bool = False
    ) -> None:
        self.facts, self.subject, self.hangs = facts, facts.subject, hangs
        self.model = self._model(model)
        self.on = on
        self.machine = machine_from(on) if on else None
        #: Why the cards that the log names make no machine.
        self.no_machine = ""
        #: What was assumed of a card whose size the log leaves open.
        self.assumed = ""
        #: How many cards the machine has beside those that the run saw.
        self.unseen = 0
        if on is None:
            self._take_machine_of_log()

    @property
    def gpu(self) -> Gpu | None:
        return self.machine.gpu(self.machine.visible[0]) if self.machine else None

    @cached_property
    def version(self) -> str | None:
        """The log's release; where it prints none, one whose lines these are; else None."""
        if self.subject.version:
            return self.subject.version
        facts = self.facts
        if facts.first(PeerMissing):
            return "0.7"
        old = facts.first(KvBlocks) or facts.first(LegacyCuda)
        newer = facts.first(CacheBudget) or facts.first(Slab)
        return "0.12" if old and not newer else None

    @cached_property
    def engine(self) -> Engine:
        """LMDeploy's engine of the log, in its release; the reference's if that is not known."""
        names = ("pytorch",) if self.subject.on_pytorch else ("auto",)
        if self.facts.first(CacheBudget) or self.facts.first(KvBlocks):
            names = ("turbomind",)
        for version in (self.version, None):
            try:
                if self.model is not None:
                    return engine_for(self.model, names[0], version)
                return engine_named(names[0].replace("auto", "turbomind"), version)
            except TurbofitError:
                continue
        return engine_named("turbomind")

    @cached_property
    def tp(self) -> int:
        """The degree that the log names, or that the size of a KV block proves; else 1."""
        value = self.subject.options.get("tp")
        if isinstance(value, int):
            return value
        sizes = [
            event.value for _, event in self.facts.every(KvBlocks) if event.field == "block_size"
        ]
        if sizes and self.model is not None:
            for tp in (1, 2, 4, 8):
                shape = self.engine.cache(self.model, replace(self.settings, tp=tp))
                if abs(shape.block_bytes - sizes[0]) <= MIB // 2:
                    return tp
        return max(1, len(self.facts.every(CacheBudget)))

    @cached_property
    def ratio(self) -> float:
        told = self.facts.first_event(CacheBudget)
        value = told.ratio if told else self.subject.options.get("cache_max_entry_count")
        if isinstance(value, float) and value > 0:
            return value
        return float(str(self.engine.defaults("").get("cache_max_entry_count", 0.8)))

    @cached_property
    def settings(self) -> Settings:
        """The settings that size the cache: the engine's defaults, and what the log names."""
        options = self.engine.defaults(self.gpu.name if self.gpu else "") | self.subject.options
        return convert({name: options[name] for name in _SIZING if name in options}, Settings)

    def forecast(self, **changed: Any) -> Plan | None:
        """What that release's account says of the log's run with something changed.

        None where the log does not name model and cards, or the release does not take it.
        """
        if self.model is None or self.machine is None:
            return None
        starting = self.facts.first_event(Starting)
        told: dict[str, Any] = {"cache_max_entry_count": self.ratio}
        told |= {"session_len": starting.session} if starting and starting.session else {}
        version = self.version if self.engine.version != REFERENCE else self.subject.version
        given = self.subject.options | told | {"lmdeploy": version, "tp": self.tp} | changed
        try:
            request = {"model": self.model, "on": self.machine, "engine": self.engine.name}
            return predict(PredictRequest.of(**(request | given)))
        except TurbofitError:
            return None

    def named(self, machine: Machine) -> str:
        """A machine as a SPEC that a user can type."""
        return spec_of(machine) + self._peers(len(machine.gpus))

    def _model(self, name: str | None) -> Model | None:
        if name is not None:
            preset = preset_of(name)
            return preset_model(preset) if preset else resolve_model(name)
        if (found := self.subject.model) is None:
            return None
        if preset := preset_of(found):
            return preset_model(preset)
        hub_id = "/".join(found.split("/")[-2:])
        read = by_its_name(hub_id, "", guess=True) if HUB_ID.fullmatch(hub_id) else ""
        return None if isinstance(read, str) else replace(read, warnings=())

    def _take_machine_of_log(self) -> None:
        """The cards that the log names, where they make a machine; else why they make none."""
        if not (spec := self._spec()):
            return
        try:
            machine = machine_from(spec)
        except UsageError as exc:
            self.no_machine = f"{exc.message} ({exc.hint})"
            return
        seen = self.subject.visible
        if seen is not None and seen < len(machine.gpus):
            self.unseen = len(machine.gpus) - seen
            gpus = machine.gpus[:seen]
            machine = machine_from(f"{self.named(replace(machine, gpus=gpus))}")
        self.machine, self.on = machine, self.named(machine)

    def _spec(self) -> str:
        """The machine of the log as `machine_from` reads it: a table, a list, or named cards."""
        gpus = self.facts.every(SmiGpu)
        table = {gpu.index: self._row(mark.line, gpu) for mark, gpu in gpus if gpu.total}
        found = table or {gpu.index: gpu for _, gpu in gpus}
        if not found:
            return self._named()
        cards = [gpu for _, gpu in sorted(found.items())]
        if not table and len({gpu.name for gpu in cards}) == 1:
            name = _as_large(cards[0].name, self._printed_total)
            cards = [replace(gpu, name=name) for gpu in cards]
        slices = [event for _, event in self.facts.every(MigSlice)]
        return "+".join(groups(cards, slices)) + self._peers(sum(gpu.count for gpu in cards))

    def _named(self) -> str:
        """Cards that the text names, where they are of one kind."""
        found = list(self.subject.cards.values())
        if len(found) > 1:
            kinds = ", ".join(f"{max(1, cards.number)}x {cards.name}" for cards in found)
            self.no_machine = f"the log names {kinds}; name the one that is meant with --on"
        if len(found) != 1:
            return ""
        _, name, number, sized = found[0]
        peers = [max(event.a, event.b) + 1 for _, event in self.facts.every(PeerMissing)]
        counts = [event.gpu + 1 for _, event in self.facts.every(TorchMemory) if event.gpu]
        if not self._printed_total and not sized and name.partition("-")[2]:
            self.assumed = assumed_note(name.partition("-")[0], 1) or ""
        tp = self.subject.options.get("tp", 1)
        seen = self.subject.visible or 1
        number = number or max([1, *peers, tp if isinstance(tp, int) else 1, *counts, seen])
        return f"{number}x{_as_large(name, self._printed_total)}" + self._peers(number)

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


def _as_large(name: str, total: int) -> str:
    """The SPEC name of the card of this name with ``total`` bytes; the name itself if it is 0."""
    key = card_of(name, total or NA)
    return key or (f"{name}:total={total // MIB}MiB" if total and find_preset(name) else name)
