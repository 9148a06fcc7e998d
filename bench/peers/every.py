"""Every pair of a preset model and a preset card: the plan against LMDeploy on the same engine.

``python -m bench.peers.every [--only MODEL] [--log FILE] [--results FILE]``. The engines cut their
cache by a rule that turbofit's account has exactly (every rehearsed count of blocks was met), so
that most pairs need no rehearsal: there the plan holds as many tokens as each peer or more, whether
that survives or not. The others are rehearsed: a peer that holds more than the plan must die of
what everybody is sent. Plans are those of ``--goal context``, which ranks by tokens: the default
gives some of them to throughput. Some ten minutes, and ten seconds for each peer in doubt.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import turbofit
from bench.page import table
from bench.peers.engine import PLAN, SETTINGS, Pair, Setting, turbomind_row
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.machine.presets import preset_names
from turbofit.memory.engines import engine_for
from turbofit.model.presets import known_presets

HEAD = """# The plan against LMDeploy's own settings, on every pair

Made by `python -m bench.peers.every --results FILE`.

{pairs:,} pairs of a preset model and one preset card. On {judged:,} the plan fits ({rest}); its
engine is turbofit's choice, that of the peers LMDeploy's own.

The plans are those of `--goal context`: tokens are what is compared here, and the default goal
gives some of them to a larger batch. On {clear:,} of these pairs no peer (LMDeploy's defaults; the
advice 0.5, 0.4, 0.2) holds more, whether it survives or not. On the other {doubtful:,} some does;
{rows:,} such peers were rehearsed ({fates}), those of {unknown:,} pairs on the PyTorch engine were
not. **Met on {met:,}, missed on {missed:,}**, where a peer survived what everybody is sent; by
the plan after its rehearsal, as `turbofit serve` starts it, {still:,} of these are missed, and at
equal promises, by a plan that leaves of the card what the peer leaves, {unequal:,}.

A peer that survives has room left by turbofit's own account: *room* below, in MiB, is what that
leaves of the card under the peer's settings and these images. A plan leaves its margin there,
so that a peer whose ratio happens to end between the two holds more. Tokens are the forecast's;
in brackets and after a rehearsal, those of the engine's cache.

"""


class Found(NamedTuple):
    """One pair: what the plan holds, and the peers that hold more."""

    pair: Pair
    engine: str
    tokens: int
    rivals: tuple[tuple[Setting, int], ...]


def pairs(only: str = "") -> Iterator[Found | str]:
    """Every pair that the plan fits, else why not; of models with ``only`` in their name."""
    for model in known_presets():
        if only not in model:
            continue
        for card in preset_names():
            pair = Pair(model, f"1x{card}")
            try:
                yield found(pair)
            except TurbofitError:
                yield "no engine of LMDeploy"


def found(pair: Pair) -> Found | str:
    """The plan and its peers by the account, these on the engine that LMDeploy takes itself."""
    plan = turbofit.plan(pair.model, on=pair.on, tp=1, replicas=1, goal="context")
    engine = engine_for(plan.model).name
    if not plan.fits:
        return "does not fit"
    rivals = []
    for setting in SETTINGS:
        if setting.name == PLAN:
            continue
        told = turbofit.predict(pair.model, on=pair.on, tp=1, **(setting.changed or {}))
        if told.kv.tokens > plan.kv.tokens:
            rivals.append((setting, told.kv.tokens))
    return Found(pair, engine, plan.kv.tokens, tuple(rivals))


class Lost(NamedTuple):
    """Why a peer lived with more tokens: bytes; the rehearsed plan's tokens, and at its room."""

    room: int
    margin: int
    rehearsed: int
    equal: int


def lost(pair: Pair, changed: dict[str, Any]) -> Lost:
    """What the account leaves to a peer, sent what everybody is, and what a rehearsal gives us."""
    options = {"on": pair.on, "tp": 1, "replicas": 1, "goal": "context"}
    plan = turbofit.plan(pair.model, rehearse=True, **options)
    assert plan.rehearsal is not None
    served = plan.rehearsal.outcome == "served"
    tokens = (plan.rehearsal.cache.tokens or 0) if served else 0
    told = of_peer(pair, changed, plan)
    (gpu,) = told.gpus
    return Lost(gpu.headroom, gpu.margin, tokens, at_its_room(pair, told))


def of_peer(pair: Pair, changed: dict[str, Any], plan: Plan) -> Plan:
    """The account of a peer that is sent what everybody is."""
    rule, limits = plan.model.image_rule, dict[str, Any]()
    if rule is not None and rule.exposed_limit > rule.checkpoint_limit:
        limits = {rule.limit_name: rule.checkpoint_limit}
    return turbofit.predict(pair.model, on=pair.on, tp=1, **changed, **limits)


def at_its_room(pair: Pair, peer: Plan) -> int:
    """Tokens of the plan that leaves of the card what the peer leaves by the account."""
    room, options = max(0, peer.gpus[0].headroom), {"tp": 1, "replicas": 1, "goal": "context"}
    return turbofit.plan(pair.model, on=pair.on, margin=room, **options).kv.tokens


