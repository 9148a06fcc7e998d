"""Two plans side by side: every figure of either, and which of them differ."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec.structs import replace

from turbofit.core.messages import groups_of, indices
from turbofit.core.struct import Struct, const
from turbofit.core.units import MIB, mib
from turbofit.report.painters.document import Column, Heading, Paragraph, Table
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.per_engine_settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block
    from turbofit.report.stored_documents import StoredPlan

__all__ = [
    "COMPARE_SCHEMA", "ComparedRow", "ComparedSide", "Comparison", "compare", "compare_blocks",
    "compare_summary", "folded",
]  # fmt: skip

COMPARE_SCHEMA: Final = "turbofit.compare/1"

_GPU: Final = "GPU "
#: Rows of a summary; of them those of GPUs for which others give way: the promise has eight.
_ROWS: Final = 14
_GPU_ROWS: Final = 6
#: Sections of few rows that matter to everybody, in their order; a GPU's peak and headroom follow.
_SECTIONS: Final = ("What it holds", "Shape", "Limits", "Settings")
_OF_GPU: Final = {"= peak": "in use at most", "= headroom": "left then"}
#: Limits whose name alone says nothing.
_LABELS: Final = {"n": "answers a request"}
_LIMITS: Final = (
    "max_dynamic_patch", "max_pixels_per_image", "images_per_request", "units_per_image",
    "units_per_request", "units_per_forward", "image_tokens_per_request", "n",
)  # fmt: skip
#: What a GPU's ledger comes to.
_SUMS: Final = ("total", "used", "steady", "load_peak", "peak", "headroom", "margin")

Unit = Literal["text", "number", "bytes"]


class ComparedRow(Struct):
    """One fact of both; None where one of them does not have it."""

    section: str
    what: str
    a: str | float | None
    b: str | float | None
    unit: Unit = "text"

    @property
    def same(self) -> bool:
        """Whether both say the same."""
        return self.a == self.b

    def on(self, what: str) -> ComparedRow:
        """The same row under another name."""
        return replace(self, what=what)


class ComparedSide(Struct):
    """One of the two: where it was read, and what it is of."""

    where: str
    model: str
    machine: str
    fits: bool
    verdict: str


class Comparison(Struct):
    """Both, and all rows, those that are the same included."""

    schema: Annotated[str, const(COMPARE_SCHEMA)] = COMPARE_SCHEMA
    a: ComparedSide
    b: ComparedSide
    rows: tuple[ComparedRow, ...]


def compare(a: StoredPlan, b: StoredPlan) -> Comparison:
    """All facts by which two plans can differ."""
    by_group = bool(a.plan.by_group or b.plan.by_group)
    left, right = (_facts(saved.plan, by_group=by_group) for saved in (a, b))
    rows = []
    # GPUs of the same index face each other, behind all else.
    for section in sorted(
        {**left, **right},
        key=lambda name: name.startswith(_GPU) and 1 + int(name.removeprefix(_GPU)),
    ):
        one, other = left.get(section, {}), right.get(section, {})
        for what in dict.fromkeys((*one, *other)):
            values = one.get(what), other.get(what)
            unit: Unit = "bytes" if section.startswith(_GPU) else "number"
            if any(isinstance(value, str) for value in values):
                unit = "text"
            rows.append(
                ComparedRow(section=section, what=what, a=values[0], b=values[1], unit=unit)
            )
    return Comparison(a=_side(a), b=_side(b), rows=tuple(rows))


def compare_blocks(found: Comparison) -> list[Block]:
    """What differs, as tables; a line for each section where nothing does."""
    blocks = [Heading(text="A and B"), *_verdicts(found, short=False)]
    equal = []
    for section, rows in folded(found.rows):
        differ = [row for row in rows if not row.same]
        if differ:
            in_mib = any(row.unit == "bytes" for row in differ)
            table = _table(differ, "in MiB" if in_mib else "")
            blocks += [Heading(text=section), table]
        else:
            equal.append(section)
    if equal:
        blocks.append(Paragraph(text=f"the same in both: {', '.join(equal)}", tone="dim"))
    return blocks


def compare_summary(found: Comparison) -> list[Block]:
    """Both verdicts, what differs most in about twenty lines, and where there is more.

    The promise comes first; of bytes what each GPU needs at most.
    """
    sections = dict(folded(found.rows))
    plain = [
        row.on(_LABELS.get(row.what, row.what))
        for name in _SECTIONS
        for row in sections.get(name, ())
        if not row.same
    ]
    cards = [
        row.on(f"{name}: {_OF_GPU[row.what]}, MiB")
        for name, rows in sections.items()
        for row in rows
        if row.what in _OF_GPU and not row.same
    ]
    cards = cards[: max(_GPU_ROWS, _ROWS - len(plain))]
    rows = [*plain[: _ROWS - len(cards)], *cards]
    blocks = [Heading(text="A and B"), *_verdicts(found, short=True)]
    if rows:
        blocks.append(_table(rows))
    left = sum(not row.same for told in sections.values() for row in told) - len(rows)
    more = f"{left} more figures differ; all of them: --full, --md or --json" if left else ""
    if more or not rows:
        blocks.append(Paragraph(text=more or "nothing differs", tone="dim"))
    return blocks


def _verdicts(found: Comparison, *, short: bool) -> Iterator[Block]:
    for name, side in (("A", found.a), ("B", found.b)):
        verdict = "fits" if short and side.fits else side.verdict
        text = f"{name}: {side.model} on {side.machine} ({side.where}): {verdict}"
        yield Paragraph(text=text, tone="good" if side.fits else "bad")


def _table(rows: Sequence[ComparedRow], title: str = "") -> Table:
    """The table of rows, with how much more B has."""
    columns = (
        Column(title=title, wrap=True),
        Column(title="A", right=True, wrap=True),
        Column(title="B", right=True, wrap=True),
        Column(title="B - A", right=True),
    )
    cells = tuple((row.what, _text(row.a, row), _text(row.b, row), _over(row)) for row in rows)
    return Table(columns=columns, rows=cells)


def folded(rows: Iterable[ComparedRow]) -> list[tuple[str, list[ComparedRow]]]:
    """The sections in order; GPUs that differ in the same way share one."""
    sections: dict[str, list[ComparedRow]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    found: list[tuple[list[str], list[ComparedRow]]] = []
    for name, section_rows in sections.items():
        facts = [(row.what, row.a, row.b) for row in section_rows]
        for names, first in found:
            if name.startswith(_GPU) and facts == [(row.what, row.a, row.b) for row in first]:
                names.append(name)
                break
        else:
            found.append(([name], section_rows))
    return [(_named(names), section_rows) for names, section_rows in found]


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return _GPU + indices(int(name.removeprefix(_GPU)) for name in names)


def _side(saved: StoredPlan) -> ComparedSide:
    plan = saved.plan
    return ComparedSide(
        where=saved.where,
        model=plan.model.name,
        machine=plan.machine.name,
        fits=plan.fits,
        verdict=plan.verdict,
    )


def _facts(plan: Plan, *, by_group: bool) -> dict[str, dict[str, Any]]:
    """Facts by their sections; ``by_group``: the settings are told of each engine."""
    room, speed = capacity(plan), plan.throughput
    groups = range(max(1, len(plan.parallel.groups)) if by_group else 1)
    found: dict[str, dict[str, Any]] = {
        "Shape": {
            "engine": f"{plan.engine.name} {plan.engine.version}",
            "tp": plan.parallel.tp,
            "replicas": plan.parallel.replicas,
            "groups": groups_of(plan.parallel.groups),
            "goal": plan.workload.goal,
            "images a request": plan.workload.images,
            "concurrency": plan.requests_at_once,
            "images queued": "yes" if plan.workload.queue_images else "no",
        },
        "Settings": {
            f"{name}, engine {number}" if by_group else name: value
            for number in groups
            for name, value in settings_of(plan.of_group(number)).items()
        },
        "What it holds": {
            "KV tokens": plan.kv.total_tokens,
            "KV tokens a group": plan.kv.tokens,
            "longest request, tokens": plan.kv.longest_request_tokens,
            "images of the worst size": room.images,
            "users, a worst request each": room.users[0].held if room.users else None,
            "output tokens/s (forecast)": speed and round(speed.output_tokens_per_second, 3),
            "requests/s (forecast)": speed and round(speed.requests_per_second, 3),
            "rehearsal": plan.rehearsal and plan.rehearsal.outcome,
        },
        "Limits": {name: getattr(plan.limits, name) for name in _LIMITS},
    }
    for gpu in plan.gpus:
        terms = Counter[str]()
        for term in gpu.ledger:
            terms[term.term] += term.bytes
        sums = {f"= {name}": getattr(gpu, name) for name in _SUMS}
        found[f"{_GPU}{gpu.index}"] = {**terms, **sums}
    return found


def _text(value: str | float | None, row: ComparedRow) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return mib(int(value)) if row.unit == "bytes" else f"{value:,}"


def _over(row: ComparedRow) -> str:
    if not isinstance(row.a, int | float) or not isinstance(row.b, int | float):
        return ""
    over = row.b - row.a
    return f"{over / MIB:+,.1f}" if row.unit == "bytes" else f"{round(over, 3):+,}"
