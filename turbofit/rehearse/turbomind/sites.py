"""Which call of the engine an allocation belongs to, in words."""

from __future__ import annotations

from collections.abc import Callable

from turbofit.pretend.symbols import PLUMBING

LOADER = "LMDeploy's weight loader"
STAGING = "torch staging"

_LINEAR = "LlamaLinear"


class CallSites:
    """Turns traces into names, with a memory of those already seen.

    Args:
        name: gives the function's name at an offset of the engine's library, ``?`` if unknown.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = name
        self._known: dict[tuple[int, ...], str] = {}
        self._names: dict[int, str] = {}

    def names(self, trace: tuple[int, ...]) -> list[str]:
        """The functions of a trace, innermost first."""
        return [self._one(offset) for offset in trace]

    def _one(self, offset: int) -> str:
        if offset not in self._names:
            self._names[offset] = self._name(offset)
        return self._names[offset]

    def site(self, trace: tuple[int, ...]) -> str:
        """The engine's call: a linear layer's output is named after the layer's owner."""
        if trace not in self._known:
            self._known[trace] = self._find(trace)
        return self._known[trace]

    def _find(self, trace: tuple[int, ...]) -> str:
        if not trace:
            return STAGING
        useful = [n for n in self.names(trace) if not n.startswith(PLUMBING)]
        if not useful:
            return LOADER
        owner = next((n for n in useful if not n.startswith(_LINEAR)), useful[0])
        return f"linear output in {owner}" if useful[0].startswith(_LINEAR) else useful[0]

    def owner(self, trace: tuple[int, ...]) -> str:
        """Whose pool was made at a trace: ``executor``, ``engine thread``, or the call's name."""
        names = self.names(trace)
        if any(n.startswith("ModelExecutor") for n in names):
            return "executor"
        if any(n.startswith("Engine") for n in names):
            return "engine thread"
        if any(n.startswith("TurboMind") for n in names):
            return "rank context"
        return self.site(trace)
