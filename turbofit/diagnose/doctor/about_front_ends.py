"""Transformers beside LMDeploy: which families the installed pair runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.model.families.engines import engine_problem
from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility

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
    engines = [one for one in ("turbomind", "pytorch") if engine_problem(model, one) is None]
    told, wanted = [], None
    for engine in engines:
        front = FrontEnd(lmdeploy, model.architecture, engine)
        failure = front.failure(transformers)
        if failure is not None:
            told.append(f"{engine} {EFFECTS[failure.step]} ({failure.error})")
            wanted = wanted or front.requirement()
    if not told:
        return ok(_CHECK, seen)
    state = stops if len(told) == len(engines) else warning
    fix = f"pip install '{wanted}'" if wanted else "use another model, or --engine transformers"
    return state(_CHECK, f"{seen}: {'; '.join(told)}", _WHY, fix)


def _of_all(lmdeploy: str, transformers: str) -> Finding:
    """A warning only where the newest versions run more: no version runs every family."""
    seen = f"LMDeploy {lmdeploy}, Transformers {transformers}"
    newest = compatibility().transformers[-1]
    told: dict[str, list[str]] = {}
    mended = False
    for engine, architectures in compatibility().families.items():
        for architecture in architectures:
            front = FrontEnd(lmdeploy, architecture, engine)
            wanted = front.requirement()
            if wanted is not None and front.failure(transformers) is not None:
                names = told.setdefault(wanted, [])
                names += [architecture] if architecture not in names else []
                mended = mended or front.failure(newest) is None
    if not told:
        return ok(_CHECK, seen)
    said = "; ".join(f"{', '.join(names)} ({wanted})" for wanted, names in told.items())
    if not mended:
        return ok(_CHECK, f"{seen}: not {said}")
    return warning(_CHECK, f"{seen}: not {said}", _WHY, f"pip install 'transformers=={newest}'")
