"""What people are told of a cluster's plan: verdict, reasons, who is left out, what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan, Remedy
from turbofit.core.units import format_bytes, three_digits
from turbofit.tuner.cluster.kind_planner import KindPlan, KindPlanner, Promise
from turbofit.tuner.cluster.kinds import Kind, Rounding
from turbofit.tuner.cluster.promise import Choice
from turbofit.tuner.cluster.spans import NETWORK
from turbofit.tuner.speed.links import LinkClass
from turbofit.tuner.speed.rates import rates

__all__ = [
    "cards_of", "count", "gains", "left_out", "over_network", "reasons", "remedies", "too_few",
    "too_short", "too_small", "verdict", "warnings",
]  # fmt: skip

#: Reasons of nodes that do not serve which the verdict names, and remedies shown.
_SHOWN: Final = 3
_MOST_REMEDIES: Final = 6


def verdict(plan: ClusterPlan) -> str:
    """Whether it fits, on how many nodes; or why none serves."""
    name, nodes = plan.model.name, plan.nodes
    if not nodes:
        return f"does not fit: {name}: the cluster has no nodes"
    if not plan.fits and plan.held is not UNSET and plan.held.requests:
        held, wanted = plan.held, plan.workload.concurrency or 0
        return (
            f"does not fit: {name} with --concurrency {wanted}: the cache of"
            f" {count(len(nodes), 'node')} holds {held.requests:,} of {wanted:,} requests of"
            f" {held.request_tokens:,} tokens"
        )
    if not plan.fits:
        why = Counter(node.why_not for node in nodes).most_common(_SHOWN)
        told = "; ".join(f"{count(n, 'node')}: {text}" for text, n in why)
        return f"does not fit: {name} on none of {count(len(nodes), 'node')}: {told}"
    used = [node.plan for node in nodes if node.plan is not None]
    together = sum(len(span.nodes) for span in plan.spans)
    gpus = sum(len(one.gpus) for one in (*used, *(span.plan for span in plan.spans)))
    of = f"{len(used) + together:,} of {count(len(nodes), 'node')}"
    if together:
        of = f"{of}, {len(plan.spans[0].nodes)} to an engine"
    return (
        f"fits: {name} on {of}, {count(gpus, 'GPU')}, {count(plan.engines, 'engine')}:"
        f" {plan.total_tokens:,} KV tokens; a request of up to"
        f" {plan.longest_request_tokens:,} tokens may go to any of them"
    )


def reasons(
    planner: KindPlanner, plan: ClusterPlan, choice: Choice, rounding: Rounding
) -> Iterator[str]:
    """Why this promise, who bounds it, how requests are shared, how nodes were put together."""
    yield from _span_reasons(plan)
    if choice.promise.limit is not None and plan.limits and plan.limits.vision_unit:
        yield _limit_reason(planner, choice)
    yield _context_reason(planner, plan)
    used = [node.at_once for node in plan.nodes if node.plan is not None]
    used += [span.at_once for span in plan.spans]
    least, most = min(used), max(used)
    shares = three_digits(least)
    if most - least >= 1e-6:
        shares += f" to {three_digits(most)}"
    where = "an engine" if plan.spans else "a node"
    requests = plan.requests_at_once
    how = "" if len(choice.shares) < 2 else ", as the forecast gives most of the goal"
    yield f"shares: {count(requests, 'request')} at once, {shares} on {where}{how}"
    if _unequally_full(planner, choice):
        yield _sign(len(choice.shares), rounding)
    if plan.engines > requests:
        yield (
            f"{plan.engines:,} engines for {count(requests, 'request')} at once: most of them wait"
            " for requests; --concurrency says how many there will be over all nodes"
        )


def _span_reasons(plan: ClusterPlan) -> Iterator[str]:
    """What an engine over several nodes rests on."""
    if not plan.spans:
        return
    tp = plan.spans[0].plan.parallel.tp
    yield (
        f"tp {tp} over {len(plan.spans[0].nodes)} nodes: no node alone serves what is asked; this"
        " is slower, since every layer's two all-reduces cross the network"
    )
    yield (
        "the network's speed is not known: all-reduces are forecast as through host memory across"
        f" NUMA nodes, {_network_rate() / 1e9:.2g} GB/s a GPU; a slower network serves less"
    )
    yield (
        f"NCCL's buffers for the network are an estimate: {format_bytes(NETWORK)} a GPU are counted"
        f" as held, and {format_bytes(NETWORK)} more stay free, since they may come late; every"
        " card counts as full as the fullest of its engine. Over: it costs cache"
    )
    if not plan.spans[0].plan.engine.on_torch:
        yield (
            "LMDeploy's own multi-node options, which turbofit has not seen run: start all commands"
            " of an engine within a minute or so, rank 0's node answers"
        )
        return
    yield (
        "engine pytorch: TurboMind of LMDeploy 0.18 does not load a model that sees images over"
        " nodes, since it looks for the GPUs of all ranks on each of them"
    )
    yield (
        "LMDeploy's PyTorch engine takes its GPUs from Ray, which turbofit has not seen it do over"
        " nodes: one command, on a node of Ray's cluster; Ray chooses among all free GPUs, so let"
        " none be free that are smaller or fuller than those planned for"
    )


def over_network(plan: Plan) -> Plan:
    """A plan over several nodes in words that say so."""
    across = f"({LinkClass.ACROSS_HOST.words})"
    return replace(plan, verdict=plan.verdict.replace(across, "(over the network)"))


def _network_rate() -> float:
    """Bytes/s that the forecast assumes one GPU to send between nodes."""
    figures = rates()
    return figures.host_bandwidth * figures.across_factor


def _sign(kinds: int, rounding: Rounding) -> str:
    """What is lost by planning differently full nodes as one."""
    text = (
        f"planned as {count(kinds, 'kind')}, each for the least free memory of its members: the"
        " others get less cache than they could have, never more"
    )
    if not rounding.span:
        return f"{text}; within {format_bytes(rounding.step)} a card"
    return (
        f"{text}; so many are differently full that nodes within {format_bytes(rounding.step)} a"
        " card are of one kind, and cards of a node as full as its fullest within"
        f" {format_bytes(rounding.span)}"
    )


def _unequally_full(planner: KindPlanner, choice: Choice) -> bool:
    """Whether some node is planned for less than it has."""
    kinds = [planner.kinds[k] for k in choice.shares]
    return any(_used(kind.machine) != _used(n.machine) for kind in kinds for n in kind.nodes)


def _used(machine: Machine | None) -> tuple[object, ...]:
    return () if machine is None else tuple(machine.gpu(i).used for i in machine.visible)


def _limit_reason(planner: KindPlanner, choice: Choice) -> str:
    name, limit, most = planner.rule.limit_name, choice.promise.limit, planner.base.requested_limit
    if not planner.limit_free:
        return f"{name} {limit}: as set by you"
    if limit == most:
        return f"{name} {limit}: the model's own; nodes that cannot serve it are left out"
    return (
        f"{name} {limit}: no node serves the model's own {most}; of what nodes reach, the share of"
        " the image times the goal's value is largest here"
    )


def _context_reason(planner: KindPlanner, plan: ClusterPlan) -> str:
    longest, positions = (
        plan.longest_request_tokens,
        planner.base.model.text.max_position_embeddings,
    )
    if planner.base.workload.context is not None:
        return f"context {longest}: as asked; nodes that do not hold it are left out"
    if "session_len" in planner.base.fixed:
        return f"context {longest}: the session_len set by you, as far as every cache holds it"
    if longest >= positions:
        return f"context {longest}: the model's own, which every used node holds"
    held = [
        node.name
        for node in plan.nodes
        if node.plan is not None and min(node.plan.kv.tokens, positions) < longest * 1.1
    ]
    who = f"; {held[0]} bounds it" if len(held) == 1 else ""
    return f"context {longest}: the longest that every used node holds or plans for{who}"


def warnings(cluster: Cluster, plan: ClusterPlan) -> Iterator[str]:
    """What a person should know: who is left out, and where nodes differ in what they answer."""
    left = Counter(node.why_not for node in plan.nodes if node.why_not)
    if plan.fits:
        for why, n in left.most_common():
            yield f"{count(n, 'node')} left out: {why}"
    pretend = sum(node.pretend for node in cluster.nodes)
    if pretend:
        yield f"{count(pretend, 'node')} of {len(cluster.nodes):,} with pretend GPUs"
    used = [node.plan for node in plan.nodes if node.plan is not None]
    used += [span.plan for span in plan.spans]
    dtypes = sorted({one.settings.dtype for one in used})
    if len(dtypes) > 1:
        yield (
            f"nodes compute in {' and '.join(dtypes)}, as their cards can: the same request may be"
            " answered differently; --dtype float16 makes them one"
        )
    engines = sorted({one.engine.name for one in used})
    if len(engines) > 1:
        yield f"nodes run {' and '.join(engines)}: answers may differ in wording"
    yield from dict.fromkeys(text for one in used for text in one.warnings if _common(text))


def _common(text: str) -> bool:
    """Whether a node's warning is about what all of them do."""
    return not text.startswith("not used: ")


