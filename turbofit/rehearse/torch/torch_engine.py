"""LMDeploy's PyTorch engine in a rehearsal's child: marks its start, then drives the cases."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Final

from turbofit.core.errors import UsageError
from turbofit.rehearse.torch.torch_notes import NotesReport
from turbofit.rehearse.torch.torch_spec import LONGEST, TorchCase, TorchRequest, TorchSpec

__all__ = ["run_pytorch"]

#: Steps of ExecutorBase.init, and the phase each begins.
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
_TOKEN: Final = 5  # an ordinary token of every vocabulary
_PROBE_SECONDS: Final = 20.0


def run_pytorch(spec: TorchSpec, report: NotesReport) -> Callable[[], None]:
    """Starts the engine, drives all cases, and returns what closes it."""
    from lmdeploy import PytorchEngineConfig, pipeline

    from turbofit.rehearse.turbomind import hfconfig

    hfconfig.register_internvl(whole=True)
    hfconfig.register_intern_s1_pro()
    hfconfig.stand_in_for_kimi()
    hfconfig.plain_gpt_oss_tokenizer()
    config_class: Any = PytorchEngineConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(spec.settings) - known)
    if unknown:
        raise UsageError(
            f"LMDeploy's PytorchEngineConfig has no field {', '.join(unknown)}",
            hint="give options of the installed LMDeploy's PyTorch engine",
        )
    _mark_start(report)
    config = config_class(**spec.settings)
    more: dict[str, Any] = {}
    if spec.speculative:
        from lmdeploy.messages import SpeculativeConfig

        speculative_class: Any = SpeculativeConfig
        more["speculative_config"] = speculative_class(**spec.speculative)
    pipe: Any = pipeline(str(spec.model_dir), backend_config=config, log_level="INFO", **more)
    engine = pipe.async_engine
    settings = {k: v for k, v in vars(engine.backend_config).items() if _plain(v)}
    report.write(settings=settings, session_len=_longest(engine))
    report.enter("ready")
    for case in spec.cases:
        done = _run(pipe, _case(engine, case, report, spec.case_seconds), spec.case_seconds + 60)
        report.data["cases"].append(done)
        report.write()
        if set(done["statuses"]) & {"unavailable", "internal_error", "not finished"}:
            report.enter("afterwards")
            report.write(afterwards=_run(pipe, _afterwards(engine), _PROBE_SECONDS + 10))
            break
    closing: Callable[[], None] = pipe.close
    return closing


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str, bool, list))


def _mark_start(report: NotesReport) -> None:
    """Marks where each step of the executor's start begins, and notes what it found."""
    from lmdeploy.pytorch.engine.executor.base import ExecutorBase

    base: Any = ExecutorBase
    init = base.init

    def marked(call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            report.enter(phase)
            return call(*args, **kwargs)

        return step

    def noted(call: Callable[..., Any], name: str, value: Callable[[Any], Any]) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            report.write(**{name: value(found)})
            return found

        return ask

    def started(self: Any) -> None:
        for name, phase in _STEPS.items():
            setattr(self, name, marked(getattr(self, name), phase))
        self.gather_free_mem = noted(self.gather_free_mem, "free_at_sizing", list)
        plans = self._prepare_worker_cache_plans
        sizes = noted(plans, "block_bytes", lambda found: [plan.total for plan in found])
        self._prepare_worker_cache_plans = sizes
        try:
            init(self)
        finally:
            cache = {name: getattr(self.cache_config, name, None) for name in _CACHE}
            cache["quant_policy"] = int(cache["quant_policy"] or 0)
            report.write(cache=cache, executor=type(self).__name__)

    base.init = started


def _longest(engine: Any) -> int:
    """Tokens that prompt and answer may have: the server's limit and what the cache holds."""
    return int(min(engine.session_len, engine.engine.max_session_len))


def _run(pipe: Any, work: Any, seconds: float) -> Any:
    return asyncio.run_coroutine_threadsafe(work, pipe.internal_thread.loop).result(seconds)


_numbers = iter(range(1, 1 << 31))


async def _case(
    engine: Any, case: TorchCase, report: NotesReport, seconds: float
) -> dict[str, Any]:
    """Prepares all requests, then submits them in one turn of the engine's own event loop."""
    from lmdeploy.serve.core.exceptions import RequestError

    refused: Any = RequestError
    made: dict[TorchRequest, Any] = {}
    ready: list[Any] = []
    try:
        for one in case.requests:
            again = one in made
            ready.append(await (_again(engine, made[one]) if again else _prepared(engine, one)))
            made.setdefault(one, ready[-1])
    except refused as error:
        # Nothing reached the engine.
        report.enter(f"case {case.name}")
        return _done(case, 0, 0.0, ["refused"] * len(case.requests), str(error))
    longest = max(one.input_token_len for one in made.values())
    report.enter(f"case {case.name}")
    begun = time.monotonic()
    tasks = [asyncio.create_task(_answer(engine, one)) for one in ready]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    statuses = ["not finished" if task in late else task.result()[0] for task in tasks]
    text = next((task.result()[1] for task in tasks if task not in late and task.result()[1]), "")
    for task in late:
        task.cancel()
    await asyncio.sleep(0.05)
    return _done(case, longest, time.monotonic() - begun, statuses, text)


def _done(
    case: TorchCase, tokens: int, seconds: float, statuses: list[str], text: str
) -> dict[str, Any]:
    return {
        "name": case.name,
        "requests": len(case.requests),
        "images": [list(size) for request in case.requests for size in request.images],
        "prompt_tokens": tokens,
        "seconds": round(seconds, 3),
        "statuses": {name: statuses.count(name) for name in sorted(set(statuses))},
        "words": text,
    }


async def _prepared(engine: Any, request: TorchRequest) -> Any:
    """What LMDeploy's own front end makes of a request."""
    from lmdeploy import GenerationConfig

    config_class: Any = GenerationConfig
    config = config_class(
        max_new_tokens=request.max_new_tokens,
        ignore_eos=True,
        do_sample=True,
        top_k=request.top_k,
        top_p=0.8,
    )
    if not request.images:
        wanted = request.text_tokens
        length = _longest(engine) - request.max_new_tokens - 1 if wanted == LONGEST else wanted
        ids = [_TOKEN] * max(1, length)
        return await engine.preprocess(None, next(_numbers), gen_config=config, input_ids=ids)
    from PIL import Image

    content: list[dict[str, Any]] = [{"type": "text", "text": "a" * request.text_tokens}]
    for size in request.images:
        picture = Image.new("RGB", size, (120, 80, 40 + request.shade))
        content.append({"type": "image_data", "image_data": {"data": picture}})
    messages = [{"role": "user", "content": content}]
    return await engine.preprocess(messages, next(_numbers), gen_config=config)


async def _again(engine: Any, first: Any) -> Any:
    """The same request once more; the pictures' pixels are shared, as no one writes to them."""
    from lmdeploy.serve.core.async_engine import PreprocessedRequest

    request: Any = PreprocessedRequest
    return request(
        session=engine.session_mgr.get(next(_numbers)),
        inputs=_copied(first.inputs),
        input_token_len=first.input_token_len,
        gen_config=first.gen_config,
        adapter_name=None,
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


async def _answer(engine: Any, request: Any) -> tuple[str, str]:
    """How a request ended, and the words of an error."""
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    refused: Any = RequestError
    codes: Any = ErrorCode
    named = {
        codes.ENGINE_UNAVAILABLE: "unavailable",
        codes.CONTEXT_LENGTH_EXCEEDED: "too_long",
        codes.INTERNAL_ERROR: "internal_error",
    }
    last: Any = None
    try:
        async for out in engine.generate(request):
            last = out
    except refused as error:
        code = getattr(error, "code", None)
        return named.get(code, "refused"), str(error)
    reason = getattr(last, "finish_reason", None) or "none"
    return ("finished" if reason in ("stop", "length") else str(reason)), ""


async def _afterwards(engine: Any) -> dict[str, Any]:
    """What a dead engine says to the next small request, and to a health check."""
    from lmdeploy.serve.core.exceptions import RequestError

    refused: Any = RequestError
    status, text = "not finished", ""
    try:
        request = await _prepared(engine, TorchRequest(8, (), 1))
        status, text = await asyncio.wait_for(_answer(engine, request), _PROBE_SECONDS)
    except refused as error:
        status, text = "refused", str(error)
    except asyncio.TimeoutError:
        pass
    try:
        health = (await engine.health_probe(90.0))["status"]
    except Exception as error:  # noqa: BLE001 - an answer of its own
        health = f"{type(error).__name__}: {error}"
    return {"next_request": status, "words": text, "health": health}
