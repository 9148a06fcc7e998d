"""Prometheus' text format, as the gateway and LMDeploy write it: a pure parser."""

from __future__ import annotations

import re
from math import isfinite
from typing import Final, NamedTuple

_QUOTED: Final = r'"((?:[^"\\]|\\.)*)"'
#: A name, its labels, a number; a time and an exemplar may follow.
_LINE: Final = re.compile(
    rf'([A-Za-z_:][\w:]*)(?:\s*\{{((?:[^"}}]|{_QUOTED})*)\}}\s*|\s+)(\S+)'
    r"(?:\s+-?[\d.]+)?(?:\s+#.*)?$"
)
_LABEL: Final = re.compile(rf"([A-Za-z_]\w*)\s*=\s*{_QUOTED}")
_ESCAPES: Final = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}


class Sample(NamedTuple):
    """One number with its labels."""

    labels: dict[str, str]
    value: float


class MetricsPage:
    """Samples by name."""

    def __init__(self, samples: dict[str, list[Sample]]) -> None:
        self._samples = samples

    def of(self, name: str) -> list[Sample]:
        """All samples of a metric."""
        return self._samples.get(name, [])

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over samples that have these labels; None where there is none."""
        values = [
            sample.value for sample in self.of(name) if labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def of_model(self, model: str) -> MetricsPage:
        """The page without other models' samples, where it has several models and this one."""
        every = [sample for samples in self._samples.values() for sample in samples]
        if not any(sample.labels.get("model") == model for sample in every):
            return self
        return MetricsPage(
            {
                name: [sample for sample in samples if sample.labels.get("model", model) == model]
                for name, samples in self._samples.items()
            }
        )


def parse_page(text: str) -> MetricsPage:
    """The page's samples; without comments, other lines, and values that are no number.

    Prometheus writes NaN and infinities for what it does not know.
    """
    samples: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.match(line.strip())
        if match is None:
            continue
        try:
            value = float(match[4])
        except ValueError:
            continue
        if not isfinite(value):
            continue
        labels = {name: _plain(quoted) for name, quoted in _LABEL.findall(match[2] or "")}
        samples.setdefault(match[1], []).append(Sample(labels, value))
    return MetricsPage(samples)


def _plain(quoted: str) -> str:
    return re.sub(r'\\[n"\\]', lambda match: _ESCAPES[match[0]], quoted)
