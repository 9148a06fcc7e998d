"""The keyword arguments of `turbofit.plan` and its siblings, for editors and type checkers.

They equal the fields of the requests in `turbofit.planning.request`, which describe and validate
them; `tests/test_api.py` compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from typing_extensions import TypedDict

from turbofit.core.machine import Machine
from turbofit.core.plan import EngineName, Goal

#: Bytes, or a text such as ``19GiB``; also ``5%`` if a share of a card is allowed.
Size = int | str
#: Width and height in pixels, or a text such as ``1920x1080``.
ImageSize = tuple[int, int] | str
Tokens = int | str


class MachineOptions(TypedDict, total=False):
    """The machine, the engine and the GPUs of one engine."""

    on: str | Machine | None
    gpus: str | None
    engine: Literal["auto"] | EngineName
    tp: int | None


class PromiseOptions(MachineOptions, total=False):
    """The promise to clients, and limits of the memory for it."""

    images: int
    image_size: ImageSize | None
    context: Tokens | None
    concurrency: int | None
    goal: Goal
    queue_images: bool | None
    max_dynamic_patch: int | None
    max_pixels: int | str | None
    image_threads: int | None
    image_cache: Size | None
    margin: Size | None
    budget: Size | None
    least: bool


class PlanOptions(PromiseOptions, total=False):
    """Keywords of `turbofit.plan`: all fields of `PlanRequest` except the model."""

    revision: str | None
    replicas: int | None
    rate: float | None
    first_token: float | str | None
    per_token: float | str | None
    no_tuned: bool
    lmdeploy: str | None
    cache_max_entry_count: float | None
    max_prefill_token_num: Tokens | None
    max_batch_size: int | None
    session_len: Tokens | None
    communicator: Literal["nccl", "native", "cuda-ipc"] | None
    dtype: Literal["auto", "float16", "bfloat16"] | None
    quant_policy: Literal[0, 4, 8, 16, 17, 42] | None
    cache_block_seq_len: Tokens | None
    model_format: Literal["hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"] | None
    enable_prefix_caching: bool | None
    async_: int | None
    language_model_only: bool | None
    num_gpu_blocks: int | None
    eager_mode: bool | None
    cudagraph_capture_batch_sizes: Sequence[int] | None
    distributed_executor_backend: Literal["uni", "mp", "ray"] | None


class PredictOptions(PlanOptions, total=False):
    """Keywords of `turbofit.predict`: all fields of `PredictRequest` except the model."""

    free_at_cache: Size | None


class WhichOptions(PlanOptions, total=False):
    """Keywords of `turbofit.which`: all fields of `WhichRequest` except the model."""

    images_per_second: float | None
    all_counts: bool
