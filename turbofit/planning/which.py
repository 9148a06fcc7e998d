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
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import JsonDocument, Struct, const, doc, known, to_builtins
from turbofit.core.units import three_digits
from turbofit.core.version import __version__
from turbofit.machine.presets import preset_names
from turbofit.machine.source import machine_from
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import model_of, resolve
from turbofit.tuner.choose import choose, why_not
from turbofit.tuner.explain.reasons import pace_words, unkept
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.search import EngineFit
from turbofit.tuner.search.sizing import excess_tokens
from turbofit.tuner.verdict import Planned

_T = TypeVar("_T")

#: GPUs of one machine that are tried.
COUNTS: Final = (1, 2, 4, 8)
#: What is looked for, and no promise.
_NOT_ASKED: Final = frozenset({"model", "on", "gpus", "revision"})
_NO_FORECAST: Final = "has no forecast of speed"
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
    largest_first = sorted(answer.keep, key=lambda row: weights[row.model], reverse=True)
    return replace(answer, keep=tuple(largest_first))


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


def blank_line(model: str, on: str, machine: Machine, why_not: str = "") -> Serving:
    """The line of a model on a machine, before there is an answer, or where none can be made."""
    total = sum(known(machine.gpu(index).total, 0) for index in machine.visible)
    return Serving(
        model=model, on=on, gpus=len(machine.visible), bytes=total, keeps=False, why_not=why_not
    )


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


# A plan in short, without its sentences: one line of `turbofit which`.


def serving(request: WhichRequest, resolved: ResolvedRequest, blank: Serving) -> Serving:
    """The plan for a request in short, by the same search; ``blank`` is the line without it.

    Raises:
        TurbofitError: as `turbofit.planning.plan.plan`.
    """
    chosen = choose(resolved, request.engine)
    if isinstance(chosen, EngineFit):
        row, tokens, speed = _of_fit(blank, chosen), chosen.tokens, chosen.throughput
    else:
        row, tokens, speed = _of_planned(blank, chosen), chosen.document.kv.tokens, None
    if row.why_not:
        return row
    if speed is not None:
        row = replace(
            row,
            requests_per_second=speed.requests_per_second,
            output_tokens_per_second=speed.output_tokens_per_second,
            seconds_to_first_token=speed.seconds_to_first_token,
        )
    why_not = next(_lacks(request, resolved, row, tokens), "")
    if not why_not and resolved.pace is not None:
        if not isinstance(chosen, EngineFit):
            why_not = _NO_FORECAST
        elif chosen.best.slow:
            why_not = pace_words(resolved, chosen.best)
    return replace(row, keeps=not why_not, why_not=why_not)


def _of_fit(blank: Serving, fit: EngineFit) -> Serving:
    shape = fit.best.shape
    row = replace(blank, engine=fit.engine.name, tp=shape.tp, replicas=shape.replicas)
    if not fit.fits:
        return replace(row, why_not=why_not(fit), missing=fit.best.short)
    return replace(
        row,
        kv_tokens=sum(account.tokens_at(account.ratio) for account in fit.accounts),
        context=fit.best.settings.session_len,
        image_limit=fit.image_limit,
        requests_at_once=sum(account.settings.max_batch_size for account in fit.accounts),
    )


def _of_planned(blank: Serving, planned: Planned) -> Serving:
    """The line of an engine whose plan is made at once: Transformers."""
    plan = planned.document
    row = replace(
        blank,
        engine=plan.engine.name,
        tp=max(map(len, plan.parallel.groups)),
        replicas=plan.parallel.replicas,
        why_not=planned.why_not,
        missing=max(0, *(gpu.margin - gpu.headroom for gpu in plan.gpus)),
    )
    if not planned.fits:
        return row
    return replace(
        row,
        kv_tokens=plan.kv.total_tokens,
        context=plan.settings.session_len,
        image_limit=plan.limits.image_limit,
        requests_at_once=plan.requests_at_once,
    )


def _lacks(
    request: WhichRequest, resolved: ResolvedRequest, row: Serving, tokens: int
) -> Iterator[str]:
    """What was asked and is not kept whole, in words; ``tokens`` of the smallest cache."""
    rule, requested, image_limit = (
        resolved.model.image_rule,
        resolved.requested_image_limit,
        row.image_limit,
    )
    if rule is not None and requested is not None and image_limit not in (None, requested):
        larger = vision_load_of(resolved, image_limit + rule.limit_step)
        if not excess_tokens(resolved, larger):  # else the context holds no larger ones anywhere
            unit = plural(requested, rule.limit_unit.removesuffix("s"))
            yield f"serves images of {image_limit:,} {unit} at most, not {requested:,}"
    yield from unkept(resolved, row.context or 0, tokens)
    wanted, speed = request.images_per_second, row.requests_per_second
    if wanted is None:
        return
    if speed is None:
        yield _NO_FORECAST
    elif speed * request.images < wanted:
        yield f"{three_digits(speed * request.images)} images/s by the forecast, not {wanted:g}"


class Serving(Struct):
    """One model on one machine: what `turbofit plan` finds there, in short."""

    model: str
    on: Annotated[str, doc("The machine, as --on takes it.")]
    gpus: Annotated[int, doc("GPUs of the machine.")]
    bytes: Annotated[int, doc("Bytes of all of them.")]
    keeps: Annotated[bool, doc("Whether the plan fits, with all that was asked.")]
    why_not: Annotated[str, doc("What is missing; empty where the promise is kept.")] = ""
    missing: Annotated[int, doc("Bytes that the tightest GPU lacks at least; else 0.")] = 0
    engine: Annotated[str | None, doc("Null where no engine can be asked.")] = None
    tp: Annotated[int, doc("GPUs of one engine.")] = 0
    replicas: Annotated[int, doc("Engines side by side.")] = 0
    kv_tokens: Annotated[int, doc("KV tokens of all engines.")] = 0
    context: Annotated[int, doc("Tokens that one request may have.")] = 0
    image_limit: Annotated[int | None, doc("Tiles or pixels of an image; null: no images.")] = None
    requests_at_once: int = 0
    requests_per_second: Annotated[float | None, doc("A forecast; null: none.")] = None
    output_tokens_per_second: float | None = None
    seconds_to_first_token: float | None = None


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