def alike(plan: Plan) -> tuple[Any, ...]:
    """What a rehearsal of a card depends on: cards that agree in it are rehearsed once."""
    gpu, (ledger,) = plan.machine.gpus[0], plan.gpus
    of_card = [term.bytes for term in ledger.ledger if term.phase in ("context", "buffers")]
    capability, batch = gpu.compute_capability, plan.settings.max_batch_size
    return (gpu.total, gpu.reserved, capability, batch, *of_card)


def rehearsed(doubtful: Sequence[Found], folder: Path, log: Path) -> Iterator[dict[str, Any]]:
    """The fate of each rival; those already in the log are not run again."""
    done = {}
    if log.exists():
        done = {line["key"]: line for line in map(json.loads, log.read_text().splitlines())}
    for number, one in enumerate(doubtful, 1):
        for setting, tokens in one.rivals:
            told = turbofit.predict(one.pair.model, on=one.pair.on, tp=1, **(setting.changed or {}))
            key = json.dumps([one.pair.model, setting.name, *map(str, alike(told))])
            if key not in done:
                done[key] = {"key": key, **fate(one.pair, setting, folder)}
                with log.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
                told_so_far = f"[{number}/{len(doubtful)}] {one.pair.name} {setting.name}"
                said = f"{done[key]['fate']} {done[key]['of']}"
                print(f"{told_so_far}: {said}", file=sys.stderr, flush=True)
            yield {
                "pair": one.pair.name, "ours": one.tokens, "who": setting.name,
                "forecast": tokens, **done[key],
            }  # fmt: skip


def fate(pair: Pair, setting: Setting, folder: Path) -> dict[str, Any]:
    """How a peer ended, and what it held."""
    try:
        row = turbomind_row(pair, setting, folder)
    except TurbofitError as exc:
        return {"fate": "not rehearsed", "of": exc.message, "tokens": None}
    return {"fate": row.fate, "of": row.of, "tokens": row.tokens}


def report(seen: Sequence[Found | str], rows: Sequence[dict[str, Any]]) -> str:
    """The bar over all pairs, and each pair on which a peer lived with more tokens."""
    judged = [one for one in seen if isinstance(one, Found)]
    doubtful = [one for one in judged if one.rivals]
    lived = [row for row in rows if row["fate"] == "survived"]
    words = sorted({one for one in seen if isinstance(one, str)})
    rest = "; ".join(f"{word}: {sum(one == word for one in seen):,}" for word in words)
    missed = len({row["pair"] for row in lived})
    unknown = len({one.pair for one in doubtful}) - len({row["pair"] for row in rows})
    clear = len(judged) - len(doubtful)
    settings = {setting.name: setting.changed or {} for setting in SETTINGS}
    why = [lost(Pair(*row["pair"].split()), settings[row["who"]]) for row in lived]
    pairs_of = list(zip(lived, why, strict=True))
    still = {row["pair"] for row, one in pairs_of if one.rehearsed < row["tokens"]}
    unequal = {row["pair"] for row, one in pairs_of if one.equal < row["forecast"]}
    fates = [row["fate"] for row in rows]
    told = HEAD.format(
        pairs=len(seen), judged=len(judged), rest=rest, clear=clear, doubtful=len(doubtful),
        rows=len(rows), fates=", ".join(f"{fates.count(f)} {f}" for f in dict.fromkeys(fates)),
        unknown=unknown, met=len(judged) - missed - unknown, missed=missed, still=len(still),
        unequal=len(unequal),
    )  # fmt: skip
    head = (
        "pair | our tokens | peer | its tokens | ours more by | room | margin"
        " | rehearsed | at its room"
    )
    cells = [
        (row["pair"], f"{row['ours']:,}", row["who"], f"{row['forecast']:,} ({row['tokens']:,})",
         f"{row['ours'] / row['forecast'] - 1:+.1%}", f"{one.room // MIB:,}",
         f"{one.margin // MIB:,}", f"{one.rehearsed:,}", f"{one.equal:,}")
        for row, one in pairs_of
    ]  # fmt: skip
    return f"{told}{table(head, cells, right='1345678')}\n"


def main() -> int:
    """Sweep, rehearse what is in doubt, and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.every", description=__doc__)
    parser.add_argument("--log", type=Path, default=Path("every.jsonl"), help="fates, kept")
    parser.add_argument("--results", type=Path, help="write the report here too")
    parser.add_argument("--only", default="", help="models whose name contains this")
    args = parser.parse_args()
    seen = list(pairs(args.only))
    doubtful = [one for one in seen if isinstance(one, Found) and one.rivals]
    with tempfile.TemporaryDirectory() as scratch:
        tm = [one for one in doubtful if one.engine == "turbomind"]
        rows = list(rehearsed(tm, Path(scratch), args.log))
    text = report(seen, rows)
    print(text)
    if args.results:
        args.results.write_text(text, encoding="utf-8")
    return 1 if any(row["fate"] == "survived" for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
