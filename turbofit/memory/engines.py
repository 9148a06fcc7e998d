"""Chooses the engine that runs a model, and creates its account."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import PackageError, UsageError, option_of
from turbofit.core.model import Model
from turbofit.core.plan import SPECULATIVE, Plan
from turbofit.core.version import REFERENCE
from turbofit.memory import versions
from turbofit.memory.account import Engine
from turbofit.memory.versions import not_listed
from turbofit.model.families.engines import engine_problem

#: The hint for an option of another engine, if the hint is more than the name of that engine.
_WAYS: Final = {
    **dict.fromkeys(
        SPECULATIVE,
        "TurboMind ignores drafts with a warning: leave the option out, or take `--engine pytorch`",
    ),
    "adapters": "turbofit merge BASE ADAPTER OUT makes a whole model of each adapter, without loss"
    " of speed; `--engine pytorch` holds the base once, and computes each adapter in addition",
}


class EngineKind(NamedTuple):
    """An engine: the path of a class that is imported when needed, and the engine's own options."""

    path: str
    exclusive_options: tuple[str, ...] = ()
    exclusive_values: Mapping[str, frozenset[object]] = {}

    def create(self, *version: str) -> Engine:
        """Create the engine of a version from the module with its formulas.

        Transformers has no version.
        """
        folder, module, name = self.path.split(".")
        newer = versions.formulas(folder, *version) if version else None
        formulas = import_module(f"turbofit.memory.{folder}.{newer or module}")
        engine: Engine = getattr(formulas, name)(*version)
        return engine


#: The engines in the order of preference: TurboMind decodes faster, and its memory is better known.
#: Transformers runs models that LMDeploy cannot run, one request at a time.
ENGINES: Final = {
    "turbomind": EngineKind("turbomind.account.Turbomind", ("communicator", "async_")),
    "pytorch": EngineKind(
        "pytorch.account.Pytorch",
        ("num_gpu_blocks", "eager_mode", "cudagraph_capture_batch_sizes",
         "distributed_executor_backend", "prefix_cache_state_budget", "adapters", *SPECULATIVE),
        {"quant_policy": frozenset({16, 17, 42})},
    ),
    "transformers": EngineKind("transformers.account.Transformers"),
}  # fmt: skip
_SEE_MODELS: Final = "`turbofit models` lists the models that run"
#: The names of LMDeploy's engines.
LMDEPLOY: Final = tuple(name for name in ENGINES if name != "transformers")


def check_options(engine: Engine, engine_options: Mapping[str, object]) -> None:
    """Refuse options that the engine would ignore.

    Raises:
        UsageError: an option belongs to another engine.
    """
    engine.check_options(engine_options)
    for name, owner in ENGINES.items():
        options = [option for option in owner.exclusive_options if option in engine_options]
        if name != engine.name and options:
            way = f"leave the option out, or take `--engine {name}` if that engine runs the model"
            raise UsageError(
                f"`{option_of(options[0])}` is no option of the {engine.name} engine",
                hint=_WAYS.get(options[0], way),
                options=[options[0], "engine"],
            )


