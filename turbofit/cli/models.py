"""``turbofit models``: what can be named without a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.core.model import Model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Only the form."""
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Show every preset."""
    from turbofit.cli.output import answer, show
    from turbofit.core.presets import load_yaml, preset_path

    found = [(name, _read(name)) for name in load_yaml(preset_path("models", "aliases"))]
    known = [(name, model) for name, model in found if not isinstance(model, str)]
    unsupported = [(name, why) for name, why in found if isinstance(why, str)]
    if args.json:
        import json

        from turbofit.core.struct import to_builtins

        document = {
            "models": {name: to_builtins(model) for name, model in known},
            "unsupported": dict(unsupported),
        }
        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        from turbofit.report.preset_view import models_view

        show(models_view(known, unsupported), markdown=args.md)
    return 0


def _read(name: str) -> Model | str:
    """The preset, or why there is no account for it."""
    from turbofit.core.errors import UsageError
    from turbofit.model.presets import preset_model

    try:
        return preset_model(name)
    except UsageError as exc:
        return exc.message
