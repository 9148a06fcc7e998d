"""What a plan says of a draft that is layers of the model's own checkpoint (MTP).

Such a draft lets fewer requests run at once, mostly since the states of delta nets grow with each
proposed token. How much faster it answers depends on the task, so a plan has no speed of it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.model import Model
from turbofit.core.plan import SPECULATIVE, Plan
from turbofit.memory.engines import LMDEPLOY
from turbofit.planning.choose import best_plan
from turbofit.planning.resolved_request import ResolvedRequest

#: The beginning of the reason that compares numbers of proposed tokens.
DRAFTS: Final = "drafts: "
#: The numbers of proposed tokens that a plan compares; 0 is a plan without a draft.
_COMPARED: Final = (0, 1, 2, 3)
_COUNTED: Final = (
    "the draft's memory is counted, not rehearsed: no engine has shown it, so 1 GiB of each GPU is"
    " kept free unless --margin says otherwise"
)


def draft_warnings(plan: Plan) -> tuple[str, ...]:
    """Return the warning of such a draft that no rehearsal has run; empty for other plans."""
    rehearsal = plan.rehearsal
    return () if rehearsal and rehearsal.outcome == "served" else doubts(plan.model)


def doubts(model: Model) -> tuple[str, ...]:
    """Return the warning of such a draft; empty for other models."""
    return (_COUNTED,) if model.draft and model.draft.is_own else ()


def with_numbers(plan: Plan, request: ResolvedRequest) -> Plan:
    """Add to a plan with such a draft how many requests run at once with other numbers of tokens.

    The reason also has TurboMind's number, which has no drafts. Other plans are returned unchanged.
    """
    draft = request.model.draft
    if not draft or not draft.is_own or not plan.fits:
        return plan
    tokens = sorted({*_COMPARED, draft.tokens})
    counts = {k: _requests(plan, request, k, LMDEPLOY[1]) for k in tokens}
    listed, numbers = (", ".join(map(str, row)) for row in (counts.values(), counts))
    without = _requests(plan, request, 0, LMDEPLOY[0])
    beside = f"; {LMDEPLOY[0]}, which has no drafts: {without:,}" if without else ""
    text = (
        f"{DRAFTS}{listed} requests at once with {numbers} tokens proposed in a step{beside}; which"
        f" is the fastest differs by task: turbofit tune --drafts {','.join(map(str, _COMPARED))}"
    )
    return replace(plan, reasons=(*plan.reasons, text))


def _requests(plan: Plan, request: ResolvedRequest, tokens: int, engine: str) -> int:
    """Return how many requests run at once with ``tokens`` proposed in a step; 0 if none fits."""
    draft = request.model.draft
    if draft and tokens == draft.tokens:
        return plan.requests_at_once
    options = {k: v for k, v in request.engine_options.items() if k not in SPECULATIVE}
    model, margin = replace(request.model, draft=UNSET), replace(request.margin, least=0)
    if tokens and draft:
        margin = request.margin
        model = replace(model, draft=replace(draft, tokens=tokens))
        options[SPECULATIVE[0]], options[SPECULATIVE[2]] = draft.algorithm, tokens
    other = replace(
        request, model=model, margin=margin, engine_options=options, compares_limits=False
    )
    with suppress(TurbofitError):
        best = best_plan(other, engine)
        return best.requests_at_once if best.fits else 0
    return 0
