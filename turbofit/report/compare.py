"""Two plans side by side: every figure of either, and which of them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.messages import groups_of, indices
from turbofit.core.struct import Struct, const
from turbofit.core.units import MIB, mib
from turbofit.report.painters.document import Column, Heading, Paragraph, Table
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.per_engine_settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.plan import GpuLedger, Plan
    from turbofit.report.painters.document import Block
    from turbofit.report.stored_documents import StoredPlan

__all__ = [
    "COMPARE_SCHEMA", "ComparedRow", "ComparedSide", "Comparison", "compare", "compare_blocks",
    "compared_table", "folded",
]  # fmt: skip

COMPARE_SCHEMA: Final = "turbofit.compare/1"

_GPU: Final = "GPU "

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


class _Two(NamedTuple):
    """Collects rows."""

    a: Plan
    b: Plan

    def row(self, section: str, what: str, get: Any, unit: Unit = "number") -> ComparedRow:
        """A row of what ``get`` takes from each."""
        return ComparedRow(section=section, what=what, a=get(self.a), b=get(self.b), unit=unit)


def compare(a: StoredPlan, b: StoredPlan) -> Comparison:
    """All facts by which two plans can differ."""
    two = _Two(a.plan, b.plan)
    rows = (*_shape(two), *_settings(two), *_holds(two), *_limits(two), *_ledgers(two))
    return Comparison(a=_side(a), b=_side(b), rows=rows)


def compare_blocks(found: Comparison) -> list[Block]:
    """What differs, as tables; a line for each section where nothing does."""
    blocks: list[Block] = [Heading(text="A and B")]
    for name, side in (("A", found.a), ("B", found.b)):
        text = f"{name}: {side.model} on {side.machine} ({side.where}): {side.verdict}"
        blocks.append(Paragraph(text=text, tone="good" if side.fits else "bad"))
    equal = []
    for section, rows in folded(found.rows):
        differ = [row for row in rows if not row.same]
        if differ:
            in_mib = any(row.unit == "bytes" for row in differ)
            table = compared_table(differ, "in MiB" if in_mib else "")
            blocks += [Heading(text=section), table]
        else:
            equal.append(section)
    if equal:
        blocks.append(Paragraph(text=f"the same in both: {', '.join(equal)}", tone="dim"))
    return blocks


def compared_table(rows: Sequence[ComparedRow], title: str = "") -> Table:
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


def _shape(two: _Two) -> Iterable[ComparedRow]:
    text: Unit = "text"
    yield two.row("Shape", "engine", lambda p: f"{p.engine.name} {p.engine.version}", text)
    yield two.row("Shape", "tp", lambda p: p.parallel.tp)
    yield two.row("Shape", "replicas", lambda p: p.parallel.replicas)
    yield two.row("Shape", "groups", lambda p: groups_of(p.parallel.groups), text)
    yield two.row("Shape", "goal", lambda p: p.workload.goal, text)
    yield two.row("Shape", "images a request", lambda p: p.workload.images)
    yield two.row("Shape", "concurrency", lambda p: p.requests_at_once)
    yield two.row("Shape", "images queued", lambda p: "yes" if p.workload.queue_images else "no")


def _settings(two: _Two) -> Iterable[ComparedRow]:
    by_group = bool(two.a.by_group or two.b.by_group)
    groups = max(len(two.a.parallel.groups), len(two.b.parallel.groups)) if by_group else 1
    for number in range(groups):
        left, right = _engine_settings(two.a, number), _engine_settings(two.b, number)
        engine = f", engine {number}" if by_group else ""
        for name in dict.fromkeys((*left, *right)):
            what = f"{name}{engine}"
            yield ComparedRow(section="Settings", what=what, a=left.get(name), b=right.get(name))


def _engine_settings(plan: Plan, number: int) -> dict[str, str]:
    """The settings of one engine; none of one that is not there."""
    if number >= max(1, len(plan.parallel.groups)):
        return {}
    return settings_of(plan.of_group(number))


def _holds(two: _Two) -> Iterable[ComparedRow]:
    section = "What it holds"
    yield two.row(section, "KV tokens", lambda p: p.kv.total_tokens)
    yield two.row(section, "KV tokens a group", lambda p: p.kv.tokens)
    yield two.row(section, "longest request, tokens", lambda p: p.kv.longest_request_tokens)
    yield two.row(section, "images of the worst size", lambda p: capacity(p).images)
    yield two.row(section, "users, a worst request each", _first_users)
    yield two.row(section, "output tokens/s (forecast)", _speed("output_tokens_per_second"))
    yield two.row(section, "requests/s (forecast)", _speed("requests_per_second"))
    yield two.row(section, "rehearsal", lambda p: p.rehearsal and p.rehearsal.outcome, "text")


def _first_users(plan: Plan) -> int | None:
    users = capacity(plan).users
    return users[0].held if users else None


def _speed(name: str) -> Any:
    def get(plan: Plan) -> float | None:
        return round(getattr(plan.throughput, name), 3) if plan.throughput else None

    return get


def _limits(two: _Two) -> Iterable[ComparedRow]:
    for name in (
        "max_dynamic_patch", "max_pixels_per_image", "images_per_request", "units_per_image",
        "units_per_request", "units_per_forward", "image_tokens_per_request", "n",
    ):  # fmt: skip
        yield two.row("Limits", name, lambda p, name=name: getattr(p.limits, name))


def _ledgers(two: _Two) -> Iterable[ComparedRow]:
    """Term by term of each GPU that either plan uses; GPUs of the same index face each other."""
    left, right = ({gpu.index: gpu for gpu in plan.gpus} for plan in two)
    for index in sorted({*left, *right}):
        a, b = left.get(index), right.get(index)
        one = _terms(a) if a else {}
        other = _terms(b) if b else {}
        section = f"{_GPU}{index}"
        for name in dict.fromkeys((*one, *other)):
            sizes = {"a": one.get(name), "b": other.get(name)}
            yield ComparedRow(section=section, what=name, **sizes, unit="bytes")


def _terms(gpu: GpuLedger) -> dict[str, int]:
    found: dict[str, int] = {}
    for term in gpu.ledger:
        found[term.term] = found.get(term.term, 0) + term.bytes
    sums = ("total", "used", "steady", "load_peak", "peak", "headroom", "margin")
    return {**found, **{f"= {name}": getattr(gpu, name) for name in sums}}


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
