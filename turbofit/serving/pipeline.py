"""Opens `lmdeploy.pipeline` by a plan, with settings and images that fit."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from turbofit.core.errors import LaunchError, NoGpuError, UsageError
from turbofit.core.messages import counted
from turbofit.core.plan import DRAFT_FIELDS, GpuLedger, Plan, config_names
from turbofit.core.struct import Options
from turbofit.memory.engines import engine_of
from turbofit.model.adapter_folders import with_copies
from turbofit.model.presets import find_preset
from turbofit.model.source import refuse_missing_folder
from turbofit.planning.checks import refuse
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.plan import refusal
from turbofit.planning.request import PlanRequest
from turbofit.serving.engine.launches import ratio_now
from turbofit.serving.engine.lmdeploy import find_lmdeploy
from turbofit.serving.leases import Leases
from turbofit.serving.passthrough import uncounted_fields
from turbofit.serving.planner import Planner

_TWIN: Final = "TURBOFIT_PRETEND_TWIN"
#: Keywords for the plan; all other keywords are LMDeploy's.
PLANNING: Final[tuple[str, ...]] = (
    "on", "tp", "gpus", "images", "image_size", "context", "concurrency", "goal",
    "queue_images", "max_dynamic_patch", "max_pixels", "image_threads", "image_cache", "margin",
    "budget", "least", "engine",
)  # fmt: skip
#: Fields of a config with which TurboMind keeps more of each prompt and answer than a plan counts,
#: if prefixes are cached.
_KEEP_MORE: Final = ("cache_prompt", "cache_generation", "cache_checkpoint_interval")
#: Further keywords of LMDeploy's engine; LMDeploy's `pipeline` drops all other keywords.
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

    ``trust_remote_code`` None trusts code of the model's repository only if the tokenizer needs the
    code. If the keyword ``on`` names another machine, no memory is reserved, and reservations of
    other turbofits do not count.
    """
    lmdeploy = find_lmdeploy()
    if lmdeploy.warning:
        warnings.warn(lmdeploy.warning, stacklevel=3)
    planning: dict[str, Any] = {n: keywords.pop(n) for n in PLANNING if n in keywords}
    _check_plannable(keywords)
    planning |= _draft_options(speculative_config)
    # The engine reads copies of adapters only during its start.
    with ExitStack() as failed, TemporaryDirectory(prefix="turbofit-adapters-") as copies:
        leases = Leases() if planning.get("on") is None else None
        if leases is not None:
            failed.callback(leases.close)
        twin = os.environ.get(_TWIN)  # a twin that `turbofit pretend --model` has made
        if twin is not None and find_preset(model_path) == find_preset(Path(twin).name):
            model_path = twin
        refuse_missing_folder(model_path)
        request = _request(model_path, backend_config, planning)
        try:
            plan = _planned(request, leases)
        except NoGpuError as exc:
            raise NoGpuError(
                exc.message,
                hint="a pipeline needs a GPU; turbofit pretend --on SPEC --model NAME -- python"
                " SCRIPT opens the pipeline on pretend GPUs, and turbofit.plan(MODEL, on=SPEC)"
                " plans without a GPU",
            ) from None
        if twin is not None and not plan.backend.on_torch:
            from turbofit.rehearsal.turbomind.server import pretend_here

            pretend_here()  # on pretend GPUs, TurboMind alone needs this
        config = planned_config(with_copies(plan, Path(copies)), backend_config)
        _choose_gpus(plan, config)
        if leases is not None and request.cache_max_entry_count is None:
            config.cache_max_entry_count = ratio_now(plan, 0)  # a pipeline has one group

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
    """Open the pipeline of a plan; a failed download becomes a `LaunchError`."""
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
    """Return the planning keywords of LMDeploy's configuration of a draft; empty for None."""
    if config is None:
        return {}
    return {ours: getattr(config, name) or None for name, ours in DRAFT_FIELDS.items()}


def _check_plannable(keywords: Options) -> None:
    """Refuse keywords that neither turbofit nor LMDeploy's engine knows."""
    for name in keywords:
        if name not in _OF_LMDEPLOY:
            raise UsageError(
                f"turbofit.pipeline has no keyword {name}, and LMDeploy drops it",
                hint="give settings of an engine in backend_config, settings of an answer in the "
                f"gen_config of a call; keywords of a plan are {', '.join(PLANNING)}",
            )


