"""The options of `turbofit page`, and the choices that the site offers."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

from pydantic import Field
from typing_extensions import Self

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct, doc, known
from turbofit.core.units import GIB, MIB
from turbofit.core.validation import Metavar, Validated, parsed
from turbofit.core.version import __version__
from turbofit.machine.presets import find_preset as find_gpu
from turbofit.machine.presets import nearest_names
from turbofit.machine.source import machine_from
from turbofit.model.presets import find_preset, preset_model
from turbofit.planning.request import Bytes, PlanRequest, Positive, Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The most used models, from small to large; more models would only cost more minutes.
_MODELS: Final = (
    "internvl3-2b", "internvl3-8b", "internvl3.5-8b", "internvl3-38b-awq", "qwen2.5-vl-3b",
    "qwen2.5-vl-7b", "qwen2.5-vl-7b-awq", "qwen2.5-vl-72b-awq", "qwen3-vl-8b", "gemma-3-12b",
)  # fmt: skip
_CARDS: Final = (
    "rtx3060", "rtx4060ti-16g", "rtx3090", "rtx4090", "rtx5090", "t4", "l4", "a10", "l40s",
    "a100-80g", "h100",
)  # fmt: skip


def _load(text: str, name: str) -> tuple[int, tuple[int, int] | None]:
    """Parse ``4@1280x720`` as four images of that size, ``2`` as two images of the worst size."""
    count, at, size = text.partition("@")
    if not re.fullmatch(r"\d{1,9}", count) or bool(at) != bool(size):
        raise UsageError(f"{name} {text!r} is not N or N@WxH", hint="write it as 4@1280x720")
    values = {"model": "-", "images": count, **({"image_size": size} if size else {})}
    request = PlanRequest.of_options(values, lambda _: name)
    return request.images, request.image_size


Names = Annotated[tuple[Annotated[str, Metavar("NAME")], ...], Field(strict=False)]
Counts = Annotated[tuple[Positive, ...], Field(strict=False)]
Sizes = Annotated[tuple[Bytes, ...], Field(strict=False)]
Contexts = Annotated[tuple[Tokens, ...], Field(strict=False)]
Load = Annotated[
    tuple[int, tuple[int, int] | None], Field(strict=False), parsed(_load), Metavar("N@WxH")
]
Loads = Annotated[tuple[Load, ...], Field(strict=False)]


class SiteRequest(Validated):
    """The values that the site is planned for, in all combinations; empty is the default."""

    all: bool = False

    models: Names = Field(
        default=(), description=f"names that `turbofit models` lists (default: {' '.join(_MODELS)})"
    )
    cards: Names = Field(
        default=(), description=f"names that `turbofit gpus` lists (default: {' '.join(_CARDS)})"
    )
    counts: Counts = ()
    used: Sizes = ()
    images: Loads = ()
    contexts: Contexts = ()
    concurrencies: Counts = ()

    def complete(self) -> Self:
        """Return a copy in which every empty field has its default."""
        defaults = {**_DEFAULTS, **(_MORE if self.all else {})}
        return self.model_copy(
            update={name: value for name, value in defaults.items() if not getattr(self, name)}
        )


_DEFAULTS: Final[dict[str, object]] = {
    "models": _MODELS,
    "cards": _CARDS,
    "counts": (1, 2, 4),
    "images": ((1, (1920, 1080)),),
}
_MORE: Final[dict[str, object]] = {
    "used": (2 * GIB,),
    "images": ((1, (1920, 1080)), (4, (1280, 720))),
    "contexts": (8192, 32768),
    "concurrencies": (8, 32),
}


class SiteModel(Struct):
    name: Annotated[str, doc("As turbofit takes it.")]
    title: str


class SiteCard(Struct):
    name: Annotated[str, doc("As --on takes it.")]
    title: str
    total: Annotated[int, doc("Bytes.")]
    free: Annotated[int, doc("Bytes that are free where others hold nothing.")]


class SiteChoice(Struct):
    """One entry of a control."""

    key: Annotated[str, doc("What a link calls it.")]
    words: Annotated[str, doc("What a command line says of it; empty where it is the default.")]
    numbers: Annotated[tuple[int, ...], doc("What it means; empty where turbofit chooses.")] = ()


class SiteChoices(Struct):
    """The controls of the site, and the entries of each control."""

    turbofit_version: str
    created: str
    models: tuple[SiteModel, ...]
    cards: tuple[SiteCard, ...]
    counts: tuple[int, ...]
    used: tuple[SiteChoice, ...]
    images: tuple[SiteChoice, ...]
    contexts: tuple[SiteChoice, ...]
    concurrencies: tuple[SiteChoice, ...]

    @property
    def answers(self) -> int:
        """The number of plans in the site."""
        return len(self.models) * len(self.cards) * len(list(points(self)))


class SitePoint(NamedTuple):
    """One combination of choices, for any model and card."""

    gpus: int
    used: SiteChoice
    images: SiteChoice
    context: SiteChoice
    concurrency: SiteChoice

    def machine(self, card: str) -> str:
        """The machine in the form that --on accepts."""
        return f"{self.gpus}x{card}{self.used.words}"

    def request(self, model: str, card: str) -> PlanRequest:
        """The request that `turbofit plan` gets for this model, this card and these choices."""
        count, *size = self.images.numbers
        given = {
            "images": count if count != 1 else None,
            "image_size": tuple(size) or None,
            "context": next(iter(self.context.numbers), None),
            "concurrency": next(iter(self.concurrency.numbers), None),
        }
        return PlanRequest.of(
            model=model,
            on=self.machine(card),
            **{name: value for name, value in given.items() if value is not None},
        )


def choices_of(request: SiteRequest, created: str) -> SiteChoices:
    """Return the controls of a site; raise UsageError for an impossible machine."""
    request = request.complete()
    choices = SiteChoices(
        turbofit_version=__version__,
        created=created,
        models=tuple(dict.fromkeys(_model(name) for name in request.models)),
        cards=tuple(dict.fromkeys(_card(name) for name in request.cards)),
        counts=tuple(sorted(set(request.counts))),
        used=tuple(_used(size) for size in sorted({0, *request.used})),
        images=tuple(_images(*choice) for choice in _usual_first(request.images)),
        contexts=tuple(_chosen("--context", request.contexts)),
        concurrencies=tuple(_chosen("--concurrency", request.concurrencies)),
    )
    every = product(choices.cards, points(choices))
    for machine in dict.fromkeys(point.machine(card.name) for card, point in every):
        machine_from(machine)
    return choices


def _usual_first(given: Loads) -> Iterable[tuple[int, tuple[int, int] | None]]:
    """The image choices: first the first one with a size, then one image of the worst size."""
    sized = [load for load in given if load[1] is not None]
    return dict.fromkeys((*sized[:1], (1, None), *given))


def points(choices: SiteChoices) -> Iterator[SitePoint]:
    """Every combination of choices, in the order of a table's answers."""
    dimensions = (
        choices.counts, choices.used, choices.images, choices.contexts, choices.concurrencies
    )  # fmt: skip
    return (SitePoint(*values) for values in product(*dimensions))


