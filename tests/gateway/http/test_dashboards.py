"""Dashboards over the gateway's /metrics: turbofit's own, and LMDeploy's behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tests.support.processes import REPO
from turbofit.gateway.http.metrics import Metrics

DASHBOARD = REPO / "docs" / "grafana.json"


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
