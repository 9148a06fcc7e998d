"""``turbofit models`` and ``gpus``: what can be named instead of a checkpoint or in SPEC."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from turbofit.cli.command import Argument, command
from turbofit.cli.options.common_options import FORMS
from turbofit.cli.terminal.output import Form, answer, say, show

if TYPE_CHECKING:
    from turbofit.core.model import Model


@command(
    Argument("fragments", nargs=-1, metavar="[WORD]..."),
    *FORMS,
)
def models(fragments: tuple[str, ...], form: Form) -> int:
    from turbofit.cli.terminal import progress_display as terminal
    from turbofit.model.presets import presets_with

    presets = [(name, _read(name)) for name in presets_with(fragments)]
    known = [(name, model) for name, model in presets if not isinstance(model, str)]
    unsupported = [(name, why) for name, why in presets if isinstance(why, str)]
    if form.as_json:
        from turbofit.core.struct import to_json

        answer(to_json({"models": dict(known), "unsupported": dict(unsupported)}))
    else:
        from turbofit.report.painters.terminal import paint
        from turbofit.report.views.preset_view import models_view

        widest = max(map(len, paint(models_view(known, ())).splitlines()))
        hub_ids = form.md or not terminal.is_terminal(sys.stdout) or widest <= terminal.width()
        show(models_view(known, unsupported, hub_ids=hub_ids), markdown=form.md)
        if not hub_ids:
            say(f"hub ids are left out, they need {widest} columns: --md and --json have them")
    return 0


def _read(name: str) -> Model | str:
    """The preset, or why there is no account for it."""
    from turbofit.core.errors import UsageError
    from turbofit.model.presets import preset_model

    try:
        return preset_model(name)
    except UsageError as exc:
        return exc.message


@command(
    Argument("words", nargs=-1, metavar="[WORD]..."),
    *FORMS,
)
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
