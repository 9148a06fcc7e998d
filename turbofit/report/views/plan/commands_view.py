"""What a plan hands out to copy: first what keeps its limits, then the engines' own commands."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import QUEUED, groups_of
from turbofit.report.painters.document import (
    ONLY_SHORT,
    ONLY_WHOLE,
    Code,
    Heading,
    Paragraph,
    remark,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.plan import Command, Plan
    from turbofit.report.painters.document import Block

_WIDTH: Final = 76
#: With the indent of a terminal a line of 80.
_ONE_LINE: Final = 78
_PORT: Final = "--server-port"
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


def command_blocks(plan: Plan) -> list[Block]:
    """What serves the plan, and each engine's own command; a page begins with the former.

    The short answer has the first engine's command alone, and where that does not keep the plan,
    none.
    """
    if not plan.commands:
        return []
    title = "Commands" if plan.fits else "Commands (would not serve)"
    blocks: list[Block] = [Heading(title)]
    if plan.serve is not None:
        if note := serve_note(plan):
            blocks.append(remark(note, **ONLY_WHOLE))
        blocks.append(Code(shell_words(plan.serve.argv), page=False, short=plan.fits))
    queues = QUEUED in plan.warnings
    shown = plan.fits and not queues
    if plan.fits and queues:
        blocks.append(remark(f"{unheld(plan)} (--full has its command)", **ONLY_SHORT))
    blocks.append(remark(f"{unheld(plan)}:", short=shown))
    if plan.machine.source == "preset":
        text = "GPUs by index: a preset has no UUIDs; plan on the machine itself to pin them"
        blocks.append(remark(text))
    for place, one in enumerate(plan.commands):
        if len(plan.commands) > 1:
            heading = f"GPU {groups_of([plan.parallel.groups[one.group]])}"
            blocks.append(Heading(heading, level=3, whole=False))
        name = f"the command of group {one.group}"
        blocks.append(Code(shell_words(one.argv, one.env), name=name, short=shown and not place))
    said = _same_elsewhere(plan)
    return [*blocks, Paragraph(said, **ONLY_SHORT)] if said and shown else blocks


def serve_note(plan: Plan) -> str:
    """Where the command that serves is to be run, where that is not here."""
    return "" if plan.machine.source == "nvml" else "on such a machine:"


def unheld(plan: Plan) -> str:
    """What the engines' own commands do not do."""
    if not plan.engine.of_lmdeploy:
        return "turbofit's server for Transformers alone does not limit the size of images"
    if QUEUED in plan.warnings:
        return "LMDeploy alone does not keep this plan: it queues no images and holds no limits"
    return "LMDeploy alone holds no limits; a client that asks for more can end it"


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


def shell_words(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Words as a shell reads them; on one line where that is short.

    Args:
        argv: the words.
        environment: variables of the command alone.
    """
    env = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    arguments = [shlex.quote(word) for word in argv]
    line = " ".join((*env, *arguments))
    if len(line) <= _ONE_LINE:
        return line
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    chunks: list[str] = []
    for word in arguments[first:]:
        if word.startswith("-") or not chunks:
            chunks.append(word)
        else:
            chunks[-1] += f" {word}"
    lines = _fill(env, "") + _fill([" ".join(arguments[:first])], "") + _fill(chunks, "    ")
    return " \\\n".join(lines)


def _fill(chunks: list[str], indent: str) -> list[str]:
    lines: list[str] = []
    for chunk in chunks:
        if lines and len(lines[-1]) + 1 + len(chunk) <= _WIDTH:
            lines[-1] += f" {chunk}"
        else:
            lines.append(f"{indent}{chunk}")
    return lines
