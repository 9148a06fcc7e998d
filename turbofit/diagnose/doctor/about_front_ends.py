"""Transformers beside LMDeploy: which families the installed pair runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.memory.engines import LMDEPLOY
from turbofit.model.families.engines import engine_problem
from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility, install_line

if TYPE_CHECKING:
    from turbofit.core.model import Model
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["front_end_finding"]

_CHECK = "front_ends"
_WHY = "LMDeploy reads configs and images through Transformers, and some versions break that"


def front_end_finding(sources: Sources, model: Model | None) -> Finding:
    """What the installed pair does: with one model, or with all families."""
    lmdeploy, transformers = sources.version("lmdeploy"), sources.version("transformers")
    if lmdeploy is None or transformers is None:
        return unreadable(_CHECK, "LMDeploy and Transformers are not both installed", _WHY)
    if model is not None and model.vision is not None:
        return _of_model(lmdeploy, transformers, model)
    return _of_all(lmdeploy, transformers)


def _of_model(lmdeploy: str, transformers: str, model: Model) -> Finding:
    """A failure on one engine is a warning: another engine serves the model."""
    seen = f"{model.name}, LMDeploy {lmdeploy}, Transformers {transformers}"
    engines = [one for one in LMDEPLOY if engine_problem(model, one) is None]
    told: list[str] = []
    wanted: tuple[str, ...] = ()
    for engine in engines:
        front = FrontEnd(lmdeploy, model.architecture, engine)
        failure = front.failure(transformers)
        if failure is not None:
            told.append(f"{engine} {EFFECTS[failure.step]} ({failure.error})")
            wanted = wanted or front.requirements()
    if not told:
        return ok(_CHECK, seen)
    state = stops if len(told) == len(engines) else warning
    fix = install_line(wanted) or "use another model, or --engine transformers"
    return state(_CHECK, f"{seen}: {'; '.join(told)}", _WHY, fix)


def _of_all(lmdeploy: str, transformers: str) -> Finding:
    """A warning only where the newest version runs more families: none runs every one."""
    seen = f"LMDeploy {lmdeploy}, Transformers {transformers}"
    not_run = _families_not_run(lmdeploy, transformers)
    if not not_run:
        return ok(_CHECK, seen)
    newest = FrontEnd(lmdeploy, "", "").tested_versions()[-1]
    seen += f": not {'; '.join(f'{name} ({wanted})' for name, wanted in not_run.items())}"
    if len(not_run) <= len(_families_not_run(lmdeploy, newest)):
        return ok(_CHECK, seen)
    return warning(_CHECK, seen, _WHY, f"pip install 'transformers=={newest}'")


def _families_not_run(lmdeploy: str, transformers: str) -> dict[str, str]:
    """Families that do not run, and with which versions they do; none that runs with no version."""
    not_run = {}
    for engine, architectures in compatibility().families.items():
        for architecture in architectures:
            front = FrontEnd(lmdeploy, architecture, engine)
            wanted = " or ".join(front.requirements()[:2]).replace("transformers", "")
            if wanted and front.failure(transformers) is not None:
                not_run[architecture] = wanted
    return not_run