def _model(name: str) -> SiteModel:
    preset = find_preset(name)
    if preset is None:
        raise UsageError(f"{name!r} is no model by name", hint="turbofit models lists them")
    return SiteModel(name=preset, title=preset_model(preset).name)


def _card(name: str) -> SiteCard:
    key = find_gpu(name)
    if key is None:
        near = nearest_names(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "turbofit gpus lists them"
        raise UsageError(f"{name!r} is no card by name", hint=hint)
    (gpu,) = machine_from(f"1x{key}").gpus
    return SiteCard(name=key, title=gpu.name, total=known(gpu.total, 0), free=known(gpu.free, 0))


def _used(size: int) -> SiteChoice:
    if not size:
        return SiteChoice(key="0", words="", numbers=(0,))
    text = f"{size}B"
    for unit, name in ((MIB, "MiB"), (GIB, "GiB")):
        if size % unit == 0:
            text = f"{size // unit}{name}"
    return SiteChoice(key=text, words=f":used={text}", numbers=(size,))


def _images(count: int, size: tuple[int, int] | None) -> SiteChoice:
    words = [f"--images {count}"] if count != 1 else []
    if size is None:
        return SiteChoice(key=str(count), words=" ".join(words), numbers=(count,))
    sides = f"{size[0]}x{size[1]}"
    words.append(f"--image-size {sides}")
    return SiteChoice(key=f"{count}@{sides}", words=" ".join(words), numbers=(count, *size))


def _chosen(option: str, values: Iterable[int]) -> Iterator[SiteChoice]:
    yield SiteChoice(key="auto", words="")
    for value in sorted(set(values)):
        yield SiteChoice(key=str(value), words=f"{option} {value}", numbers=(value,))
