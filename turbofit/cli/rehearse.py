"""``turbofit rehearse MODEL``: the plan's settings and worst cases before the real engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli import options
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]

#: Engines that run on torch: their own defaults are rehearsed without a plan.
_TORCH: Final = ("pytorch", "transformers")
#: What only a plan or another engine can use.
_PLANNED: Final = (
    "replicas", "context", "concurrency", "goal", "queue_images", "margin", "budget",
)  # fmt: skip
_TURBOMIND: Final = ("communicator", "async_")


def add_arguments(parser: Parser) -> None:
    """The options of `plan`; with `--defaults` LMDeploy's own settings are rehearsed."""
    options.add_model(parser)
    options.add_machine(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    parser.add_argument(
        "--defaults", action="store_true", help="LMDeploy's defaults instead of turbofit's plan"
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="keep timelines and log here (with --defaults of an engine on torch)",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Rehearse and show; exit 3 where the engine did not serve."""
    from turbofit import api
    from turbofit.cli.output import note
    from turbofit.cli.plan import show_plan

    if args.engine == "transformers" or (args.engine == "pytorch" and args.defaults):
        return _run_torch(args)
    if args.keep is not None:
        raise UsageError(
            "--keep is for what is rehearsed without a plan", hint="add --engine pytorch --defaults"
        )
    note("pretend GPUs: memory, admission and death are the engine's own; nothing is computed")
    keywords = options.planning_keywords(args)
    plan = api.rehearse(args.model, defaults=args.defaults, **keywords)
    code = show_plan(plan, args, "rehearse")
    served = plan.rehearsal is not None and plan.rehearsal.outcome == "served"
    return code if served or code else 3


def _run_torch(args: argparse.Namespace) -> int:
    from turbofit import api
    from turbofit.cli.output import answer, note, show
    from turbofit.report.torch_view import torch_view

    given = options.planning_keywords(args)
    _check(args.engine, given)
    note("pretend GPUs: memory, admission and death are the engine's own; values are not")
    document = api.rehearse_torch(args.model, keep=args.keep, **given)
    if args.json:
        import json

        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        show(torch_view(document), markdown=args.md)
    return 0 if document["outcome"] == "served" else 3


def _check(engine: str, given: dict[str, Any]) -> None:
    """Refuse what this engine has no use for, rather than leave it unheard."""
    from turbofit.planning.request import ENGINE_OPTIONS

    for name in _PLANNED:
        if name in given:
            raise UsageError(
                f"{_flag(name)} shapes a plan, and none is made for the {engine} engine",
                hint="give the engine's own options, such as --session-len or --max-batch-size",
            )
    unused = set(_TURBOMIND)
    if engine == "transformers":
        unused |= {*ENGINE_OPTIONS, "tp"} - {"dtype"}
    for name in sorted(unused & set(given)):
        raise UsageError(
            f"{_flag(name)} is no option of the {engine} engine",
            hint=f"leave it out, or rehearse with --engine "
            f"{'turbomind' if name in _TURBOMIND else 'pytorch'}",
        )


def _flag(name: str) -> str:
    return f"--{name.rstrip('_').replace('_', '-')}"
