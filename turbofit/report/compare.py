"""Two plans side by side: every figure of both, and which figures differ."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from turbofit.core.messages import groups_of, indices
from turbofit.core.struct import Struct, const
from turbofit.core.units import MIB, mib
from turbofit.report.painters.document import ONLY_SHORT, Heading, Paragraph, remark, table
from turbofit.report.views.figures import images_held, settings_of, users_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block, Table, Tone
    from turbofit.report.stored_documents import StoredPlan

_SCHEMA: Final = "turbofit.compare/1"

_GPU: Final = "GPU "
#: Rows of the short answer at most; up to `_GPU_ROWS` rows of GPUs keep their place.
_ROWS: Final = 14
_GPU_ROWS: Final = 6
#: Sections of the short answer in order; the peak and headroom of each GPU follow.
_SECTIONS: Final = ("What it holds", "Shape", "Limits", "Settings")
_OF_GPU: Final = {"= peak": "in use at most", "= headroom": "left then"}
#: Labels for the figures whose names do not explain themselves.
_LABELS: Final = {
    "n": "answers to one request (n), at most",
    "concurrency": "requests at once",
    "users, a worst request each": "worst requests in the cache",
}
_LIMITS: Final = (
    "max_dynamic_patch", "max_pixels_per_image", "images_per_request", "units_per_image",
    "units_per_request", "units_per_forward", "image_tokens_per_request", "n",
)  # fmt: skip
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
        return self.a == self.b


class ComparedSide(Struct):
    """One of the two: where it was read, and what it is of."""

    where: str
    model: str
    machine: str
    fits: bool
    verdict: str


class Comparison(Struct):
    """Both, and all rows, those that are the same included."""

    schema: Annotated[str, const(_SCHEMA)] = _SCHEMA
    a: ComparedSide
    b: ComparedSide
    rows: tuple[ComparedRow, ...]


def compare(a: StoredPlan, b: StoredPlan) -> Comparison:
    by_group = bool(a.plan.by_group or b.plan.by_group)
    left, right = (_facts(saved.plan, by_group=by_group) for saved in (a, b))
    rows = []
    # Sections of GPUs come last; GPUs of the same index share a section.
    for section in sorted(
        {**left, **right},
        key=lambda name: name.startswith(_GPU) and 1 + int(name.removeprefix(_GPU)),
    ):
        facts_a, facts_b = left.get(section, {}), right.get(section, {})
        for what in {**facts_a, **facts_b}:
            values = facts_a.get(what), facts_b.get(what)
            unit: Unit = "bytes" if section.startswith(_GPU) else "number"
            if any(isinstance(value, str) for value in values):
                unit = "text"
            rows.append(
                ComparedRow(section=section, what=what, a=values[0], b=values[1], unit=unit)
            )
    return Comparison(a=_side(a), b=_side(b), rows=tuple(rows))


def compare_view(comparison: Comparison) -> list[Block]:
    """Both verdicts, then a table of differences per section; a short answer has only one table."""
    blocks: list[Block] = [Heading("A and B", short=True)]
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        what = f"{name}: {side.model} on {side.machine} ({side.where})"
        tone: Tone = "good" if side.fits else "bad"
        blocks.append(Paragraph(f"{what}: {side.verdict}", tone, short=not side.fits))
        if side.fits:
            blocks.append(Paragraph(f"{what}: fits", tone, **ONLY_SHORT))
    sections = {
        name: [row for row in rows if not row.same]
        for name, rows in folded(comparison.rows).items()
    }
    blocks += _in_short(sections)
    for name, rows in sections.items():
        if rows:
            title = "in MiB" if any(row.unit == "bytes" for row in rows) else ""
            blocks += [Heading(name), _table(title, [(row.what, row) for row in rows])]
    equal = ", ".join(name for name, rows in sections.items() if not rows)
    if equal:
        blocks.append(remark(f"the same in both: {equal}"))
    return blocks


def _in_short(sections: Mapping[str, Sequence[ComparedRow]]) -> list[Block]:
    """The most important differences; of sizes in bytes only the peak and headroom of each GPU."""
    facts = {row.what: (row.a, row.b) for row in sections["What it holds"]}
    one_cache = facts.get("KV tokens") == facts.get("KV tokens a group")
    plain = [
        (_LABELS.get(row.what, row.what), row)
        for name in _SECTIONS
        for row in sections[name]
        if not (one_cache and row.what == "KV tokens a group")
    ]
    cards = [
        (f"{name}: {_OF_GPU[row.what]}, MiB", row)
        for name, rows in sections.items()
        for row in rows
        if row.what in _OF_GPU
    ]
    cards = cards[: max(_GPU_ROWS, _ROWS - len(plain))]
    rows = [*plain[: _ROWS - len(cards)], *cards]
    left = sum(map(len, sections.values())) - len(rows)
    blocks: list[Block] = [_table("", rows, **ONLY_SHORT)] if rows else []
    if left or not rows:
        text = f"{left} more figures differ; all of them: --full, --md or --json"
        blocks.append(remark(text if left else "nothing differs", **ONLY_SHORT))
    return blocks


def _table(title: str, rows: Iterable[tuple[str, ComparedRow]], **places: Any) -> Table:
    """A table of the rows under their names; the last column is B minus A."""
    cells = ((name, _text(row.a, row), _text(row.b, row), _over(row)) for name, row in rows)
    numbers = ("A", "B", "B - A")
    return table((title, *numbers), cells, right=numbers, wrap=(title, "A", "B"), **places)


def folded(rows: Iterable[ComparedRow]) -> dict[str, list[ComparedRow]]:
    """The rows by section, in order; GPUs with the same differences share a section."""
    sections: dict[str, list[ComparedRow]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    equal: dict[object, list[str]] = {}
    for name, section in sections.items():
        facts = tuple((row.what, row.a, row.b) for row in section)
        equal.setdefault(facts if name.startswith(_GPU) else name, []).append(name)
    merged = {}
    for first, *others in equal.values():
        gpus = [int(name.removeprefix(_GPU)) for name in (first, *others) if name.startswith(_GPU)]
        merged[f"{_GPU}{indices(gpus)}" if gpus else first] = sections[first]
    return merged


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
    """Return the figures by section; ``by_group`` lists the settings of each engine apart."""
    users, speed = users_of(plan), plan.throughput
    groups = range(max(1, len(plan.parallel.groups)) if by_group else 1)
    facts: dict[str, dict[str, Any]] = {
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
            "images of the worst size": images_held(plan),
            "users, a worst request each": users[0].in_cache if users else None,
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
        facts[f"{_GPU}{gpu.index}"] = {**terms, **sums}
    return facts


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
