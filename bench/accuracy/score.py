"""Compares each figure of each row with its forecast, and summarises the errors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Final

from bench.accuracy.forecast import Forecast, forecast
from bench.accuracy.rows import Row
from turbofit.core.plan import GpuLedger
from turbofit.core.struct import Struct
from turbofit.core.units import MIB

_OUTCOMES = {"ran": "ok", "oom": "oom"}


class Score(Struct):
    """One figure of a row; ``error`` is forecast minus observed in ``unit``.

    ``figure`` is ``used``, ``peak``, ``free`` (when the cache is sized), ``weights``, ``cache``,
    ``vision``, ``llm``, ``blocks``, ``block``, ``tokens``, ``host``, ``pinned`` or ``outcome``;
    ``card_mib`` is the memory of one card, or of all where a figure is their sum, and None for
    memory of the host.
    """

    figure: str
    unit: str
    forecast: float
    observed: float
    card_mib: int | None

    @property
    def error(self) -> float:
        """Forecast minus observed."""
        return self.forecast - self.observed

    @property
    def error_mib(self) -> float | None:
        """The error in MiB, None for counts."""
        return self.error if self.unit == "MiB" else None

    @property
    def percent_of_card(self) -> float | None:
        """The error in percent of the card, None for counts and for the host."""
        counts = self.unit != "MiB" or self.card_mib is None
        return None if counts else 100 * self.error / (self.card_mib or 1)

    @property
    def percent(self) -> float:
        """The error in percent of what was observed."""
        return 100 * self.error / self.observed if self.observed else 0.0


class Scored(Struct):
    """A row that was scored."""

    row: Row
    forecast: Forecast
    scores: tuple[Score, ...]

    @property
    def observed(self) -> str:
        """``ok``, ``oom`` or ``other``."""
        return _OUTCOMES.get(self.row.outcome, self.row.outcome)

    @property
    def wrong(self) -> bool:
        """Whether the outcome contradicts the forecast.

        A row that ran must not be forecast to die at its start; one that ran out must not be
        forecast to run with more than the margin to spare, unless its machine was not empty. A
        card that nobody named is not judged.
        """
        if not self.row.card_known:
            return False
        if self.observed == "ok":
            return self.forecast.outcome == "oom" and not self.row.not_empty
        if self.observed == "oom":
            fine = self.forecast.outcome == "ok" and self.forecast.has_margin
            return fine and not self.row.not_empty
        return False


def score(rows: Sequence[Row]) -> tuple[list[Scored], list[Row]]:
    """Score all rows that lack nothing; returns the scored rows and the others."""
    scored = []
    for row in rows:
        if not row.missing:
            made = forecast(row)
            scored.append(Scored(row=row, forecast=made, scores=tuple(_scores(row, made))))
    return scored, [row for row in rows if row.missing]


def _scores(row: Row, made: Forecast) -> Iterator[Score]:
    """Yield the scores of a row; if its machine was not empty, only of blocks and host memory."""
    for key, value in row.figures.items():
        name, _, unit = key.partition("_")
        if name == "block":
            yield _score("block", "MiB a block", made.block_bytes / MIB, _first(value), None)
        elif name in ("host", "pinned"):
            yield _score(name, "MiB", getattr(made, name) / MIB, _first(value), None)
        elif not row.not_empty:
            yield from _figure(name, unit, value, made, _summed(row, made))


def _summed(row: Row, made: Forecast) -> bool:
    """Return whether the row gives weights and cache of all cards together.

    It does if one of the figures is more than a card holds: people who compute such figures by
    hand do so for the whole model, while a log has those of one card.
    """
    card = made.ledgers[0].total / MIB
    sizes = [
        _first(value) * _scale(key) for key, value in row.figures.items() if key in _PER_ENGINE
    ]
    return len(made.ledgers) > 1 and any(size > card for size in sizes)


def _figure(
    name: str, unit: str, value: float | list[float], made: Forecast, summed: bool
) -> Iterator[Score]:
    """Yield the score of one figure by its name; of a list of ``used``, one for each GPU."""
    ledger = made.ledgers[-1 if unit.endswith("_last") else 0]
    card, scale = ledger.total // MIB, _scale(unit)
    seen = _first(value) * scale
    if name == "used" and isinstance(value, list):
        for one, each in zip(made.ledgers, value, strict=False):
            yield _score("used", "MiB", one.steady / MIB, each * scale, card)
    elif name in ("budget", "used"):
        yield _score(name, "MiB", ledger.steady / MIB, seen, card)
    elif name == "peak":
        yield _score("peak", "MiB", ledger.peak / MIB, seen, card)
    elif name == "free":
        yield _score("free", "MiB", made.free / MIB, seen, card)
    elif name == "blocks":
        yield _score("blocks", "blocks", made.region // made.block_bytes, seen, card)
    elif name == "kv":
        yield _score("tokens", "tokens", made.tokens, seen, card)
    elif name == "vision" and not _tower(ledger):
        return
    elif name in _MEMORY:
        over = made.ledgers if summed else (ledger,)
        size = sum(_MEMORY[name](made, one) for one in over)
        yield _score(name, "MiB", size / MIB, seen, card * len(over))


def _tower(ledger: GpuLedger) -> int:
    return sum(t.bytes for t in ledger.terms if t.term in _TOWER)


def _weights(ledger: GpuLedger) -> int:
    held = (t for t in ledger.terms if t.phase == "weights" and t.term != "torch_cache")
    return sum(t.bytes for t in held)


_MEMORY: Final[dict[str, Callable[[Forecast, GpuLedger], int]]] = {
    "weights": lambda _, ledger: _weights(ledger),
    "files": lambda _, ledger: _weights(ledger),
    "llm": lambda _, ledger: _weights(ledger) - _tower(ledger),
    "vision": lambda _, ledger: _tower(ledger),
    "cache": lambda made, _: made.region,
}
#: Figures that people give of a whole model.
_PER_ENGINE: Final = frozenset({"weights_gb", "cache_gb", "llm_gb", "files_gb"})
_TOWER = ("weights.vision_tower", "weights.vision", "weights.projector")


def _first(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value


def _scale(key: str) -> float:
    """Return how many MiB the unit in a figure's name has."""
    return 1024.0 if "gb" in key else 1.0


