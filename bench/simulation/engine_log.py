"""What simulated engines print: TurboMind's lines, and those of LMDeploy's PyTorch engine."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.standin.standin_engine import STARTING, budget_line, lengths_line, slab_line

__all__ = ["PytorchLog", "TurboMindLog"]

_MIB = 1 << 20
_SLAB = 32 * _MIB


class TurboMindLog:
    """TurboMind's.

    Args:
        print_line: takes a line.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print = print_line

    def context(self) -> None:
        """The process has its CUDA context."""
        self._say(STARTING, level="WARN")

    def cache(self, free: int, size: int, ratio: float) -> None:
        """The cache is there: bytes that were free, its bytes, and ``cache_max_entry_count``."""
        self._say(budget_line(free / _MIB, ratio))
        self._say(slab_line(max(1, size // _SLAB)), level="WARN")

    def warming(self) -> None:
        """The warm-up begins."""
        self._say(lengths_line(4096))
        self._say("8")

    def warm(self) -> None:
        """The warm-up is over."""
        self._say("Warm-up finished in 3.00 seconds.")

    def cuda_error(self) -> None:
        """A CUDA error that is not memory."""
        self._say("CUDA error: an illegal memory access was encountered", level="FATAL")

    def out_of_memory(self, *, serving: bool) -> None:
        """An allocation failed."""
        self._say("CUDA error: out of memory", level="FATAL")
        where = "InternVit::Impl::Forward" if serving else "LlamaLinear::Forward"
        self._print("*** stacktrace of thread 0x7f0 ***")
        self._print(f"  [ 0] {where} @ src/turbomind/x.cc:12")

    def _say(self, text: str, *, level: str = "INFO") -> None:
        self._print(f"[TM][{level}][turbomind.cc:305] {text}")


class PytorchLog(TurboMindLog):
    """The PyTorch engine's, at WARNING: none tells of free memory or of the cache."""

    def context(self) -> None:
        """See `TurboMindLog`."""
        self._print("Loading weights from safetensors:   0%|          | 0/4")

    def cache(self, free: int, size: int, ratio: float) -> None:
        """See `TurboMindLog`."""

    def warming(self) -> None:
        """See `TurboMindLog`."""
        self._print("Warming up decoding:   0%|          | 0/5")

    def warm(self) -> None:
        """See `TurboMindLog`."""
        self._print("INFO:     Uvicorn running on http://127.0.0.1:1")

    def cuda_error(self) -> None:
        """See `TurboMindLog`."""
        self._loop_failed()
        self._print("RuntimeError: CUDA error: an illegal memory access was encountered")

    def out_of_memory(self, *, serving: bool) -> None:
        """See `TurboMindLog`."""
        if serving:
            self._loop_failed()
            self._print("    image_embeds = self.visual(pixel_values)")
        self._print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 MiB.")

    def _loop_failed(self) -> None:
        self._print(
            "2027-01-15 08:00:00,000 - lmdeploy - ERROR - engine.py:671 - Engine main loop failed."
        )
