"""``turbofit models``: what can be named without a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli.command import Argument, command
from turbofit.cli.options.common_options import FORMS
from turbofit.cli.terminal.output import Form

if TYPE_CHECKING:
    from turbofit.core.model import Model


@command(
    Argument(
        "fragments", nargs=-1, metavar="[WORD]...",
        explained="only models whose name has all of these in it: awq, qwen 7b",
    ),
    *FORMS,
)  # fmt: skip
def models(fragments: tuple[str, ...], form: Form) -> int:
    from turbofit.model.presets import presets_with
    from turbofit.report.views.preset_view import models_view

    found = [(name, _read(name)) for name in presets_with(fragments)]
    known = [(name, model) for name, model in found if not isinstance(model, str)]
    unsupported = [(name, why) for name, why in found if isinstance(why, str)]
    document = {"models": dict(known), "unsupported": dict(unsupported)}
    form.show(document, lambda _: models_view(known, unsupported))
    return 0


def _read(name: str) -> Model | str:
    """The preset, or why there is no account for it."""
    from turbofit.core.errors import UsageError
    from turbofit.model.presets import preset_model

    try:
        return preset_model(name)
    except UsageError as exc:
        return exc.message
