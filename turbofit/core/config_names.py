"""Settings that each engine is told, under the names of LMDeploy's engine configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["CONFIG_NAMES"]

_TURBOMIND_NAMES: Final = (
    "tp", "dtype", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
    "session_len", "quant_policy", "cache_block_seq_len", "communicator", "async_",
    "enable_prefix_caching", "model_format", "language_model_only",
)  # fmt: skip
_PYTORCH_NAMES: Final = (
    "tp", "dtype", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
    "session_len", "quant_policy", "cache_block_seq_len", "enable_prefix_caching", "model_format",
    "language_model_only", "num_gpu_blocks", "eager_mode", "cudagraph_capture_batch_sizes",
    "distributed_executor_backend",
)  # fmt: skip
_OTHER_NAMES: Final = {"pytorch": {"cache_block_seq_len": "block_size"}}

#: Settings that each engine is told: our names, and those of LMDeploy's config.
CONFIG_NAMES: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    engine: tuple((name, _OTHER_NAMES.get(engine, {}).get(name, name)) for name in names)
    for engine, names in {
        "turbomind": _TURBOMIND_NAMES,
        "pytorch": _PYTORCH_NAMES,
        "transformers": ("dtype", "max_batch_size", "session_len"),
    }.items()
}
