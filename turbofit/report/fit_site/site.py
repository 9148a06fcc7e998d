"""The answers of the site, each planned as `turbofit plan` plans it, and the site's files."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context, parent_process
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.memory_stack import fold, stack, sums
from turbofit.core.messages import indices, plural
from turbofit.core.plan import LimitCost, Limits, Remedy, Throughput
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, tell, under_way
from turbofit.core.struct import Struct, const, doc
from turbofit.core.version import __version__
from turbofit.planning.plan import plan as make_plan
from turbofit.report.fit_site.choices import choices_of, points
from turbofit.report.page.elements import json_text
from turbofit.report.page.html import page_file, policy
from turbofit.report.views.figures import users_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.fit_site.choices import SiteChoices, SitePoint, SiteRequest

_SCHEMA: Final = "turbofit.page/1"
#: The usual names of the engines.
_ENGINES: Final = {
    "turbomind": "LMDeploy, TurboMind",
    "pytorch": "LMDeploy, PyTorch engine",
    "transformers": "Hugging Face Transformers",
}
#: The number of remedies that are shown.
_REMEDIES: Final = 3


class PageMemory(Struct):
    """The GPU that has the least left, from empty to full."""

    gpus: Annotated[str, doc("Which GPUs are like it.")]
    total: int
    pieces: Annotated[dict[str, int], doc("Bytes of each kind of piece, from empty to full.")]
    need: Annotated[int, doc("The most that is in use, in bytes.")]
    loading: Annotated[bool, doc("Whether that is while weights are loaded.")]
    headroom: int
    margin: int


class PageAnswer(Struct):
    """One plan in short. Where it does not fit, what a server would serve is 0, empty or null."""

    fits: bool
    verdict: Annotated[str, doc("The plan's sentence.")]
    engine: str = ""
    tp: int = 0
    replicas: int = 0
    context: Annotated[int, doc("Tokens that one request may have.")] = 0
    limits: Annotated[Limits | None, doc("Null where no plan can be made at all.")] = None
    kv_tokens: int = 0
    requests_at_once: int = 0
    held: Annotated[
        tuple[tuple[int, int], ...],
        doc(
            "Tokens of the workload's request and of the longest one, and how many the cache holds."
        ),
    ] = ()
    throughput: Throughput | None = None
    memory: PageMemory | None = None
    limit_costs: tuple[LimitCost, ...] = ()
    warnings: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    serve: Annotated[str | None, doc("The command that serves it, with its limits.")] = None


class SiteTable(Struct):
    """All answers for one model on one card."""

    model: str
    card: str
    answers: tuple[PageAnswer, ...]
    order: Annotated[tuple[int, ...], doc("The answer of each point, since many are equal.")]

    def to_script(self) -> str:
        """A script that passes the table to the page, because `fetch` cannot read local files."""
        return f"turbofitTable({msgspec.json.encode(self).decode()});\n"


class PageRow(Struct):
    """One choice, and what `turbofit plan` answers to it."""

    model: Annotated[str, doc("As turbofit takes it.")]
    on: Annotated[str, doc("The machine, as --on takes it.")]
    images: Annotated[int, doc("Images of a request.")]
    image_size: Annotated[tuple[int, int] | None, doc("Pixels; null: the worst size.")]
    context: Annotated[int | None, doc("What was asked; null: as turbofit chooses.")]
    concurrency: Annotated[int | None, doc("What was asked; null: as turbofit chooses.")]
    answer: PageAnswer


class PageDocument(Struct):
    """Every answer of a page."""

    schema: Annotated[str, const(_SCHEMA)] = _SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    answers: tuple[PageRow, ...]


def answer_of(plan: Plan) -> PageAnswer:
    """The short form of a plan."""
    answer = PageAnswer(
        fits=plan.fits,
        verdict=plan.verdict,
        engine=f"{_ENGINES[plan.engine.name]} {plan.engine.version}",
        tp=plan.parallel.tp,
        replicas=plan.parallel.replicas,
        context=plan.settings.session_len,
        limits=plan.limits,
        memory=_memory(plan.gpus),
        warnings=plan.warnings,
        remedies=plan.remedies[:_REMEDIES],
    )
    if not plan.fits:
        return answer
    users = users_of(plan)
    shown = dict.fromkeys((*users[:1], *users[-1:]))  # the first and the last
    return msgspec.structs.replace(
        answer,
        kv_tokens=plan.kv.total_tokens,
        requests_at_once=plan.requests_at_once,
        held=tuple((conversation.tokens, conversation.in_cache) for conversation in shown),
        throughput=plan.throughput,
        limit_costs=plan.limit_costs,
        serve=None if plan.serve is None else shlex.join(plan.serve.argv),
    )


def refused(error: TurbofitError) -> PageAnswer:
    """The answer for a request that cannot be planned at all."""
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return PageAnswer(fits=False, verdict=text)


def _memory(gpus: tuple[GpuLedger, ...]) -> PageMemory | None:
    if not gpus:
        return None
    members, ledger = min(fold(gpus), key=lambda pair: pair[1].headroom)
    return PageMemory(
        gpus=f"GPU {indices(members)}",
        total=ledger.total,
        pieces=sums(stack(ledger)),
        need=ledger.most,
        loading=ledger.most > ledger.peak,
        headroom=ledger.headroom,
        margin=ledger.margin,
    )


def begin_worker() -> None:
    """Make this process end at once and without a traceback at Ctrl-C or when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def tables(choices: SiteChoices, processes: int) -> Iterator[SiteTable]:
    pairs = [(model.name, card.name) for model in choices.models for card in choices.cards]
    if processes == 1:
        yield from (table_of(choices, *pair) for pair in pairs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=begin_worker) as pool:
        yield from pool.map(table_of, [choices] * len(pairs), *zip(*pairs, strict=True))