def left_out(planner: KindPlanner, plan: Plan, choice: Choice) -> str:
    """Why a node that would serve alone is not used under the promise."""
    limit, longest = plan.limits.image_limit, plan.kv.longest_request_tokens
    promise = choice.promise
    if promise.limit is not None and limit is not None and limit < promise.limit:
        return too_small(planner, limit, promise.limit)
    if promise.context is not None and longest < promise.context:
        return too_short(longest, promise.context)
    if planner.base.workload.goal == "latency":
        return "its answers would be the slowest, and the goal is the shortest one"
    return f"holds less than {promise.context:,} tokens with its share of the requests"


def too_few(planner: KindPlanner, choice: Choice) -> str:
    """All nodes hold too few requests at once."""
    held, wanted = round(planner.at_once(choice.shares)), planner.base.workload.concurrency
    return f"all nodes together hold {held:,} of {wanted:,} requests at once"


def too_small(planner: KindPlanner, limit: int, promised: int) -> str:
    """Images that are too small."""
    return (
        f"serves images of {limit:,} {planner.rule.limit_unit} at most, {promised:,} are promised"
    )


def too_short(held: int, promised: int) -> str:
    """A context that is too short."""
    return f"holds {held:,} tokens under the promised images, {promised:,} are promised"


def gains(planner: KindPlanner, choice: Choice, weighed: Sequence[Choice]) -> Iterator[Remedy]:
    """Other promises that were weighed, and what they would give."""
    if planner.base.workload.goal != "throughput":
        return
    seen: set[Promise] = {choice.promise}
    for one in sorted(weighed, key=lambda it: -it.value):
        changes = []
        if one.promise.limit != choice.promise.limit:
            changes.append(f"{planner.rule.limit_option} {one.promise.limit}")
        if one.promise.context != choice.promise.context and not planner.base.context_given:
            changes.append(f"--context {one.promise.context}")
        better = one.value > choice.value * 1.05 or one.context > choice.context
        if one.promise in seen or not changes or not better:
            continue
        seen.add(one.promise)
        yield Remedy(
            change=" ".join(changes),
            effect=f"{count(one.nodes, 'node')} serve: about {three_digits(one.value)} requests/s"
            f" instead of {three_digits(choice.value)} on {count(choice.nodes, 'node')}",
        )
        if len(seen) > _MOST_REMEDIES:
            return


def remedies(tried: Iterable[KindPlan], kinds: Sequence[Kind]) -> Iterator[Remedy]:
    """Of each kind the cheapest change that would make it serve."""
    found: dict[str, Remedy] = {}
    for one, kind in zip(tried, kinds, strict=True):
        for remedy in one.plan.remedies if one.plan is not None else ():
            if remedy.effect.startswith("fits") and remedy.change not in found:
                where = f"{count(len(kind.nodes), 'node')} of {cards_of(kind.machine)}"
                found[remedy.change] = replace(remedy, effect=f"{where}: {remedy.effect}")
                break
    return iter(list(found.values())[:_MOST_REMEDIES])


def cards_of(machine: Machine | None) -> str:
    """Visible cards as people say them; empty where nothing was measured."""
    if machine is None:
        return ""
    names = Counter(machine.gpu(index).name for index in machine.visible)
    return " + ".join(f"{n}x {name}" for name, n in names.items())


def count(number: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
