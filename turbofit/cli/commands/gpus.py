"""``turbofit gpus``: what SPEC can name."""

from __future__ import annotations

from turbofit.cli.command import command
from turbofit.cli.options.common_options import FORMS

__all__ = ["gpus"]


@command(*FORMS)
def gpus(as_json: bool, md: bool) -> int:
    """Show every preset."""
    from turbofit.cli.terminal.output import answer, show
    from turbofit.machine.presets import load_preset, preset_names

    known = [(name, load_preset(name)) for name in preset_names()]
    if as_json:
        import json

        from turbofit.core.struct import to_builtins

        document = {"gpus": {name: to_builtins(preset) for name, preset in known}}
        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        from turbofit.report.views.plan.preset_view import gpus_view

        show(gpus_view(known), markdown=md)
    return 0
