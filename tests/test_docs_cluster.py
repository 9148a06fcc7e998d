"""docs/cluster.md: its figures are what its commands say, its names are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from turbofit.cli.main import main
from turbofit.launch.serve.runs import LEASE_SECONDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_every_action_is_there() -> None:
    for action in ("status", "nodes", "change", "drain"):
        assert f"turbofit cluster {action}" in PAGE


@pytest.mark.parametrize("nodes", ["4xrtx3090@4/1xl4@2/1xrtx2080ti", "4xrtx3090@4/1xl4:free=19GiB"])
def test_a_plan_says_what_the_page_says(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(nodes, capsys)
    said = " ".join(PAGE.split())
    (why,) = re.findall(
        r"1 node left out: ((?:runs|holds) .*?(?:peak of \S+ GiB|are promised))", told
    )
    assert f"`{why}`" in said
    if "/1xl4@2/" in nodes:
        assert re.findall(r"fits: .*? to any of them", told)[0] in said


def test_what_a_weak_node_costs_is_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    (spec,) = re.findall(r"with `sim:(\S+)` requests go up to 32,768", " ".join(PAGE.split()))
    told = planned(spec, capsys)
    assert "a request of up to 32,768 tokens" in told
    (effect,) = re.findall(r"--context 14336 (4 nodes serve: .*? on 2 nodes)", told)
    assert effect in " ".join(PAGE.split())


def planned(nodes: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `plan` prints, on one line."""
    assert main(["plan", "internvl2-8b", "--cluster", f"sim:{nodes}", "--concurrency", "64"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_names_are_the_codes() -> None:
    from turbofit.core.cluster import CLUSTER_STATUS_SCHEMA

    for name in (
        "TURBOFIT_NODE_SPEC",
        CLUSTER_STATUS_SCHEMA,
        "RAY_USE_TLS",
        f"for {LEASE_SECONDS:.0f} s",
    ):
        assert name in PAGE
    for section in ("## Without a GPU", "## More fronts, or none of ours", "## Who may do what"):
        assert section in PAGE


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) <= 150
