"""Which engine runs a model, and its account."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import Model
from turbofit.memory import versions
from turbofit.memory.engine import Engine
from turbofit.memory.pytorch.constants import load_constants as load_torch_constants
from turbofit.memory.pytorch.engine import Pytorch
from turbofit.memory.turbomind.constants import load_constants
from turbofit.memory.turbomind.engine import Turbomind
from turbofit.model.families.support import engine_problem

__all__ = ["ENGINES", "FALLBACK", "check_options", "engine_for", "engine_named", "fallback_reason"]

#: LMDeploy's engines, and how each is made of a version that has presets; in the order of
#: preference: TurboMind decodes faster and sizes what it takes.
_KINDS: Final[dict[str, Callable[[str], Engine]]] = {
    "turbomind": lambda version: Turbomind(load_constants(version)),
    "pytorch": lambda version: Pytorch(load_torch_constants(version)),
}
ENGINES: Final = tuple(_KINDS)
#: What runs a model that LMDeploy does not, one request at a time.
FALLBACK: Final = "transformers"


def check_options(engine: Engine, fixed: Mapping[str, object]) -> None:
    """Refuse what the engine would not hear.

    Raises:
        UsageError: an option is the other engine's.
    """
    for owner in (Turbomind, Pytorch):
        found = [name for name in owner.own_options if name in fixed]
        if owner.name != engine.name and found:
            flag = found[0].rstrip("_").replace("_", "-")
            raise UsageError(
                f"--{flag} is no option of the {engine.name} engine",
                hint=f"leave it out, or take --engine {owner.name} where it runs the model",
            )


def engine_named(name: str, version: str | None = None) -> Engine:
    """The engine of a version of LMDeploy such as ``0.18``; its account may be an older one's.

    Raises:
        PackageError: turbofit has no account for it.
    """
    if version and versions.is_legacy(version):
        from turbofit.memory.legacy.legacy_engines import LegacyPytorch, LegacyTurbomind

        return LegacyTurbomind(version) if name == "turbomind" else LegacyPytorch(version)
    known = versions.account_version(name, version) if name in ENGINES else None
    if known is None:
        raise PackageError(
            f"turbofit has no memory account for the {name} engine of LMDeploy"
            f" {version or versions.REFERENCE}",
            hint=f"it has them for {' and '.join(ENGINES)} of {versions.REFERENCE}",
        )
    engine = _KINDS[name](known)
    engine.doubt = versions.doubt(name, version)
    return engine


def fallback_reason(model: Model, asked: str) -> str | None:
    """Why a model is planned for Transformers instead of LMDeploy; None where LMDeploy runs it.

    Raises:
        UsageError: Transformers does not run it either.
        PackageError: no engine of this name is known.
    """
    if asked not in ("auto", *ENGINES, FALLBACK):
        raise PackageError(
            f"turbofit has no memory account for the engine {asked}",
            hint=f"it has them for {', '.join((*ENGINES, FALLBACK))}",
        )
    problems = [engine_problem(model, name) for name in ENGINES]
    if asked in ENGINES or (asked == "auto" and None in problems):
        return None
    problem = engine_problem(model, FALLBACK)
    if problem is not None:
        raise UsageError(problem, hint="see docs/models.md for what runs where")
    return "as asked" if asked == FALLBACK else str(problems[0])


def engine_for(model: Model, asked: str = "auto", version: str | None = None) -> Engine:
    """The engine that was asked for, or the first that runs the model.

    LMDeploy's own choice is by the outer architecture alone, so that it starts TurboMind for
    models whose inner language model it cannot load, and fails.

    Raises:
        UsageError: the engine does not run the model, or none does.
        PackageError: turbofit has no account for the engine.
    """
    if version and versions.is_legacy(version):
        if model.text.delta is not None:
            raise UsageError(
                f"turbofit has no account of gated delta nets with LMDeploy {version}",
                hint=f"it has one for the PyTorch engine of {versions.REFERENCE}",
            )
        from turbofit.memory.legacy.generations import generation_of

        if model.vision is not None and generation_of(version).vision.runs == "none":
            raise UsageError(
                f"LMDeploy {version} runs no vision tower, and {model.name} has one",
                hint="towers came with 0.2.6",
            )
        # Towers ran under torch then: what decides is the language model alone.
        model = replace(model, vision=None, architecture=model.text.architecture)
    wanted = ENGINES if asked == "auto" else (asked,)
    problems = [engine_problem(model, name) for name in wanted]
    for name, problem in zip(wanted, problems, strict=True):
        if problem is None:
            return engine_named(name, version)
    others = [one for one in ENGINES if one not in wanted and engine_problem(model, one) is None]
    hint = f"--engine {others[0]} does" if others else "see turbofit models for what runs"
    raise UsageError(str(problems[0]), hint=hint)
