"""Figures, settings and commands of a plan that several views show."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import QUEUED, groups_of, indices, plural
from turbofit.core.struct import Struct
from turbofit.core.units import three_digits
from turbofit.planning.commands import ratio
from turbofit.report.painters.document import (
    ONLY_WHOLE,
    Code,
    Heading,
    remark,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.plan import Plan
    from turbofit.report.painters.document import Block

#: Sizes of the example conversations: tokens of text, prompt and answer together.
_TEXT: Final = (512, 2048, 8192, 32768)


class Users(Struct):
    """How many conversations of this many tokens the caches hold, and how many run at once."""

    what: str
    tokens: int
    in_cache: int
    running: int


def images_held(plan: Plan) -> int | None:
    """Images of the worst size that the caches hold without text; None if it takes no images."""
    kv, limits, groups = plan.kv, plan.limits, plan.group_plans()
    per_image = -(-_pictures(plan) // max(1, limits.images_per_request))
    if not per_image:
        return None
    if plan.engine.serial:  # a group answers one request at a time
        return limits.images_per_request * len(groups) if kv.longest_request_tokens else 0
    return sum(group.kv.tokens // per_image for group in groups)


def users_of(plan: Plan) -> list[Users]:
    """Conversations of several sizes; the longest request comes last."""
    groups, pictures, longest = plan.group_plans(), _pictures(plan), plan.kv.longest_request_tokens
    images = plan.limits.images_per_request
    beside = f"{images} worst {plural(images, 'image')} and " if pictures else ""
    rows = [
        _users(groups, f"{beside}{text:,} tokens of text", pictures + text)
        for text in _TEXT
        if 0 < pictures + text < longest
    ]
    return [*rows, _users(groups, "the longest request", longest)] if longest else rows


def _pictures(plan: Plan) -> int:
    """The tokens of a request's images."""
    return largest_images(plan)[1] if plan.limits.vision_unit else 0


def largest_images(plan: Plan) -> tuple[int, int]:
    """Return the units of the largest image that is served, and the tokens of a request of them.

    LMDeploy refuses a request whose tokens and one token of text exceed a session.
    """
    limits, rule, room = plan.limits, plan.model.image_rule, plan.settings.session_len - 1
    whole = limits.units_per_image, limits.image_tokens_per_request
    if rule is None or plan.throughput is None or limits.image_tokens_per_request <= room:
        return whole
    return rule.images_in(limits.images_per_request, room, limits.units_per_image)


def _users(groups: Sequence[Plan], what: str, tokens: int) -> Users:
    in_cache = running = 0
    for plan in groups:
        most = plan.settings.requests_in(plan.kv.tokens, tokens)
        if plan.engine.serial:
            most = min(1, plan.kv.tokens // tokens)
        in_cache += most
        running += min(most, plan.settings.max_batch_size)
    return Users(what=what, tokens=tokens, in_cache=in_cache, running=running)


_SAID_WHERE_SET: Final = ("language_model_only", "eager_mode", "num_gpu_blocks")
#: Engines in one table; more engines start a new table, because a line has 80 columns.
_ABREAST: Final = 3


def settings_of(plan: Plan) -> dict[str, str]:
    """The settings under LMDeploy's names, as text, without those that LMDeploy is not given."""
    out = {}
    for name, value in plan.lmdeploy_settings().items():
        if name == "cache_max_entry_count":
            out[name] = ratio(value)
        elif value is not None and (value or name not in _SAID_WHERE_SET):
            out[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return out


def differing(plan: Plan) -> tuple[str, ...]:
    """The names of the settings that differ between the plan's engines."""
    all_settings = [settings_of(plan.of_group(numbers[0])) for numbers in plan.unlike_groups()]
    return tuple(
        name
        for name in all_settings[0]
        if len({settings.get(name) for settings in all_settings}) > 1
    )


def per_engine_blocks(plan: Plan) -> list[Block]:
    """The settings that differ between engines; engines with equal settings share a column."""
    if not plan.by_group:
        return []
    rows = [*differing(plan), "KV tokens", "requests there", "units in a forward"]
    if plan.limits.vision_unit is None:
        rows.pop()
    columns = [_column(plan, numbers, rows) for numbers in plan.unlike_groups()]
    blocks: list[Block] = [Heading("Settings of each engine's own")]
    for start in range(0, len(columns), _ABREAST):
        part = dict(columns[start : start + _ABREAST])
        cells = (
            (name, *(column[row] for column in part.values())) for row, name in enumerate(rows)
        )
        blocks.append(table(("each engine", *part), cells, right=part))
    return blocks


def _column(plan: Plan, numbers: tuple[int, ...], rows: list[str]) -> tuple[str, list[str]]:
    group_plan = plan.by_group[numbers[0]]
    cells = settings_of(plan.of_group(numbers[0])) | {
        "KV tokens": f"{group_plan.kv.tokens:,}",
        "requests there": three_digits(group_plan.at_once),
        "units in a forward": f"{group_plan.units_per_forward:,}",
    }
    gpus = [index for number in numbers for index in plan.parallel.groups[number]]
    return f"GPU {indices(gpus)}", [cells.get(name, "-") for name in rows]


_WIDTH: Final = 76
#: The longest command on one line: with a terminal's indent it fills 80 columns.
_ONE_LINE: Final = 78


def command_blocks(plan: Plan) -> list[Block]:
    """The command that serves the plan, first on a page, and the command of each engine.

    The short answer has the first alone.
    """
    if not plan.commands:
        return []
    title = "Commands" if plan.fits else "Commands (would not serve)"
    blocks: list[Block] = [Heading(title)]
    if plan.serve is not None:
        if note := serve_note(plan):
            blocks.append(remark(note, **ONLY_WHOLE))
        blocks.append(Code(shell_words(plan.serve.argv), page=False, short=plan.fits))
    blocks.append(remark(f"{unheld(plan)}:"))
    if plan.machine.source == "preset":
        text = "GPUs by index: a preset has no UUIDs; plan on the machine itself to pin them"
        blocks.append(remark(text))
    for command in plan.commands:
        if len(plan.commands) > 1:
            heading = f"GPU {groups_of([plan.parallel.groups[command.group]])}"
            blocks.append(Heading(heading, level=3, whole=False))
        name = f"the command of group {command.group}"
        blocks.append(Code(shell_words(command.argv, command.env), name=name))
    return blocks


def serve_note(plan: Plan) -> str:
    """A note on where to run the command that serves; empty for this machine."""
    return "" if plan.machine.source == "nvml" else "on such a machine:"


def unheld(plan: Plan) -> str:
    """What the engines' own commands do not do, in a sentence."""
    if not plan.engine.of_lmdeploy:
        return "turbofit's server for Transformers alone does not limit the size of images"
    if QUEUED in plan.warnings:
        return "LMDeploy alone does not keep this plan: it queues no images and holds no limits"
    return "LMDeploy alone holds no limits; a client that asks for more can end it"


def shell_words(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command and its variables in the syntax of a shell; short commands stay on one line."""
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
    lines = _fill(env, "") + chunks[:1] + _fill(chunks[1:], "    ")
    return " \\\n".join(lines)


def _fill(chunks: list[str], indent: str) -> list[str]:
    lines: list[str] = []
    for chunk in chunks:
        if lines and len(lines[-1]) + 1 + len(chunk) <= _WIDTH:
            lines[-1] += f" {chunk}"
        else:
            lines.append(f"{indent}{chunk}")
    return lines
