"""Metrics of the gateway and of its engines, in Prometheus' text format."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

#: The values of gauges by name, each with its labels.
Gauges: TypeAlias = Mapping[str, Iterable[tuple[tuple[str, ...], float]]]

_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PREFIX: Final = "turbofit_gateway_"
_HELP: Final = {
    "requests_total": ("counter", "Requests answered, by route and status."),
    "refused_total": ("counter", "Requests not passed on, by reason."),
    "limited_total": ("counter", "Requests lowered to the plan, by what was lowered."),
    "disconnected_total": ("counter", "Requests whose client went away."),
    "engine_failures_total": ("counter", "Requests that an engine did not finish."),
    "connections_closed_total": ("counter", "Connections closed without an answer, by reason."),
    "engine_deaths_total": ("counter", "Deaths of engines that had requests, by engine."),
    "convicted_total": ("counter", "Requests that became refused, since engines died of them."),
    "follow_ups_total": (
        "counter",
        "Requests that went on with a conversation, by engine and whether it had the turn before.",
    ),
    "images_total": ("counter", "Images passed on."),
    "units_total": ("counter", "Vision units passed on."),
    "connections": ("gauge", "Connections of clients."),
    "waiting": ("gauge", "Requests that wait for room."),
    "in_flight": ("gauge", "Requests at an engine."),
    "units_in_flight": ("gauge", "Vision units at an engine."),
    "kv_tokens_reserved": (
        "gauge",
        "KV tokens that requests may take, if vision units are limited.",
    ),
    "host_bytes_in_flight": ("gauge", "Host memory of images at an engine, as estimated."),
    "suspects": ("gauge", "Requests that an engine may have died of."),
    "convicted": ("gauge", "Requests that are refused because engines died of them."),
    "gpu_bytes_in_use": ("gauge", "Bytes in use on a GPU, by all processes."),
    "engine_up": ("gauge", "Whether an engine answers."),
    "first_tokens_told": ("gauge", "Whether an engine tells first tokens of answers in one piece."),
    "first_byte_seconds": ("histogram", "From the request's last byte to the answer's first."),
}


class Metrics:
    """Counts events of the gateway; the caller of `text` passes the values of gauges."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[tuple[str, ...], int]] = {}
        #: For each bucket, the requests whose first byte came in a time of this bucket.
        self._first = [0] * (len(_BUCKETS) + 1)
        self._first_sum = 0.0

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add ``by`` to a counter; each label is a text ``name=value``."""
        series = self._counts.setdefault(name, {})
        series[labels] = series.get(labels, 0) + by

    def first_byte(self, seconds: float) -> None:
        self._first[bisect_left(_BUCKETS, seconds)] += 1
        self._first_sum += seconds

    def text(self, gauges: Gauges) -> str:
        """Return the counters, the histogram and the given gauges in Prometheus' text format."""
        lines: list[str] = []
        for name, (kind, explained) in _HELP.items():
            lines += [f"# HELP {_PREFIX}{name} {explained}", f"# TYPE {_PREFIX}{name} {kind}"]
            if kind == "histogram":
                total = 0
                for bound, number in zip((*map(str, _BUCKETS), "+Inf"), self._first, strict=True):
                    total += number
                    lines.append(_line(f"{name}_bucket", (f"le={bound}",), total))
                lines += [
                    _line(f"{name}_sum", (), self._first_sum),
                    _line(f"{name}_count", (), total),
                ]
            else:
                counts = self._counts.get(name, {}).items()
                series = gauges.get(name, ()) if kind == "gauge" else counts
                lines += [_line(name, labels, value) for labels, value in series]
        return "\n".join(lines) + "\n"


def merge(pages: Mapping[int | str, str], label: str = "engine") -> str:
    """Merge pages of metrics into one; each sample gets the key of its page as label ``label``.

    All samples of a metric stand together. If a sample already has a label of this name, the old
    label gets the prefix ``exported_``, as in Prometheus: Prometheus refuses a sample with two
    labels of one name.
    """
    #: The lines of help and type, and the samples, of each metric.
    families: dict[str, tuple[list[str], list[str]]] = {}
    old_label = re.compile(rf'([{{,]){label}="')
    for key, page in pages.items():
        family, is_new, pair = "", False, f'{label}="{_escaped(str(key))}"'
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if name != family:
                    family, is_new = name, name not in families
                    families.setdefault(name, ([], []))
                if is_new:
                    families[name][0].append(line)
            elif line and not line.startswith("#"):
                # A histogram has samples of several names, which begin with its own name.
                name = family if family and line.startswith(family) else re.split("[{ ]", line)[0]
                families.setdefault(name, ([], []))[1].append(
                    _labelled(old_label.sub(rf'\1exported_{label}="', line), pair)
                )
    return "".join(
        f"{line}\n" for heads, samples in families.values() for line in (*heads, *samples)
    )


def _labelled(line: str, pair: str) -> str:
    """Return a sample's line with one more label; ``pair`` is ``name="value"``."""
    brace, space = line.find("{"), line.find(" ")
    if 0 <= brace < space or space < 0:
        inner = "" if line[brace + 1 : brace + 2] == "}" else ","
        return f"{line[: brace + 1]}{pair}{inner}{line[brace + 1 :]}"
    return f"{line[:space]}{{{pair}}}{line[space:]}"


def _line(name: str, labels: tuple[str, ...], value: float) -> str:
    pairs = (label.partition("=") for label in labels)
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, _, text in pairs)
    number = f"{value:.6f}" if isinstance(value, float) else str(value)
    return f"{_PREFIX}{name}{{{inner}}} {number}" if inner else f"{_PREFIX}{name} {number}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
