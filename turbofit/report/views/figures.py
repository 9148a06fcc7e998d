"""Figures, settings and commands of a plan that several views show."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final

from turbofit.core.messages import QUEUED, groups_of, indices
from turbofit.core.plan import EnginePlan, Plan, alike
from turbofit.core.units import three_digits
from turbofit.memory.versions import is_legacy
from turbofit.planning.commands import ratio
from turbofit.report.painters.document import (
    ONLY_SHORT,
    ONLY_WHOLE,
    Block,
    Code,
    Heading,
    remark,
    table,
)
from turbofit.report.painters.terminal import filled

#: Settings that are listed only if they are neither false nor 0.
_SAID_WHERE_SET: Final = ("language_model_only", "eager_mode", "num_gpu_blocks")
_WIDTH: Final = 76
#: The longest command on one line: with a terminal's indent it fills 80 columns.
_ONE_LINE: Final = 78


def settings_of(engine: EnginePlan) -> dict[str, str]:
    """Return the settings that are set, as text, by LMDeploy's names."""
    out = {}
    for name, value in engine.lmdeploy_settings().items():
        if name == "cache_max_entry_count":
            out[name] = ratio(value)
        elif value is not None and (value or name not in _SAID_WHERE_SET):
            out[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return out


def shared_settings(plan: Plan, other: str = "by GPU (--full)") -> dict[str, str]:
    """Return the settings that all engines share, and ``other`` for those that differ."""
    settings: dict[str, str] = {}
    for engine in plan.engines:
        settings = settings_of(engine) | settings
    return settings | dict.fromkeys(differing(plan), other)


def differing(plan: Plan) -> tuple[str, ...]:
    """Return the names of the settings that differ between the plan's engines."""
    all_settings = [settings_of(engine) for engine in plan.engines]
    return tuple(
        name
        for name in dict.fromkeys(chain.from_iterable(all_settings))
        if len({settings.get(name) for settings in all_settings}) > 1
    )


def per_engine_blocks(plan: Plan) -> list[Block]:
    """Return a table of settings that differ between engines; equal engines share a column."""
    sets = alike(plan.engines)
    if len(sets) == 1:
        return []
    rows = [*differing(plan), "KV tokens", "requests there", "units in a forward"]
    if plan.promise.limits.vision_unit is None:
        rows.pop()
    columns = dict(_column(plan, numbers, rows) for numbers in sets)
    cells = zip(rows, *columns.values(), strict=True)
    title = Heading("Settings of each engine's own")
    return [title, table(("each engine", *columns), cells, right=columns)]


def _column(plan: Plan, numbers: tuple[int, ...], rows: list[str]) -> tuple[str, list[str]]:
    """Return the title and the cells of a set of equal engines."""
    engine = plan.engines[numbers[0]]
    cells = settings_of(engine) | {
        "KV tokens": f"{engine.kv.tokens:,}",
        "requests there": three_digits(engine.requests),
        "units in a forward": f"{engine.units_per_forward:,}",
    }
    gpus = [index for number in numbers for index in plan.groups[number]]
    return f"GPU {indices(gpus)}", [cells.get(name, "-") for name in rows]


def command_blocks(plan: Plan) -> list[Block]:
    """Return the command that serves the plan, and the command of each engine.

    The short answer has only the command that serves. For an older release of LMDeploy, the short
    answer also has LMDeploy's own command, once for equal engines. A page shows the command that
    serves only at its top.
    """
    commands = {engine.gpus: engine.command for engine in plan.engines if engine.command}
    if not commands:
        return []
    title = "Commands" if plan.fits else "Commands (would not serve)"
    blocks: list[Block] = [Heading(title)]
    if plan.serve is not None:
        if note := serve_note(plan):
            blocks.append(remark(note, **ONLY_WHOLE))
        blocks.append(Code(shell_words(plan.serve.argv), page=False, short=plan.fits))
    older = plan.fits and for_older_release(plan)
    blocks.append(remark(f"{limits_not_kept(plan)}:", short=older))
    if plan.machine.source == "preset":
        text = "GPUs by index: a preset has no UUIDs; plan on the machine itself to pin the GPUs"
        blocks.append(remark(text))
    equal_to_first = {numbers[0]: numbers[1:] for numbers in alike(plan.engines)}
    for number, (gpus, command) in enumerate(commands.items()):
        if len(commands) > 1:
            blocks.append(Heading(f"GPU {groups_of([gpus])}", level=3, whole=False))
        name = f"the command of group {number}"
        shown = older and number in equal_to_first
        blocks.append(Code(shell_words(command.argv, command.env), name=name, short=shown))
        if shown and (others := equal_to_first[number]):
            blocks.append(remark(_same_on(plan, others), **ONLY_SHORT))
    return blocks


def _same_on(plan: Plan, numbers: Sequence[int]) -> str:
    """Return a note with the GPUs and ports of the equal engines with these ``numbers``."""
    engines = (plan.engines[number] for number in numbers)
    commands = [engine.command for engine in engines if engine.command]
    gpus = " | ".join(command.env["CUDA_VISIBLE_DEVICES"] for command in commands)
    ports = " | ".join(it.argv[it.argv.index("--server-port") + 1] for it in commands)
    return f"the same command on GPU {gpus}, with --server-port {ports}"


def for_older_release(plan: Plan) -> bool:
    """Return whether a plan, not a prediction, is for an LMDeploy before the reference release."""
    return plan.backend.of_lmdeploy and is_legacy(plan.backend.version) and bool(plan.considered)


def serve_note(plan: Plan) -> str:
    """Return the words above the command that serves the plan; "" if this machine was measured.

    A plan for a described machine has to say where its command may be run.
    """
    return "" if plan.machine.source == "nvml" else "on this kind of machine:"


def limits_not_kept(plan: Plan) -> str:
    """Return a sentence on the limits that an engine alone does not keep."""
    if not plan.backend.of_lmdeploy:
        return "turbofit's server for Transformers alone does not limit the size of images"
    if QUEUED in plan.warnings:
        return "LMDeploy alone does not keep this plan: it queues no images and holds no limits"
    return "LMDeploy alone holds no limits: a client that asks for more can end the engine"


def shell_words(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Return a command and its variables for a shell; a short command stays on one line."""
    env = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    # The first chunk is the command; each further chunk is an option with its values.
    chunks: list[str] = []
    for word in map(shlex.quote, argv):
        if word.startswith("-") or not chunks:
            chunks.append(word)
        else:
            chunks[-1] += f" {word}"
    line = " ".join((*env, *chunks))
    if len(line) <= _ONE_LINE:
        return line
    options = (f"    {line}" for line in filled(chunks[1:], _WIDTH - 4))
    return " \\\n".join((*filled(env, _WIDTH), chunks[0], *options))