def option_owner(engine_options: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the engine and the name of the first option that only one engine accepts, or None."""
    for name, owner in ENGINES.items():
        for option, value in engine_options.items():
            if option in owner.exclusive_options:
                return name, option_of(option)
            if value in owner.exclusive_values.get(option, ()):
                return name, f"{option_of(option)} {value}"
    return None


def engine_named(name: str, version: str | None = None) -> Engine:
    """Return an engine in a version of LMDeploy, such as ``0.18``.

    A version without an account of its own gets the account of an older version.

    Raises:
        PackageError: turbofit has no account for the engine, or for the version.
    """
    if version is None and name not in LMDEPLOY and name in ENGINES:
        return ENGINES[name].create()
    if version and versions.is_legacy(version) and name in LMDEPLOY:
        from turbofit.memory.legacy.pytorch import LegacyPytorch
        from turbofit.memory.legacy.turbomind import LegacyTurbomind

        return LegacyTurbomind(version) if name == "turbomind" else LegacyPytorch(version)
    known = versions.account_version(name, version)
    if known is None or name not in LMDEPLOY:
        raise PackageError(
            f"turbofit has no memory account for the {name} engine of LMDeploy"
            f" {version or REFERENCE}",
            hint=f"turbofit has accounts for {' and '.join(LMDEPLOY)} of {REFERENCE}",
        )
    engine = ENGINES[name].create(known)
    engine.doubt = versions.doubt(name, version)
    return engine


def engine_of(plan: Plan) -> Engine:
    """Return the engine that a plan's account describes.

    Raises:
        PackageError: turbofit has no account for the engine.
    """
    name, version = plan.backend.name, plan.backend.version
    return engine_named(name, version if plan.backend.of_lmdeploy else None)


def engine_for(model: Model, engine: str = "auto", version: str | None = None) -> Engine:
    """Return the wished engine; for ``auto``, the first that runs the model.

    With a version, only LMDeploy's engines count. LMDeploy itself looks only at the model's outer
    architecture. It therefore starts TurboMind even if TurboMind cannot load the inner language
    model, and fails.

    Raises:
        UsageError: the engine does not run the model, or no engine does.
        PackageError: turbofit has no account for the engine.
    """
    if version:
        _check_version(model, version)
    known = LMDEPLOY if version else tuple(ENGINES)
    wanted = known if engine == "auto" else (engine,)
    problems = {name: _problem(model, name, version) for name in wanted}
    for name, problem in problems.items():
        if problem is None:
            return engine_named(name, version)
    if not version and wanted[-1] not in LMDEPLOY:
        instead = "take a checkpoint that is not quantised; " if model.quantization else ""
        raise UsageError(
            "; ".join(map(str, problems.values())),
            hint=f"{instead}docs/models.md says which engine runs which model",
        )
    if wanted == LMDEPLOY and version:
        raise _in_no_engine(model, version, problems)
    others = (it for it in known if it not in wanted and not _problem(model, it, version))
    other = next(others, None)
    since = versions.listed_since(model.architecture, after=version) if version else None
    hint = f"`--lmdeploy {since}` and newer releases run the model" if since else _SEE_MODELS
    if other is not None:
        hint = f"`--engine {other}` runs the model"
    raise UsageError(str(problems[wanted[0]]), hint=hint, options=["engine"])


def _in_no_engine(model: Model, version: str, problems: dict[str, str | None]) -> UsageError:
    """Return the error for a model that neither engine of a release runs, with the reasons."""
    since = versions.listed_since(model.architecture, after=version)
    if since is None:
        reasons = dict.fromkeys(filter(None, problems.values()))
        return UsageError("; ".join(reasons), hint=_SEE_MODELS, options=["engine"])
    cause = f"no engine of LMDeploy {version} runs {model.architecture}, which {since} runs"
    return UsageError(cause, hint=f"`--lmdeploy {since}` or newer", options=["lmdeploy"])


def _check_version(model: Model, version: str) -> None:
    """Refuse a model that contains a part without an account for that version.

    Raises:
        UsageError: the version has the part in another form, or lacks the part; or ``version`` is
            no version.
    """
    versions.check_release(version)
    if not versions.is_legacy(version):
        return
    # Older versions lack these parts, or have them in another form. For example, TurboMind 0.12
    # cached a latent for each head. This left 42,880 tokens for GLM-4.7-Flash, a
    # twentieth of the tokens with one latent for each token (lmdeploy#4367).
    parts = {
        "an audio tower": model.vision and model.vision.audio,
        "gated delta nets": model.text.delta,
        "multi-head latent attention": model.text.mla,
        "attention sinks": model.text.sinks,
        "LoRA adapters": model.loras,
        "drafts": model.draft,
    }
    lacking = next((name for name, part in parts.items() if part), None)
    if lacking is not None:
        raise UsageError(
            f"turbofit has no account of {lacking} with LMDeploy {version}",
            hint=f"turbofit has an account for LMDeploy {REFERENCE}",
        )
    from turbofit.memory.legacy.generations import generation_of

    if model.vision is not None and generation_of(version).vision.runs == "none":
        raise UsageError(
            f"LMDeploy {version} runs no vision tower, and {model.name} has one",
            hint="towers came with 0.2.6",
        )


def _problem(model: Model, engine: str, version: str | None) -> str | None:
    """Return the reason why a version of an engine does not run a model, or None."""
    if version is None or engine not in LMDEPLOY or not versions.is_legacy(version):
        return engine_problem(model, engine)
    from turbofit.memory.legacy.generations import heads_problem, quantization_problem

    # Torch ran the towers of old versions: only LMDeploy's lists and the language model decide.
    text = replace(model, vision=None, architecture=model.text.architecture)
    return (
        not_listed(model, engine, version)
        or heads_problem(engine, version, model.text.head_dim)
        or quantization_problem(engine, version, model.quantization)
        or engine_problem(text, engine)
    )
