"""``turbofit download MODEL``: its checkpoint on disk, where plans and engines then find it."""

from __future__ import annotations

from turbofit.cli.command import command
from turbofit.cli.options.common_options import model_argument
from turbofit.planning.request import PlanRequest


@command(*model_argument(), only_linux=True)
def download(*, model: str, revision: str | None) -> int:
    from turbofit.cli.terminal.output import answer, say
    from turbofit.core.errors import UsageError
    from turbofit.launch.serve.download import fetched
    from turbofit.planning.resolve import model_of

    known = model_of(PlanRequest(model=model, revision=revision))
    folder = fetched(known, say).source.checkpoint
    if folder is None:
        raise UsageError(
            f"{model} has no repository that is known here",
            hint="give a hub id: turbofit models lists them",
        )
    answer(f"{folder}\n")
    return 0