def table_of(choices: SiteChoices, model: str, card: str) -> SiteTable:
    numbers: dict[bytes, int] = {}
    answers: list[PageAnswer] = []
    order = []
    for point in points(choices):
        answer = _answer(model, card, point)
        number = numbers.setdefault(msgspec.json.encode(answer), len(answers))
        if number == len(answers):
            answers.append(answer)
        order.append(number)
    return SiteTable(model=model, card=card, answers=tuple(answers), order=tuple(order))


def rows(choices: SiteChoices, table: SiteTable) -> Iterator[PageRow]:
    for point, number in zip(points(choices), table.order, strict=True):
        request = point.request(table.model, table.card)
        yield PageRow(
            model=table.model,
            on=point.machine(table.card),
            images=request.images,
            image_size=request.image_size,
            context=next(iter(point.context.numbers), None),
            concurrency=request.concurrency,
            answer=table.answers[number],
        )


def _answer(model: str, card: str, point: SitePoint) -> PageAnswer:
    try:
        return answer_of(make_plan(point.request(model, card)))
    except TurbofitError as exc:
        return refused(exc)


_FOLDER: Final = Path(__file__).parent
_DOING: Final = "planning tables"
#: Scripts that the page's own script loads are allowed; `'self'` would allow no local file.
_LOADS: Final = "'strict-dynamic'"


def write_site(
    request: SiteRequest, folder: Path, *, say: Callable[[str], None], jobs: int | None = None
) -> PageDocument:
    """Plan every combination and write the site: `index.html` and the files of its tables.

    ``jobs`` is the number of parallel processes, by default one per CPU.

    Raises:
        UsageError: the folder cannot be made.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    choices = choices_of(request, created)
    every = len(choices.models) * len(choices.cards)
    processes = min(jobs or os.cpu_count() or 1, every)
    where = f"{processes} {plural(processes, 'process')}"
    say(f"{choices.answers:,} plans for {folder}, with {where}")
    answers: list[PageRow] = []
    with under_way(_DOING):
        tell(Step(_DOING, 0, every))
        for done, table in enumerate(tables(choices, processes), 1):
            path = folder / "data" / table.model / f"{table.card}.js"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                hint = "name another folder with --out"
                raise UsageError(f"{folder} cannot be made: {exc.strerror}", hint=hint) from exc
            write_atomic(path, table.to_script())
            answers += rows(choices, table)
            tell(Step(_DOING, done, every))
    write_atomic(folder / "index.html", index_page(choices))
    return PageDocument(turbofit_version=__version__, created=created, answers=tuple(answers))


def index_page(choices: SiteChoices) -> str:
    scripts = (_read(name) for name in ("wording.js", "answer.js", "site.js"))
    script = page_file("shared.js") + "".join(scripts)
    return Template(_read("index.html")).substitute(
        policy=policy(script, _LOADS),
        style=page_file("page.css") + _read("site.css"),
        script=script,
        choices=json_text(choices),
        version=choices.turbofit_version,
        created=choices.created,
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
