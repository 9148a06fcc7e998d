"""`lmdeploy.pipeline` with a plan: the same call, the settings that fit, images held to them."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import DoesNotFitError, LaunchError, UsageError
from turbofit.launch.environment import find_lmdeploy, rank_warning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turbofit.core.plan import Plan

__all__ = ["PLANNING", "open_pipeline"]

#: Keywords that are for the plan; all others are LMDeploy's.
PLANNING: Final[tuple[str, ...]] = (
    "on", "tp", "gpus", "images", "image_size", "context", "concurrency", "goal",
    "max_dynamic_patch", "max_pixels", "margin", "budget",
)  # fmt: skip

#: Fields of `TurbomindEngineConfig` that are settings of a plan.
_SETTINGS: Final = (
    "cache_max_entry_count", "max_prefill_token_num", "max_batch_size", "session_len",
    "communicator", "dtype", "quant_policy", "cache_block_seq_len", "model_format",
    "enable_prefix_caching", "async_", "language_model_only",
)  # fmt: skip

#: Its fields that change memory in ways the ledger does not model.
_UNPLANNED: Final = (
    "dp", "cp", "ep", "nnodes", "device_num", "attn_tp_size", "attn_cp_size", "attn_dp_size",
    "mlp_tp_size", "mlp_dp_size", "outer_dp_size", "num_tokens_per_iter", "max_prefill_iters",
    "cache_chunk_size", "empty_init", "hf_overrides", "gemm_input_dtype",
)  # fmt: skip


def open_pipeline(
    planner: Callable[..., Plan],
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
    """Plan, then open LMDeploy's own pipeline with the plan's settings.

    Args:
        planner: `turbofit.api.plan`.
        model_path: as LMDeploy takes it, or a name that presets know.
        backend_config: a `TurbomindEngineConfig`; each field that differs from LMDeploy's default
            stays. It is not changed: a copy is used.
        chat_template_config: LMDeploy's.
        log_level: LMDeploy's.
        max_log_len: LMDeploy's.
        trust_remote_code: LMDeploy's; None means where the model's tokenizer needs it, with a
            warning.
        speculative_config: LMDeploy's; TurboMind has none.
        allowed_media_domains: LMDeploy's.
        **keywords: those of `PLANNING`, and LMDeploy's own.

    Returns:
        An `lmdeploy.Pipeline`; its ``plan`` is the plan.

    Raises:
        PackageError: LMDeploy is missing or too old.
        DoesNotFitError: nothing fits; the message says what is missing.
        UsageError: a keyword or config that cannot be planned for.
        LaunchError: started by a rank launcher with tp > 1.
    """
    lmdeploy = find_lmdeploy()
    if lmdeploy.warning:
        warnings.warn(lmdeploy.warning, stacklevel=3)
    planning: dict[str, Any] = {n: keywords.pop(n) for n in PLANNING if n in keywords}
    if keywords.pop("replicas", 1) != 1:
        raise UsageError(
            "a pipeline is one engine", hint="leave replicas out, or use turbofit serve"
        )
    if speculative_config is not None:
        raise UsageError(
            "speculative decoding is not planned for: TurboMind has none",
            hint="leave speculative_config out",
        )
    planning = _with_config(planning, backend_config)
    plan = planner(model_path, replicas=1, engine="turbomind", **planning)
    _refuse(plan)
    config = _planned_config(plan, backend_config)
    _choose_gpus(plan, config)

    from turbofit.launch.command import model_path as checkpoint
    from turbofit.launch.planned_pipeline import PlannedPipeline

    return PlannedPipeline(
        plan,
        checkpoint(plan.model),
        backend_config=config,
        chat_template_config=chat_template_config,
        log_level=log_level,
        max_log_len=max_log_len,
        trust_remote_code=_trust(plan, trust_remote_code),
        allowed_media_domains=allowed_media_domains,
        **keywords,
    )


def _with_config(planning: dict[str, Any], config: Any) -> dict[str, Any]:
    """Planning keywords, and the config's fields that differ from their defaults.

    Raises:
        UsageError: another engine's config, or a contradiction.
    """
    if config is None:
        return planning
    changed = _changed(config)
    out = dict(planning)
    for name in (*_SETTINGS, "tp", "revision"):
        if name not in changed:
            continue
        if out.setdefault(name, changed[name]) != changed[name]:
            raise UsageError(
                f"{name} is {changed[name]!r} in backend_config and {out[name]!r} as a keyword",
                hint="give it once",
            )
    if "devices" in changed:
        out.setdefault("gpus", _visible_gpus(changed["devices"]))
    unplanned = [name for name in _UNPLANNED if name in changed]
    if unplanned:
        warnings.warn(
            f"{', '.join(unplanned)} of backend_config may change memory: the plan does not count "
            "it",
            stacklevel=4,
        )
    return out


def _changed(config: Any) -> dict[str, Any]:
    """Fields of the caller's config that differ from LMDeploy's defaults."""
    from lmdeploy import TurbomindEngineConfig

    if not isinstance(config, TurbomindEngineConfig):
        raise UsageError(
            f"backend_config is a {type(config).__name__}; only TurboMind is planned for",
            hint="give a TurbomindEngineConfig, or use lmdeploy.pipeline",
        )
    default = vars(TurbomindEngineConfig())
    return {name: value for name, value in vars(config).items() if value != default.get(name)}


def _visible_gpus(devices: list[int]) -> str:
    """CUDA ordinals as the indices that planning speaks."""
    from turbofit.machine.source import machine_from

    visible = machine_from(None).visible
    if any(not 0 <= device < len(visible) for device in devices):
        raise UsageError(
            f"devices {devices} of backend_config: only {len(visible)} GPUs are visible",
            hint="count them from 0 inside CUDA_VISIBLE_DEVICES",
        )
    return ",".join(str(visible[device]) for device in devices)


def _refuse(plan: Plan) -> None:
    ranks = rank_warning(plan.parallel.tp, os.environ)
    if ranks:
        raise LaunchError(ranks, hint="start it with python, not with torchrun")
    # The plan's other warnings are about clients of a server: here images are held to it.
    for warning in (*plan.machine.warnings, *plan.model.warnings):
        warnings.warn(warning, stacklevel=4)
    if not plan.fits:
        first = plan.remedies[0] if plan.remedies else None
        hint = f"{first.change}: {first.effect}" if first else "see turbofit plan MODEL"
        raise DoesNotFitError(plan.verdict, hint=hint)


def _planned_config(plan: Plan, config: Any) -> Any:
    """A deep copy of the caller's config with the planned settings in it."""
    from copy import deepcopy

    from lmdeploy import TurbomindEngineConfig

    out = TurbomindEngineConfig() if config is None else deepcopy(config)
    out.tp = plan.settings.tp
    for name in _SETTINGS:
        setattr(out, name, getattr(plan.settings, name))
    return out


def _choose_gpus(plan: Plan, config: Any) -> None:
    """Let the engine see the planned group only.

    LMDeploy and torch ask the first GPUs for their memory whatever ``devices`` says, so the
    environment decides while CUDA is not yet in use in this process; after that only ``devices``
    can.
    """
    import torch

    from turbofit.launch.command import visible_devices

    group = plan.parallel.groups[0]
    if plan.machine.source == "preset":
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        config.devices = [plan.machine.visible.index(index) for index in group]
        return
    _set_environment(
        {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": visible_devices(plan.machine, group),
        }
    )
    config.devices = None


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


def _trust(plan: Plan, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    if plan.model.needs_remote_code:
        warnings.warn(
            f"the tokenizer of {plan.model.name} is code of its own repository, which will run; "
            "trust_remote_code=False forbids it",
            stacklevel=4,
        )
    return plan.model.needs_remote_code
