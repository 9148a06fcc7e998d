"""``turbofit gpus``: what SPEC can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Only the form."""
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Show every preset."""
    from turbofit.cli.output import answer, show
    from turbofit.machine.presets import load_preset, preset_names

    known = [(name, load_preset(name)) for name in preset_names()]
    if args.json:
        import json

        from turbofit.core.struct import to_builtins

        document = {"gpus": {name: to_builtins(preset) for name, preset in known}}
        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        from turbofit.report.preset_view import gpus_view

        show(gpus_view(known), markdown=args.md)
    return 0
