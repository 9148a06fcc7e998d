"""Why a shape that fits was not chosen, in one line."""

from __future__ import annotations

from turbofit.core.units import format_bytes, three_digits
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.speed.links import group_class

__all__ = ["why_rejected"]

#: Less than this share of a step on links is not what decides.
_MUCH = 0.1


def why_rejected(request: ResolvedRequest, best: Evaluation, other: Evaluation) -> str:
    """The goal's figures of both, and why the other's is lower."""
    if other.worth < best.worth:
        figures = _figures(request, best, other)
        slower = other.worth[:-1] == best.worth[:-1]
        return figures + (_because(request, best, other) if slower else "")
    if other.queues and not best.queues:
        return "image requests would queue"
    if other.kv_tokens < best.kv_tokens:
        return f"{best.kv_tokens - other.kv_tokens:,} KV tokens fewer"
    return "equal; the larger prefill and fewer shards are preferred"


def _figures(request: ResolvedRequest, best: Evaluation, other: Evaluation) -> str:
    if other.vision_load.units_per_request < best.vision_load.units_per_request:
        return "serves smaller images"
    shorter, context = other.settings.session_len, best.settings.session_len
    if shorter < context:
        return f"its cache holds a context of {shorter:,} tokens, not {context:,}"
    goal = request.workload.goal
    if other.footprint > best.footprint:
        return f"takes {format_bytes(other.footprint - best.footprint)} more"
    if goal == "latency":
        return f"an answer in {1 / other.score:.1f} s, not {1 / best.score:.1f}"
    if goal == "context":
        return f"{other.kv_tokens:,} KV tokens for one request, not {best.kv_tokens:,}"
    return f"{three_digits(other.score)} requests/s, not {three_digits(best.score)}"


def _because(request: ResolvedRequest, best: Evaluation, other: Evaluation) -> str:
    """Why the other shape is slower; empty where there is no single cause."""
    speeds, ours = other.speeds, best.speeds
    if not speeds or not ours or request.workload.goal == "context":
        return ""
    worst = max(range(len(speeds)), key=lambda i: speeds[i].reduce / speeds[i].step)
    share = speeds[worst].reduce / speeds[worst].step
    if share > max(_MUCH, *(speed.reduce / speed.step for speed in ours)):
        gpus = [request.machine.gpu(index) for index in other.shape.groups[worst]]
        return (
            f": {share:.0%} of a step waits for links ({group_class(request.machine, gpus).words})"
        )
    together, chosen = (sum(speed.running for speed in each) for each in (speeds, ours))
    if together < chosen - 0.5:
        return f": its cache holds {together:.0f} requests at once, not {chosen:.0f}"
    if sum(map(len, other.shape.groups)) < sum(map(len, best.shape.groups)):
        return ": GPUs stay idle"
    slow, fast = (max(speed.prefill for speed in each) for each in (speeds, ours))
    if slow > fast * (1 + _MUCH):
        return f": a prompt takes {_two_digits(slow)} s, not {_two_digits(fast)}"
    slow, fast = (max(speed.step for speed in each) for each in (speeds, ours))
    if slow > fast * (1 + _MUCH):
        return f": a token takes {_two_digits(slow * 1000)} ms, not {_two_digits(fast * 1000)}"
    return ""


def _two_digits(value: float) -> str:
    """``0.14``, ``1.4``, ``14`` or ``140``, never ``1.4e+02``."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
