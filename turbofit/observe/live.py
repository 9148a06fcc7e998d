"""The state of a running server, read from its gateway's ``/metrics``, and the page's parser.

The page has Prometheus' text format, as the gateway and LMDeploy write it.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPException
from math import isfinite
from typing import Final, NamedTuple

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.struct import Struct

_SECONDS: Final = 5.0
_LARGEST: Final = 8 << 20
_OURS: Final = "turbofit_gateway_"
#: The most digits of an engine's number; a longer label is a name.
_LONGEST_NUMBER: Final = 9
_QUOTED: Final = r'"((?:[^"\\]|\\.)*)"'
#: A name, its labels, a number; a timestamp and an exemplar may follow.
_LINE: Final = re.compile(
    rf'([A-Za-z_:][\w:]*)(?:\s*\{{((?:[^"}}]|{_QUOTED})*)\}}\s*|\s+)(\S+)'
    r"(?:\s+-?[\d.]+)?(?:\s+#.*)?$"
)
_LABEL: Final = re.compile(rf"([A-Za-z_]\w*)\s*=\s*{_QUOTED}")
_ESCAPES: Final = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}


class LiveEngine(Struct):
    """The state of one engine; a figure is None if the page does not contain it.

    ``index`` is the engine's name in a cluster. ``cache_used`` is a share of 1; tokens are totals
    since its start.
    """

    index: int | str
    up: bool
    in_flight: int
    units: int
    running: int | None = None
    queued: int | None = None
    cache_used: float | None = None
    prompt_tokens: float | None = None
    generated_tokens: float | None = None


class LiveServer(Struct):
    """The server at one moment; ``limited`` and ``refused`` are totals by kind and reason.

    ``suspects`` counts the requests and clients after which an engine may have died; ``convicted``
    and ``clients_refused`` count the requests and clients that are refused for that.
    """

    waiting: int
    engines: tuple[LiveEngine, ...]
    requests: int = 0
    limited: dict[str, int] = msgspec.field(default_factory=dict)
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    failures: int = 0
    suspects: int = 0
    convicted: int = 0
    clients_refused: int = 0


def fetch_page(url: str, key: str | None = None) -> str:
    """Return the text of a gateway's ``/metrics``.

    Raises:
        UsageError: no server answers there, or its answer is an error.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        # Without a proxy: the gateway is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_SECONDS) as answer:
            text: bytes = answer.read(_LARGEST)
    except urllib.error.HTTPError as exc:
        hint = "give a key that the server knows: --api-key, or TURBOFIT_API_KEYS"
        if exc.code != 401:
            hint = "is it turbofit's gateway? An LMDeploy without one has no such page"
        raise UsageError(f"{url} answers {exc.code} to /metrics", hint=hint) from None
    except (OSError, ValueError, HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise UsageError(
            f"nobody answers at {url}: {reason}", hint="is the server still running?"
        ) from None
    return text.decode(errors="replace")


def now_of(text: str, model: str = "") -> LiveServer:
    """The state that a page describes; if it covers several models, only that of this one.

    Raises:
        UsageError: it is not a page of turbofit's gateway.
    """
    page = parse_page(text).of_model(model)
    if not page.of(f"{_OURS}waiting"):
        raise UsageError(
            "that page is not of turbofit's gateway", hint="give the address that clients use"
        )
    labels = {sample.labels.get("engine", "") for sample in page.of(f"{_OURS}engine_up")} - {""}
    numbers = {label for label in labels if label.isdecimal() and len(label) <= _LONGEST_NUMBER}
    known: list[int | str] = [*sorted(map(int, numbers)), *sorted(labels - numbers)]
    return LiveServer(
        waiting=page.count("waiting"),
        engines=tuple(_engine(page, index) for index in known),
        requests=page.count("requests_total"),
        limited=_by(page, "limited_total"),
        refused=_by(page, "refused_total"),
        failures=page.count("engine_failures_total"),
        suspects=page.count("suspects"),
        convicted=page.count("convicted"),
        clients_refused=page.count("clients_refused"),
    )


def _engine(page: MetricsPage, index: int | str) -> LiveEngine:
    label = {"engine": str(index)}
    running = page.total("lmdeploy:num_requests_running", **label)
    queued = page.total("lmdeploy:num_requests_waiting", **label)
    return LiveEngine(
        index=index,
        up=bool(page.count("engine_up", **label)),
        in_flight=page.count("in_flight", **label),
        units=page.count("units_in_flight", **label),
        running=None if running is None else int(running),
        queued=None if queued is None else int(queued),
        cache_used=page.total("lmdeploy:gpu_cache_usage_perc", **label),
        prompt_tokens=page.total("lmdeploy:prompt_tokens_total", **label),
        generated_tokens=page.total("lmdeploy:generation_tokens_total", **label),
    )


def _by(page: MetricsPage, name: str) -> dict[str, int]:
    totals = Counter[str]()
    for sample in page.of(f"{_OURS}{name}"):
        totals[", ".join(sample.labels.values())] += int(sample.value)
    return dict(totals)


class Sample(NamedTuple):
    """One number with its labels."""

    labels: dict[str, str]
    value: float


class MetricsPage:
    """The samples of a page, by name."""

    def __init__(self, samples: dict[str, list[Sample]]) -> None:
        self._samples = samples

    def of(self, name: str) -> list[Sample]:
        return self._samples.get(name, [])

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of all samples that have these labels; None if there are none."""
        values = [
            sample.value for sample in self.of(name) if labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def count(self, name: str, **labels: str) -> int:
        """The sum of the gateway's own samples; 0 if there are none."""
        return int(self.total(f"{_OURS}{name}", **labels) or 0)

    def of_model(self, model: str) -> MetricsPage:
        """The page without other models' samples; the whole page if it does not name this model."""
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
    """Return the samples of a page, without comments, other lines and values that are not finite.

    Prometheus writes NaN and infinities for unknown values.
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
