"""A stand-in for TurboMind, for tests: LMDeploy around it is the real one, the engine is not.

It answers every request with the same few tokens, prints the lines that the real engine prints, and
dies as it dies. `install_hook()` puts it in LMDeploy's place of the engine as soon as LMDeploy is
imported; the environment says what it does:

- ``STANDIN_SCRIPT``: ``serve`` (default), ``hang``, ``oom_weights``, ``oom_image``,
  ``check_failed``, ``killed``, ``stuck`` (in its warm-up).
- ``STANDIN_DUMP``: a file for the config that the engine was given, as JSON.
- ``STANDIN_FREE``: MiB that it claims were free when the cache was sized.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
FRAMES = {
    "oom_weights": "turbomind::ModelRoot::prepare",
    "oom_image": "InternVit::Impl::Forward",
}


#: The first line of a start.
STARTING = "`max_context_token_num` is not set, default to 32768."


def budget_line(free: float, ratio: float) -> str:
    """How TurboMind says what its cache takes, of so many free MiB."""
    return (
        f"Object cache budget: {free * ratio:.2f} MB from free {free:.2f} MB and ratio {ratio:.3f}"
    )


def slab_line(slabs: int) -> str:
    """How TurboMind says that its cache is cut into blocks: so many slabs of 32 MiB."""
    return f"slab_size {32 * MIB}, object_size {2 * MIB}, object_count {16 * slabs}, ratio 1"


def lengths_line(longest: int) -> str:
    """How TurboMind says which requests warm it up, up to so many tokens."""
    return f"Warm-up lengths: 8, 16, {longest}"


def say(text: str, *, level: str = "INFO", where: str = "turbomind.cc:305") -> None:
    """One line as TurboMind prints it, if its level would."""
    if level == "INFO" and os.environ.get("TM_LOG_LEVEL", "WARNING") != "INFO":
        return
    now = time.time()
    stamp = time.strftime("%m%d.%H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1e6):06d}"
    os.write(2, f"[TM][{level}][{stamp}][{where}] {text}\n".encode())


def abort_out_of_memory(script: str) -> None:
    """What the real engine does when CUDA has no memory left."""
    say("CUDA error: out of memory", level="FATAL", where="allocator.cc:44")
    trace = f"*** stacktrace of thread 0x7f0 ***\n  [ 0] {FRAMES[script]} @ src/turbomind/x.cc:12\n"
    os.write(2, trace.encode())
    os.abort()


class StandInEngine:
    """Has what `AsyncEngine` asks of an engine."""

    def __init__(self, model_path: str, config: Any) -> None:
        self.engine_config = config
        self.model_path = model_path
        self.requests: list[dict[str, Any]] = []
        self.closed = False
        self.script = os.environ.get("STANDIN_SCRIPT", "serve")
        dump = os.environ.get("STANDIN_DUMP")
        if dump:
            with open(dump, "w", encoding="utf-8") as file:
                json.dump(vars(config), file, default=str)
        self._start()

    def _start(self) -> None:
        say(STARTING, level="WARN")
        if self.script == "oom_weights":
            abort_out_of_memory(self.script)
        if self.script == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.script == "check_failed":
            say("Check failed: cache_ratio < 1. (2 vs. 1) object-cache path", level="FATAL")
            os.abort()
        self._size_cache()
        self._warm_up()

    def _size_cache(self) -> None:
        free = float(os.environ.get("STANDIN_FREE", "20114"))
        say(budget_line(free, self.engine_config.cache_max_entry_count))
        say(slab_line(1), level="WARN", where="slab.h:136")

    def _warm_up(self) -> None:
        config = self.engine_config
        most = config.max_prefill_token_num + config.max_batch_size
        say(lengths_line(most))
        say("8")
        if self.script == "stuck":
            threading.Event().wait()
        if self.script == "hang":
            say(str(most))
            line = "[TM][INFO][1120.08:30:00.{:06d}][scheduler.cc:1186] out of memory at 0/1\n"
            block = "".join(line.format(i) for i in range(3600)).encode()
            while True:
                os.write(2, block)
                time.sleep(0.1)
        say(str(most))
        say("Warm-up finished in 0.01 seconds.")

    def create_instance(self, *_: Any, **__: Any) -> StandInInstance:
        """A handle for one request at a time."""
        return StandInInstance(self)

    def get_schedule_metrics(self) -> Any:
        """Nothing runs, nothing waits."""
        from lmdeploy.messages import ScheduleMetrics

        return ScheduleMetrics(scheduler_tick=int(time.monotonic() * 1000))

    async def get_health_status(self) -> dict[str, Any]:
        """Always alive."""
        return {"alive": True, "message": "", "schedule_metrics": self.get_schedule_metrics()}

    def close(self) -> None:
        """Remember it."""
        self.closed = True


class StandInInstance:
    """Answers ``ok`` byte by byte."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine

    async def async_stream_infer(
        self, session_id: int, input_ids: Any, gen_config: Any = None, **rest: Any
    ) -> Any:
        """The tokens of an answer, one at a time."""
        from lmdeploy.messages import EngineOutput, RequestMetrics, ResponseType

        multimodal = rest.get("multimodal") or []
        self.engine.requests.append(
            {
                "tokens": len(input_ids),
                "images": len(multimodal),
                "units": [_units(item) for item in multimodal],
            }
        )
        if multimodal and self.engine.script == "oom_image":
            abort_out_of_memory(self.engine.script)
        answer = [ord("o"), ord("k")][: gen_config.max_new_tokens]
        for i, token in enumerate(answer):
            last = i == len(answer) - 1
            status = ResponseType.FINISH if last else ResponseType.SUCCESS
            yield EngineOutput(status, [token], req_metrics=RequestMetrics())

    async def async_cancel(self, session_id: int) -> None:
        """Nothing to cancel."""


