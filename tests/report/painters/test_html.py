"""A plan's page: whole, in silence and safe."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from msgspec.structs import replace

from tests.report.documents import KINDS, plan_page, planned, served_run
from tests.support.plans import changed, plausible_plan
from turbofit.core.machine import Holder
from turbofit.core.plan import Command, Plan, Remedy
from turbofit.report.stored_documents import StoredPlan

EVIL = (
    "</script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"
    "'\"&<b>\u2028\u202e${x}$title"
)


def page_of(kind: str) -> str:
    """The page of a kind of plan, or of a run."""
    if kind == "run":
        plan = planned("mixed cards")
        return plan_page(StoredPlan(plan, served_run(plan), "run"))
    if kind == "pretend run":
        plan = planned("fits")
        return plan_page(StoredPlan(plan, served_run(plan, pretend=True), "run"))
    return plan_page(StoredPlan(planned(kind), None, kind))


def evil_plan() -> Plan:
    """A plan whose names and sentences try to get out of their places."""
    plan = plausible_plan(
        verdict=EVIL, warnings=(EVIL,), reasons=(EVIL, f"dtype: {EVIL}"),
        remedies=(Remedy(change=EVIL, effect=EVIL),),
        command=Command(env={"A": EVIL}, argv=("lmdeploy", EVIL)),
    )  # fmt: skip
    holder = Holder(pid=1, name=EVIL, bytes=5)
    gpus = tuple(replace(gpu, name=EVIL, uuid=EVIL, holders=(holder,)) for gpu in plan.machine.gpus)
    ledgers = tuple(
        replace(
            gpu, name=EVIL,
            terms=tuple(replace(term, term=term.term + EVIL, note=EVIL) for term in gpu.terms),
        )
        for gpu in plan.ledgers
    )  # fmt: skip
    considered = tuple(replace(one, why_not=EVIL, engine=EVIL) for one in plan.considered)
    return replace(
        changed(plan, ledgers=ledgers),
        considered=considered,
        model=replace(plan.model, name=EVIL, architecture=EVIL),
        machine=replace(plan.machine, name=EVIL, source=EVIL, gpus=gpus),
        created=EVIL,
    )


ALL = (*KINDS, "served", "died", "run", "pretend run")
VOID = {"meta", "link", "br"}


class Reader(HTMLParser):
    """Elements with their attributes; fails where they do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.data[self.seen[-1][1].get("id") or self.open[-1]] = data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("kind", ALL)
def test_a_page_is_whole_small_and_asks_nobody(kind: str) -> None:
    text = page_of(kind)
    assert len(text.encode()) < 300_000
    reader = read(text)
    for name, attributes in reader.seen:
        assert name not in ("img", "iframe", "object", "embed", "video", "audio", "base", "form")
        assert not set(attributes) & {"src", "srcset", "action", "ping"}
        assert not [key for key in attributes if key.startswith("on")]
        if "href" in attributes:
            assert re.fullmatch(r"data:,|#part-[0-9]+", attributes["href"] or "")
    assert "url(" not in reader.data["style"]
    assert "@import" not in reader.data["style"]
    ids = [attributes["id"] for _, attributes in reader.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.seen:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        assert attributes.get("role") != "img" or attributes.get("aria-label")


@pytest.mark.parametrize("kind", ["fits", "served", "run"])
def test_the_json_is_inside(kind: str) -> None:
    document = json.loads(read(page_of(kind)).data["turbofit-json"])
    plan = document["plan"] if kind == "run" else document
    name = "mixed cards" if kind == "run" else kind
    assert Plan.from_json(json.dumps(plan)) == planned(name)


def test_nothing_but_its_own_script_may_run() -> None:
    reader = read(page_of("fits"))
    policy = next(
        attributes["content"]
        for _, attributes in reader.seen
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(reader.data["script"].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_what_others_wrote_stays_text() -> None:
    reader = read(plan_page(StoredPlan(evil_plan(), None, EVIL)))
    assert "img" not in {name for name, _ in reader.seen}
    assert sum(name == "script" for name, _ in reader.seen) == 2
    assert json.loads(reader.data["turbofit-json"])["verdict"] == EVIL
