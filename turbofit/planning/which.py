"""`turbofit which`: the cards that keep a promise, or the models that a machine serves.

More cards of a kind keep the promise as well (`bench.plans promises` checks thousands of such
pairs), so only the smallest count of each card is searched.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from typing import Annotated, ClassVar, Final, TypeVar

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import LimitCost, roomier_limit
from turbofit.core.process.progress import Step, tell
from turbofit.core.promise import Promise
from turbofit.core.struct import JsonDocument, Struct, const, doc, known, to_builtins
from turbofit.core.units import GIB, three_digits
from turbofit.core.version import __version__
from turbofit.machine.presets import preset_names
from turbofit.machine.source import machine_from
from turbofit.memory.engines import LMDEPLOY
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning.choose import choose, known_warnings_of, problem_of, promise_of
from turbofit.planning.own_drafts import doubts
from turbofit.planning.reasons import limit_costs, unkept, usual_image
from turbofit.planning.remedies import made_in_four_bits
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import model_of, resolve
from turbofit.planning.resolved_request import ResolvedRequest, vision_load_of
from turbofit.planning.search.search import EngineFit
from turbofit.planning.search.sizing import excess_tokens
from turbofit.planning.verdict import Planned

_T = TypeVar("_T")

#: The numbers of GPUs that are tried.
COUNTS: Final = (1, 2, 4, 8)
#: Options that name the thing to find, and are not part of the promise.
_NOT_ASKED: Final = frozenset({"model", "on", "gpus", "revision"})
WHICH_SCHEMA: Final = "turbofit.which/1"
#: The most names in a repr.
_SHOWN: Final = 3


class Serving(Struct):
    """The short result of `turbofit plan` for one model on one machine."""

    model: str
    on: Annotated[str, doc("The machine, as --on takes it.")]
    gpus: Annotated[int, doc("GPUs of the machine.")]
    bytes: Annotated[int, doc("Bytes of all these GPUs.")]
    keeps: Annotated[bool, doc("Whether the plan fits, with all that was asked.")]
    why_not: Annotated[str, doc("What is missing; empty where the promise is kept.")] = ""
    missing: Annotated[int, doc("Bytes that the tightest GPU lacks at least; else 0.")] = 0
    engine: Annotated[str | None, doc("The engine; null if no engine can be asked.")] = None
    tp: Annotated[int, doc("GPUs of one engine.")] = 0
    replicas: Annotated[int, doc("Engines side by side.")] = 0
    kv_tokens: Annotated[int, doc("KV tokens of all engines.")] = 0
    context: Annotated[int, doc("Tokens that one request may have.")] = 0
    image_limit: Annotated[int | None, doc("Tiles or pixels of an image; null: no images.")] = None
    requests_at_once: int = 0
    requests_per_second: Annotated[float | None, doc("A forecast; null: none.")] = None
    output_tokens_per_second: float | None = None
    seconds_to_first_token: Annotated[
        float | None, doc("Of one request alone, with images of a usual size; null: none.")
    ] = None
    warnings: Annotated[tuple[str, ...], doc("Known faults of the model on this machine.")] = ()
    smaller: Annotated[
        LimitCost | None, doc("A lower image limit for 8 requests at once; null: 8 run, or none.")
    ] = None
    quantize: Annotated[
        str | None,
        doc("The command that counts and makes 4-bit weights, with which the plan keeps all."),
    ] = None

    @property
    def of_lmdeploy(self) -> bool:
        """Whether LMDeploy runs the model; if not, Transformers does, one request at a time."""
        return self.engine in LMDEPLOY


def empty_row(model: str, on: str, machine: Machine, why_not: str = "") -> Serving:
    """Return the row of a model on a machine for which no plan exists; ``why_not`` says why."""
    total = sum(known(machine.gpu(index).total, 0) for index in machine.visible)
    return Serving(
        model=model, on=on, gpus=len(machine.visible), bytes=total, keeps=False, why_not=why_not
    )


def serving(request: WhichRequest, resolved: ResolvedRequest, blank: Serving) -> Serving:
    """Return the row of a request's plan, made by the same search as `turbofit plan`.

    ``blank`` is the row of the same model and machine without a plan.

    Raises:
        TurbofitError: as `turbofit.planning.plan.plan`.
    """
    chosen = choose(resolved, request.engine)
    if isinstance(chosen, EngineFit):
        row, promise, speed = _of_fit(blank, chosen), promise_of(chosen), chosen.throughput
    else:
        row, promise, speed = _of_planned(blank, chosen), chosen.document.promise, None
    if row.why_not:
        return row
    row = replace(
        row,
        context=promise.context,
        image_limit=promise.image_limit,
        requests_at_once=promise.requests,
    )
    if isinstance(chosen, EngineFit) and promise.image_limit is not None:
        costs = limit_costs(chosen.request, chosen.best, chosen.engine)
        row = replace(row, smaller=roomier_limit(costs, promise.image_limit, promise.requests))
    if speed is not None and isinstance(chosen, EngineFit):
        usual = usual_image(chosen) or speed
        row = replace(
            row,
            requests_per_second=speed.requests_per_second,
            output_tokens_per_second=speed.output_tokens_per_second,
            seconds_to_first_token=usual.seconds_to_first_token_alone,
        )
    why_not = next(_broken_promises(request, resolved, row, promise), "")
    return replace(row, keeps=not why_not, why_not=why_not)


def _of_fit(blank: Serving, fit: EngineFit) -> Serving:
    shape = fit.best.shape
    row = replace(blank, engine=fit.engine.name, tp=shape.tp, replicas=shape.replicas)
    if not fit.fits:
        return replace(row, why_not=problem_of(fit), missing=fit.best.short)
    return replace(
        row,
        kv_tokens=sum(account.tokens_at(account.ratio) for account in fit.accounts),
        warnings=(
            *doubts(fit.request.model),
            *fit.request.model.warnings,
            *known_warnings_of(fit),
        ),
    )


def _of_planned(blank: Serving, planned: Planned) -> Serving:
    """Return the row of a plan that was made without a search, as for Transformers."""
    plan = planned.document
    row = replace(
        blank,
        engine=plan.backend.name,
        tp=max(map(len, plan.groups)),
        replicas=plan.replicas,
        why_not=planned.verdict.reason,
        missing=max(0, *(gpu.margin - gpu.headroom for gpu in plan.ledgers)),
    )
    return replace(row, kv_tokens=plan.kv_tokens) if planned.fits else row


def _broken_promises(
    request: WhichRequest, resolved: ResolvedRequest, row: Serving, promise: Promise
) -> Iterator[str]:
    """Yield the parts of the request that the plan does not keep."""
    rule, requested = resolved.model.image_rule, resolved.requested_image_limit
    image_limit = promise.image_limit
    if rule is not None and requested is not None and image_limit not in (None, requested):
        larger = vision_load_of(resolved, image_limit + rule.limit_step)
        if not excess_tokens(resolved, larger):  # else no context holds larger images
            unit = plural(requested, rule.limit_unit.removesuffix("s"))
            yield f"serves images of {image_limit:,} {unit} at most, not {requested:,}"
    yield from unkept(resolved, promise.context)
    wanted, speed = request.images_per_second, row.requests_per_second
    if wanted is None:
        return
    if speed is None:
        yield "its speed is not known"
    elif speed * request.images < wanted:
        yield f"{three_digits(speed * request.images)} images/s by the forecast, not {wanted:g}"


def which_cards(request: WhichRequest) -> Which:
    """Find which preset cards, and how many of each, keep the promise for a model.

    Raises:
        UsageError: the request is not valid on any machine.
    """
    if request.on is not None or request.gpus is not None:
        raise UsageError(
            "which MODEL looks for machines, and `--on` names one",
            hint="turbofit plan MODEL --on SPEC, or for its models turbofit which --on SPEC",
        )
    model, errors = model_of(request), list[TurbofitError]()
    promise = request.changed(model=model, revision=None)
    names = _with_progress("planning for every card", preset_names())
    rows = [_fewest_of_card(promise, name, errors) for name in names]
    rows.sort(key=by_size)
    return _answer(request, rows, errors, model=model.name)


def by_size(row: Serving) -> tuple[float, int, bool, float, str]:
    """Return the key that orders machines: by memory, GPUs, then the faster of known speeds."""
    speed = row.requests_per_second
    return round(row.bytes / GIB, 1), row.gpus, speed is None, -(speed or 0.0), row.on


def which_models(request: WhichRequest) -> Which:
    """Find the preset models for which one machine keeps the promise.

    ``request.model`` is ignored.

    Raises:
        UsageError: the request is not valid for any model.
        MachineError: this machine cannot be read, or has no GPU.
    """
    machine = machine_from(request.on, gpus=request.gpus)
    name = request.on if isinstance(request.on, str) else machine.name
    on = f" --on {shlex.quote(request.on)}" if isinstance(request.on, str) else ""
    promise, errors = request.changed(on=machine, gpus=None), list[TurbofitError]()
    rows, first = list[Serving](), dict[str, tuple[bool, int]]()
    for preset in _with_progress("planning for every model", known_presets()):
        try:
            model = preset_model(preset)
            sees = model.vision is not None and request.images > 0
            first[preset] = sees, model.weight_bytes
            row = _row_of_request(promise.changed(model=model), name, errors)
            if _serves_in_four_bits(promise, model, row):
                row = replace(row, quantize=f"turbofit quantize {preset}{on}")
        except TurbofitError as exc:  # there is no memory account of the preset
            errors.append(exc)
            row = empty_row(preset, name, machine, exc.message)
        rows.append(replace(row, model=preset))
    rows.sort(key=lambda row: row.model)
    answer = _answer(request, rows, errors, machine=name)
    # Models with images come first, models on Transformers last; each the largest first.
    order = sorted(answer.keep, key=lambda row: (row.of_lmdeploy, first[row.model]), reverse=True)
    return replace(answer, keep=tuple(order))


def _serves_in_four_bits(promise: WhichRequest, model: Model, row: Serving) -> bool:
    """Return whether 4-bit weights would keep a promise of which no published ones are known."""
    made = None if row.keeps else made_in_four_bits(model)
    if made is None or made.weight_bytes > row.bytes:
        return False
    return _row_of_request(promise.changed(model=made), row.on, []).keeps


def _with_progress(doing: str, items: Collection[_T]) -> Iterator[_T]:
    """Yield the items one by one, and report under the name ``doing`` how many are done."""
    for done, item in enumerate(items):
        tell(Step(doing, done, len(items)))
        yield item


def _fewest_of_card(promise: WhichRequest, name: str, errors: list[TurbofitError]) -> Serving:
    """Return the row of the fewest cards of a kind that keep the promise.

    If no number of cards is enough, the row is that of the largest number.
    """
    for count in COUNTS:
        on = f"{count}x{name}"
        asked = promise.changed(on=machine_from(on))
        row = _row_of_request(asked, on, errors, lowers=count == COUNTS[-1])
        if row.keeps:
            break
    return row


def _row_of_request(
    request: WhichRequest, on: str, errors: list[TurbofitError], *, lowers: bool = True
) -> Serving:
    """Return the row of one request, whose model and machine are already read.

    An error becomes the row's reason, and is added to ``errors``. If not ``lowers``, no image limit
    is tried that would break the promise: the search for one takes half of the time.
    """
    model, machine = request.model, request.on
    assert isinstance(model, Model)
    assert isinstance(machine, Machine)
    blank = empty_row(model.name, on, machine)
    try:
        resolved = resolve(request)
        limit = resolved.requested_image_limit
        if not (lowers or excess_tokens(resolved, vision_load_of(resolved, limit))):
            resolved = replace(resolved, image_limit=limit)
        return serving(request, resolved, blank)
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
    """Make the answer from the rows of all machines or models.

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

    Machines are ordered by GPU memory in tenths of a GiB, then by number of GPUs, then by forecast
    requests a second, with unknown speeds last. Models are ordered by bytes of weights, models with
    images first unless none are asked for.
    """

    what: ClassVar[str] = "answer of which"

    schema: Annotated[str, const(WHICH_SCHEMA)] = WHICH_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    model: Annotated[str | None, doc("The model that was asked about; null: all presets.")]
    machine: Annotated[str | None, doc("The machine that was asked about; null: all presets.")]
    request: Annotated[dict[str, object], doc("The other given options, by turbofit's names.")]
    counts: Annotated[
        tuple[int, ...], doc("Numbers of GPUs that were tried; empty for a given machine.")
    ]
    keep: Annotated[tuple[Serving, ...], doc("Rows that keep the promise.")]
    others: Annotated[tuple[Serving, ...], doc("The other rows, each with what is missing.")]

    def __repr__(self) -> str:
        """Return one line with the first rows that keep the promise; :meth:`to_json` has all."""
        names = [row.model if self.model is None else row.on for row in self.keep]
        first = f": {', '.join(names[:_SHOWN])}{', …' if names[_SHOWN:] else ''}" if names else ""
        what, kept = self.model or self.machine, len(names)
        return f"<Which: {kept} of {kept + len(self.others)} for {what}{first}>"
