"""``turbofit gpus``: what SPEC can name."""

from __future__ import annotations

from turbofit.cli.command import Argument, command
from turbofit.cli.options.common_options import FORMS

__all__ = ["gpus"]


@command(
    Argument(
        "words", nargs=-1, metavar="[WORD]...",
        explained="only cards whose name has all of these in it: 4090, rtx 24gb",
    ),
    *FORMS,
)  # fmt: skip
def gpus(words: tuple[str, ...], as_json: bool, md: bool) -> int:
    """Show presets."""
    from turbofit.cli.terminal.output import answer, show
    from turbofit.machine.presets import load_preset, presets_with
    from turbofit.machine.unlisted import no_preset

    known = [(name, load_preset(name)) for name in presets_with(words)]
    if not known:
        raise no_preset(" ".join(words))
    if as_json:
        import json

        from turbofit.core.struct import to_builtins

        document = {"gpus": {name: to_builtins(preset) for name, preset in known}}
        answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        from turbofit.report.views.plan.preset_view import gpus_view

        show(gpus_view(known), markdown=md)
    return 0
