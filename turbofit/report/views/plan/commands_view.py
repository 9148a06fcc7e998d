"""What a plan hands out to copy: first what keeps its limits, then the engines' own commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.messages import QUEUED, groups_of
from turbofit.report.painters.document import Code, Heading, Paragraph
from turbofit.report.shell import shell_command, shell_words

if TYPE_CHECKING:
    from turbofit.core.plan import Command, Plan
    from turbofit.report.painters.document import Block

__all__ = ["INDICES", "commands_in_short", "every_command", "serve_note", "unheld"]

_PORT: Final = "--server-port"
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
#: Why a preset's command names GPUs by their numbers.
INDICES: Final = "GPUs by index: a preset has no UUIDs; plan on the machine itself to pin them"


def commands_in_short(plan: Plan) -> list[Block]:
    """What serves the plan; the first engine's own command where that keeps the plan as well."""
    blocks = _serve(plan)[-1:]
    if not plan.commands:
        return blocks
    if _queues(plan):
        return [*blocks, Paragraph(text=f"{unheld(plan)} (--full has its command)", tone="dim")]
    blocks += [
        Paragraph(text=f"{unheld(plan)}:", tone="dim"),
        Code(text=shell_command(plan.commands[0])),
    ]
    said = _same_elsewhere(plan)
    return [*blocks, Paragraph(text=said)] if said else blocks


def every_command(plan: Plan) -> list[Block]:
    """What serves the plan, and each engine's own command."""
    if not plan.commands:
        return []
    title = "Command" if plan.serve is not None or len(plan.commands) == 1 else "Commands"
    blocks: list[Block] = [Heading(text=title if plan.fits else f"{title} (would not serve)")]
    blocks += _serve(plan)
    blocks.append(Paragraph(text=f"{unheld(plan)}:", tone="dim"))
    if plan.machine.source == "preset":
        blocks.append(Paragraph(text=INDICES, tone="dim"))
    return [*blocks, *(Code(text=shell_command(command)) for command in plan.commands)]


def _serve(plan: Plan) -> list[Block]:
    if plan.serve is None:
        return []
    note = serve_note(plan)
    said: list[Block] = [Paragraph(text=note, tone="dim")] if note else []
    return [*said, Code(text=shell_words(plan.serve.argv))]


def serve_note(plan: Plan) -> str:
    """Where the command that serves is to be run, where that is not here."""
    return "" if plan.machine.source == "nvml" else "on such a machine:"


def unheld(plan: Plan) -> str:
    """What the engines' own commands do not do."""
    if not plan.engine.of_lmdeploy:
        return "turbofit's server for Transformers alone does not limit the size of images"
    if _queues(plan):
        return "LMDeploy alone does not keep this plan: it queues no images and holds no limits"
    return "LMDeploy alone holds no limits; a client that asks for more can end it"


def _queues(plan: Plan) -> bool:
    """Whether it holds only where image requests are queued."""
    return QUEUED in plan.warnings


def _same_elsewhere(plan: Plan) -> str:
    """How the commands of the other groups differ from the first; empty where there is one."""
    first, *rest = plan.commands
    if not rest:
        return ""
    gpus = groups_of(plan.parallel.groups[one.group] for one in rest)
    if any(_apart_from_place(one) != _apart_from_place(first) for one in rest):
        return f"GPU {gpus}: other settings, see --full"
    ports = ", ".join(one.argv[one.argv.index(_PORT) + 1] for one in rest if _PORT in one.argv)
    there = f", {_PORT} {ports}" if ports else ""
    return f"the same on GPU {gpus}{there}"


def _apart_from_place(command: Command) -> tuple[object, ...]:
    """A command without its GPUs and its port."""
    words = list(command.argv)
    if _PORT in words:
        del words[words.index(_PORT) + 1]
    return (words, {name: value for name, value in command.env.items() if name != _VISIBLE})
