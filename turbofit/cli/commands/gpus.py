"""``turbofit gpus``: what SPEC can name."""

from __future__ import annotations

from turbofit.cli.command import Argument, command
from turbofit.cli.options.common_options import FORMS
from turbofit.cli.terminal.output import Form


@command(
    Argument(
        "words", nargs=-1, metavar="[WORD]..."
    ),
    *FORMS,
)  # fmt: skip
def gpus(words: tuple[str, ...], form: Form) -> int:
    from turbofit.machine.presets import load_preset, presets_with
    from turbofit.machine.unlisted import no_preset
    from turbofit.report.views.preset_view import gpus_view

    known = [(name, load_preset(name)) for name in presets_with(words)]
    if not known:
        raise no_preset(" ".join(words))
    document = {"gpus": dict(known)}
    form.show(document, lambda _: gpus_view(known))
    return 0
