"""Known faults of engines (wrong answers, hangs, crashes) in `presets/engines/known-bad.yaml`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from msgspec.structs import replace

from turbofit.core.presets import read_preset
from turbofit.core.struct import NA, Struct
from turbofit.memory.account import Engine, EngineLaunch
from turbofit.memory.versions import between, parse

Capability = tuple[int, int]


class Condition(Struct, forbid_unknown_fields=True):
    """The conditions of one known fault; a launch has the fault if all given conditions hold.

    ``quantization`` are methods of the weights; ``dtypes``, ``quant_policy`` and ``communicators``
    are LMDeploy's options. ``capabilities`` and ``capability_below`` hold if they are true of one
    GPU of the group; they are false for a GPU of unknown capability. ``odd_vocab_share``: each rank
    has an odd number of the vocabulary's logits. ``tower_qk_norm``: the vision tower normalises
    queries and keys. ``images``, ``experts`` and ``delta``: the model has a vision tower, routed
    experts, gated delta nets. ``min_batch``: the least ``max_batch_size``.
    """

    quantization: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    quant_policy: tuple[int, ...] | None = None
    communicators: tuple[str, ...] | None = None
    min_tp: int = 1
    min_batch: int = 1
    capabilities: tuple[Capability, ...] | None = None
    capability_below: Capability | None = None
    architectures: tuple[str, ...] | None = None
    text_architectures: tuple[str, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    odd_vocab_share: bool | None = None
    tower_qk_norm: bool | None = None
    prefix_caching: bool | None = None
    images: bool | None = None
    experts: bool | None = None
    delta: bool | None = None

    def met(self, launch: EngineLaunch) -> bool:
        """Return whether all given conditions hold for a launch."""
        settings = launch.settings
        return (
            settings.tp >= self.min_tp
            and settings.max_batch_size >= self.min_batch
            and self._lists(launch)
            and self._has_traits_of(launch)
            and self._cards_match(launch)
        )

    def _lists(self, launch: EngineLaunch) -> bool:
        """Return whether the launch's values are in all lists that the condition gives."""
        model, settings, packed = launch.model, launch.settings, launch.model.quantization
        listed = (
            (settings.dtype, self.dtypes),
            (settings.quant_policy, self.quant_policy),
            (settings.communicator, self.communicators),
            (packed.method if packed else "", self.quantization),
            (model.architecture, self.architectures),
            (model.text.architecture, self.text_architectures),
            (model.text.head_dim, self.head_dims),
        )
        return all(among is None or value in among for value, among in listed)

    def _has_traits_of(self, launch: EngineLaunch) -> bool:
        """Return whether the launch has every given trait."""
        model, text, settings = launch.model, launch.model.text, launch.settings
        vocab_share = -(-text.vocab // settings.tp)
        traits = (
            (vocab_share % 2 == 1, self.odd_vocab_share),
            (bool(model.vision and model.vision.qk_norm), self.tower_qk_norm),
            (settings.enable_prefix_caching, self.prefix_caching),
            (model.vision is not None, self.images),
            (text.moe is not None, self.experts),
            (text.delta is not None, self.delta),
        )
        return all(rule in (None, value) for value, rule in traits)

    def _cards_match(self, launch: EngineLaunch) -> bool:
        """Return whether ``capabilities`` and ``capability_below`` hold for the launch.

        A condition that is not given holds. A given condition holds if it is true of one card.
        """
        cards = [gpu.compute_capability for gpu in launch.gpus if gpu.compute_capability != NA]
        wanted, below = self.capabilities, self.capability_below
        if wanted is not None and not any(card in wanted for card in cards):
            return False
        return below is None or any(card < below for card in cards)


class KnownProblem(Struct, forbid_unknown_fields=True):
    """A known fault (a row of the file) of the releases from ``first`` to ``last``, both included.

    A short release such as ``0.7`` means all 0.7 releases; None means no bound. ``fatal``: the
    engine always crashes or hangs. Without ``fatal``, answers are wrong, or some starts fail.
    ``python_only``: only programs that call the engine meet the fault, no client of a server.
    ``advisory``: a published hole of the server, whatever it serves.
    """

    id: str
    engines: tuple[str, ...]
    when: Condition
    what: str
    instead: str
    confirmed: str
    sources: tuple[str, ...]
    first: str | None = None
    last: str | None = None
    fatal: bool = False
    python_only: bool = False
    advisory: bool = False

    def has(self, version: str) -> bool:
        """Return whether a version has the fault.

        A text that is no version has only the faults without a ``last`` release.
        """
        unknown = parse(version) is None and self.last is None
        return unknown or between(version, self.first, self.last)

    @property
    def bounds_batch(self) -> bool:
        """True if the fault ends the engine, but only while several requests run at once."""
        return self.fatal and self.when.min_batch > 1

    @property
    def cause(self) -> str:
        return f"{self.what} ({self.sources[0]})"

    @property
    def warning(self) -> str:
        """The fault, its issue thread, and what to do instead."""
        return f"{self.cause}; {self.instead}"


def known_problems(launch: EngineLaunch, engine: str, version: str) -> tuple[KnownProblem, ...]:
    """Return the known faults that a launch has, fatal faults first."""
    return tuple(row for row in _rows_of(engine, version) if row.when.met(launch))


def known_warnings(
    launches: Iterable[EngineLaunch], engine: Engine, *, asked: bool = True
) -> tuple[str, ...]:
    """Return a warning for each known fault of several launches; a fatal one is a verdict.

    ``asked``: False leaves out the faults that no server's clients meet.
    """
    problems = [it for one in launches for it in known_problems(one, engine.name, engine.version)]
    told = (it for it in problems if not it.fatal and (asked or not it.python_only))
    return tuple(dict.fromkeys(it.warning for it in told))


def largest_batch(launch: EngineLaunch, engine: str, version: str) -> int | None:
    """Return the largest batch at which a launch has no known crash; None: any batch."""

    def ends(row: KnownProblem) -> bool:
        settings = replace(launch.settings, max_batch_size=row.when.min_batch)
        return row.when.met(replace(launch, settings=settings))

    rows = [row for row in _rows_of(engine, version) if row.bounds_batch and ends(row)]
    return min((row.when.min_batch - 1 for row in rows), default=None)


@cache
def _rows_of(engine: str, version: str) -> tuple[KnownProblem, ...]:
    """Return the known faults of an engine's version, fatal faults first."""
    rows = [row for row in all_problems() if engine in row.engines and row.has(version)]
    return tuple(sorted(rows, key=lambda row: not row.fatal))


@cache
def all_problems() -> tuple[KnownProblem, ...]:
    """Return the known faults of all versions and engines."""
    return read_preset("engines", "known-bad", tuple[KnownProblem, ...], "problems")
