"""`turbofit which`: the cards that keep a promise, the models that a machine serves; its document.

More of the same cards keep a promise as well (`bench.plans promises` plans thousands of such
pairs), so of each card the smallest count is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import model_of, resolve
from turbofit.planning.serving import Serving, blank_line, serving

_T = TypeVar("_T")

#: GPUs of one machine that are tried.
COUNTS: Final = (1, 2, 4, 8)
#: What is looked for, and no promise.
_NOT_ASKED: Final = frozenset({"model", "on", "gpus", "revision"})
WHICH_SCHEMA: Final = "turbofit.which/1"
#: Names that a repr has.
_SHOWN: Final = 3


def which_cards(request: WhichRequest) -> Which:
    """The preset cards, and counts of them, that keep what is asked of a model.

    Raises:
        UsageError: what is asked cannot be meant on any machine.
    """
    if request.on is not None or request.gpus is not None:
        raise UsageError(
            "which MODEL looks for machines, and --on names one",
            hint="turbofit plan MODEL --on SPEC, or turbofit which --on SPEC without a model",
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
    """The preset models that one machine serves with what is asked; the request's is not read.

    Raises:
        UsageError: what is asked cannot be meant of any model.
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
        except TurbofitError as exc:  # there is no account of it
            errors.append(exc)
            row = blank_line(preset, name, machine, exc.message)
        rows.append(replace(row, model=preset))
    rows.sort(key=lambda row: row.model)
    answer = _answer(request, rows, errors, machine=name)
    # The largest first, behind all of LMDeploy's those that Transformers alone runs.
    order = sorted(answer.keep, key=lambda row: (row.of_lmdeploy, weights[row.model]), reverse=True)
    return replace(answer, keep=tuple(order))


def _told(doing: str, items: Collection[_T]) -> Iterator[_T]:
    """The items, one by one, and how many of them are done."""
    for done, item in enumerate(items):
        tell(Step(doing, done, len(items)))
        yield item


def _of_card(promise: WhichRequest, name: str, errors: list[TurbofitError]) -> Iterator[Serving]:
    """The counts of a card that keep the promise; the largest where none does."""
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
    """One line; the request has its model and its machine."""
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
    """The answer of these rows.

    Raises:
        UsageError: what is asked cannot be meant anywhere.
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

    A machine is smaller that has fewer bytes of GPU memory, then fewer GPUs. A model is larger that
    has more bytes of weights.
    """

    what: ClassVar[str] = "answer of which"
    #: HTML of it for notebooks, as of `Plan`.
    notebook_html: ClassVar[Callable[[Which], str] | None] = None

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
        """One line with the first of those that keep it: the whole is :meth:`to_json`'s."""
        names = [row.model if self.model is None else row.on for row in self.keep]
        first = f": {', '.join(names[:_SHOWN])}{', …' if names[_SHOWN:] else ''}" if names else ""
        what, kept = self.model or self.machine, len(names)
        return f"<Which: {kept} of {kept + len(self.others)} for {what}{first}>"

    def _repr_html_(self) -> str | None:
        """What a notebook shows, where `turbofit.api` has said how."""
        make = type(self).notebook_html
        return None if make is None else make(self)