def _request(model_path: str, backend_config: Any, planning: dict[str, Any]) -> PlanRequest:
    """Return the planner's request, with the caller's config and keywords."""
    engine = config_engine(backend_config, planning.pop("engine", "auto"))
    planning = with_config(planning, backend_config, engine)
    # With a prefix cache LMDeploy refuses `get_ppl`, and logits of all tokens are empty.
    planning.setdefault("enable_prefix_caching", False)
    return PlanRequest.of(model=model_path, replicas=1, engine=engine, **planning)


def _planned(request: PlanRequest, leases: Leases | None) -> Plan:
    """Return a plan that fits, or raise a `TurbofitError`; ``leases`` reserves its memory."""
    if leases is None:
        plan = best_plan(request)
    else:
        say = partial(warnings.warn, stacklevel=8)  # names the line that calls `api.pipeline`
        plan = Planner(request, leases, say, rehearse=False).make({})
    # The plan's own warnings are left out, since they are about a server's clients.
    for warning in (*plan.machine.warnings, *plan.model.warnings):
        warnings.warn(warning, stacklevel=4)
    if not plan.backend.of_lmdeploy:
        raise UsageError(
            f"LMDeploy does not run {plan.model.name}, and a pipeline is LMDeploy's",
            hint="turbofit serve runs the model with Transformers",
        )
    refuse(Scene(Sources(), "launch", plan=plan))
    if not plan.fits:
        raise refusal(plan)
    return plan


def _choose_gpus(plan: Plan, config: Any) -> None:
    """Let the engine see only the planned GPUs, and configure torch's allocator as planned.

    If this process has not used CUDA yet, CUDA_VISIBLE_DEVICES chooses the GPUs, since torch and
    parts of LMDeploy ignore ``devices``. Later, ``devices`` chooses TurboMind's GPUs; the PyTorch
    engine lacks ``devices`` and takes the first GPUs.
    """
    import torch

    from turbofit.planning.commands import visible_devices

    (engine,) = plan.engines
    if plan.machine.source == "preset":
        return
    pytorch = plan.backend.on_torch
    if torch.cuda.is_initialized():
        if pytorch:
            warnings.warn(
                "this process already uses CUDA: torch's allocator cannot switch to expandable"
                " segments, and the engine takes the first visible GPUs; open the pipeline before"
                " other uses of CUDA",
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
    """Return the ledgers that limit torch's allocator; empty if the allocator must have no limit.

    A budget leaves memory to the caller's other models, and ``config`` may have fields that no plan
    counts. In both cases the allocator serves more than the plan and must have no limit.
    """
    more = uncounted_fields() & changed_fields(config).keys()
    return () if more or plan.shares_cards else plan.ledgers


def _trust(plan: Plan, trust: bool | None) -> bool:
    """Return whether code of the model's repository may run; warn of such code."""
    if trust is not None:
        return trust
    if plan.model.needs_remote_code:
        warnings.warn(
            f"the tokenizer of {plan.model.name} is code of its own repository, which now runs; "
            "trust_remote_code=False forbids it",
            stacklevel=4,
        )
    return plan.model.needs_remote_code


def config_engine(config: Any, engine: str) -> str:
    """Return the name of a config's engine; without a config, return ``engine``.

    Raises:
        UsageError: the config is not an engine's config, or ``engine`` names another engine.
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
            hint="give only backend_config or only engine",
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
                hint=f"give {theirs} once",
            )
    more = [name for name in _KEEP_MORE if name in changed]
    if more and out.get("enable_prefix_caching"):
        raise UsageError(
            f"{' and '.join(more)} of backend_config: the plan counts LMDeploy's defaults of a "
            "prefix cache alone",
            hint="leave it out, or enable_prefix_caching",
        )
    if "devices" in changed:
        out.setdefault("gpus", _visible_gpus(changed["devices"]))
    unplanned = sorted(uncounted_fields() & changed.keys())
    if unplanned:
        warnings.warn(
            f"{', '.join(unplanned)} of backend_config may take memory that no plan counts",
            stacklevel=5,
        )
    return out


def planned_config(plan: Plan, config: Any) -> Any:
    """Return a deep copy of the caller's config, or a new one, with the plan's settings."""
    from copy import deepcopy

    (engine,) = plan.engines
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
            f"devices {devices} of backend_config: it has {counted(len(visible), 'visible GPU')}",
            hint="count devices from 0 inside CUDA_VISIBLE_DEVICES",
        )
    return ",".join(str(visible[device]) for device in devices)
