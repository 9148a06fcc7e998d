"""What the pages of docs say, in both languages."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import pytest

import turbofit.api
from turbofit.cli.main import main
from turbofit.cli.manual import EXIT_CODES
from turbofit.gateway.http.refusals import refusals

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (DOCS / "troubleshooting.md", DOCS / "zh" / "troubleshooting.md")
LEDGERS: list[dict[str, Any]] = [
    {"model": "internvl2-8b", "on": "1xrtx3090"},
    {"model": "internvl2-8b", "on": "1xv100-32g"},
    {"model": "internvl2-8b", "on": "4xrtx3090,nvlink=0-1+2-3", "tp": 4},
    {"model": "qwen2-vl-7b-awq", "on": "1xl4:free=19GiB"},
    {"model": "qwen2.5-7b", "on": "1xrtx4090"},
    {"model": "internvl2-2b", "on": "1xrtx3090", "enable_prefix_caching": True},
]
#: A table's row: the variable, and whether it is read, set or both.
ROW = re.compile(r"^\| `([A-Z][A-Z0-9_]+)` \| (?:read|set|read, set) \| \S", re.MULTILINE)
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
#: Strings that look like variables: a word in a sentence, the tests' own variable, values, types of
#: tensors, constants of C and of NVML.
OTHERS = re.compile(
    r"COMMAND_OPTION|MALLOC_ARENA_MAX|TURBOFIT_CUDA_PATH|FIRST_COMPLETED|PCI_BUS_ID|SC_CLK_TCK|F[68]_E\dM\d(FNUZ)?|F8_E8M0|(O|TCP|P2P|NVML_NVLINK)_[A-Z_]+"
)
CLUSTER_PAGE = (DOCS / "cluster.md").read_text()
TWINS = {"README.md": "README.zh-CN.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}" for path in sorted((DOCS / "zh").glob("*.md"))
}
_KINDS = (("#", r"#+ "), ("row", r"\|"), ("item", r"(?:-|\d+\.) "), ("code", r"    \S"))
_CODE = re.compile(r"``(.+?)``|`([^`]+)`")
_LINK = re.compile(r"\]\(([^)#\s]*)[^)]*\)")
_FACT = re.compile(r"--[a-z][\w-]*|\d+(?:[.,]\d+)*")
#: Answers of `diagnose` that are no cause: no failure, another program, a server that stands still.


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
    terms = {term.term for gpu in plan.ledgers for term in gpu.terms}
    assert len(terms) > 20
    assert terms <= named()


def anchors(page: Path) -> list[str]:
    """What its headings are called in an address, on GitHub and on the site."""
    heads = re.findall(r"^#+ (.+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_links_lead_somewhere() -> None:
    found = 0
    for page in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", text):
            assert anchor in anchors(page.parent / target if target else page), (page.name, anchor)
            found += 1
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
    assert found >= 20


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
    rows = ROW.findall((DOCS / "environment.md").read_text(encoding="utf-8"))
    assert len(rows) == len(set(rows)), "a variable stands twice"
    used = {one for one in texts - names if VARIABLE.fullmatch(one) and not OTHERS.fullmatch(one)}
    assert used - set(rows) == set()
    # `HOME` is what `expanduser` reads.
    unused = [one for one in rows if one not in texts and not re.search(rf"\b{one}\b", other)]
    assert unused in ([], ["HOME"])


def test_a_node_that_is_left_out_says_what_the_page_says(capsys) -> None:
    words = ["plan", "internvl2-8b", "--cluster", "sim:4xrtx3090@4/1xl4:free=19GiB", "--json"]
    assert main(words) == 0
    (why,) = {one["why_not"] for one in json.loads(capsys.readouterr().out)["nodes"]} - {""}
    assert f"`{why}`" in " ".join(CLUSTER_PAGE.split())


class Block(NamedTuple):
    """A heading, a row of a table, an item of a list, a line of code or a paragraph."""

    line: int
    kind: str
    text: str

    @property
    def facts(self) -> set[str]:
        """Its code, figures, options and the pages that its links lead to."""
        if self.kind == "code":
            return {re.sub(r"\s+#.*", "", self.text)}
        code = {(one[1] or one[2]).strip() for one in _CODE.finditer(self.text)}
        text = _CODE.sub("", self.text)
        pages = {Path(page).name.replace(".zh-CN", "") for page in _LINK.findall(text)}
        return code | pages | set(_FACT.findall(_LINK.sub("]", text)))


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page; comments are none."""
    block: Block | None = None
    fenced = False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        kind = next((kind for kind, start in _KINDS if re.match(start, line)), "text")
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            yield Block(number, "code", line)
        elif block and line and kind == "text":
            block = block._replace(text=f"{block.text} {line.strip()}")
        else:
            if block:
                yield block
            level = line.split()[0] if kind == "#" else kind
            block = Block(number, level, line) if line and not line.startswith("<!--") else None


@pytest.mark.parametrize(("english", "chinese"), TWINS.items())
def test_both_languages_have_the_same_facts(english: str, chinese: str) -> None:
    pages = [list(blocks((ROOT / name).read_text(encoding="utf-8"))) for name in (english, chinese)]
    differ = []
    for one, twin in zip_longest(*pages):
        if one is None or twin is None or one.kind != twin.kind:
            differ.append(f"here the pages part: {one} / {twin}")
            break
        if facts := one.facts ^ twin.facts:
            differ.append(f"{english}:{one.line}, {chinese}:{twin.line}: {sorted(facts)}")
    assert not differ, "\n".join(differ)


@pytest.mark.parametrize("page", PAGES)
def test_every_refusal_stands_on_the_page_with_its_status(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = {f"| {row.status} `{key.partition(':')[0]}` |" for key, row in refusals().items()}
    assert {row for row in rows if row not in text} == set()
    assert set(re.findall(r"^\| \d{3} `\w+` \|", text, re.MULTILINE)) == rows


def test_every_refusal_is_a_row_and_names_the_facts_of_its_sentence() -> None:
    """Codes that are no literals are looked for as such."""
    package, used = ROOT / "turbofit", set()
    for path in [*package.glob("gateway/**/*.py"), package / "serving" / "fallback_server.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)}
        for node in ast.walk(tree):
            named = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal"
            if not named or not isinstance(node.args[0], ast.Constant):
                continue
            facts = {one.arg for one in node.keywords} - {"retry_after", "status"}
            says = refusals()[node.args[0].value].says
            asked = {field for _, field, _, _ in Formatter().parse(says) if field}
            assert asked | {"param"} == facts | {"param"}, (path, node.lineno)
    assert refusals().keys() <= used


def test_every_exit_code_of_a_failure_is_explained() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for code in EXIT_CODES:
        assert code in (0, 1, 2, 130) or f"\n| {code} |" in text
