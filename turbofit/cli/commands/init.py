"""``turbofit init MODEL``: a profile from a plan."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import machine_options, model_argument, planning_options
from turbofit.cli.options.fields import filled
from turbofit.cli.options.profile_options import PROFILE, sections
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.core.profile import ProfileSection
    from turbofit.planning.request import PlanRequest

__all__ = ["init", "profile_text"]

_WIDTH: Final = 96
#: Of one run, and of no server that is started again and again.
_ONCE: Final = frozenset({"dry_run", "pretend_taken", "pretend_fail", "forget"})
_HEAD: Final = """\
# What `turbofit plan`, `serve` and `export systemd|compose|k8s` read with `-f {file}`.
# The command line comes before the environment, the environment before this file, this file before
# the defaults. A line that begins with # says what a plan chose on {created}, or the default.
# {verdict}
"""


@command(
    *model_argument(),
    *machine_options(),
    Option(
        "--out", metavar="FILE", type=PATH, default=PROFILE,
        help=f"the file (default {PROFILE}); - for stdout",
    ),
    Option("--force", is_flag=True, help="write over a file that is there"),
    *planning_options(),
)  # fmt: skip
def init(*, out: str, force: bool, **given: Any) -> int:
    """Plan, and write what was asked and what was promised."""
    from turbofit import api
    from turbofit.cli.terminal.output import answer
    from turbofit.core.process.files import write_output
    from turbofit.planning.plan import refusal
    from turbofit.planning.request import PlanRequest

    if out != "-" and not force and os.path.exists(out):
        raise UsageError(f"{out} is there already", hint="add --force, or name another --out")
    request = filled(PlanRequest, given)
    with under_way("planning"):
        plan = api.plan(request)
    if not plan.fits:
        raise refusal(plan)
    text = profile_text(request, plan, file=PROFILE if out == "-" else out)
    if out == "-":
        answer(text)
    else:
        write_output(out, text)
        answer(f"{out}\n")
    return 0


def profile_text(request: PlanRequest, plan: Plan, *, file: str) -> str:
    """A profile that promises what a plan does; the rest of the plan stands there as comments.

    What was asked holds, and the plan's images and context; ``file`` is what it will be called.
    """
    kept = request.given()
    kept["images"] = request.images
    kept.setdefault("context", None if "session_len" in kept else plan.settings.session_len)
    verdict = textwrap.fill(plan.verdict, _WIDTH).replace("\n", "\n# ")
    lines = [_HEAD.format(file=file, created=plan.created[:10], verdict=verdict)]
    chosen = _chosen(plan)
    for heading, section in sections().items():
        if heading == "model":
            lines.append(f"model: {_scalar(kept['model'])}")
            if request.revision is not None:
                lines[-1] = f"model:\n  model: {_scalar(kept['model'])}\n"
                lines[-1] += f"  revision: {_scalar(request.revision)}"
            continue
        lines += ["", f"{heading}:", *_lines(section, kept, chosen)]
    return "\n".join(lines) + "\n"


def _lines(section: ProfileSection, kept: Options, chosen: Options) -> Iterator[str]:
    """A comment and a line for each field; what is not kept is a comment, too."""
    for name in section.fields:
        if name in _ONCE:
            continue
        field = section.kind.model_fields[name]
        yield textwrap.fill(
            field.description or "", _WIDTH, initial_indent="  # ", subsequent_indent="  # "
        )
        value = kept.get(name)
        if value is not None:
            yield f"  {name.rstrip('_')}: {_scalar(value)}"
            continue
        usual = chosen.get(name, field.default)
        if name in section.secret:
            usual = "[env:CLIENT_KEY, file:keys/first]"
        elif usual is None or usual == ():
            usual = ""
        yield f"  # {name.rstrip('_')}: {_scalar(usual)}".rstrip()


def _chosen(plan: Plan) -> Options:
    """What the plan chose of what nobody fixed."""
    from turbofit.core.struct import to_builtins

    limits = plan.limits
    return {
        **to_builtins(plan.settings),
        "tp": plan.parallel.tp,
        "replicas": plan.parallel.replicas,
        "engine": plan.engine.name,
        "concurrency": plan.requests_at_once,
        "max_dynamic_patch": limits.max_dynamic_patch,
        "max_pixels": limits.max_pixels_per_image,
    }


def _scalar(value: object) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if not isinstance(value, str) or not value:
        return str(value)
    import yaml

    if value.startswith("["):
        return value
    return yaml.safe_dump(value, width=10**6, default_flow_style=True).partition("\n")[0]
