"""Scores: each figure of each row against its forecast, and what they come to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.accuracy.forecast import Forecast, forecast
from bench.accuracy.inputs import Inputs, MissingError, inputs_of
from bench.accuracy.rows import Row
from turbofit.core.errors import TurbofitError
from turbofit.core.struct import Struct
from turbofit.core.units import MIB

__all__ = ["ENGINES", "Score", "Scored", "Unscored", "score", "summary"]

#: The engines of LMDeploy.
ENGINES = ("turbomind", "pytorch")
_OUTCOMES = {"ran": "ok", "oom": "oom"}


class Score(Struct):
    """One figure of a row; ``error`` is forecast minus observed in ``unit``.

    ``figure`` is ``used``, ``weights``, ``cache``, ``vision``, ``llm``, ``blocks``, ``block`` or
    ``outcome``; ``card_mib`` is the memory of one card.
    """

    figure: str
    unit: str
    forecast: float
    observed: float
    card_mib: int

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
        """The error in percent of one card, None for counts."""
        return 100 * self.error / self.card_mib if self.unit == "MiB" else None

    @property
    def percent(self) -> float:
        """The error in percent of what was observed."""
        return 100 * self.error / self.observed if self.observed else 0.0


class Scored(Struct):
    """A row that was scored."""

    inputs: Inputs
    forecast: Forecast
    scores: tuple[Score, ...]
    not_empty: str

    @property
    def row(self) -> Row:
        """The row."""
        return self.inputs.row

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
        if not self.inputs.card_known:
            return False
        if self.observed == "ok":
            return self.forecast.outcome == "oom" and not self.not_empty
        if self.observed == "oom":
            fine = self.forecast.outcome == "ok" and self.forecast.has_margin
            return fine and not self.not_empty
        return False


class Unscored(Struct):
    """A row that was not, and the input that it lacks."""

    row: Row
    missing: str


def score(rows: Sequence[Row]) -> tuple[list[Scored], list[Unscored]]:
    """Score all rows that can be."""
    scored, unscored = [], []
    for row in rows:
        try:
            inputs = inputs_of(row)
            made = forecast(inputs)
        except (MissingError, TurbofitError, ArithmeticError) as exc:
            unscored.append(Unscored(row=row, missing=str(exc)))
            continue
        not_empty = "" if row.free_mib else inputs.not_empty
        scores = tuple(_scores(inputs.row, made, bool(not_empty)))
        scored.append(Scored(inputs=inputs, forecast=made, scores=scores, not_empty=not_empty))
    return scored, unscored


def _scores(row: Row, made: Forecast, not_empty: bool) -> Iterator[Score]:
    """The figures that the account has, as far as an empty machine can be compared."""
    card = made.ledgers[0].total // MIB
    for key, value in row.figures.items():
        if key == "block_mib":
            size = made.block_bytes / MIB
            yield _score("block", "MiB a block", size, _first(value), card)
        elif not not_empty:
            yield from _figure(key, value, made, card)


def _figure(key: str, value: float | list[float], made: Forecast, card: int) -> Iterator[Score]:
    """One figure by its name."""
    name, _, rest = key.partition("_")
    last = rest.endswith("_last")
    ledger = made.ledgers[-1 if last else 0]
    scale = 1024.0 if "gb" in rest else 1.0
    terms = ledger.ledger
    weights = sum(t.bytes for t in terms if t.phase == "weights" and t.term != "torch_cache")
    tower = sum(t.bytes for t in terms if t.term in _TOWER)
    if name == "budget":
        yield _score("budget", "MiB", ledger.steady / MIB, _first(value) * scale, card)
    elif name == "used" and isinstance(value, list):
        for one, seen in zip(made.ledgers, value, strict=False):
            yield _score("used", "MiB", one.steady / MIB, seen * scale, card)
    elif name == "used":
        yield _score("used", "MiB", ledger.steady / MIB, _first(value) * scale, card)
    elif name == "weights":
        yield _score("weights", "MiB", weights / MIB, _first(value) * scale, card)
    elif name == "llm":
        yield _score("llm", "MiB", (weights - tower) / MIB, _first(value) * scale, card)
    elif name == "vision" and tower:
        yield _score("vision", "MiB", tower / MIB, _first(value) * scale, card)
    elif name == "cache":
        yield _score("cache", "MiB", made.region / MIB, _first(value) * scale, card)
    elif name == "blocks":
        yield _score("blocks", "blocks", made.region // made.block_bytes, _first(value), card)
    elif name == "files":
        yield _score("files", "MiB", weights / MIB, _first(value) * scale, card)


_TOWER = ("weights.vision_tower", "weights.vision", "weights.projector")


def _first(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value


def _score(figure: str, unit: str, made: float, seen: float, card: int) -> Score:
    return Score(figure=figure, unit=unit, forecast=made, observed=seen, card_mib=card)


def summary(scored: Sequence[Scored], unscored: Sequence[Unscored]) -> dict[str, Any]:
    """Counts, errors by source and generation, confusion of outcomes, and the bars."""
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for one in scored:
        confusion[one.observed][one.forecast.outcome] += 1
    known = [one.row for one in scored if one.scores]
    lacking = [one.row for one in unscored if one.row.engine in ENGINES and one.row.figures]
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
        "not_empty": {one.row.id: one.not_empty for one in scored if one.not_empty},
    }


def _source(one: Scored) -> str:
    """A source without the numbers of its threads."""
    return one.row.source.partition("#")[0].partition("@")[0].split(" (")[0].strip()


def _generation(one: Scored) -> str:
    return f"{one.row.engine} {one.forecast.generation}"


def _groups(scored: Sequence[Scored], key: Any) -> list[tuple[str, list[Scored]]]:
    found: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        found[key(one)].append(one)
    return sorted(found.items())


def _errors(group: Sequence[Scored]) -> dict[str, Any] | None:
    """Errors of whole-GPU figures: median of the sizes, p90, and the worst with its sign."""
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
    """By source: rows with an outcome, and those that the forecast contradicts."""
    table = {}
    for key, group in _groups(scored, _source):
        counted = [one for one in group if one.observed in ("ok", "oom")]
        table[key] = {
            "ran": sum(one.observed == "ok" for one in counted),
            "ran_out": sum(one.observed == "oom" for one in counted),
            "wrong": sum(one.wrong for one in counted),
        }
    return table
