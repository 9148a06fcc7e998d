"""How sure a forecast of speed is, by its kind: the errors on published and measured rows.

`presets/engines/surety.yaml` has them; `python -m bench.speed --write` writes it.
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

    Word: TypeAlias = Literal["good", "fair", "rough"]

#: Forecasts nine of ten of which are within such a share are good, or fair; others are rough.
_SHARES: Final = (0.25, 0.5)
_WORDS: Final[tuple[Word, ...]] = ("good", "fair", "rough")
#: A kind of which one figure is off by more times is told as an order.
_ORDER: Final = 2.0
#: Of the kinds whose rows no constant was fitted to, and whose cards are none of the fit's.
UNSEEN: Final = "other cards"


class Errors(Struct):
    """The errors of one kind: shares, and by how many times the worst figure is off."""

    figures: int
    median: float
    p90: float
    worst: float
    cards: tuple[str, ...]


@cache
def errors_of() -> dict[str, Errors]:
    """The errors of all kinds that have a figure."""
    return msgspec.convert(load_yaml(preset_path("engines", "surety")), dict[str, Errors])


def surety_of_speed(model: Model, engine: str, gpus: Iterable[Gpu], *, images: bool) -> Surety:
    """How sure requests a second are, of texts or of the model's images."""
    rule = model.image_rule
    what = f"images of {rule.unit_name}" if rule is not None and images else "text"
    return surety_of(f"{what}, {engine}", {gpu.name for gpu in gpus})


def first_token_surety(engine: str, gpus: Iterable[Gpu], *, alone: bool = False) -> Surety:
    """How sure seconds to the first token are, of one among others or alone."""
    many = "alone" if alone else "among others"
    return surety_of(f"first token {many}, {engine}", {gpu.name for gpu in gpus})


def with_surety(
    forecast: Throughput, model: Model, engine: str, gpus: Sequence[Gpu], *, images: bool
) -> Throughput:
    """A forecast for a model on an engine and cards, with how sure each of its figures is."""
    surety = surety_of_speed(model, engine, gpus, images=images)
    return replace(
        forecast,
        basis=f"{forecast.basis}; {surety.words}",
        median_error=surety.median,
        surety=surety,
        first_token=first_token_surety(engine, gpus),
        first_token_alone=first_token_surety(engine, gpus, alone=True),
    )


def surety_of(kind: str, cards: set[str]) -> Surety:
    """How sure a kind of forecast is on these cards.

    By the figures of other cards where there are none of some of these. Where there are none of
    others either, it is a word less sure.
    """
    known = errors_of()
    found, other = known.get(kind), known.get(f"{kind}, {UNSEEN}")
    if found is None:
        return Surety(kind=kind, word="unknown")
    seen, sure = cards <= set(found.cards), 0
    if not seen and other is not None:
        kind, found = f"{kind}, {UNSEEN}", other
    elif not seen:
        sure = 1
    sure += sum(found.p90 > share for share in _SHARES)
    return Surety(
        kind=kind,
        word="order" if found.worst > _ORDER else _WORDS[min(sure, len(_SHARES))],
        figures=found.figures,
        median=found.median,
        p90=found.p90,
        worst=found.worst,
        seen=seen,
    )
