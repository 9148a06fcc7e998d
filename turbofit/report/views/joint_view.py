"""Several models on the same cards, as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import MIB, format_bytes, mib
from turbofit.report.painters.document import (
    MORE,
    ONLY_SHORT,
    Code,
    Heading,
    Items,
    Paragraph,
    Table,
    Verdict,
    first_warnings,
    listed,
    remark,
    table,
)
from turbofit.report.views.figures import shell_words
from turbofit.report.views.machine_view import assumed_of

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.planning.joint_plan import JointGpu, JointPlan
    from turbofit.report.painters.document import Block

_PHASES = ("context", "weights", "cache", "buffers", "transient", "margin")


def joint_view(joint: JointPlan) -> list[Block]:
    blocks: list[Block] = [
        Heading(f"{len(joint.plans)} models together" if joint.gpus else "Together", short=True),
        Verdict(joint.verdict, "good" if joint.fits else "bad", short=True),
    ]
    if joint.remedy is not None:
        blocks.append(Items((joint.remedy,), short=True))
    if joint.fits:
        blocks.append(_promises(joint))
    if joint.gpus:
        fullest = min(joint.gpus, key=lambda gpu: gpu.left)
        text = f"GPU {fullest.index} is the fullest: {format_bytes(fullest.left)} of it stay free"
        if fullest.left < 0:
            text = f"GPU {fullest.index} lacks {format_bytes(-fullest.left)}"
        if joint.fits or fullest.left < 0:
            blocks.append(Paragraph(text, **ONLY_SHORT))
    for gpu in joint.gpus:
        blocks += [Heading(f"GPU {gpu.index}: {gpu.name}, MiB at the worst"), _card(gpu)]
    warnings = _warnings(joint)
    assumed = assumed_of(joint.plans[0].machine) if joint.plans else ()
    blocks += [*first_warnings(warnings, assumed), *listed("Notes", warnings)]
    return [*blocks, *_serve(joint), MORE]


def _serve(joint: JointPlan) -> list[Block]:
    """The command that serves all models at one address."""
    if not joint.fits:
        return []
    if joint.serve is None:
        text = "next: turbofit serve -f with this profile, which asks each model for something else"
        return [Paragraph(text, **ONLY_SHORT)]
    where = "" if joint.plans[0].machine.source == "nvml" else " on such a machine"
    note = remark(f"at one address{where}:", short=True)
    code = Code(shell_words(joint.serve.argv), short=True)
    return [Heading("Command"), note, code]


def _warnings(joint: JointPlan) -> tuple[str, ...]:
    texts = (
        text if text in plan.machine.warnings else f"{plan.model.name}: {text}"
        for plan in joint.plans
        for text in plan.warnings
    )
    return tuple(dict.fromkeys(texts))


def _promises(joint: JointPlan) -> Table:
    rows = (
        (
            plan.model.name,
            # Rounded down as the option takes it: rounded up, the sum would exceed the card.
            f"{budget // MIB}MiB",
            f"{plan.parallel.replicas} x tp {plan.parallel.tp}",
            f"{plan.kv.longest_request_tokens:,}",
            f"{plan.kv.total_tokens:,}",
            f"{plan.settings.max_batch_size}",
            _images(plan),
        )
        for plan, budget in zip(joint.plans, joint.budgets, strict=True)
    )
    return table(
        ("model", "--budget", "engines", "context", "KV tokens", "batch", "images"),
        rows,
        right=("--budget", "context", "KV tokens", "batch"),
        wrap=("model", "images"),
        aside=("KV tokens",),
        short=True,
    )


def _images(plan: Plan) -> str:
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None:
        return "none"
    return f"{plan.limits.images_per_request}" + (
        "" if limit is None else f", {rule.limit_name} {limit:,}"
    )


def _card(gpu: JointGpu) -> Table:
    """The table of a card; the rows of the models, of others and of the rest add up to it."""
    empty = ("",) * len(_PHASES)
    rows = [("others", *empty, mib(gpu.used))]
    for share in gpu.models:
        figures = tuple(mib(getattr(share, phase)) for phase in _PHASES)
        rows.append((share.model, *figures, mib(share.bytes)))
    rows += [
        ("left", *empty, mib(gpu.left)),
        ("the card", *empty, mib(gpu.total - gpu.reserved)),
    ]
    return table(("", *_PHASES, "all"), rows, right=(*_PHASES, "all"))
