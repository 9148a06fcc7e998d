"""The certainty of a speed forecast, by its kind: errors on published and measured rows.

`presets/engines/surety.yaml` has the errors; `python -m bench.speed --write` writes it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.plan import Surety, Throughput
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal, TypeAlias

    from turbofit.core.machine import Gpu
    from turbofit.core.model import Model

    Word: TypeAlias = Literal["good", "fair", "rough", "order"]

#: Nine of ten forecasts of a kind must be within these factors to be good, fair or rough; of worse
#: kinds only the order of magnitude is told.
_TIMES: Final = (1.25, 1.5, 2.0)
_WORDS: Final[tuple[Word, ...]] = ("good", "fair", "rough", "order")
#: The suffix of kinds whose rows were not used in the fit, and whose cards were not either.
UNSEEN: Final = "other cards"


class Errors(Struct):
    """The errors of one kind: all shares, and the factors of nine in ten and of the worst."""

    figures: int
    median: float
    p90: float
    times: float
    worst: float
    cards: tuple[str, ...]


@cache
def errors_of() -> dict[str, Errors]:
    """The errors of all kinds with at least one figure."""
    return msgspec.convert(load_yaml(preset_path("engines", "surety")), dict[str, Errors])


def kind_of(model: Model, engine: str, *, images: bool) -> str:
    """The kind of a forecast: for texts or for the model's images, on an engine."""
    rule = model.image_rule
    what = f"images of {rule.unit_name}" if rule is not None and images else "text"
    return f"{what}, {engine}"


def with_surety(
    forecast: Throughput, model: Model, engine: str, gpus: Sequence[Gpu], *, images: bool
) -> Throughput:
    """Add to a forecast for a model, an engine and cards how certain each of its figures is."""
    kind = kind_of(model, engine, images=images)
    surety = surety_of(kind, gpus)
    return replace(
        forecast,
        basis=f"{forecast.basis}; {surety.words}",
        median_error=surety.median,
        surety=surety,
        first_token=surety_of(f"first token among others, {kind}", gpus),
        first_token_alone=surety_of(f"first token alone, {kind}", gpus),
    )


def surety_of(kind: str, gpus: Iterable[Gpu]) -> Surety:
    """The certainty of a kind of forecast on these cards.

    If some of these cards have no figures, those of other cards count. If there are none of other
    cards either, the word is one step less certain.
    """
    known, cards = errors_of(), {gpu.name for gpu in gpus}
    found, other = known.get(kind), known.get(f"{kind}, {UNSEEN}")
    if found is None:
        return Surety(kind=kind, word="unknown")
    seen, sure = cards <= set(found.cards), 0
    if not seen and other is not None:
        kind, found = f"{kind}, {UNSEEN}", other
    elif not seen:
        sure = 1
    sure += sum(found.times > most for most in _TIMES)
    return Surety(
        kind=kind,
        word=_WORDS[min(sure, len(_WORDS) - 1)],
        figures=found.figures,
        median=found.median,
        p90=found.p90,
        worst=found.worst,
        seen=seen,
    )
