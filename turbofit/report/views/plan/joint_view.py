"""Several models on the same cards, as a document: who takes what of each card."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from turbofit.core.units import MIB, format_bytes, mib
from turbofit.report.painters.document import (
    ONLY_SHORT,
    Code,
    Heading,
    Items,
    Paragraph,
    Table,
    Verdict,
    listed,
    remark,
    table,
)
from turbofit.report.views.plan.commands_view import shell_words
from turbofit.report.views.shared_blocks import MORE, assumed_of, first_warnings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.planning.joint_plan import JointGpu, JointPlan
    from turbofit.report.painters.document import Block

_PHASES = ("context", "weights", "cache", "buffers", "transient", "margin")


def joint_view(found: JointPlan, names: Sequence[str]) -> list[Block]:
    """The verdict, each model's promise, each card's account, warnings, and what comes next.

    Args:
        found: the plan.
        names: the models as they were named.
    """
    blocks: list[Block] = [
        Heading(f"{len(found.plans)} models together" if found.gpus else "Together", short=True),
        Verdict(found.verdict, good=found.fits, short=True),
    ]
    if found.remedy is not None:
        blocks.append(Items((found.remedy,), short=True))
    if found.fits:
        blocks.append(_promises(found))
    if found.gpus:
        fullest = min(found.gpus, key=lambda gpu: gpu.left)
        text = f"GPU {fullest.index} is the fullest: {format_bytes(fullest.left)} of it stay free"
        if fullest.left < 0:
            text = f"GPU {fullest.index} lacks {format_bytes(-fullest.left)}"
        if found.fits or fullest.left < 0:
            blocks.append(Paragraph(text, **ONLY_SHORT))
    for gpu in found.gpus:
        blocks += [Heading(f"GPU {gpu.index}: {gpu.name}, MiB at the worst"), _card(gpu)]
    warnings = _warnings(found)
    assumed = assumed_of(found.plans[0].machine) if found.plans else ()
    blocks += [*first_warnings(warnings, assumed), *listed("Notes", warnings)]
    return [*blocks, *_serve(found, names), MORE]


def _serve(found: JointPlan, names: Sequence[str]) -> list[Block]:
    """What serves them at one address."""
    if not found.fits:
        return []
    if found.serve is None:
        text = f"next: turbofit serve {shlex.join(names)}, with the same options"
        return [Paragraph(text, **ONLY_SHORT)]
    where = "" if found.plans[0].machine.source == "nvml" else " on such a machine"
    note = remark(f"at one address{where}:", short=True)
    code = Code(shell_words(found.serve.argv), short=True)
    return [Heading("Command"), note, code]


def _warnings(found: JointPlan) -> tuple[str, ...]:
    """Each once, with its model where it is not of the machine."""
    said = (
        text if text in plan.machine.warnings else f"{plan.model.name}: {text}"
        for plan in found.plans
        for text in plan.warnings
    )
    return tuple(dict.fromkeys(said))


def _promises(found: JointPlan) -> Table:
    rows = (
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
    """One row a model, which add up to the card."""
    empty = ("",) * len(_PHASES)
    rows = [("others", *empty, mib(gpu.used))]
    for one in gpu.models:
        figures = tuple(mib(getattr(one, phase)) for phase in _PHASES)
        rows.append((one.model, *figures, mib(one.bytes)))
    rows += [
        ("left", *empty, mib(gpu.left)),
        ("the card", *empty, mib(gpu.total - gpu.reserved)),
    ]
    return table(("", *_PHASES, "all"), rows, right=(*_PHASES, "all"))