def _score(figure: str, unit: str, made: float, seen: float, card: int | None) -> Score:
    return Score(figure=figure, unit=unit, forecast=made, observed=seen, card_mib=card)


def summary(scored: Sequence[Scored], unscored: Sequence[Row]) -> dict[str, Any]:
    """Return counts, errors by source and generation, and how outcomes agree with forecasts."""
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for one in scored:
        confusion[one.observed][one.forecast.outcome] += 1
    known = [one.row for one in scored if one.scores]
    lacking = [row for row in unscored if row.figures]
    with_figure = len(known) + len(lacking)
    return {
        "rows": len(scored) + len(unscored),
        "scored": len(scored),
        "with_a_figure": with_figure,
        "with_a_figure_scored": len(known),
        "share_scored": round(len(known) / with_figure, 3) if with_figure else None,
        "by_source": {key: _errors(group) for key, group in _groups(scored, _source)},
        "by_generation": {key: _errors(group) for key, group in _groups(scored, _generation)},
        "blocks": _blocks(scored),
        "confusion": {seen: dict(made) for seen, made in sorted(confusion.items())},
        "outcomes_by_source": _outcomes(scored),
        "wrong_outcomes": [one.row.id for one in scored if one.wrong],
        "not_empty": {one.row.id: one.row.not_empty for one in scored if one.row.not_empty},
    }


def _source(one: Scored) -> str:
    """Return a row's source without the number of its thread."""
    return one.row.source.partition("#")[0].partition("@")[0].split(" (")[0].strip()


def _generation(one: Scored) -> str:
    return f"{one.row.engine} {one.forecast.generation}"


def _groups(scored: Sequence[Scored], key: Any) -> list[tuple[str, list[Scored]]]:
    found: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        found[key(one)].append(one)
    return sorted(found.items())


def _errors(group: Sequence[Scored]) -> dict[str, Any] | None:
    """Return the errors of ``used`` figures: median and p90 of sizes, and the worst, signed."""
    errors = [
        (s.error_mib, s.percent_of_card)
        for one in group
        for s in one.scores
        if s.figure == "used" and s.error_mib is not None and s.percent_of_card is not None
    ]
    if not errors:
        return None
    mib, share = [e for e, _ in errors], [p for _, p in errors]
    return {
        "count": len(errors),
        "median_mib": round(median(abs(e) for e in mib)),
        "median_percent": round(median(abs(p) for p in share), 2),
        "median_signed_percent": round(median(share), 2),
        "p90_mib": round(_p90([abs(e) for e in mib])),
        "p90_percent": round(_p90([abs(p) for p in share]), 2),
        "worst_mib": round(max(mib, key=abs)),
        "worst_percent": round(max(share, key=abs), 2),
    }


def _p90(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def _blocks(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    return [
        {
            "id": one.row.id,
            "figure": s.figure,
            "forecast": s.forecast,
            "observed": s.observed,
            "error_percent": round(s.percent, 2),
        }
        for one in scored
        for s in one.scores
        if s.figure in ("block", "blocks")
    ]


def _outcomes(scored: Sequence[Scored]) -> dict[str, dict[str, int]]:
    """Count by source the rows with an outcome, and the rows that the forecast contradicts."""
    table = {}
    for key, group in _groups(scored, _source):
        counted = [one for one in group if one.observed in ("ok", "oom")]
        table[key] = {
            "ran": sum(one.observed == "ok" for one in counted),
            "ran_out": sum(one.observed == "oom" for one in counted),
            "wrong": sum(one.wrong for one in counted),
        }
    return table
