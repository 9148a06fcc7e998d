"""`turbofit which`: the cards that keep a promise, or the models that a machine serves.

More cards of a kind keep the promise as well (`bench.plans promises` checks thousands of such
pairs), so only the smallest count of each card is searched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from typing import Annotated, ClassVar, Final, TypeVar

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import JsonDocument, const, doc, to_builtins
from turbofit.core.version import __version__
from turbofit.machine.presets import preset_names
from turbofit.machine.source import machine_from
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning.commands import Serving, blank_line, serving
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import model_of, resolve

_T = TypeVar("_T")

#: The numbers of GPUs that are tried.
COUNTS: Final = (1, 2, 4, 8)
#: Options that name the thing to find, and are not part of the promise.
_NOT_ASKED: Final = frozenset({"model", "on", "gpus", "revision"})
WHICH_SCHEMA: Final = "turbofit.which/1"
#: The most names in a repr.
_SHOWN: Final = 3


def which_cards(request: WhichRequest) -> Which:
    """The preset cards, with their counts, that keep the promise for a model.

    Raises:
        UsageError: the request is not valid on any machine.
    """
    if request.on is not None or request.gpus is not None:
        raise UsageError(
            "which MODEL looks for machines, and --on names one",
            hint="turbofit plan MODEL --on SPEC, or turbofit which --on SPEC without a model",
            options=["on"],
        )
    model, errors = model_of(request), list[TurbofitError]()
    promise = request.changed(model=model, revision=None)
    rows = [
        row
        for name in _told("planning for every card", preset_names())
        for row in _of_card(promise, name, errors)
    ]
    rows.sort(key=lambda row: (row.bytes, row.gpus, row.on))
    return _answer(request, rows, errors, model=model.name)


def which_models(request: WhichRequest) -> Which:
    """The preset models that one machine serves with the promise; ``request.model`` is ignored.

    Raises:
        UsageError: the request is not valid for any model.
        MachineError: this machine cannot be read, or has no GPU.
    """
    machine = machine_from(request.on, gpus=request.gpus)
    name = request.on if isinstance(request.on, str) else machine.name
    promise, errors = request.changed(on=machine, gpus=None), list[TurbofitError]()
    rows, weights = list[Serving](), dict[str, int]()
    for preset in _told("planning for every model", known_presets()):
        try:
            model = preset_model(preset)
            weights[preset] = model.weight_bytes
            row = _tried(promise.changed(model=model), name, errors)
        except TurbofitError as exc:  # there is no memory account of the preset
            errors.append(exc)
            row = blank_line(preset, name, machine, exc.message)
        rows.append(replace(row, model=preset))
    rows.sort(key=lambda row: row.model)
    answer = _answer(request, rows, errors, machine=name)
    # The largest come first; models that only Transformers runs come last.
    order = sorted(answer.keep, key=lambda row: (row.of_lmdeploy, weights[row.model]), reverse=True)
    return replace(answer, keep=tuple(order))


def _told(doing: str, items: Collection[_T]) -> Iterator[_T]:
    """Yield the items one by one and report how many are done."""
    for done, item in enumerate(items):
        tell(Step(doing, done, len(items)))
        yield item


def _of_card(promise: WhichRequest, name: str, errors: list[TurbofitError]) -> Iterator[Serving]:
    """Yield the counts of a card that keep the promise; the largest count if none does."""
    kept = False
    for count in COUNTS:
        on = f"{count}x{name}"
        machine, last = machine_from(on), count == COUNTS[-1]
        row = _tried(promise.changed(on=machine), on, errors)
        kept |= row.keeps
        if row.keeps or (last and not kept):
            yield row
        if row.keeps and not promise.all_counts:
            return


def _tried(request: WhichRequest, on: str, errors: list[TurbofitError]) -> Serving:
    """The line of one request, which has a model and a machine."""
    model, machine = request.model, request.on
    assert isinstance(model, Model)
    assert isinstance(machine, Machine)
    blank = blank_line(model.name, on, machine)
    try:
        return serving(request, resolve(request), blank)
    except TurbofitError as exc:
        errors.append(exc)
        return replace(blank, why_not=exc.message)


def _answer(
    request: WhichRequest,
    rows: list[Serving],
    errors: list[TurbofitError],
    *,
    model: str | None = None,
    machine: str | None = None,
) -> Which:
    """The answer that consists of these rows.

    Raises:
        UsageError: the request is not valid anywhere.
    """
    keep = tuple(row for row in rows if row.keeps)
    usage = [error for error in errors if isinstance(error, UsageError)]
    if usage and len(errors) >= len(rows) and not keep:
        raise usage[-1]
    promise = {key: value for key, value in request.given().items() if key not in _NOT_ASKED}
    return Which(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        machine=machine,
        request=to_builtins(promise),
        counts=COUNTS if machine is None else (),
        keep=keep,
        others=tuple(row for row in rows if not row.keeps),
    )


class Which(JsonDocument):
    """The machines that keep a promise, the smallest first; or the models, the largest first.

    Machines are ordered by bytes of GPU memory, then by number of GPUs; models by bytes of weights.
    """

    what: ClassVar[str] = "answer of which"

    schema: Annotated[str, const(WHICH_SCHEMA)] = WHICH_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    model: Annotated[str | None, doc("The model that was asked about; null: all presets.")]
    machine: Annotated[str | None, doc("The machine that was asked about; null: all presets.")]
    request: Annotated[dict[str, object], doc("What was asked beside them, by turbofit's names.")]
    counts: Annotated[tuple[int, ...], doc("Numbers of GPUs that were tried; empty where given.")]
    keep: Annotated[tuple[Serving, ...], doc("Those that keep the promise.")]
    others: Annotated[tuple[Serving, ...], doc("The others, each with what is missing.")]

    def __repr__(self) -> str:
        """One line with the first rows that keep the promise; :meth:`to_json` has all."""
        names = [row.model if self.model is None else row.on for row in self.keep]
        first = f": {', '.join(names[:_SHOWN])}{', …' if names[_SHOWN:] else ''}" if names else ""
        what, kept = self.model or self.machine, len(names)
        return f"<Which: {kept} of {kept + len(self.others)} for {what}{first}>"
