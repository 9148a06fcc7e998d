"""Opens `lmdeploy.pipeline` by a plan: the same call, with settings and images that fit."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from turbofit.core.errors import LaunchError, NoGpuError, UsageError
from turbofit.core.plan import DRAFT_FIELDS, GpuLedger, Plan, config_names
from turbofit.core.struct import Options
from turbofit.memory.engines import engine_of
from turbofit.model.adapters import with_copies
from turbofit.model.presets import find_preset
from turbofit.planning.checks import refuse
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.plan import refusal
from turbofit.planning.request import PlanRequest
from turbofit.serving.engine.cache_ratio import ratio_now
from turbofit.serving.engine.lmdeploy import find_lmdeploy
from turbofit.serving.leases import Leases
from turbofit.serving.passthrough import uncounted_fields
from turbofit.serving.planner import Planner

_TWIN: Final = "TURBOFIT_PRETEND_TWIN"
#: Keywords that are for the plan; all others are LMDeploy's.
PLANNING: Final[tuple[str, ...]] = (
    "on", "tp", "gpus", "images", "image_size", "context", "concurrency", "goal",
    "queue_images", "max_dynamic_patch", "max_pixels", "image_threads", "image_cache", "margin",
    "budget", "least", "engine",
)  # fmt: skip
#: Keywords of LMDeploy's engine that its `pipeline` does not name; it drops all others.
_OF_LMDEPLOY: Final = ("model_name", "vision_config")


def open_pipeline(  # noqa: PLR0913 - LMDeploy's own signature
    model_path: str,
    backend_config: Any = None,
    chat_template_config: Any = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool | None = None,
    speculative_config: Any = None,
    allowed_media_domains: list[str] | None = None,
    **keywords: Any,
) -> Any:
    """Open LMDeploy's pipeline with planned settings; see `api.pipeline` for the keywords.

    If ``trust_remote_code`` is None, code of the model's repository is trusted if its tokenizer
    needs it. If the keyword ``on`` names another machine, no memory is reserved, and reservations
    of other turbofits do not count.
    """
    lmdeploy = find_lmdeploy()
    if lmdeploy.warning:
        warnings.warn(lmdeploy.warning, stacklevel=3)
    planning: dict[str, Any] = {n: keywords.pop(n) for n in PLANNING if n in keywords}
    _check_plannable(keywords)
    planning |= _draft_options(speculative_config)
    # The engine reads a copy of an adapter while it starts, so the copy can go afterwards.
    with ExitStack() as failed, TemporaryDirectory(prefix="turbofit-adapters-") as copies:
        leases = Leases() if planning.get("on") is None else None
        if leases is not None:
            failed.callback(leases.close)
        twin = os.environ.get(_TWIN)  # `turbofit pretend --model` made one, of this model?
        if twin is not None and find_preset(model_path) == find_preset(Path(twin).name):
            model_path = twin
        request = _request(model_path, backend_config, planning)
        try:
            plan = _planned(request, leases)
        except NoGpuError as exc:
            raise NoGpuError(
                exc.message,
                hint="a pipeline needs a GPU; turbofit pretend --on SPEC --model NAME -- python"
                " SCRIPT opens it on pretend GPUs, and turbofit.plan(MODEL, on=SPEC) plans without"
                " one",
            ) from None
        if twin is not None and not plan.backend.on_torch:
            from turbofit.rehearsal.turbomind.server import pretend_here

            pretend_here()  # the PyTorch engine runs on pretend GPUs without this
        config = planned_config(with_copies(plan, Path(copies)), backend_config)
        _choose_gpus(plan, config)
        if leases is not None and request.cache_max_entry_count is None:
            config.cache_max_entry_count = ratio_now(plan, 0)  # a pipeline is one engine

        pipeline = _opened(
            plan,
            leases=leases,
            backend_config=config,
            chat_template_config=chat_template_config,
            log_level=log_level,
            max_log_len=max_log_len,
            trust_remote_code=_trust(plan, trust_remote_code),
            speculative_config=speculative_config,
            allowed_media_domains=allowed_media_domains,
            **keywords,
        )
        failed.pop_all()
    return pipeline


def _opened(plan: Plan, **arguments: Any) -> Any:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from turbofit.planning.commands import model_path
    from turbofit.serving.planned_pipeline import PlannedPipeline
    from turbofit.serving.weights import HINTS

    try:
        return PlannedPipeline(plan, model_path(plan.model), **arguments)
    except (HfHubHTTPError, LocalEntryNotFoundError) as exc:
        raise LaunchError(
            f"{plan.model.name} cannot be downloaded: {str(exc).splitlines()[0]}",
            hint=HINTS["huggingface_hub"],
        ) from exc


def _draft_options(config: Any) -> Options:
    """Return the planning keywords for LMDeploy's configuration of a draft; none for None."""
    if config is None:
        return {}
    return {ours: getattr(config, name) or None for name, ours in DRAFT_FIELDS.items()}


