"""With which versions of Transformers LMDeploy's front ends run: what `bench.compatibility` found.

`presets/engines/compatibility.yaml` has the tried versions and the failures; what is not a failure
ran. Under: a version between a tried one that runs and a tried one that fails counts as running.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Literal, NamedTuple

import msgspec

from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import Version, parse, release

__all__ = ["EFFECTS", "Compatibility", "Failure", "FrontEnd", "compatibility"]

Step = Literal["import", "config", "start", "image", "class"]

#: What a person sees of the step that fails.
EFFECTS: Final[dict[Step, str]] = {
    "import": "does not start",
    "config": "does not read config.json",
    "start": "fails at its start",
    "image": "fails at every image",
    "class": "does not build the model",
}


class Failure(Struct, forbid_unknown_fields=True):
    """Tried versions of Transformers with which some families fail alike, both ends included."""

    lmdeploy: tuple[str, ...]
    engine: Literal["turbomind", "pytorch"]
    architectures: tuple[str, ...]
    first: str
    last: str
    step: Step
    error: str

    def has(self, transformers: str) -> bool:
        """Whether a tried version is one of these."""
        return _numbers(self.first) <= _numbers(transformers) <= _numbers(self.last)


class Compatibility(Struct, forbid_unknown_fields=True):
    """The whole table; versions from the oldest to the newest."""

    schema: str
    source: str
    date: str
    lmdeploy: tuple[str, ...]
    transformers: tuple[str, ...]
    families: dict[str, tuple[str, ...]]
    failures: tuple[Failure, ...]


class FrontEnd(NamedTuple):
    """LMDeploy's code for a family before one of its engines; ``lmdeploy`` is any version."""

    lmdeploy: str
    architecture: str
    engine: str

    def failure(self, transformers: str) -> Failure | None:
        """Why it does not run with a version of Transformers; None where it runs or nobody knows.

        A version that was not tried fails where the tried ones next to it do.
        """
        found = self._failures()
        if not found:
            return None
        wanted, tried = _numbers(transformers), compatibility().transformers
        older = [one for one in tried if _numbers(one) <= wanted][-1:]
        newer = [one for one in tried if _numbers(one) >= wanted][:1]
        beside = [next((f for f in found if f.has(one)), None) for one in (*older, *newer)]
        return beside[0] if all(beside) else None

    def requirement(self) -> str | None:
        """The newest versions that run, as pip takes them; None where all that were tried do.

        None, too, where no version runs.
        """
        found, tried = self._failures(), compatibility().transformers
        runs = [not any(failure.has(one) for failure in found) for one in tried]
        if all(runs) or not any(runs):
            return None
        last = len(tried) - 1 - runs[::-1].index(True)
        first = last
        while first and runs[first - 1]:
            first -= 1
        bounds = [f">={tried[first]}"] if first else []
        bounds += [f"<{_short(tried[last + 1])}"] if last + 1 < len(tried) else []
        return f"transformers{','.join(bounds)}"

    def _failures(self) -> list[Failure]:
        known = [one for one in compatibility().lmdeploy if release(one) <= release(self.lmdeploy)]
        return [
            one
            for one in compatibility().failures
            if known
            and known[-1] in one.lmdeploy
            and self.engine == one.engine
            and self.architecture in one.architectures
        ]


@cache
def compatibility() -> Compatibility:
    """The table."""
    return msgspec.convert(load_yaml(preset_path("engines", "compatibility")), Compatibility)


def _numbers(version: str) -> Version:
    return parse(version) or (0, 0, 0)


def _short(version: str) -> str:
    """Without zeros at the end: a bound says no more than it means."""
    while version.endswith(".0"):
        version = version.removesuffix(".0")
    return version
