"""The engine config of a caller: which fields the plan takes from it, and a copy with the plan's.

Both of LMDeploy's configs are taken; the class of the config chooses the engine.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.config_names import CONFIG_NAMES
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan

__all__ = ["engine_of", "planned_config", "with_config", "with_draft"]

#: Fields that change memory in ways the ledger does not model.
_UNPLANNED: Final = (
    "dp", "cp", "ep", "nnodes", "device_num", "attn_tp_size", "attn_cp_size", "attn_dp_size",
    "mlp_tp_size", "mlp_dp_size", "moe_tp_size", "outer_dp_size", "num_tokens_per_iter",
    "max_prefill_iters", "cache_chunk_size", "empty_init", "hf_overrides", "gemm_input_dtype",
    "kernel_block_size", "num_cpu_blocks", "adapters", "prefix_cache_state_budget",
    "prefix_cache_decode_state_interval", "custom_module_map", "enable_microbatch", "enable_eplb",
    "logprobs_mode", "enable_return_routed_experts", "dllm_block_length", "kv_transfer_config",
    "piecewise_cudagraph_max_tokens",
)  # fmt: skip


def engine_of(config: Any, engine: str) -> str:
    """The engine that a config is for; what was asked where there is none.

    Raises:
        UsageError: the config is no engine's, or another one's than was asked for.
    """
    if config is None:
        return engine
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig

    kinds = {"turbomind": TurbomindEngineConfig, "pytorch": PytorchEngineConfig}
    found = next((name for name, kind in kinds.items() if isinstance(config, kind)), None)
    if found is None:
        raise UsageError(
            f"backend_config is a {type(config).__name__}, no config of LMDeploy's engines",
            hint="give a TurbomindEngineConfig or a PytorchEngineConfig",
        )
    if engine not in ("auto", found):
        raise UsageError(
            f"backend_config is of the {found} engine, and engine={engine!r}",
            hint="give one of the two",
        )
    return found


def with_config(planning: Options, config: Any, engine: str) -> Options:
    """Planning keywords, and the config's fields that differ from LMDeploy's defaults.

    Raises:
        UsageError: a contradiction.
    """
    if config is None:
        return planning
    changed = _changed(config)
    out = dict(planning)
    names = [("revision", "revision"), *CONFIG_NAMES[engine]]
    for ours, theirs in names:
        if theirs not in changed:
            continue
        if out.setdefault(ours, changed[theirs]) != changed[theirs]:
            raise UsageError(
                f"{theirs} is {changed[theirs]!r} in backend_config and {out[ours]!r} as a keyword",
                hint="give it once",
            )
    if "devices" in changed:
        out.setdefault("gpus", _visible_gpus(changed["devices"]))
    unplanned = [name for name in _UNPLANNED if name in changed]
    if unplanned:
        warnings.warn(
            f"{', '.join(unplanned)} of backend_config may change memory: the plan does not count "
            "it",
            stacklevel=5,
        )
    return out


def with_draft(planning: Options, config: Any) -> Options:
    """Planning keywords, with what a SpeculativeConfig of LMDeploy says.

    Raises:
        UsageError: it is none, or says what turbofit has no account of.
    """
    if config is None:
        return planning
    if not hasattr(config, "num_speculative_tokens"):
        raise UsageError(
            f"speculative_config is a {type(config).__name__}", hint="give a SpeculativeConfig"
        )
    return {
        **planning,
        "speculative_algorithm": config.method,
        "speculative_draft_model": config.model or None,
        "speculative_num_draft_tokens": config.num_speculative_tokens,
    }


def planned_config(plan: Plan, config: Any) -> Any:
    """A deep copy of the caller's config, or a new one, with the planned settings in it."""
    from copy import deepcopy

    out = plan.engine_config() if config is None else deepcopy(config)
    for name, value in plan.lmdeploy_settings().items():
        setattr(out, name, value)
    return out


def _changed(config: Any) -> dict[str, Any]:
    """Fields of the caller's config that differ from LMDeploy's defaults."""
    default = vars(type(config)())
    changed = {n: value for n, value in vars(config).items() if value != default.get(n)}
    if "quant_policy" in changed:
        changed["quant_policy"] = int(changed["quant_policy"])
    return changed


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
