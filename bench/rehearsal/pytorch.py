"""LMDeploy's PyTorch engine and Transformers on pretend GPUs; blocks against the formula.

Needs a Python with a CUDA build of torch (no GPU) and LMDeploy 0.18:

    python -m bench.rehearsal.pytorch [--only WORD] [--out bench/rehearsal/PYTORCH.md]
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bench.rehearsal import mixes
from turbofit import api
from turbofit.core.model import TextDims
from turbofit.core.units import MIB
from turbofit.model.source import resolve_model

#: A card with 24268 - 300 MiB left by a CUDA context: its preset charges 360.
CARD = "rtx3090:total=24328MiB"
_TOKENS = 64
#: Bits of a key and a value by `quant_policy`, and the numbers of 16 bits that each head's have.
_BITS = {0: (16, 16), 4: (4, 4), 8: (8, 8), 16: (8, 8), 17: (8, 8), 42: (4, 2)}
_SCALES = {4: (2, 2), 8: (2, 2), 42: (2, 1)}

HEAD = """# LMDeploy's PyTorch engine and Transformers on pretend GPUs

`{command}`, {date}:
{versions}.
Simulated cards (`{card}`, 360 MiB for each process's context); the engines, torch's
allocator and Triton are real, nothing was computed. MiB.

`blocks` is the engine's own `num_gpu_blocks`; `formula` is
`int((free - (max_prefill_token_num + 2 * max_batch_size) * vocab * 2) * ratio) // block bytes`,
with the free memory that the engine saw and the model's published dimensions:
{told}. Weights are what the tensors ask for, and the blocks that torch's
allocator gives them.

{starts}

Peaks of each case, as torch's allocator and the account saw them; `left` is what the card still
had, `idle` what torch had reserved and did not use. Cases run one after another and torch keeps
what it has reserved, so `left` falls. With several cards, the fullest. `allocated` and `reserved`
are what `torch.cuda.max_memory_allocated` and `max_memory_reserved` say in that case; the account's
own peak less the CUDA context is the latter to the byte in {agreed}.
How the Transformers rows compare with turbofit's forecast is in `docs/fallback.md`, and plans for
the PyTorch engine in `PLANNED.md`.

{cases}
{deaths}
## The worst mix of images

`vision_forward` of a plan, live above the steady state: so many equal largest images as meet, as
rehearsals sent them before, and the mix that brings most units into one forward (units of each
image; `+` joins those of one request). The mix is sent twice, since the engine sends the next
forward's pixels to the card while one runs. It may hold no less than equal images, and no more than
the plan's forecast: {kept}.

{mixes}
"""


class Row(NamedTuple):
    """One rehearsal."""

    model: str
    engine: str = "pytorch"
    tp: int = 1
    image: tuple[int, int] | None = None
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def name(self) -> str:
        words = [self.model, self.engine] + ([f"tp {self.tp}"] if self.tp > 1 else [])
        words += [f"{self.image[0]}x{self.image[1]}"] if self.image else []
        return " ".join([*words, *(f"{k}={v}" for k, v in self.settings.items())])


ROWS = (
    Row("qwen2-vl-2b", image=(1344, 1568)),
    Row("qwen2-vl-2b"),
    Row("qwen2-vl-2b", settings={"eager_mode": True}),
    Row("qwen2-vl-2b", tp=2, image=(1344, 1568)),
    Row("qwen2-vl-7b"),
    Row("qwen2-vl-7b", settings={"cache_max_entry_count": 0.99}),
    Row("internvl3-8b-hf"),
    Row("internvl2-1b"),
    Row("qwen2.5-0.5b"),
    Row("qwen2-vl-2b", engine="transformers", image=(1344, 1568)),
    Row("qwen2-vl-7b", engine="transformers"),
    Row("internvl3-8b-hf", engine="transformers"),
)


def formula(model: str, tp: int, cache: dict[str, Any], drafting: int = 0) -> int:
    """Blocks by the formula, of the rank that has least; with so many layers that draft.

    Those are alike to the target's, and whole on the rank.
    """
    text = resolve_model(model).text
    heads = max(1, text.kv_heads // tp)
    rows = cache["block_size"] * heads
    # Latents have no values beside them.
    kinds = _BITS[cache["quant_policy"]][: 1 if text.cached_latent else 2]
    sizes = [rows * text.head_dim * bits // 8 for bits in kinds]
    sizes += [rows * scales * 2 for scales in _SCALES.get(cache["quant_policy"], ())]
    block = (text.attention_layers + drafting) * sum(-(-size // 256) * 256 for size in sizes)
    runtime = states(text, tp, cache["num_state_caches"] or 0)
    runtime += (cache["max_prefill_token_num"] + 2 * cache["max_batches"]) * text.vocab * 2
    ratio = cache["cache_max_entry_count"]
    return min(int((free - runtime) * ratio) // block for free in cache["free"])


def states(text: TextDims, tp: int, slots: int) -> int:
    """Bytes of the states of gated delta nets, at 16 bits."""
    if text.delta is None:
        return 0
    one = text.delta
    window = one.layers * one.channels // tp * one.kernel * 2
    state = one.layers * one.value_heads // tp * one.key_dim * one.value_dim * 2
    return slots * sum(-(-size // 256) * 256 for size in (window, state))


def run(row: Row) -> dict[str, Any]:
    """The row's document."""
    tp = {"tp": row.tp} if row.tp > 1 else {}
    return api.rehearse_torch(
        row.model,
        engine=row.engine,
        on=f"{row.tp}x{CARD}",
        image_size=row.image,
        **tp,
        **row.settings,
    )


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


def start_of(row: Row, document: dict[str, Any]) -> tuple[str, ...]:
    card, cache = document["gpus"][0], document["cache"] or {}
    weights, after = card.get("weights", {}), card.get("after_start", {})
    sized = cache.get("free")
    return (
        row.name,
        document["outcome"],
        f"{mib(weights.get('requested'))} / {mib(weights.get('allocated'))}",
        mib(min(sized)) if sized else "",
        str(cache.get("num_gpu_blocks", "")),
        str(formula(row.model, row.tp, cache)) if sized else "",
        f"{mib(after.get('allocated'))} / {mib(after.get('reserved'))}",
        mib(after.get("left")),
        f"{document['seconds']:.0f}",
    )


def cases_of(row: Row, document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for case in document["cases"]:
        card = min(case["gpus"], key=lambda one: one["left"])
        words = " ".join(f"{count} {name}" for name, count in case["statuses"].items())
        rows.append(
            (
                row.name,
                case["name"],
                str(case.get("prompt_tokens", "")),
                mib(card["allocated_peak"]),
                mib(card["reserved_peak"]),
                mib(card["held_peak"]),
                mib(card["fragmentation"]),
                mib(card["left"]),
                words or "died",
            )
        )
    return rows


def agreement(document: dict[str, Any]) -> list[bool]:
    """For each case and card, whether torch and the account saw the same peak."""
    contexts = [gpu["contexts"] for gpu in document["gpus"]]
    return [
        card["held_peak"] - contexts[card["gpu"]] == card["reserved_peak"]
        for case in document["cases"]
        for card in case["gpus"]
    ]


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.pytorch", description=__doc__)
    parser.add_argument("--only", help="rows whose name has this word")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    starts: list[tuple[str, ...]] = []
    cases: list[tuple[str, ...]] = []
    deaths, versions, wrong, sized = [], {}, 0, 0
    agreed: list[bool] = []
    for row in ROWS:
        if args.only and args.only not in row.name:
            continue
        print(row.name, file=sys.stderr, flush=True)
        document = run(row)
        versions |= document["versions"]
        start = start_of(row, document)
        print("  " + " | ".join(start[1:]), file=sys.stderr, flush=True)
        starts.append(start)
        cases += cases_of(row, document)
        agreed += agreement(document)
        sized += bool(start[5])
        wrong += start[4] != start[5]
        if document["death"]:
            death = document["death"]
            after = (death["afterwards"] or {}).get("next_request", "not asked")
            deaths.append(
                f"- {row.name}: {death['phase']}, {mib(death['asked'])} asked, "
                f"{mib(death['left'])} left, at `{(death['where'] or ['?'])[0]}`; "
                f"the next request: {after}"
            )
    mixed = [mixes.compare(row) for row in mixes.ROWS if not args.only or args.only in row.name]
    text = HEAD.format(
        command="python -m bench.rehearsal.pytorch",
        date=dt.date.today().isoformat(),
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        card=CARD,
        agreed=f"{sum(agreed)} of {len(agreed)} peaks",
        told=f"{sized - wrong} of {sized} exact",
        starts=table(
            ("row", "outcome", "weights asked / allocated", "free at sizing", "blocks", "formula",
             "after start allocated / reserved", "left", "seconds"),
            starts,
        ),
        cases=table(
            ("row", "case", "prompt tokens", "allocated", "reserved", "card", "idle", "left",
             "ended"),
            cases,
        ),
        kept=f"{sum(one.kept for one in mixed)} of {len(mixed)} rows",
        mixes=table(mixes.TITLES, [one.line for one in mixed]),
        deaths="\nDeaths:\n\n" + "\n".join(deaths) + "\n" if deaths else "",
    )  # fmt: skip
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 1 if wrong or not all(agreed) or not all(one.kept for one in mixed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
