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
    from turbofit.cli.terminal.output import show_form
    from turbofit.machine.presets import load_preset, presets_with
    from turbofit.machine.unlisted import no_preset
    from turbofit.report.views.preset_view import gpus_view

    known = [(name, load_preset(name)) for name in presets_with(words)]
    if not known:
        raise no_preset(" ".join(words))
    document = {"gpus": dict(known)}
    show_form(document, lambda _: gpus_view(known), as_json=as_json, md=md)
    return 0
