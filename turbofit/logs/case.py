"""A log with its model, machine, engine and settings, as the log or the user names them."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Settings
from turbofit.core.units import GIB, MIB
from turbofit.core.version import REFERENCE
from turbofit.logs.log_events import (
    CacheBudget,
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    Slab,
    Starting,
)
from turbofit.machine.nvidia_smi import MigSlice, SmiGpu, groups
from turbofit.machine.presets import assumed_note, nearest_in_memory, spec_name
from turbofit.machine.source import machine_from, spec_of
from turbofit.machine.torch_memory import TorchMemory
from turbofit.machine.unlisted import other_card, unsupported_card
from turbofit.memory.engines import engine_for, engine_named
from turbofit.model.names import by_its_name, preset_of
from turbofit.model.presets import HUB_ID, preset_model
from turbofit.model.source import resolve_model
from turbofit.planning.plan import predict
from turbofit.planning.request import PredictRequest

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu, Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.logs.facts import LogFacts
    from turbofit.memory.account import Engine

#: The card that stands for a Jetson, if a log names a Jetson or its kernel. turbofit makes no
#: machine of this card, and the refusal has the reason (`LogCase.on_jetson`).
_JETSON: Final = SmiGpu(index=0, name="Orin")
#: Events that only some releases print, the release that they show (None: the reference), and the
#: reason in words.
_GUESSES: Final = (
    ((PeerMissing,), "0.7", "a guess: LMDeploy prints its warning of peer access up to 0.7.3"),
    ((CacheBudget, Slab), None, "assumed: TurboMind prints such lines of its cache since 0.15"),
    ((KvBlocks, LegacyCuda), "0.12", "a guess: TurboMind prints such lines up to 0.14"),
)
#: Used bytes in nvidia-smi's table; fewer bytes belong to a display or to the driver.
_IN_USE: Final = 256 * MIB
DEGREES: Final = (1, 2, 4, 8)
#: The least share of the cache that a step names. A run that died with less lacks something else:
#: of the presets no model has a plan below 0.15 on any card. Plans of older releases may be lower.
LEAST_SHARE: Final = 0.1
_SIZING: Final = ("cache_block_seq_len", "max_batch_size", "session_len", "quant_policy")


class LogCase:
    """One run of a log, with its model, machine, engine and settings as far as they are known.

    Args:
        facts: the log.
        model: the user's name of the model; it overrides the log's.
        on: the user's SPEC or snapshot; it overrides the log's.
        hangs: whether the user says (``--hang``) that the program stands still.
    """

    def __init__(
        self, facts: LogFacts, *, model: str | None, on: str | None, hangs: bool = False
    ) -> None:
        self.facts, self.subject, self.hangs = facts, facts.subject, hangs
        self.model = self._model(model)
        self.on = on
        self.machine = machine_from(on) if on else None
        #: The reason why turbofit can make no machine of the cards that the log names; else empty.
        self.no_machine = ""
        #: Whether no release of LMDeploy has code for one of these cards.
        self.too_old = False
        #: A note on the assumed size of a card that is sold in several sizes; else empty.
        self.assumed = ""
        #: True if the log names no card, and the memory that torch prints shows the kind of card;
        #: or if of the named card only the size is known.
        self.guessed = False
        if on is None:
            self._take_machine_of_log()

    @property
    def gpu(self) -> Gpu | None:
        return self.machine.gpu(self.machine.visible[0]) if self.machine else None

    @property
    def on_jetson(self) -> bool:
        """Whether the card is a Jetson, where no share of the memory lets TurboMind start."""
        return self.on is None and "jetson" in self.subject.facts

    @property
    def reads_text_alone(self) -> bool:
        return self.model is not None and self.model.vision is None

    @property
    def has_all(self) -> bool:
        """Whether model and cards are known."""
        return self.model is not None and self.machine is not None

    @property
    def has_account(self) -> bool:
        """Whether LMDeploy wrote the log, and its model and cards are known."""
        return self.subject.of_lmdeploy and self.has_all

    @cached_property
    def version(self) -> str | None:
        """The release that the log prints, else a guess by the form of its lines, or None."""
        return self.subject.version or self._guess[0]

    @property
    def assumption(self) -> str:
        """The reason for the guessed release, in words; empty if the log names its release."""
        return "" if self.subject.version else self._guess[1]

    @cached_property
    def _guess(self) -> tuple[str | None, str]:
        """The release that the form of the log's lines shows, or None, and the reason in words."""
        for kinds, version, why in _GUESSES:
            if any(self.facts.first(kind) for kind in kinds):
                return version, why
        refused = self.facts.every(TorchMemory)
        much = any((event.allocated or 0) >= GIB for _, event in refused)
        if much and self.subject.of_lmdeploy and not self.subject.on_pytorch:
            return "0.12", "a guess: torch holds much beside TurboMind, as it does up to 0.15"
        return None, "assumed: no line tells the release"

    @cached_property
    def engine(self) -> Engine:
        """LMDeploy's engine in the log's release.

        If turbofit has no account of that release, the engine of the reference release.
        """
        name = "pytorch" if self.subject.on_pytorch else "auto"
        if self.facts.first(CacheBudget) or self.facts.first(KvBlocks):
            name = "turbomind"
        for version in (self.version, None):
            with suppress(TurbofitError):
                # Without a model nothing shows which engine LMDeploy chose.
                alone = name.replace("auto", "turbomind")
                return (
                    engine_for(self.model, name, version)
                    if self.model
                    else engine_named(alone, version)
                )
        return engine_named("turbomind")

    @property
    def told_tp(self) -> int | None:
        """The degree of tensor parallelism by an option in the log; None without the option."""
        value = self.subject.options.get("tp")
        return value if isinstance(value, int) else None

    @property
    def shown_tp(self) -> int | None:
        """The degree that an option or other lines of the log show; None if no line shows it."""
        return self.tp if self.told_tp or self.tp > 1 else None

    @cached_property
    def tp(self) -> int:
        """The degree of tensor parallelism of the run; 1 if no line shows it.

        An option gives the degree. Else the size of a KV block shows it, the number of lines about
        the cache, or the devices in TurboMind's lines about peer access: an engine prints these
        lines for its own devices alone.
        """
        if self.told_tp:
            return self.told_tp
        sizes = [
            event.value for _, event in self.facts.every(KvBlocks) if event.field == "block_size"
        ]
        if sizes and self.model is not None:
            for tp in DEGREES:
                shape = self.engine.cache(self.model, replace(self.settings, tp=tp))
                if abs(shape.block_bytes - sizes[0]) <= MIB // 2:
                    return tp
        missing = self.facts.every(PeerMissing)
        last = max((max(pair.a, pair.b) for _, pair in missing), default=0)
        of_peers = next((degree for degree in DEGREES if degree > last), 0)
        return max(1, len(self.facts.every(CacheBudget)), of_peers)

    @cached_property
    def ratio(self) -> float:
        """The share of free memory for the cache: the log's, else the engine's default."""
        budget = self.facts.first_event(CacheBudget)
        value = budget.ratio if budget else self.subject.options.get("cache_max_entry_count")
        default = self.engine.defaults("").get("cache_max_entry_count", 0.8)
        return value if isinstance(value, float) and value > 0 else float(str(default))

    @property
    def tiny_share(self) -> bool:
        """Whether the share of the cache is so small that a lower one helps nobody."""
        return self.subject.of_lmdeploy and self.ratio <= LEAST_SHARE

    @cached_property
    def settings(self) -> Settings:
        """The settings that determine the cache's size: the log's, else the engine's defaults."""
        options = self.engine.defaults(self.gpu.name if self.gpu else "") | self.subject.options
        return convert({name: options[name] for name in _SIZING if name in options}, Settings)

    def forecast(self, **changed: Any) -> Plan | None:
        """Return a prediction of the log's run with the options in ``changed``.

        The account is that of the log's release. None if model or cards are unknown, or if the
        request is refused.
        """
        if self.model is None or self.machine is None:
            return None
        starting = self.facts.first_event(Starting)
        printed: dict[str, Any] = {"cache_max_entry_count": self.ratio}
        printed |= {"session_len": starting.session} if starting and starting.session else {}
        version = self.version if self.engine.version != REFERENCE else self.subject.version
        given = self.subject.options | printed | {"lmdeploy": version, "tp": self.tp} | changed
        try:
            request = {"model": self.model, "on": self.machine, "engine": self.engine.name}
            return predict(PredictRequest.of(**(request | given)), finds_remedies=False)
        except TurbofitError:
            return None

    def named(self, machine: Machine) -> str:
        """Return a machine as a SPEC that a user can type."""
        return spec_of(machine) + self._peers(len(machine.gpus))

    def _model(self, name: str | None) -> Model | None:
        if (found := name or self.subject.model) is None:
            return None
        if preset := preset_of(found):
            return preset_model(preset)
        if name is not None:
            return resolve_model(name)
        hub_id = "/".join(found.split("/")[-2:])
        read = by_its_name(hub_id, "", guess=True) if HUB_ID.fullmatch(hub_id) else ""
        return None if isinstance(read, str) else replace(read, warnings=())

    def _take_machine_of_log(self) -> None:
        """Set ``machine`` to the log's cards; if that fails, set ``no_machine`` to the reason."""
        cards = [_JETSON] if "jetson" in self.subject.facts else self._cards()
        if not cards:
            return
        slices = [event for _, event in self.facts.every(MigSlice)]
        spec = "+".join(groups(cards, slices)) + self._peers(sum(gpu.count for gpu in cards))
        try:
            machine = machine_from(spec)
        except UsageError as exc:
            self.no_machine = f"{exc.message} ({exc.hint})"
            rows = [unsupported_card(card.name) for card in cards]
            self.too_old = any(row is not None and row.too_old for row in rows)
            self._take_size_of_card(cards)
            return
        visible = self.subject.visible or len(machine.gpus)
        if len(machine.gpus) > visible:
            machine = machine_from(self.named(replace(machine, gpus=machine.gpus[:visible])))
        self.machine, self.on = machine, None if self.guessed else self.named(machine)

    def _take_size_of_card(self, cards: list[SmiGpu]) -> None:
        """Set ``machine`` to cards of which only the size by their name is known.

        The size is the printed one, which is more than CUDA can allocate: what does not fit it fits
        no such card. Such a machine is a guess, for which no plan is made.
        """
        other = other_card(cards[0].name)
        if other is None or len(cards) > 1:
            return
        total, count = max(other.sizes) * GIB // MIB, cards[0].count
        with suppress(UsageError):
            self.machine = machine_from(f"{count}x{other.name}:total={total}MiB")
            self.guessed = True

    def _cards(self) -> list[SmiGpu]:
        """Return the run's cards: nvidia-smi's, else the cards that the log names, else torch's.

        The memory in use counts only in a table of nvidia-smi from before the engine began. It
        never counts beside torch's out-of-memory text, since the table may show a later state.
        """
        torch = [event for _, event in self.facts.every(TorchMemory)]
        total = next((event.total for event in reversed(torch) if event.total), 0)
        listed, before = self.facts.every(SmiGpu), 0 if torch else self.facts.begun_at or 0
        table = {gpu.index: (mark.line, gpu, gpu.used or 0) for mark, gpu in listed if gpu.total}
        if table:
            return [
                replace(gpu, used=used if line < before and used >= _IN_USE else 0)
                for _, (line, gpu, used) in sorted(table.items())
            ]
        cards = {gpu.index: gpu for _, gpu in listed}
        found = [gpu for _, gpu in sorted(cards.items())] or self._named(total, self._least(torch))
        if self.guessed or len({gpu.name for gpu in found}) != 1:
            return found
        return [replace(gpu, name=spec_name(gpu.name, total)) for gpu in found]

    def _named(self, total: int, least: int) -> list[SmiGpu]:
        """Return cards of the only kind that the log names.

        If the log names no kind, the cards are of the kind whose memory is nearest to ``total``,
        the bytes of a card (0 if unknown). No cards if the log names several kinds, or neither a
        kind nor bytes. ``least``: how many cards there are if the log gives no number.
        """
        named = list(self.subject.cards.values())
        if len(named) > 1:
            kinds = ", ".join(f"{max(1, card.number)}x {card.name}" for card in named)
            self.no_machine = f"the log names {kinds}; name the machine with --on"
            return []
        if named:
            chip, name, number, sized = named[0]
            if not total and not sized and name != chip:
                self.assumed = assumed_note(chip, 1) or ""
            return [SmiGpu(index=0, name=name, count=number or least)]
        self.guessed = bool(total)
        return [SmiGpu(index=0, name=nearest_in_memory(total), count=least)] if total else []

    def _least(self, torch: list[TorchMemory]) -> int:
        """Return how many cards the log shows at least."""
        return max(
            self.told_tp or 1,
            self.subject.visible or 1,
            *(max(event.a, event.b) + 1 for _, event in self.facts.every(PeerMissing)),
            *(event.gpu + 1 for event in torch if event.gpu),
        )

    def _peers(self, number: int) -> str:
        return ",p2p=none" if number > 1 and self.facts.first(PeerMissing) else ""