def _check_plannable(keywords: Options) -> None:
    for name in keywords:
        if name not in _OF_LMDEPLOY:
            raise UsageError(
                f"turbofit.pipeline has no keyword {name}, and LMDeploy drops it",
                hint="an engine's settings are in backend_config, an answer's in gen_config of a "
                f"call; those of a plan are {', '.join(PLANNING)}",
            )


def _request(model_path: str, backend_config: Any, planning: dict[str, Any]) -> PlanRequest:
    engine = config_engine(backend_config, planning.pop("engine", "auto"))
    planning = with_config(planning, backend_config, engine)
    return PlanRequest.of(model=model_path, replicas=1, engine=engine, **planning)


def _planned(request: PlanRequest, leases: Leases | None) -> Plan:
    """Make the plan, and refuse it if it does not fit; with ``leases``, reserve its memory."""
    if leases is None:
        plan = best_plan(request)
    else:
        say = partial(warnings.warn, stacklevel=8)  # where `pipeline` of `api` was called
        plan = Planner(request, leases, say, rehearse=False).make({})
    # The plan's other warnings are about clients of a server; a pipeline limits its own images.
    for warning in (*plan.machine.warnings, *plan.model.warnings):
        warnings.warn(warning, stacklevel=4)
    if not plan.backend.of_lmdeploy:
        raise UsageError(
            f"LMDeploy, whose pipeline this is, does not run {plan.model.name}",
            hint="turbofit serve serves it with Transformers",
        )
    refuse(Scene(Sources(), "launch", plan=plan))
    if not plan.fits:
        raise refusal(plan)
    return plan


def _choose_gpus(plan: Plan, config: Any) -> None:
    """Let the engine see only the planned GPUs, and set torch's allocator as the plan assumes it.

    If this process has not used CUDA yet, CUDA_VISIBLE_DEVICES chooses the GPUs, since torch and
    parts of LMDeploy ignore ``devices``. After that ``devices`` chooses them for TurboMind; the
    PyTorch engine, which has no such option, takes the first GPUs.
    """
    import torch

    from turbofit.planning.commands import visible_devices

    engine = plan.engines[0]
    if plan.machine.source == "preset":
        return
    pytorch = plan.backend.on_torch
    if torch.cuda.is_initialized():
        if pytorch:
            warnings.warn(
                "CUDA is in use in this process already: torch's allocator cannot be told to use"
                " expandable segments any more, and the engine takes the first visible GPUs;"
                " open the pipeline first",
                stacklevel=4,
            )
            return
        config.devices = [plan.machine.visible.index(index) for index in engine.gpus]
        return
    if pytorch:
        ledgers = held_to(plan, config)
        os.environ.update(engine_of(plan).environment(plan.model, engine.settings, ledgers))
    os.environ.update(
        {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": visible_devices(plan.machine, engine.gpus),
        }
    )
    if not pytorch:
        config.devices = None


