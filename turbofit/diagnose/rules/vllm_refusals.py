"""vLLM's refusals at its start, for logs of people who compare.

Sources: vLLM 0.6 to 0.11 (worker/worker.py, v1/core/kv_cache_utils.py, v1/worker/gpu_worker.py).
"""

from __future__ import annotations

from typing import Final

from turbofit.diagnose.rules.message import MessageRule

__all__ = ["VLLM"]

VLLM: Final[tuple[MessageRule, ...]] = (
    MessageRule(
        kind="no_kv_memory",
        substrings=("No available memory for the cache blocks", "stored in KV cache",
               "available KV cache memory"),
        pattern=r"(No available memory for the cache blocks"
        r"|max seq len \(\d+\) is larger than the maximum number of tokens that can be stored in KV"
        r" cache \(\d+\)"
        r"|[\d.]+ GiB KV cache is needed, which is larger than the available KV cache memory"
        r" \([\d.]+ GiB\))",
        phase="cache",
        what="vLLM found no room for the KV cache of one longest request: {0}",
        why=(
            "it takes gpu_memory_utilization of the whole card, less what weights, others and its"
            " profiling run with the largest images hold",
        ),
        changes=(
            "a shorter --max-model-len, a higher --gpu-memory-utilization, fewer images a request"
            " (--limit-mm-per-prompt), or more GPUs",
        ),
        planned=True,
    ),
    MessageRule(
        kind="card_occupied",
        substrings=("less than desired GPU memory utilization",),
        pattern=r"Free memory on device \(?([\d.]+/[\d.]+ GiB)\)? on startup is less than desired"
        r" GPU memory utilization \(([\d.]+)",
        phase="configuration",
        what="vLLM was to take {1} of the card, of which less was free at its start: {0}",
        why=("somebody else holds the rest: another program, or an earlier server of yours",),
        changes=(
            "see who holds the card (`turbofit doctor`), or lower --gpu-memory-utilization to what"
            " is free",
        ),
        planned=True,
    ),
)  # fmt: skip