def _units(item: dict[str, Any]) -> int:
    """Tiles or patches of one image, as the real preprocessor made them."""
    grid = item.get("image_grid_thw")
    return int(item["pixel_values"].shape[0] if grid is None else grid.prod())


def patch_lmdeploy(make: Any = StandInEngine) -> None:
    """Put the stand-in where `AsyncEngine` builds its engine; CUDA questions get CPU answers."""
    import lmdeploy.turbomind
    import torch
    from lmdeploy.serve.core.async_engine import AsyncEngine
    from lmdeploy.vl import engine as vl_engine

    def build(self: Any, model_path: str, backend_config: Any = None, **_: Any) -> Any:
        return make(model_path, backend_config)

    AsyncEngine._build_turbomind = build
    lmdeploy.turbomind.is_available = lambda: True
    vl_engine.is_bf16_supported = lambda *_: True
    torch.cuda.mem_get_info = lambda *_: (20 << 30, 24 << 30)


class _Around(importlib.abc.MetaPathFinder):
    """Does something before or after one module is loaded; to find it loads nothing."""

    def __init__(
        self, name: str, before: Callable[[], None] | None, after: Callable[[], None] | None
    ) -> None:
        self.name, self.before, self.after = name, before, after

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Let the usual one find it."""
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if self.before:
                    self.before()
                execute(module)
                if self.after:
                    self.after()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _declare_operators() -> None:
    import torch

    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []


def mend_torchvision() -> None:
    """Let torchvision of the package index be imported beside a CPU build of torch.

    It is built for CUDA: the library does not load there that declares two of its operators.
    """
    sys.meta_path.insert(0, _Around("torchvision", _declare_operators, None))


def mend_transformers() -> None:
    """Let Transformers write no configuration for a line of its log, which is read by nobody.

    It writes each that it reads, at every level of the log: a quarter of what tests of them take.
    """
    sys.meta_path.insert(0, _Around("transformers.configuration_utils", None, _name_alone))


def _name_alone() -> None:
    from transformers.configuration_utils import PreTrainedConfig

    PreTrainedConfig.__repr__ = object.__repr__  # type: ignore[method-assign]


def install_hook() -> None:
    """From now on, whoever imports LMDeploy's command line gets the stand-in."""
    mend_torchvision()
    sys.meta_path.insert(0, _Around("lmdeploy.cli.entrypoint", None, patch_lmdeploy))
