"""A plan as a document: verdict first, then what it rests on, the command last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.core.messages import groups_of, plural
from turbofit.core.units import format_bytes, three_digits
from turbofit.report.painters.document import (
    Column,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
)
from turbofit.report.views.plan.capacity import capacity
from turbofit.report.views.plan.commands_view import every_command
from turbofit.report.views.plan.interconnect import ways_text
from turbofit.report.views.plan.memory_view import ledger_blocks, memory_blocks
from turbofit.report.views.plan.per_engine_settings import differing, per_engine_blocks, settings_of
from turbofit.report.views.plan.remedies_table import remedies_table
from turbofit.report.views.run.rehearsal_view import rehearsal_blocks
from turbofit.report.views.run.run_view import run_blocks, sides_blocks

if TYPE_CHECKING:
    from turbofit.core.plan import Candidate, Plan
    from turbofit.core.run_report import RunReport
    from turbofit.report.painters.document import Block

__all__ = [
    "candidate_value", "capacity_blocks", "fact_block", "limit_blocks", "plan_view",
    "settings_blocks",
]  # fmt: skip

#: Candidates shown; the JSON has all of them.
_SHOWN = 8

#: What remedies are, by whether the plan fits.
_TITLES: Final = {True: "What more would give", False: "What would fit, cheapest first"}


def plan_view(plan: Plan, run: RunReport | None = None) -> list[Block]:
    """The whole plan; a prediction is one without candidates and shows as such.

    Args:
        plan: what was planned.
        run: what became of it, where it was launched.
    """
    blocks: list[Block] = [
        Heading(text=f"{plan.model.name} on {plan.machine.name}"),
        Paragraph(text=plan.verdict, tone="good" if plan.fits else "bad"),
    ]
    if not plan.fits:
        blocks += remedies_table(plan.remedies, _TITLES[plan.fits])
    if plan.warnings:
        blocks += [Heading(text="Warnings"), Items(items=plan.warnings, tone="warn")]
    blocks += [Heading(text="What was asked, and the shape chosen"), fact_block(plan)]
    blocks += settings_blocks(plan)
    blocks += per_engine_blocks(plan)
    blocks += memory_blocks(plan)
    blocks += rehearsal_blocks(plan)
    blocks += run_blocks(plan, run) if run else []
    blocks += sides_blocks(plan, run)
    blocks += ledger_blocks(plan)
    blocks += capacity_blocks(plan)
    blocks += limit_blocks(plan)
    blocks += _candidates(plan)
    if plan.fits:
        blocks += remedies_table(plan.remedies, _TITLES[plan.fits])
    blocks += every_command(plan)
    return blocks


def fact_block(plan: Plan) -> FactList:
    """Model, machine, engine, workload, shape and forecast of speed."""
    model, workload = plan.model, plan.workload
    where = ", ".join(dict.fromkeys((model.source.where, f"sizes by {model.source.sizes}")))
    size = f"{workload.image_size[0]}x{workload.image_size[1]}" if workload.image_size else "worst"
    context = f"{workload.context:,}" if workload.context else "as much as fits"
    images = _images(plan, size) if plan.limits.vision_unit else ""
    at_once = workload.concurrency or plan.requests_at_once
    facts = [
        (
            "model",
            f"{model.architecture}, {model.parameters / 1e9:.2f} B parameters, "
            f"{format_bytes(model.weight_bytes)} of weights ({model.source.kind}: {where})",
        ),
        ("machine", f"{_gpu_names(plan)} ({plan.machine.source})"),
        ("engine", _engine(plan)),
        (
            "workload",
            f"{images}context {context}, {at_once:,} at once, for {workload.goal}"
            + (", images queued" if workload.queue_images else ""),
        ),
        (
            "shape",
            f"tp {plan.parallel.tp} x {plan.parallel.replicas} on "
            f"{groups_of(plan.parallel.groups)}: {plan.parallel.reason}",
        ),
    ]
    if len(plan.machine.gpus) > 1:
        facts.append(("links", ways_text(plan.machine)))
    if plan.throughput:
        speed = plan.throughput
        facts.append(
            (
                "forecast",
                f"{speed.output_tokens_per_second:,.0f} output tokens/s, "
                f"{speed.requests_per_second:.2f} requests/s, {speed.concurrent_requests} at once "
                f"({speed.basis})",
            )
        )
    if plan.usual_image:
        usual, (width, height) = plan.usual_image, plan.usual_image.image_size
        facts.append(
            (
                "a usual image",
                f"of {width}x{height} takes {usual.image_tokens:,} tokens: "
                f"{usual.requests_per_second:.2f} requests/s, {usual.requests_at_once:,} at once; "
                f"--image-size {width}x{height} plans for these alone",
            )
        )
    return FactList(facts=tuple(facts))


def _images(plan: Plan, size: str) -> str:
    """The promised images of a request, and how many smaller ones may share what they take."""
    limits, images = plan.limits, plan.workload.images
    said = f"{images} {plural(images, 'image')} a request ({size} size"
    most = limits.most_images(plan.model.image_rule)
    if most > images:
        units = limits.units_per_request
        what = plural(units, limits.vision_unit or "unit")
        said += f": {units:,} {what}, which up to {most:,} smaller ones may share"
    return f"{said}), "


def _engine(plan: Plan) -> str:
    if not plan.engine.of_lmdeploy:
        return f"Hugging Face Transformers, the fallback (accounted for {plan.engine.version})"
    return f"LMDeploy {plan.engine.version}, {plan.engine.name}"


def _gpu_names(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for gpu in plan.machine.gpus:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return " + ".join(f"{n}x {name}" for name, n in counts.items())


def settings_blocks(plan: Plan) -> list[Block]:
    """Each setting with the reason that begins with its name; the other reasons below."""
    rest = list(plan.reasons)
    rows = []
    differ = differing(plan)
    for name, value in settings_of(plan).items():
        found = [reason for reason in rest if reason.split(" ", 1)[0].rstrip(":,=") == name]
        rest = [reason for reason in rest if reason not in found]
        texts = [reason[len(name) :].lstrip(" :,=") for reason in found]
        why = "; ".join(text.removeprefix(f"{value}: ") for text in texts)
        rows.append((name, "see below" if name in differ else value, why))
    columns = (Column(title="setting"), Column(title="value"), Column(title="why", wrap=True))
    blocks: list[Block] = [Heading(text="Settings"), Table(columns=columns, rows=tuple(rows))]
    if rest:
        blocks.append(Items(items=tuple(rest)))
    return blocks


def capacity_blocks(plan: Plan) -> list[Block]:
    """What the cache holds, what a request may be, and host memory."""
    kv, limits = plan.kv, plan.limits
    per_group = "" if plan.parallel.replicas == 1 else f", {kv.total_tokens:,} over all groups"
    least = "at least " if plan.by_group else ""
    found = capacity(plan)
    held, running = (found.users[-1].held, found.users[-1].running) if found.users else (0, 0)
    facts = [
        (
            "KV cache",
            f"{least}{kv.tokens:,} tokens of {format_bytes(kv.bytes_per_token)}{per_group}",
        ),
        (
            "longest request",
            f"{kv.longest_request_tokens:,} tokens; {held:,} fit, {running:,} run at once",
        ),
    ]
    if limits.vision_unit:
        unit = limits.vision_unit
        rule = plan.model.image_rule
        if limits.max_dynamic_patch is not None and rule is not None and rule.varies_by_limit:
            facts.append(("max_dynamic_patch", str(limits.max_dynamic_patch)))
        if limits.max_pixels_per_image is not None:
            facts.append(("max_pixels", f"{limits.max_pixels_per_image:,} an image"))
        facts += [
            (
                "images",
                f"{limits.images_per_request} a request, {limits.units_per_image:,} "
                f"{plural(limits.units_per_image, unit)} each, "
                f"{limits.image_tokens_per_request:,} tokens a request",
            ),
            ("images at once", f"{found.images or 0:,} of the worst size, without any text"),
            (
                "paid for",
                f"{limits.units_per_forward:,} {plural(limits.units_per_forward, unit)} in one "
                "forward pass",
            ),
        ]
        if plan.takes_videos:
            facts.append(("videos", "1 a request, in the place of an image and held to its size"))
    for one in found.users[:1]:
        text = f"{one.held:,} with {one.what} each; {one.running:,} of them run at once"
        facts.append(("users", text))
    host = plan.host
    have = "unknown" if host.available is None else format_bytes(host.available)
    facts.append(
        (
            "host memory",
            f"{format_bytes(host.pinned)} pinned, {format_bytes(host.pageable)} pageable; "
            f"available: {have}",
        )
    )
    return [Heading(text="Capacity and limits"), FactList(facts=tuple(facts))]


def limit_blocks(plan: Plan) -> list[Block]:
    """What an image limit costs: the same GPUs under others."""
    if not plan.limit_costs:
        return []
    rows = tuple(
        (
            cost.option,
            f"{cost.image_tokens:,}",
            f"{cost.kv_tokens:,}",
            f"{cost.requests_at_once:,}",
            three_digits(cost.requests_per_second),
            three_digits(cost.seconds_to_first_token),
        )
        for cost in plan.limit_costs
    )
    columns = (
        Column(title="option"),
        Column(title="its tokens", right=True),
        Column(title="KV tokens", right=True),
        Column(title="at once", right=True),
        Column(title="requests/s", right=True),
        Column(title="first, s", right=True),
    )
    return [
        Heading(text="What an image limit costs"),
        Paragraph(
            text="forecasts for the largest image that each limit admits (its tokens, requests a"
            " second, seconds to the first token), on the same GPUs with the same prefill; a plan"
            " for that limit serves as much or more",
            tone="dim",
        ),
        Table(columns=columns, rows=rows),
    ]


def _candidates(plan: Plan) -> list[Block]:
    if not plan.considered:
        return []
    rows = tuple(
        (
            f"{c.tp}x{c.replicas}",
            groups_of(c.groups),
            candidate_value(c, "max_prefill_token_num"),
            candidate_value(c, "max_batch_size"),
            f"{c.kv_tokens:,}" if c.fits else "-",
            three_digits(c.score) if c.fits else "-",
            _why(plan, c),
        )
        for c in plan.considered[:_SHOWN]
    )
    columns = (
        Column(title="tp x n"),
        Column(title="GPUs", wrap=True),
        Column(title="prefill", right=True),
        Column(title="batch", right=True),
        Column(title="KV tokens", right=True),
        Column(title="score", right=True),
        Column(title="why not", wrap=True),
    )
    blocks: list[Block] = [
        Heading(text="Considered"),
        Table(columns=columns, rows=rows),
    ]
    if len(plan.considered) > _SHOWN:
        more = len(plan.considered) - _SHOWN
        blocks.append(Paragraph(text=f"and {more} more (--json has all of them)", tone="dim"))
    return blocks


def candidate_value(candidate: Candidate, name: str) -> str:
    """A candidate's setting, ``-`` for none; where its engines differ, the least and the most."""
    settings: dict[str, Any] = candidate.settings
    values = sorted({one[name] for one in settings.get("by_group", []) if name in one})
    if not values:
        values = [settings.get(name)]
    texts = [f"{one:.3f}" if isinstance(one, float) else str(one) for one in values]
    if len(texts) > 1:
        return f"{texts[0]}-{texts[-1]}"
    return "-" if values[0] is None else texts[0]


def _why(plan: Plan, candidate: Candidate) -> str:
    if not candidate.why_not:
        return "chosen"
    same = candidate.engine == plan.engine.name
    return candidate.why_not if same else f"{candidate.engine}: {candidate.why_not}"
