"""Modules beside LMDeploy that one model needs: it ends without them, some after it has loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning
from turbofit.memory.engines import ENGINES, LMDEPLOY
from turbofit.model.families.engines import engine_problem
from turbofit.planning.needed_modules import modules_for

if TYPE_CHECKING:
    from turbofit.core.model import Model
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["module_finding"]

_CHECK = "modules"
_WHY = "LMDeploy imports them for this model alone, and ends without them"


def module_finding(sources: Sources, model: Model, *, drafts: bool) -> Finding:
    """What is missing; a warning where another engine needs none of it.

    Args:
        sources: what is read.
        model: what will be served.
        drafts: whether speculative decoding is asked for.
    """
    if sources.version("lmdeploy") is None:
        return unreadable(_CHECK, "LMDeploy is not installed here", _WHY)
    engines = [one for one in LMDEPLOY if engine_problem(model, one) is None]
    if drafts:
        engines = [one for one in engines if "speculative" in ENGINES[one].exclusive_options]
    missing = {
        engine: [
            one
            for one in modules_for(model, engine, drafts=drafts)
            if not sources.has_module(one.name)
        ]
        for engine in engines
    }
    lacking = {engine: modules for engine, modules in missing.items() if modules}
    if not lacking:
        return ok(_CHECK, f"{model.name} needs none that is missing")
    told = "; ".join(
        f"{engine}: {', '.join(one.title for one in modules)} not installed"
        for engine, modules in lacking.items()
    )
    mends = dict.fromkeys(one.mend for modules in lacking.values() for one in modules)
    state = stops if len(lacking) == len(engines) else warning
    return state(_CHECK, f"{model.name} on {told}", _WHY, "; ".join(mends))
