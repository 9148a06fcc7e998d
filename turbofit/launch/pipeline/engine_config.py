"""A caller's engine config: which fields the plan takes from it, and a copy with the plan's."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import UsageError
from turbofit.core.plan import config_names
from turbofit.launch.serve.passthrough import uncounted_fields

if TYPE_CHECKING:
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan


def config_engine(config: Any, engine: str) -> str:
    """The engine that a config is for; what was asked where there is none.

    Raises:
        UsageError: it is no config of an engine, or of another one than was asked for.
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
    """Planning keywords, and the config's fields that differ from LMDeploy's defaults.

    Raises:
        UsageError: a keyword and the config say different things.
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
    """A deep copy of the caller's config, or a new one, with the planned settings in it."""
    from copy import deepcopy

    out = plan.engine_config() if config is None else deepcopy(config)
    for name, value in plan.lmdeploy_settings().items():
        setattr(out, name, value)
    return out


def changed_fields(config: Any) -> Options:
    """The fields of a config that differ from LMDeploy's defaults."""
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
