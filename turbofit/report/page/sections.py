"""The parts of the page that are words and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import groups_of
from turbofit.core.units import format_bytes, three_digits
from turbofit.report.page.blocks import command, paint, table
from turbofit.report.page.frame import tiles
from turbofit.report.page.tag import Markup, join, tag
from turbofit.report.painters.document import Column, Heading, Items, Paragraph, Table
from turbofit.report.shell import shell_command, shell_words
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.commands_view import INDICES, serve_note, unheld
from turbofit.report.views.plan.memory_view import need_of
from turbofit.report.views.plan.per_engine_settings import per_engine_blocks
from turbofit.report.views.plan.plan_view import candidate_value, fact_block, settings_blocks
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.run.rehearsal_view import rehearsal_blocks
from turbofit.report.views.run.run_view import run_blocks, sides_blocks

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.core.run_report import RunReport
    from turbofit.report.painters.document import Block

__all__ = [
    "ENGINES",
    "candidates",
    "commands",
    "compared",
    "figures",
    "first_command",
    "head",
    "remedies",
    "settings",
    "users",
    "warnings",
]

#: What people call the engines.
ENGINES: Final = {
    "turbomind": "LMDeploy, TurboMind",
    "pytorch": "LMDeploy, PyTorch engine",
    "transformers": "Hugging Face Transformers",
}


def head(plan: Plan, run: RunReport | None) -> Markup:
    """What it is, and whether it fits."""
    mark, word = ("✔", "fits") if plan.fits else ("✖", "does not fit")
    verdict = plan.verdict.removeprefix(f"{word}: ")
    shape = plan.parallel
    chips = [
        f"{ENGINES[plan.engine.name]} {plan.engine.version}",
        f"tp {shape.tp} × {shape.replicas}",
        f"for {plan.workload.goal}",
        _kind(plan, run),
    ]
    badge = tag("strong", f"{mark} {word}", class_="badge " + ("good" if plan.fits else "bad"))
    return join(
        tag("h1", plan.model.name, tag("small", f" on {plan.machine.name}")),
        tag("p", badge, " ", verdict, class_="verdict"),
        tag("ul", *(tag("li", chip) for chip in chips if chip), class_="chips"),
    )


def _kind(plan: Plan, run: RunReport | None) -> str:
    """What the figures rest on."""
    if run is not None:
        return f"run of {run.started}: {run.state}" + (" (pretend GPUs)" if run.pretend else "")
    if plan.rehearsal is not None:
        return f"rehearsed on pretend GPUs: {plan.rehearsal.outcome.replace('_', ' ')}"
    return "forecast, not rehearsed"


def figures(plan: Plan) -> Markup:
    """The capacity in three figures, the forecast of speed as a fourth; or what is lacking."""
    if not plan.fits:
        return _lacking(plan)
    found = capacity(plan)
    per = "in one cache"
    if found.groups > 1:
        least = "" if found.tokens_per_group * found.groups == found.tokens else "at least "
        per = f"{least}{found.tokens_per_group:,} in each of {found.groups} groups"
    shown = [("KV tokens", f"{found.tokens:,}", per)]
    if found.images is not None:
        text = f"of the worst size, {found.tokens_per_image:,} tokens each, fill the cache"
        shown.append(("images", f"{found.images:,}", text))
    if found.users:
        first = found.users[0]
        text = f"with {first.what} each"
        if first.running < first.held:
            text += f"; the cache holds {first.held:,}"
        shown.append(("requests at once", f"{first.running:,}", text))
    if plan.throughput is not None:
        speed = plan.throughput
        text = f"{speed.requests_per_second:.2f} requests/s, {speed.concurrent_requests} at once"
        number = f"{speed.output_tokens_per_second:,.0f}"
        shown.append(("tokens/s, forecast", number, f"{text}; ranks shapes, promises nothing"))
    return tiles(shown)


def _lacking(plan: Plan) -> Markup:
    """What the GPU with the least left needs, and what it has."""
    if not plan.gpus:
        return Markup()
    gpu = min(plan.gpus, key=lambda one: one.headroom)
    need, when = need_of(gpu)
    shown = [("GPU memory needed", need, f"{when}, on GPU {gpu.index}")]
    shown.append(("GPU memory there", format_bytes(gpu.total - gpu.reserved), gpu.name))
    if gpu.headroom < gpu.margin:
        short = f"on GPU {gpu.index}, its margin of {format_bytes(gpu.margin)} included"
        shown.append(("lacking", format_bytes(gpu.margin - gpu.headroom), short))
    return tiles(shown)


def users(plan: Plan) -> Markup:
    """How many conversations there can be."""
    rows = tuple(
        (one.what, f"{one.tokens:,}", f"{one.held:,}", f"{one.running:,}")
        for one in capacity(plan).users
    )
    if not rows:
        return tag("p", "The cache holds no request.", class_="bad")
    columns = (
        Column(title="a conversation of", wrap=True),
        Column(title="tokens", right=True),
        Column(title="the cache holds", right=True),
        Column(title="run at once", right=True),
    )
    return table(Table(columns=columns, rows=rows))


def remedies(plan: Plan) -> Markup:
    """What would fit, or what more would give."""
    return paint(remedies_table(plan.remedies))


def compared(plan: Plan, run: RunReport | None) -> Markup:
    """Forecast, rehearsed and measured; what to do where there is only the first."""
    blocks = [*rehearsal_blocks(plan, timeline=False)[1:]]
    blocks += run_blocks(plan, run)[1:] if run else []
    blocks += sides_blocks(plan, run)
    if not blocks:
        text = (
            "A forecast alone. With turbofit rehearse the engine itself runs on pretend GPUs, and "
            "what it allocates stands beside the forecast here; turbofit serve measures."
        )
        blocks.append(Paragraph(text=text, tone="dim"))
    return paint(blocks)


def settings(plan: Plan) -> Markup:
    """What was asked, the shape chosen, each setting with its reason."""
    return join(
        paint([fact_block(plan)]), paint([*settings_blocks(plan), *per_engine_blocks(plan)])
    )


#: Settings of a candidate that have a column.
_SETTINGS: Final = (
    ("prefill", "max_prefill_token_num"), ("batch", "max_batch_size"), ("context", "session_len"),
    ("image limit", "limit"), ("cache ratio", "cache_max_entry_count"),
)  # fmt: skip


def candidates(plan: Plan) -> Markup:
    """All that were considered, in a table that sorts."""
    if not plan.considered:
        return Markup()
    found = [
        (name, key) for name, key in _SETTINGS if any(key in c.settings for c in plan.considered)
    ]
    columns = (
        Column(title="engine"),
        Column(title="tp x n"),
        Column(title="GPUs", wrap=True),
        *(Column(title=name, right=True) for name, _ in found),
        Column(title="KV tokens", right=True),
        Column(title="score", right=True),
        Column(title="why not", wrap=True),
    )
    rows = tuple(
        (
            c.engine,
            f"{c.tp}x{c.replicas}",
            groups_of(c.groups),
            *(candidate_value(c, key) for _, key in found),
            f"{c.kv_tokens:,}" if c.fits else "-",
            three_digits(c.score) if c.fits else "-",
            c.why_not or "chosen",
        )
        for c in plan.considered
    )
    chosen = next((i for i, one in enumerate(plan.considered) if not one.why_not), None)
    return table(Table(columns=columns, rows=rows), sortable=True, chosen=chosen)


def commands(plan: Plan) -> Markup:
    """The engines' own commands, each with its button, and what they do not do."""
    if not plan.commands:
        return Markup()
    said: list[Block] = [Paragraph(text=f"{unheld(plan)}.", tone="dim")]
    if plan.machine.source == "preset":
        said.append(Paragraph(text=INDICES, tone="dim"))
    if not plan.fits:
        said.insert(0, Paragraph(text="This would not serve.", tone="bad"))
    parts = [paint(said)]
    for one in plan.commands:
        parts.append(paint([Heading(text=f"Group {one.group}")]))
        parts.append(command(shell_command(one), f"the command of group {one.group}"))
    return join(*parts)


def first_command(plan: Plan) -> Markup:
    """What serves the plan, and where the engines' own commands are."""
    if plan.serve is None:
        return Markup()
    note = serve_note(plan)
    said = f"{unheld(plan)}; its own commands are in the last section."
    return join(
        paint([Paragraph(text=note.capitalize(), tone="dim")] if note else []),
        command(shell_words(plan.serve.argv), "the command"),
        paint([Paragraph(text=said, tone="dim")]),
    )


def warnings(plan: Plan) -> Markup:
    """The plan's warnings, and the machine's and model's that are not among them."""
    return paint([Items(items=plan.warnings, tone="warn")]) if plan.warnings else Markup()
