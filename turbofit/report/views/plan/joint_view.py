"""Several models on the same cards, as a document: who takes what of each card."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from turbofit.core.units import MIB, format_bytes, mib
from turbofit.report.painters.document import Column, Heading, Items, Paragraph, Table
from turbofit.report.views.summary_lines import MORE, first_warning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.planning.joint_plan import JointGpu, JointPlan
    from turbofit.report.painters.document import Block

__all__ = ["joint_summary", "joint_view"]

_PHASES = ("context", "weights", "cache", "buffers", "transient", "margin")


def joint_view(found: JointPlan) -> list[Block]:
    """The verdict, each model's promise, and each card's account."""
    blocks = _promise_blocks(found)
    for gpu in found.gpus:
        blocks += [Heading(text=f"GPU {gpu.index}: {gpu.name}, MiB at the worst"), _card(gpu)]
    said = _warnings(found)
    if said:
        blocks += [Heading(text="Warnings"), Items(items=said)]
    return blocks


def joint_summary(found: JointPlan, names: Sequence[str]) -> list[Block]:
    """The verdict, each model's promise, the fullest card, a warning, and what comes next.

    Args:
        found: the plan.
        names: the models as they were named.
    """
    blocks = _promise_blocks(found)
    if found.gpus:
        fullest = min(found.gpus, key=lambda gpu: gpu.left)
        text = f"GPU {fullest.index} is the fullest: {format_bytes(fullest.left)} of it stay free"
        if fullest.left < 0:
            text = f"GPU {fullest.index} lacks {format_bytes(-fullest.left)}"
        if found.fits or fullest.left < 0:
            blocks.append(Paragraph(text=text))
    blocks += first_warning(_warnings(found), found.plans[0].machine if found.plans else None)
    if found.fits:
        blocks.append(
            Paragraph(text=f"next: turbofit serve {shlex.join(names)}, with the same options")
        )
    return [*blocks, MORE]


def _promise_blocks(found: JointPlan) -> list[Block]:
    blocks: list[Block] = [
        Heading(text=f"{len(found.plans)} models together" if found.gpus else "Together"),
        Paragraph(text=found.verdict, tone="good" if found.fits else "bad"),
    ]
    if found.remedy is not None:
        blocks.append(Items(items=(found.remedy,)))
    if found.fits:
        blocks.append(_promises(found))
    return blocks


def _warnings(found: JointPlan) -> tuple[str, ...]:
    """Each once, with its model where it is not of the machine."""
    said = (
        text if text in plan.machine.warnings else f"{plan.model.name}: {text}"
        for plan in found.plans
        for text in plan.warnings
    )
    return tuple(dict.fromkeys(said))


def _promises(found: JointPlan) -> Table:
    columns = (
        Column(title="model", wrap=True),
        Column(title="--budget", right=True),
        Column(title="engines"),
        Column(title="context", right=True),
        Column(title="KV tokens", right=True, aside=True),
        Column(title="batch", right=True),
        Column(title="images", wrap=True),
    )
    rows = tuple(
        (
            plan.model.name,
            # As the option takes it; rounded up, the sum would be more than the card has.
            f"{budget // MIB}MiB",
            f"{plan.parallel.replicas} x tp {plan.parallel.tp}",
            f"{plan.kv.longest_request_tokens:,}",
            f"{plan.kv.total_tokens:,}",
            f"{plan.settings.max_batch_size}",
            _images(plan),
        )
        for plan, budget in zip(found.plans, found.budgets, strict=True)
    )
    return Table(columns=columns, rows=rows)


def _images(plan: Plan) -> str:
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None:
        return "none"
    return f"{plan.limits.images_per_request}" + (
        "" if limit is None else f", {rule.limit_name} {limit:,}"
    )


def _card(gpu: JointGpu) -> Table:
    """One row a model, which add up to the card."""
    columns = (Column(title=""), *(Column(title=name, right=True) for name in (*_PHASES, "all")))
    empty = ("",) * len(_PHASES)
    rows = [("others", *empty, mib(gpu.used))]
    for one in gpu.models:
        figures = tuple(mib(getattr(one, phase)) for phase in _PHASES)
        rows.append((one.model, *figures, mib(one.bytes)))
    rows += [
        ("left", *empty, mib(gpu.left)),
        ("the card", *empty, mib(gpu.total - gpu.reserved)),
    ]
    return Table(columns=columns, rows=tuple(rows))
