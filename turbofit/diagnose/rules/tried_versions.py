"""Which versions of Transformers run a log's model, where `bench.compatibility` tried them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.memory.versions import REFERENCE
from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility, install_line

if TYPE_CHECKING:
    from turbofit.diagnose.case import LogCase

__all__ = ["tried_versions"]


def tried_versions(case: LogCase | None, error: str, family: str | None = None) -> tuple[str, ...]:
    """What to install, or that nothing helps; empty where no such failure of the family was seen.

    Args:
        case: the log; LMDeploy's version is the log's, else turbofit's reference.
        error: a part of the failure's message.
        family: the architecture, where the error itself says it; else the log's model has it.
    """
    if case is None:
        return ()
    model = case.model
    name = model.name if model else "this model"
    family = family or (model.architecture if model else None)
    lmdeploy = case.facts.subject.version or REFERENCE
    for front in _fronts(lmdeploy, family):
        failure = front.failed_with(error)
        if failure is None:
            continue
        oldest = front.oldest_allowed()
        every = (f"transformers>={oldest}",) if oldest else ()
        wanted = install_line(front.requirements() or every)
        if wanted:
            return (f"{wanted}: with these LMDeploy {lmdeploy} runs {name}",)
        return (
            f"turbofit serve --engine transformers: LMDeploy {lmdeploy} {EFFECTS[failure.step]}"
            f" ({name}), whichever version of Transformers was tried",
        )
    return ()


def _fronts(lmdeploy: str, family: str | None) -> list[FrontEnd]:
    """Of both engines, with each code that checkpoints of the family bring along."""
    if family is None:
        return []
    failed = {name for one in compatibility().failures for name in one.architectures}
    names = sorted(name for name in failed if name.partition("+")[0] == family)
    return [
        FrontEnd(lmdeploy, name, engine) for name in names for engine in compatibility().families
    ]
