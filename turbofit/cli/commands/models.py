"""``turbofit models``, ``gpus``, ``machine``, ``completion``: names, and the hardware here."""

from __future__ import annotations

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.main import SHELLS, complete
from turbofit.cli.options.common_options import FORMS, FULL, machine_options
from turbofit.cli.terminal.output import Form, answer, say, show
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.struct import to_json


@command(Argument("fragments", nargs=-1, metavar="[WORD]..."), *FORMS)
def models(fragments: tuple[str, ...], form: Form) -> int:
    """Show the preset models whose names have all ``fragments``, and those without support."""
    from turbofit.model.presets import presets_with

    presets = [(name, _read(name)) for name in presets_with(fragments)]
    known = [(name, model) for name, model in presets if not isinstance(model, str)]
    unsupported = [(name, why) for name, why in presets if isinstance(why, str)]
    if form.as_json:
        answer(to_json({"models": dict(known), "unsupported": dict(unsupported)}))
    else:
        from turbofit.report.views.preset_view import models_view

        show(models_view(known, unsupported), markdown=form.md)
    return 0


def _read(name: str) -> Model | str:
    """Return the preset's model, or the reason why turbofit cannot plan for it."""
    from turbofit.model.presets import preset_model

    try:
        return preset_model(name)
    except UsageError as exc:
        return exc.message


@command(Argument("words", nargs=-1, metavar="[WORD]..."), *FORMS)
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


@command(
    *machine_options(),
    Option("--save", metavar="FILE", type=PATH),
    FULL,
    *FORMS,
)
def machine(*, on: str | None, gpus: str | None, save: str | None, form: Form) -> int:
    """Show the machine here, or the machine of ``--on``; ``save`` is the file for a snapshot."""
    from turbofit.machine.source import machine_from, save_snapshot
    from turbofit.report.views.machine_view import machine_view

    hardware = machine_from(on, gpus=gpus)
    if save:
        save_snapshot(hardware, save)
        say(f"saved to {save}")
    form.show(hardware, machine_view)
    return 0


@command(Argument("shell", metavar="SHELL", type=click.Choice(SHELLS)))
def completion(shell: str) -> int:
    """Print a shell's completion script, which asks turbofit at each TAB."""
    return complete(f"{shell}_source")
