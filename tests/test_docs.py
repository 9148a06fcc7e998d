"""The docs: links, environment variables, and the figures of the cluster's page."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import turbofit.api
from scripts.symptoms import anchors
from turbofit.cli.main import main
from turbofit.launch.serve.runs import LEASE_SECONDS

DOCS = Path(__file__).parents[1] / "docs"
LEDGERS: list[dict[str, Any]] = [
    {"model": "internvl2-8b", "on": "1xrtx3090"},
    {"model": "internvl2-8b", "on": "1xv100-32g"},
    {"model": "internvl2-8b", "on": "4xrtx3090,nvlink=0-1+2-3", "tp": 4},
    {"model": "qwen2-vl-7b-awq", "on": "1xl4:free=19GiB"},
    {"model": "qwen2.5-7b", "on": "1xrtx4090"},
    {"model": "internvl2-2b", "on": "1xrtx3090", "enable_prefix_caching": True},
]


def named() -> set[str]:
    """Terms in back ticks; `.lm_head` beside `weights.embedding` is `weights.lm_head`."""
    found = set[str]()
    for line in (DOCS / "turbomind.md").read_text().splitlines():
        words = re.findall(r"`([\w.]+)`", line)
        head = next((word.split(".")[0] for word in words if "." in word[1:]), "")
        found |= {head + word if word.startswith(".") else word for word in words}
    return found


@pytest.mark.parametrize("options", LEDGERS, ids=lambda options: f"{options['model']}")
def test_every_term_of_turbominds_ledger_is_explained(options: dict[str, Any]) -> None:
    plan = turbofit.api.plan(**{"engine": "turbomind", **options})
    terms = {term.term for gpu in plan.gpus for term in gpu.ledger}
    assert len(terms) > 20
    assert terms <= named()


def test_links_to_sections_lead_somewhere() -> None:
    found = 0
    for page in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text):
            assert anchor in anchors(page.parent / target if target else page), (page.name, anchor)
            found += 1
    assert found >= 20


ROOT = Path(__file__).parents[1]
#: A table's row: the variable, and whether it is read, set or both.
ROW = re.compile(r"^\| `([A-Z][A-Z0-9_]+)` \| (?:read|set|read, set) \| \S", re.MULTILINE)
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
#: Strings that look like variables: a word in a sentence, the tests' own variable, values, types of
#: tensors, constants of C and of NVML.
OTHERS = re.compile(
    r"COMMAND_OPTION|TURBOFIT_CUDA_PATH|FIRST_COMPLETED|PCI_BUS_ID|F[68]_E\dM\d(FNUZ)?|F8_E8M0|(O|TCP|P2P|NVML_NVLINK)_[A-Z_]+"
)


def test_the_table_names_the_variables_of_the_code() -> None:
    names: set[str] = set()
    texts: set[str] = set()
    for path in (ROOT / "turbofit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            names.update(str(getattr(node, field, "")) for field in ("id", "name", "attr"))
    other = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "turbofit").rglob("*.c"))
    other += (ROOT / "presets" / "export" / "compose.template").read_text(encoding="utf-8")
    rows = ROW.findall((ROOT / "docs" / "environment.md").read_text(encoding="utf-8"))
    assert len(rows) == len(set(rows)), "a variable stands twice"
    used = {one for one in texts - names if VARIABLE.fullmatch(one) and not OTHERS.fullmatch(one)}
    assert used - set(rows) == set()
    # `HOME` is what `expanduser` reads.
    unused = [one for one in rows if one not in texts and not re.search(rf"\b{one}\b", other)]
    assert unused in ([], ["HOME"])


PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_every_action_is_there() -> None:
    for action in ("status", "nodes", "change", "drain"):
        assert f"turbofit cluster {action}" in PAGE


@pytest.mark.parametrize("nodes", ["4xrtx3090@4/1xl4@2/1xrtx2080ti", "4xrtx3090@4/1xl4:free=19GiB"])
def test_a_plan_says_what_the_page_says(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(nodes, capsys, "--concurrency", "64")
    said = " ".join(PAGE.split())
    (why,) = re.findall(
        r"1 node left out: ((?:runs|holds) .*?(?:peak of \S+ GiB|are promised))", told
    )
    assert f"`{why}`" in said
    if "/1xl4@2/" in nodes:
        assert re.findall(r"fits: .*? to any of them", told)[0] in said


def test_what_a_weak_node_costs_is_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(PAGE.split())
    (spec,) = re.findall(r"With `sim:(\S+)` requests go up to 32,768 tokens on two nodes", said)
    told = planned(spec, capsys)
    assert "on 2 of 4 nodes" in told
    assert "a request of up to 32,768 tokens" in told
    assert "`--context 14336` plans four" in said
    assert "on 4 of 4 nodes" in planned(spec, capsys, "--context", "14336")


def planned(nodes: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `plan` prints, on one line."""
    assert main(["plan", "internvl2-8b", "--cluster", f"sim:{nodes}", *more]) == 0
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
