"""Dashboards over the gateway's /metrics: turbofit's own, and LMDeploy's behind it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import REPO
from turbofit.gateway.http.metrics import Metrics, merge

DASHBOARD = REPO / "docs" / "grafana.json"
#: The metrics that LMDeploy's own dashboard asks for, by model_name: in its repository
#: lmdeploy/monitoring/grafana/dashboards/json/lmdeploy-dashboard.json.
HISTOGRAMS = (
    "e2e_request_latency_seconds", "time_per_output_token_seconds", "iter_token_latency",
    "time_to_first_token_seconds",
)  # fmt: skip
OTHERS = (
    "prompt_tokens_total", "generation_tokens_total", "num_requests_running",
    "num_requests_waiting", "gpu_cache_usage_perc", "request_success_total",
    "request_queue_time_seconds_sum",
)  # fmt: skip


def queries() -> Iterator[str]:
    """What the panels of the gateway's dashboard ask for."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            yield target["expr"]


def test_each_query_is_of_a_metric_and_of_labels_that_there_are() -> None:
    text = Metrics().text({})
    names = set(re.findall(r"# TYPE (\S+)", text))
    asked = set()
    for query in queries():
        found = re.findall(r"turbofit_gateway_\w+", query)
        assert len(found) == 1, query
        name = re.sub("_(bucket|sum|count)$", "", found[0])
        assert name in names, query
        asked.add(name)
        # A counter is asked for its rate, a gauge for its value.
        assert (f"# TYPE {name} gauge" in text) is not bool(re.search("rate|increase", query))
    # What somebody must look at is there.
    assert {
        f"turbofit_gateway_{name}" for name in ("waiting", "engine_up", "refused_total")
    } < asked
    labels = {label for query in queries() for label in re.findall(r"by \((\w+)\)", query)}
    source = (REPO / "turbofit" / "gateway").rglob("*.py")
    code = "".join(path.read_text(encoding="utf-8") for path in source)
    assert [label for label in labels - {"le"} if f"{label}=" not in code] == []


def test_what_lmdeploys_dashboard_asks_for_comes_through() -> None:
    model = 'engine="0",model_name="m"'
    lines = [f'lmdeploy:{name}_bucket{{{model},le="1.0"}} 1.0' for name in HISTOGRAMS]
    lines += [f"lmdeploy:{name}{{{model}}} 2.0" for name in OTHERS]
    page = merge({0: "\n".join(lines), 1: "\n".join(lines)})
    for name in (*(f"{name}_bucket" for name in HISTOGRAMS), *OTHERS):
        samples = re.findall(rf"^lmdeploy:{name}{{(.*)}} ", page, re.MULTILINE)
        assert [sample.split(",")[0] for sample in samples] == ['engine="0"', 'engine="1"']
        assert all('model_name="m"' in sample for sample in samples)
        assert all('exported_engine="0"' in sample for sample in samples)


def test_lmdeploy_still_has_them() -> None:
    spec = importlib.util.find_spec("lmdeploy")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no lmdeploy")
    folder = Path(spec.submodule_search_locations[0]) / "metrics"
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    names = [name.removesuffix("_sum") for name in (*HISTOGRAMS, *OTHERS)]
    assert [name for name in names if f"lmdeploy:{name}" not in code] == []
