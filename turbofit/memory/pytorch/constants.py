"""The figures of one generation of the PyTorch engine, read from `presets/engines/`."""

from __future__ import annotations

from functools import cache

import msgspec

from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory import versions

__all__ = ["PytorchConstants", "load_constants"]


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
