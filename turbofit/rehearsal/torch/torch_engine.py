"""Drives LMDeploy's PyTorch engine in a rehearsal's child: marks its start and runs the cases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from turbofit.rehearsal.notes import NOT_FINISHED, Notes, called_after
from turbofit.rehearsal.spec import (
    LETTER,
    LONGEST,
    SPECULATIVE_CONFIG,
    TOKEN,
    RehearsalCase,
    RehearsalRequest,
    Spec,
)
from turbofit.rehearsal.torch.phase_recorder import Phases

#: Steps of ExecutorBase.init, and the phase that each begins.
_STEPS: Final = {
    "build_model": "build",
    "update_configs": "sizing",
    "build_graph_runner": "graph runner",
    "build_cache_engine": "cache",
    "warmup": "warm-up",
}
_CACHE: Final = (
    "num_gpu_blocks", "block_size", "max_prefill_token_num", "max_batches",
    "cache_max_entry_count", "num_state_caches", "num_cpu_blocks", "quant_policy",
)  # fmt: skip
_numbers = iter(range(1, 1 << 31))


def drive(spec: Spec, notes: Notes) -> Callable[[], None]:
    """Start the engine, drive the cases, and return a function that closes the engine.

    If the engine does not survive a case, the later cases are left out.
    """
    notes.begin = Phases(notes.folder).enter
    from lmdeploy import PytorchEngineConfig, pipeline
    from lmdeploy.messages import SpeculativeConfig

    from turbofit.rehearsal.turbomind import hfconfig

    hfconfig.register_for_pytorch()
    hfconfig.stand_in_for_kimi()
    hfconfig.plain_gpt_oss_tokenizer()
    hfconfig.infer_channels_of_llava()
    settings = dict(spec.settings)
    draft = settings.pop(SPECULATIVE_CONFIG, None)
    speculative = SpeculativeConfig(**draft) if draft else None
    config = PytorchEngineConfig(**settings)
    _mark_start(notes)
    pipe: Any = pipeline(
        spec.model_dir, backend_config=config, speculative_config=speculative, log_level="INFO"
    )
    engine = pipe.async_engine
    notes.started(engine.backend_config, session_len=_longest(engine))
    for case in spec.cases:
        work = _case(engine, case, notes, spec.case_seconds)
        running = asyncio.run_coroutine_threadsafe(work, pipe.internal_thread.loop)
        if not running.result(spec.case_seconds + 60):
            break
    closing: Callable[[], None] = pipe.close
    return closing


def _mark_start(notes: Notes) -> None:
    """Make the engine begin a phase at each step of its start, and note the sizes of its cache."""
    from lmdeploy.pytorch.engine.executor.base import ExecutorBase

    base: Any = ExecutorBase
    init = base.init

    def noted(call: Callable[..., Any], name: str, value: Callable[[Any], Any]) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            notes.write(**{name: value(answer)})
            return answer

        return ask

    def started(self: Any) -> None:
        """Start the executor: mark its steps, and note its cache even if the start fails."""
        for name, phase in _STEPS.items():
            setattr(self, name, called_after(partial(notes.enter, phase), getattr(self, name)))
        self.gather_free_mem = noted(self.gather_free_mem, "free_at_sizing", list)
        # The sizes of all ranks: lmdeploy engine/executor/base.py
        # `self._get_rank_cache_block_sizes(`
        sizes = self._get_rank_cache_block_sizes
        self._get_rank_cache_block_sizes = noted(sizes, "block_bytes", list)
        try:
            init(self)
        finally:
            cache = {name: getattr(self.cache_config, name, None) for name in _CACHE}
            cache["quant_policy"] = int(cache["quant_policy"] or 0)
            notes.write(cache=cache)

    base.init = started


def _longest(engine: Any) -> int:
    """Return the most tokens of a prompt and its answer, by session length and cache."""
    return int(min(engine.session_len, engine.engine.max_session_len))


async def _case(engine: Any, case: RehearsalCase, notes: Notes, seconds: float) -> bool:
    """Prepare all requests of a case, then submit them in one step of the event loop.

    Return whether the engine can take another case.
    """
    from lmdeploy.serve.core.exceptions import RequestError

    refused: Any = RequestError
    try:
        ready = [await _prepared(engine, request) for request in case.requests]
    except refused as error:
        # A refused request ends the case before any of its requests reaches the engine.
        notes.enter(f"case {case.name}")
        refusals = ["refused"] * len(case.requests)
        return notes.case(case.name, [], time.monotonic(), refusals, str(error))
    notes.enter(f"case {case.name}")
    begun = time.monotonic()
    tasks = [asyncio.create_task(_answer(engine, prompt)) for prompt in ready]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    statuses = [NOT_FINISHED if task in late else task.result()[0] for task in tasks]
    words = next((task.result()[1] for task in tasks if task not in late and task.result()[1]), "")
    for task in late:
        task.cancel()
    await asyncio.sleep(0.05)
    tokens = [request.input_token_len for request in ready]
    return notes.case(case.name, tokens, begun, statuses, words)


async def _prepared(engine: Any, request: RehearsalRequest) -> Any:
    """Return a request that LMDeploy's own front end has prepared."""
    from lmdeploy import GenerationConfig

    config_class: Any = GenerationConfig
    config = config_class(
        max_new_tokens=request.max_new_tokens,
        ignore_eos=True,
        do_sample=True,
        top_k=request.top_k,
        top_p=0.8,
    )
    adapter = next(iter(engine.backend_config.adapters or ()), None)
    if not request.sizes:
        length = request.text_tokens
        if length == LONGEST:
            length = _longest(engine) - request.max_new_tokens - 1
        ids = [TOKEN] * max(1, length)
        return await engine.preprocess(
            None, next(_numbers), gen_config=config, input_ids=ids, adapter_name=adapter
        )
    from PIL import Image

    content: list[dict[str, Any]] = [{"type": "text", "text": LETTER * request.text_tokens}]
    for size in request.sizes:
        picture = Image.new("RGB", size, (120, 80, 40 + (request.images or 0)))
        content.append({"type": "image_data", "image_data": {"data": picture}})
    messages = [{"role": "user", "content": content}]
    return await engine.preprocess(
        messages, next(_numbers), gen_config=config, adapter_name=adapter
    )


async def _answer(engine: Any, request: Any) -> tuple[str, str]:
    """Run a request to its end; return its status and its error message, which may be empty."""
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    refused: Any = RequestError
    codes: Any = ErrorCode
    named = {
        codes.ENGINE_UNAVAILABLE: "unavailable",
        codes.CONTEXT_LENGTH_EXCEEDED: "too_long",
        codes.INTERNAL_ERROR: "internal_error",
    }
    last_output: Any = None
    try:
        async for out in engine.generate(request):
            last_output = out
    except refused as error:
        code = getattr(error, "code", None)
        return named.get(code, "refused"), str(error)
    reason = getattr(last_output, "finish_reason", None) or "none"
    return ("finished" if reason in ("stop", "length") else str(reason)), ""
