"""``turbofit predict MODEL``: what given settings would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """The options of `plan`, and what a log or another engine generation says."""
    options.add_model(parser)
    options.add_machine(parser)
    options.add_planning(parser)
    options.add_settings(parser)
    parser.add_argument("--lmdeploy", metavar="VERSION", help="LMDeploy's version (default 0.18)")
    parser.add_argument(
        "--free-at-cache",
        type=options.size,
        metavar="BYTES",
        help="free memory when the cache was sized, as a log said it",
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Predict and show; exit 3 where the settings would not serve."""
    from turbofit import api
    from turbofit.cli.output import patience
    from turbofit.cli.plan import show_plan

    keywords = options.planning_keywords(args)
    for name in ("lmdeploy", "free_at_cache"):
        if getattr(args, name) is not None:
            keywords[name] = getattr(args, name)
    with patience("predicting"):
        plan = api.predict(args.model, **keywords)
    return show_plan(plan, args, "predict")
