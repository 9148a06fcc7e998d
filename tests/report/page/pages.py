"""Pages of the plans in `documents`, and of one whose every text is an attack."""

from __future__ import annotations

from msgspec.structs import replace

from tests.report.documents import planned, served_run
from tests.support.plans import plausible_plan
from turbofit.core.machine import Holder
from turbofit.core.plan import Command, Plan, Remedy
from turbofit.report.stored_documents import StoredPlan
from turbofit.report.views.plan_view import plan_page

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
        commands=(Command(env={"A": EVIL}, argv=("lmdeploy", EVIL), group=0),),
    )  # fmt: skip
    holder = Holder(pid=1, name=EVIL, bytes=5)
    gpus = tuple(replace(gpu, name=EVIL, uuid=EVIL, holders=(holder,)) for gpu in plan.machine.gpus)
    ledgers = tuple(
        replace(
            gpu, name=EVIL,
            ledger=tuple(replace(term, term=term.term + EVIL, note=EVIL) for term in gpu.ledger),
        )
        for gpu in plan.gpus
    )  # fmt: skip
    considered = tuple(replace(one, why_not=EVIL, engine=EVIL) for one in plan.considered)
    return replace(
        plan,
        gpus=ledgers,
        considered=considered,
        model=replace(plan.model, name=EVIL, architecture=EVIL),
        machine=replace(plan.machine, name=EVIL, source=EVIL, gpus=gpus),
        created=EVIL,
    )
