"""The versions of Transformers with which LMDeploy's front ends run, by `bench.compatibility`.

`presets/engines/compatibility.yaml` has the tried versions and the failures; all others ran. A
version between a tried one that runs and a tried one that fails counts as running.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Final, Literal, NamedTuple

import msgspec

from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import Version, parse, release

Step = Literal["import", "config", "start", "image", "class"]

#: The effect of each failing step for a person.
EFFECTS: Final[dict[Step, str]] = {
    "import": "does not start",
    "config": "does not read config.json",
    "start": "fails at its start",
    "image": "fails at every image",
    "class": "does not build the model",
}


class Failure(Struct, forbid_unknown_fields=True):
    """Tried versions of Transformers with which some families fail alike, from first to last."""

    lmdeploy: tuple[str, ...]
    engine: Literal["turbomind", "pytorch"]
    architectures: tuple[str, ...]
    first: str
    last: str
    step: Step
    error: str

    def has(self, transformers: str) -> bool:
        """Whether a tried version is in this range."""
        return _numbers(self.first) <= _numbers(transformers) <= _numbers(self.last)


class Compatibility(Struct, forbid_unknown_fields=True):
    """The table of all tried versions and failures.

    ``transformers`` has the tried versions for each LMDeploy, oldest first. ``outside`` are
    versions that LMDeploy's own metadata exclude.
    """

    schema: str
    source: str
    date: str
    transformers: dict[str, tuple[str, ...]]
    outside: tuple[str, ...]
    families: dict[str, tuple[str, ...]]
    failures: tuple[Failure, ...]


class FrontEnd(NamedTuple):
    """LMDeploy's front end for a family and engine; ``lmdeploy`` may be any version."""

    lmdeploy: str
    architecture: str
    engine: str

    def failure(self, transformers: str) -> Failure | None:
        """The failure with a version of Transformers; None if it runs, or if that is unknown.

        An untried version fails if the tried versions next to it fail.
        """
        wanted, outcomes = _numbers(transformers), self._outcomes()
        older = [failure for version, failure in outcomes if _numbers(version) <= wanted][-1:]
        newer = [failure for version, failure in outcomes if _numbers(version) >= wanted][:1]
        beside = older + newer
        return beside[0] if beside and all(beside) else None

    def newest_failure(self) -> Failure | None:
        """The failure with the newest failing version, if an older version ran.

        Versions that are only too old do not count, since pip installs newer ones.
        """
        outcomes = [failure for _, failure in self._allowed()]
        ran = outcomes.index(None) if None in outcomes else len(outcomes)
        return next((failure for failure in outcomes[:ran:-1] if failure), None)

    def failed_with(self, error: str) -> Failure | None:
        """A failure whose message contains ``error``; None if there is none."""
        return next((failure for failure in self._failures() if error in failure.error), None)

    def oldest_allowed(self) -> str | None:
        """The oldest tried version that LMDeploy's metadata allow; None if it does not run."""
        allowed = self._allowed()
        return allowed[0][0] if allowed and allowed[0][1] is None else None

    def requirements(self) -> tuple[str, ...]:
        """Requirements for pip of the versions that run and that LMDeploy allows, newest first.

        Empty if all allowed versions run, or none does.
        """
        allowed = self._allowed()
        requirements: list[str] = []
        for failed, run in groupby(allowed, key=lambda outcome: outcome[1] is not None):
            versions = [version for version, _ in run]
            bounds = [f">={versions[0]}"] if versions[0] != allowed[0][0] else []
            bounds += [self._below(versions[-1])] if versions[-1] != allowed[-1][0] else []
            if bounds and not failed:
                requirements.append(f"transformers{','.join(bounds)}")
        return tuple(reversed(requirements))

    def tested_versions(self) -> tuple[str, ...]:
        """The versions that were tried with this LMDeploy, or with the nearest older one."""
        return compatibility().transformers.get(self._known(), ())

    def _outcomes(self) -> list[tuple[str, Failure | None]]:
        """The outcome of each tried version, oldest first."""
        failures = self._failures()
        return [
            (version, next((failure for failure in failures if failure.has(version)), None))
            for version in self.tested_versions()
        ]

    def _allowed(self) -> list[tuple[str, Failure | None]]:
        """The outcomes of the versions that LMDeploy's metadata allow."""
        outside = compatibility().outside
        return [outcome for outcome in self._outcomes() if outcome[0] not in outside]

    def _known(self) -> str:
        """The tried LMDeploy that stands for this one; empty if all tried ones are newer."""
        wanted = release(self.lmdeploy)
        older = [version for version in compatibility().transformers if release(version) <= wanted]
        return max(older, key=release, default="")

    def _below(self, last: str) -> str:
        """The upper bound after a version that ran; pip then takes no untried version."""
        versions = self.tested_versions()
        after = _numbers(versions[versions.index(last) + 1])
        return f"<{after[0]}" if after[1:] == (0, 0) else f"<={last}"

    def _failures(self) -> list[Failure]:
        known = self._known()
        return [
            failure
            for failure in compatibility().failures
            if known in failure.lmdeploy
            and self.engine == failure.engine
            and self.architecture in failure.architectures
        ]


def install_line(wanted: tuple[str, ...]) -> str:
    """The command that installs a version that runs; its newest one may need a newer Python."""
    return " or ".join(f"pip install '{requirement}'" for requirement in wanted[:2])


@cache
def compatibility() -> Compatibility:
    """The table of all tried versions and failures, read once."""
    return msgspec.convert(load_yaml(preset_path("engines", "compatibility")), Compatibility)


def _numbers(version: str) -> Version:
    return parse(version) or (0, 0, 0)
