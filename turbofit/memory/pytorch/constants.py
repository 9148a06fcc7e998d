"""The figures of one generation of the PyTorch engine, and the environment that they hold for."""

from __future__ import annotations

from functools import cache

import msgspec

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory import versions

__all__ = ["PytorchConstants", "environment", "load_constants", "segments"]


class PytorchConstants(Struct):
    """What one generation fixes, in bytes unless the name says otherwise.

    The meaning, source and sign of each figure stand beside it in the YAML file.
    """

    version: str
    page: int
    cublas_workspaces: int
    cublas_workspace: dict[str, int]
    segment: int
    load_fragmentation: dict[str, int]
    live_fragmentation: dict[str, float]
    kernel_modules: int
    nccl_buffers: dict[str, int]
    packed_copy: dict[str, float]
    logit: int
    logit_few: int
    sampling_base: int
    token_elements: int
    prefill_base: int
    hidden_copies: int
    kernel_tuning: int
    vision_copies: dict[str, int]
    vision_base: int
    host_process: int
    least_blocks: int


@cache
def load_constants(version: str = versions.REFERENCE) -> PytorchConstants:
    """The constants of a version with presets of its own, such as ``0.18``."""
    figures = {
        key: entry["value"] if isinstance(entry, dict) else entry
        for key, entry in load_yaml(preset_path("engines", f"pytorch-{version}")).items()
    }
    return msgspec.convert(figures, PytorchConstants, strict=False)


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