def held_to(plan: Plan, config: Any) -> tuple[GpuLedger, ...]:
    """Return the ledgers whose sizes limit torch's allocator; empty if it must not be limited.

    It must not be limited if a budget leaves memory to the caller's other models, or if ``config``
    has fields that the plan does not count: their memory comes from the same allocator.
    """
    more = uncounted_fields() & changed_fields(config).keys()
    return () if more or plan.shares_cards else plan.engines[0].ledgers


def _trust(plan: Plan, trust: bool | None) -> bool:
    if trust is not None:
        return trust
    if plan.model.needs_remote_code:
        warnings.warn(
            f"the tokenizer of {plan.model.name} is code of its own repository, which will run; "
            "trust_remote_code=False forbids it",
            stacklevel=4,
        )
    return plan.model.needs_remote_code


def config_engine(config: Any, engine: str) -> str:
    """Return the name of the engine that a config is for; without a config, return ``engine``.

    Raises:
        UsageError: the config is not an engine's, or is for another engine than ``engine``.
    """
    if config is None:
        return engine
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig

    kinds = {"turbomind": TurbomindEngineConfig, "pytorch": PytorchEngineConfig}
    config_engine = next((name for name, kind in kinds.items() if isinstance(config, kind)), None)
    if config_engine is None:
        raise UsageError(
            f"backend_config is a {type(config).__name__}, no config of LMDeploy's engines",
            hint="give a TurbomindEngineConfig or a PytorchEngineConfig",
        )
    if engine not in ("auto", config_engine):
        raise UsageError(
            f"backend_config is of the {config_engine} engine, and engine={engine!r}",
            hint="give one of the two",
        )
    return config_engine


def with_config(planning: Options, config: Any, engine: str) -> Options:
    """Return the planning keywords with the config's fields that differ from LMDeploy's defaults.

    Raises:
        UsageError: a keyword and the config contradict each other.
    """
    if config is None:
        return planning
    changed, out = changed_fields(config), dict(planning)
    for ours, theirs in (("revision", "revision"), *config_names(engine)):
        if theirs in changed and out.setdefault(ours, changed[theirs]) != changed[theirs]:
            raise UsageError(
                f"{theirs} is {changed[theirs]!r} in backend_config and {out[ours]!r} as a keyword",
                hint="give it once",
            )
    if "devices" in changed:
        out.setdefault("gpus", _visible_gpus(changed["devices"]))
    unplanned = sorted(uncounted_fields() & changed.keys())
    if unplanned:
        warnings.warn(
            f"{', '.join(unplanned)} of backend_config may change memory: the plan does not count "
            "it",
            stacklevel=5,
        )
    return out


def planned_config(plan: Plan, config: Any) -> Any:
    """Return a deep copy of the caller's config, or a new one, with the plan's settings."""
    from copy import deepcopy

    engine = plan.engines[0]
    out = engine.engine_config() if config is None else deepcopy(config)
    for name, value in engine.lmdeploy_settings().items():
        setattr(out, name, value)
    return out


def changed_fields(config: Any) -> Options:
    """Return the fields of a config that differ from LMDeploy's defaults."""
    default = vars(type(config)())
    changed = {n: value for n, value in vars(config).items() if value != default.get(n)}
    if "quant_policy" in changed:
        changed["quant_policy"] = int(changed["quant_policy"])
    return changed


def _visible_gpus(devices: list[int]) -> str:
    """Return the machine's GPU numbers of these CUDA ordinals, joined by commas."""
    from turbofit.machine.source import machine_from

    visible = machine_from(None).visible
    if any(not 0 <= device < len(visible) for device in devices):
        raise UsageError(
            f"devices {devices} of backend_config: only {len(visible)} GPUs are visible",
            hint="count them from 0 inside CUDA_VISIBLE_DEVICES",
        )
    return ",".join(str(visible[device]) for device in devices)
