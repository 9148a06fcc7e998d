"""The tables of the site: each point planned as `turbofit plan` would, said in few words."""

from __future__ import annotations

import os
import shlex
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from turbofit.core.errors import TurbofitError
from turbofit.core.struct import Struct, doc
from turbofit.planning.plan import plan as make_plan
from turbofit.report.fit_site.choices import points
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.memory_view import KINDS, fullest, stack, sums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.fit_site.choices import SiteChoices, SitePoint

__all__ = [
    "SiteAnswer",
    "SiteLimit",
    "SiteMemory",
    "SiteSpeed",
    "SiteTable",
    "SiteTexts",
    "answer_of",
    "refused",
    "table_of",
    "tables",
]

#: What people call the engines.
_ENGINES = {
    "turbomind": "LMDeploy, TurboMind",
    "pytorch": "LMDeploy, PyTorch engine",
    "transformers": "Hugging Face Transformers",
}
#: Remedies that are shown, as in the short text of a plan.
_REMEDIES = 3


class SiteTexts:
    """Sentences that many answers share; answers have their numbers."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """Where the sentence stands among all."""
        return self._numbers.setdefault(text, len(self._numbers))

    def all(self) -> tuple[str, ...]:
        """The sentences in the order of their numbers."""
        return tuple(self._numbers)


class SiteMemory(Struct, array_like=True):
    """The GPU that has the least left, from empty to full."""

    gpus: Annotated[int, doc("Text: which GPUs are like it.")]
    total: int
    pieces: Annotated[tuple[int, ...], doc("Bytes of each kind of piece, in the bar's order.")]
    need: Annotated[int, doc("The most that is in use, in bytes.")]
    loading: Annotated[bool, doc("Whether that is while weights are loaded.")]
    headroom: int
    margin: int


class SiteSpeed(Struct, array_like=True):
    """The forecast of speed."""

    requests_per_second: float
    output_tokens_per_second: float
    seconds_to_first_token: float
    median_error: float | None


class SiteLimit(Struct, array_like=True):
    """What one image limit leaves."""

    option: Annotated[int, doc("Text.")]
    chosen: bool
    image_tokens: int
    kv_tokens: int
    requests_at_once: int
    requests_per_second: float
    seconds_to_first_token: float


class SiteAnswer(Struct, array_like=True):
    """One plan in short; of texts their numbers. What is no capacity of a server is 0."""

    fits: bool
    verdict: Annotated[int, doc("Text: the plan's sentence.")]
    engine: Annotated[int, doc("Text.")] = 0
    tp: int = 0
    replicas: int = 0
    kv_tokens: int = 0
    requests_at_once: int = 0
    held: Annotated[
        tuple[tuple[int, int], ...],
        doc(
            "Tokens of the workload's request and of the longest one, and how many the cache holds."
        ),
    ] = ()
    images: Annotated[
        tuple[int, int, int], doc("Images a request; units of one at most; their tokens.")
    ] = (0, 0, 0)
    unit: Annotated[int | None, doc("Text: what the units are; null without images.")] = None
    context: int = 0
    speed: SiteSpeed | None = None
    memory: SiteMemory | None = None
    limits: tuple[SiteLimit, ...] = ()
    warnings: Annotated[tuple[int, ...], doc("Texts.")] = ()
    remedies: Annotated[tuple[tuple[int, int], ...], doc("Texts: a change, its effect.")] = ()
    serve: Annotated[int | None, doc("Text: the command that serves it, with its limits.")] = None


class SiteTable(Struct):
    """All answers for one model on one card."""

    model: str
    card: str
    texts: tuple[str, ...]
    answers: tuple[SiteAnswer, ...]
    order: Annotated[tuple[int, ...], doc("The answer of each point, since many are equal.")]

    def to_script(self) -> str:
        """A script that hands the table to the page: `fetch` reads nothing beside a local file."""
        return f"turbofitTable({msgspec.json.encode(self).decode()});\n"


def answer_of(plan: Plan, texts: SiteTexts) -> SiteAnswer:
    """A plan in short.

    Args:
        plan: as `turbofit plan` finds it.
        texts: takes its sentences.
    """
    more: dict[str, Any] = _capacity(plan, texts) if plan.fits else {}
    return SiteAnswer(
        fits=plan.fits,
        verdict=texts.number(plan.verdict),
        engine=texts.number(f"{_ENGINES[plan.engine.name]} {plan.engine.version}"),
        tp=plan.parallel.tp,
        replicas=plan.parallel.replicas,
        images=(
            plan.limits.images_per_request,
            plan.limits.units_per_image,
            plan.limits.image_tokens_per_request,
        ),
        unit=None if plan.limits.vision_unit is None else texts.number(plan.limits.vision_unit),
        context=plan.settings.session_len,
        memory=_memory(plan.gpus, texts),
        warnings=tuple(texts.number(text) for text in plan.warnings),
        remedies=tuple(
            (texts.number(one.change), texts.number(one.effect))
            for one in plan.remedies[:_REMEDIES]
        ),
        **more,
    )


def refused(error: TurbofitError, texts: SiteTexts) -> SiteAnswer:
    """The answer where no plan can be made at all."""
    said = f"{error.message}; {error.hint}" if error.hint else error.message
    return SiteAnswer(fits=False, verdict=texts.number(said))


def _capacity(plan: Plan, texts: SiteTexts) -> dict[str, Any]:
    """What a plan that fits serves."""
    users = capacity(plan).users
    shown = (users[0], users[-1]) if len(users) > 1 else users
    speed = plan.throughput
    limit = plan.limits.image_limit
    return {
        "serve": None if plan.serve is None else texts.number(shlex.join(plan.serve.argv)),
        "kv_tokens": plan.kv.total_tokens,
        "requests_at_once": plan.requests_at_once,
        "held": tuple((one.tokens, one.held) for one in shown),
        "speed": None
        if speed is None
        else SiteSpeed(
            requests_per_second=speed.requests_per_second,
            output_tokens_per_second=speed.output_tokens_per_second,
            seconds_to_first_token=speed.seconds_to_first_token,
            median_error=speed.median_error,
        ),
        "limits": tuple(
            SiteLimit(
                option=texts.number(one.option),
                chosen=one.limit == limit,
                image_tokens=one.image_tokens,
                kv_tokens=one.kv_tokens,
                requests_at_once=one.requests_at_once,
                requests_per_second=one.requests_per_second,
                seconds_to_first_token=one.seconds_to_first_token,
            )
            for one in plan.limit_costs
        ),
    }


def _memory(gpus: tuple[GpuLedger, ...], texts: SiteTexts) -> SiteMemory | None:
    if not gpus:
        return None
    title, ledger = fullest(gpus)
    sizes = sums(stack(ledger))
    return SiteMemory(
        gpus=texts.number(title),
        total=ledger.total,
        pieces=tuple(sizes.get(kind, 0) for kind in KINDS),
        need=ledger.most,
        loading=ledger.most > ledger.peak,
        headroom=ledger.headroom,
        margin=ledger.margin,
    )


def tables(choices: SiteChoices, jobs: int | None = None) -> Iterator[SiteTable]:
    """A table for each model on each card, in processes beside each other.

    Args:
        choices: of the site.
        jobs: processes; by default one for each CPU.
    """
    pairs = [(model.name, card.name) for model in choices.models for card in choices.cards]
    processes = min(jobs or os.cpu_count() or 1, len(pairs))
    if processes == 1:
        yield from (table_of(choices, *pair) for pair in pairs)
        return
    # Ctrl-C reaches all of a terminal's processes: each ends at once, without a traceback.
    with ProcessPoolExecutor(
        processes,
        get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        yield from pool.map(table_of, [choices] * len(pairs), *zip(*pairs, strict=True))


def table_of(choices: SiteChoices, model: str, card: str) -> SiteTable:
    """The answers for one model on one card."""
    texts = SiteTexts()
    numbers: dict[SiteAnswer, int] = {}
    order = [
        numbers.setdefault(_answer(point, model, card, texts), len(numbers))
        for point in points(choices)
    ]
    return SiteTable(
        model=model, card=card, texts=texts.all(), answers=tuple(numbers), order=tuple(order)
    )


def _answer(point: SitePoint, model: str, card: str, texts: SiteTexts) -> SiteAnswer:
    try:
        return answer_of(make_plan(point.request(model, card)), texts)
    except TurbofitError as exc:
        return refused(exc, texts)
