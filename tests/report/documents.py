"""Plans that reports must read well for, made by turbofit's own planner on preset machines."""

from __future__ import annotations

from functools import cache

import msgspec

from tests.support.plans import changed
from turbofit import api
from turbofit.core.engine_end import AnyEnd, Moment, RehearsedCache, RehearsedCase
from turbofit.core.plan import Plan, Rehearsal
from turbofit.core.run_report import (
    EngineRecord,
    RunAttempt,
    RunEvent,
    RunFigure,
    RunMoment,
    RunReport,
)
from turbofit.core.units import MIB
from turbofit.report.painters.html import page
from turbofit.report.stored_documents import StoredPlan, saved_document
from turbofit.report.views.plan_view import plan_view

#: What each is, and how it is asked for.
KINDS = {
    "fits": ("internvl2-8b", {"on": "4xrtx3090,nvlink=0-1+2-3", "tp": 4}),
    "does not fit": ("internvl2-26b", {"on": "1xrtx3060"}),
    "mixed cards": ("internvl2-8b", {"on": "rtx3090+rtx4090"}),
    "shared": ("llava-1.5-7b", {"on": "1xl4:free=19GiB"}),
    "text only": ("qwen2.5-7b", {"on": "1xrtx3090"}),
    "pytorch": ("cogvlm-17b", {"on": "2xrtx3090"}),
    "fallback": ("llava-onevision-7b", {"on": "2xrtx4090"}),
    "many cards": ("internvl2-76b", {"on": "16xrtx4090"}),
    "nvlink": ("internvl2-8b", {"on": "8xa100-80g"}),
}


@cache
def planned(kind: str) -> Plan:
    """One of ``KINDS``, or a rehearsal that served or died (shaped by hand on a real plan)."""
    if kind == "served":
        return rehearsed(api.plan("qwen2-vl-7b", on="1xrtx3090"))
    if kind == "died":
        return rehearsed(api.predict("qwen2-vl-7b", on="1xrtx3090"), dies=True)
    name, keywords = KINDS[kind]
    return api.plan(name, **keywords)  # type: ignore[arg-type]


def rehearsed(plan: Plan, *, dies: bool = False) -> Plan:
    """A plan as if it had been rehearsed: its own figures, a MiB more in each phase."""
    first = plan.ledgers[0]
    sizes = {"weights": first.load_peak, "cache": first.steady - 800 * MIB, "ready": first.steady}
    sizes["case vision_request"] = first.total - first.reserved if dies else first.peak
    if not dies:
        sizes["after vision_request"] = first.peak
    timeline = tuple(
        Moment(phase=name, peak=(size + MIB,), end=(size,), image=name == "case vision_request")
        for name, size in sizes.items()
    )
    death = AnyEnd(
        phase="case vision_request", where="QwenVit::Impl::Attn", asked=512 * MIB, left=202 * MIB
    )
    case = RehearsedCase(name="vision_request", peak=(first.peak,), transient=(MIB,), pinned=0)
    region = plan.engines[0].kv.region_bytes
    seen = Rehearsal(
        outcome="out_of_memory" if dies else "served",
        seconds=3.5,
        engine_version="0.18.0",
        cases=() if dies else (case,),
        cache=RehearsedCache(
            free=(2 * region,),
            region=(region,),
            object_size=1,
            slab_size=2,
            tokens=plan.engines[0].kv.tokens,
        ),
        death=death if dies else None,
        not_known=("CUDA context",),
        timeline=timeline,
    )
    serve = None if dies else plan.serve
    seen_plan = changed(plan, rehearsal=seen)
    return msgspec.structs.replace(seen_plan, fits=plan.fits and not dies, serve=serve)


def served_run(plan: Plan, *, pretend: bool = False) -> RunReport:
    """A run of a plan, as its record tells it."""
    moments = [
        RunMoment(
            phase=phase,
            at=float(at),
            used={}
            if pretend
            else {str(gpu.index): gpu.used + at * 512 * MIB for gpu in plan.ledgers},
        )
        for at, phase in enumerate(("starting", "weights", "cache", "check", "ready"))
    ]
    kv, card = plan.engines[0].kv, plan.ledgers[0]
    what = "in use at most" if pretend else "in use after the check"
    region, tokens = kv.region_bytes, kv.tokens
    rows = (
        RunFigure(what="KV cache", forecast=region, actual=region + MIB),
        RunFigure(what="KV tokens", forecast=tokens, actual=tokens, unit="tokens"),
        RunFigure(what=what, forecast=card.peak, actual=card.peak - MIB, gpu=card.index),
    )
    engine = EngineRecord(group=0, seconds={"weights": 2.5}, beside=rows)
    attempt = RunAttempt(
        started="2026-11-20T10:00:00+0000", engines=(engine,), moments=tuple(moments)
    )
    event = RunEvent(at="2026-11-20T11:00:00+0000", kind="grown", text="somebody grows")
    return RunReport(
        schema="turbofit.run/1", turbofit_version="0.1.0", started="2026-11-20T10:00:00+0000",
        state="ended", model=plan.model.name, pretend=pretend, lmdeploy="0.18.0",
        ended="SIGTERM", attempts=(attempt,), events=(event,),
    )  # fmt: skip


def plan_page(saved: StoredPlan) -> str:
    return page(plan_view(saved.plan, saved.run), saved_document(saved))
