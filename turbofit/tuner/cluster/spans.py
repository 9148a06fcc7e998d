"""One engine over several nodes, only where no node holds the model: the nodes as one machine.

LMDeploy has two ways. TurboMind joins nodes by NCCL (``--nnodes``, ``--node-rank``,
``--dist-init-addr``), its ranks as many on every node; but for a model that sees images LMDeploy
0.18 asks each node about GPUs 0 to tp - 1 as it loads (``vl/model/builder.py``), and dies where a
node has fewer. The PyTorch engine asks Ray for its GPUs, wherever they are. The nodes' cards are
planned as one machine without peer access between nodes, every card as full as the fullest: each
node stages its load on its own first card, and the account knows one such card. NCCL's memory for
the network was not measured: an allowance is counted as held before the cache is sized and kept
free after it as well, since NCCL may connect early or late. Both are over: they cost cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.cluster import Node
from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Gpu, Holder, Host, Link, Machine
from turbofit.core.struct import NA, Struct, known
from turbofit.core.units import MIB
from turbofit.memory.engine import Engine
from turbofit.memory.engines import check_options, engine_for
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.shapes import kinds as card_kinds

__all__ = ["NETWORK", "Team", "span_engine", "span_request", "teams"]

#: Bytes a GPU that NCCL may take to reach other nodes: as much again as its largest figure of one
#: PCIe host that the account knows. An assumption.
NETWORK: Final = 512 * MIB
#: More ranks than these reduce longer than they compute.
_MOST_RANKS: Final = 32


class Team(Struct):
    """Nodes that make one engine: ``machine`` is all their cards, ``groups`` which are whose."""

    nodes: tuple[Node, ...]
    machine: Machine
    groups: tuple[tuple[int, ...], ...]

    @property
    def id(self) -> str:
        """A name for the team: its nodes' ids."""
        return "+".join(node.id for node in self.nodes)

    def as_node(self) -> Node:
        """The team as what the planning of nodes takes."""
        return Node(id=self.id, name=self.machine.name, address="", machine=self.machine)


def teams(base: ResolvedRequest, nodes: Sequence[Node], engine: str) -> Iterator[tuple[Team, ...]]:
    """Ways to make teams: of each kind of card the fewest nodes an engine first.

    Args:
        base: what is asked; a ``tp`` that was asked for is the only one.
        nodes: those that were measured.
        engine: as asked.
    """
    runner = span_engine(base, engine)
    if runner is None:
        return
    eligible: dict[tuple[object, ...], list[tuple[Node, tuple[Gpu, ...]]]] = {}
    for node in nodes:
        cards = _cards(node)
        if cards:
            card = cards[0]
            key = (len(cards), card.name, card.total, card.compute_capability)
            eligible.setdefault(key, []).append((node, cards))
    for found in eligible.values():
        found.sort(key=lambda pair: max(known(gpu.used, 0) for gpu in pair[1]))
        each, count = len(found[0][1]), 2
        while count <= len(found) and each * count <= _MOST_RANKS:
            tp = each * count
            if base.tp in (None, tp) and runner.tp_problem(base.model, tp) is None:
                starts = range(0, len(found) - count + 1, count)
                yield tuple(_team(found[start : start + count]) for start in starts)
            count *= 2


def span_request(base: ResolvedRequest, team: Team, engine: Engine) -> ResolvedRequest:
    """What is asked of teams like this one."""
    whole = tuple(gpu.index for gpu in team.machine.gpus)
    return replace(
        base,
        tp=len(whole),
        replicas=1,
        groups=(whole,),
        margin=replace(base.margin, more=NETWORK),
        fixed={**base.fixed, **engine.options_over_nodes},
    )


def span_engine(base: ResolvedRequest, engine: str) -> Engine | None:
    """The engine that spans nodes for this model, None where none that is asked for does."""
    name = "pytorch" if _sees(base) else "turbomind"
    if engine not in ("auto", name) or base.replicas not in (None, 1):
        return None
    if base.fixed.get("communicator", "nccl") != "nccl":
        return None
    if base.fixed.get("distributed_executor_backend", "ray") != "ray":
        return None
    try:
        found = engine_for(base.model, name)
        check_options(found, base.fixed)
    except TurbofitError:
        return None
    return found


def _sees(base: ResolvedRequest) -> bool:
    """Whether LMDeploy loads the model as one that takes images."""
    return base.model.vision is not None and not base.fixed.get("language_model_only")


def _cards(node: Node) -> tuple[Gpu, ...]:
    """As many equal cards of a node as a power of two, the freest of them, in their order."""
    machine = node.machine
    assert machine is not None
    equal = max(card_kinds([machine.gpu(i) for i in machine.visible]), key=len, default=())
    if not equal or equal[0].mig:
        return ()
    number = 1 << (len(equal).bit_length() - 1)
    freest = sorted(equal, key=lambda gpu: (known(gpu.used, 0), gpu.index))[:number]
    return tuple(sorted(freest, key=lambda gpu: gpu.index))


def _team(members: Sequence[tuple[Node, tuple[Gpu, ...]]]) -> Team:
    each = len(members[0][1])
    fullest = max(known(gpu.used, 0) for _, cards in members for gpu in cards) + NETWORK
    gpus: list[Gpu] = []
    links: list[Link] = []
    groups: list[tuple[int, ...]] = []
    for place, (node, cards) in enumerate(members):
        machine = node.machine
        assert machine is not None
        first = place * each
        gpus += [_as_full(gpu, first + k, fullest) for k, gpu in enumerate(cards)]
        groups.append(tuple(range(first, first + each)))
        links += [
            replace(machine.link(a.index, b.index), a=first + j, b=first + k)
            for k, b in enumerate(cards)
            for j, a in enumerate(cards[:k])
        ]
    links += [
        Link(a=a.index, b=b.index, p2p_read=False, p2p_write=False, nvlinks=0, ancestor="system")
        for a in gpus
        for b in gpus[a.index + 1 :]
        if a.index // each != b.index // each
    ]
    machines = [node.machine for node, _ in members if node.machine is not None]
    available = [one.host.ram_available for one in machines]
    sizes = [size for size in available if size != "NA"]
    return Team(
        nodes=tuple(node for node, _ in members),
        machine=Machine(
            name=" + ".join(node.name for node, _ in members),
            source=machines[0].source,
            gpus=tuple(gpus),
            links=tuple(links),
            host=Host(ram_available=min(sizes) if len(sizes) == len(available) else NA),
            visible=tuple(gpu.index for gpu in gpus),
            warnings=tuple(dict.fromkeys(text for one in machines for text in one.warnings)),
        ),
        groups=tuple(groups),
    )


def _as_full(gpu: Gpu, index: int, used: int) -> Gpu:
    """The card as full as the fullest of the team, with the network's allowance."""
    free = gpu.usable - used
    more = used - known(gpu.used, 0)
    allowance = Holder(pid=NA, name="counted for other nodes and NCCL's network", bytes=more)
    return replace(
        gpu, index=index, used=used, free=max(0, free), holders=(*gpu.holders, allowance)
    )
