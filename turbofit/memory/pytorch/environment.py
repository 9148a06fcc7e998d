"""What the PyTorch engine is told by its environment, which the account relies on."""

from __future__ import annotations

from turbofit.core.model import Model
from turbofit.core.plan import Settings

__all__ = ["environment", "segments"]


def segments(settings: Settings) -> str:
    """How torch's allocator maps memory: LMDeploy's Ray workers refuse expandable segments."""
    default = "uni" if settings.tp == 1 else "ray"
    return "fixed" if (settings.distributed_executor_backend or default) == "ray" else "expandable"


def environment(settings: Settings, model: Model) -> dict[str, str]:
    """Variables of the engine's processes.

    Its own check of the environment starts a process with a CUDA context of its own; expandable
    segments leave little unusable between weights and activations. States of delta nets are counted
    at 16 bits, LMDeploy's default.
    """
    env = {"LMDEPLOY_ENABLE_CHECK_ENV": "0"}
    if model.text.delta is not None:
        env["LMDEPLOY_FP32_MAMBA_SSM_DTYPE"] = "0"
    if segments(settings) == "expandable":
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return env
