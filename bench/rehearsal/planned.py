"""Compares plans for LMDeploy's PyTorch engine with that engine on pretend GPUs.

Needs a Python with a CUDA build of torch (no GPU), LMDeploy 0.18, and Ray for tp 2:

    python -m bench.rehearsal.planned [--only WORD] [--out bench/rehearsal/PLANNED.md]
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace

from bench.page import table
from bench.rehearsal.adapters import ALL, ATTENTION, BESIDE_TOWER, INTERNLM2, write_adapter
from bench.rehearsal.drafts import MTP, Algorithm, write_draft
from turbofit import api
from turbofit.core.plan import SPECULATIVE, GpuLedger, Plan
from turbofit.core.units import MIB
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.pytorch.weights import segments
from turbofit.model.drafts import with_draft
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.planned import (
    broken_promise,
    charged,
    plan_document,
    with_rehearsed_terms,
)

#: What a term or a peak may be over, as a share of the card. Under is never allowed.
SHARE = 0.02

#: Bits of a key and a value by `quant_policy`, and the numbers of 16 bits that each head's have.
_BITS = {0: (16, 16), 4: (4, 4), 8: (8, 8), 16: (8, 8), 17: (8, 8), 42: (4, 2)}
_SCALES = {4: (2, 2), 8: (2, 2), 42: (2, 1)}

HEAD = """# Plans for LMDeploy's PyTorch engine on pretend GPUs

`python -m bench.rehearsal.planned`, {date}:
{versions}.
`turbofit plan MODEL --on CARD --engine pytorch`, then that engine with the plan's settings and its
worst cases. Engine, torch's allocator and Triton are real, nothing was computed. MiB. Where several
cards, the one with the least left.

A forecast may be over by {share} of the card at most, and never under. What a rehearsal cannot
see (kernel modules, NCCL, the HTTP server's own context) is charged to the pretend card as
forecast, and is in both columns. *Live* is what tensors, contexts and that charge held at once at
the worst moment; *reserved* is with what torch's allocator kept beside it, which it gives back when
the card is full. Ray's workers (tp 2) have fixed segments, of which much lies unusable between live
blocks: there the ledger charges that too, and a peak is held against *reserved*, a case only from
below. With a draft a peak is held against *reserved* too, since two CUDA graphs' pools are held and
idle, each as large as a step of all tokens.

{told}

## Starts

`margin 0` fills the card to its last MiB, where the ratio does not end at 0.999 before. `formula`
is `int((free - (max_prefill_token_num + 2 * max_batch_size) * vocab * 2) * ratio) // block bytes`,
with the free memory that the engine saw. `lost` is what torch reserved
beyond the weights when it looked, `warm-up` what it kept idle after it.

A *worst case* has what it held above the steady state, forecast / seen, live, by torch's allocator.
The ledger charges the largest.

{starts}
{missed}"""


class Row(NamedTuple):
    """A plan to compare.

    ``layers``, if not 0: only this number of the model's layers. ``loras``: ranks and modules of
    adapters that are served beside it, whose files call its layers ``called``. ``draft``: the
    algorithm of a draft, and its tokens.
    """

    model: str
    on: str
    margin: int | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    layers: int = 0
    loras: tuple[tuple[int, tuple[str, ...]], ...] = ()
    called: str = "model.layers"
    draft: tuple[Algorithm, int] | None = None

    @property
    def name(self) -> str:
        cut = f" {self.layers} layers" * bool(self.layers)
        options = (
            f" {name} {value}"
            for name, value in self.options.items()
            if name not in ("adapters", "hf_overrides", *SPECULATIVE)
        )
        margin = " margin 0" * (self.margin == 0) + " long" * ("hf_overrides" in self.options)
        made = "".join(f" LoRA {rank} of {len(modules)}" for rank, modules in self.loras)
        made += " {} of {}".format(*self.draft) if self.draft else ""
        return f"{Path(self.model).name}{cut} {self.on}{''.join(options)}{margin}{made}"


#: Overrides for a context of 131,072 tokens, as Qwen's pages give them.
_YARN = (
    '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, '
    '"original_max_position_embeddings": 32768}}'
)
#: What peft calls the decoder's layers inside InternVL.
_INSIDE = "language_model.model.layers"
_LONG = {"context": "max", "hf_overrides": _YARN}
_MP = {"tp": 2, "distributed_executor_backend": "mp"}


def _both(model: str, on: str, **options: Any) -> tuple[Row, Row]:
    return Row(model, on, None, options), Row(model, on, 0, options)


ROWS = (
    *_both("qwen2-vl-2b", "1xrtx3060"),
    *_both("qwen2-vl-7b", "1xrtx3090"),
    *_both("qwen2.5-vl-7b", "1xl4"),
    # InternVL's ratio ends at 0.999 with the margin too.
    Row("internvl3-8b-hf", "1xrtx3090"),
    Row("internvl3-8b", "1xrtx3090"),
    Row("intern-s1-mini", "1xrtx3090"),
    *_both("qwen3-vl-8b", "1xrtx3090"),
    Row("qwen3-vl-2b", "1xrtx3060"),
    Row("internvl2-1b", "1xrtx3060"),
    Row("internvl2-1b", "1xt4"),
    Row("qwen2-vl-2b", "1xrtx3060", None, {"image_size": (1344, 1568)}),
    Row("qwen2.5-vl-7b", "1xl4", None, {"image_size": (1344, 1568)}),
    Row("qwen3-vl-2b", "1xrtx3060", None, {"image_size": (1344, 1568)}),
    *_both("qwen2.5-7b", "1xrtx3090"),
    Row("qwen2.5-0.5b", "1xl4"),
    Row("qwen2.5-7b", "1xrtx3090", None, {"quant_policy": 42}),
    Row("llama-2-7b", "1xrtx3090", None, {"quant_policy": 42}),
    Row("llama-2-7b", "1xrtx3090", None, {"quant_policy": 17}),
    Row("internvl2-2b", "1xl4", None, {"quant_policy": 42}),
    # documents' readers, with what their own tools set
    *_both("mineru2.5-1.2b", "1xrtx3060"),
    Row("mineru2.5-1.2b", "1xrtx3060", None, {"cache_max_entry_count": 0.5}),
    Row("mineru2.5-1.2b", "1xt4"),
    Row("qwen2.5-vl-3b", "1xl4", None, {"image_size": (1236, 1600), "session_len": 10240}),
    Row("olmocr-2-7b", "1xl4", None, {"image_size": (910, 1288), "context": 16384}),
    # gpt-oss and GLM-4.5, whose layers are alike
    Row("gpt-oss-20b-bf16", "1xrtx3090", layers=2),
    Row("internvl3.5-gpt-oss-20b-a4b", "1xrtx3090", layers=2),
    Row("glm-4.5-air", "1xa100-40g", layers=3),
    Row("glm-4.5", "1xa100-80g", layers=5),
    # experts behind ordinary attention, and latents that are expanded
    Row("phi-3.5-moe", "1xa100-40g", 0, layers=4),
    Row("deepseek-moe-16b", "1xa100-40g"),
    Row("minicpm3-4b", "1xrtx3090"),
    Row("minicpm3-4b", "1xrtx3090", 0, layers=4),
    # Qwen3-Omni: its decoder's first three layers are given features of the tower
    Row("qwen3-omni-30b-a3b", "1xrtx3090", layers=4),
    *_both("qwen2-vl-2b", "2xrtx3060", tp=2),
    *_both("qwen2-vl-7b", "2xrtx3090", tp=2),
    Row("internvl3-8b-hf", "2xrtx3060", None, {"tp": 2}),
    # attention to latents, and experts
    *_both("deepseek-v2-lite", "1xa100-40g"),
    Row("deepseek-v2-lite", "2xrtx3090", None, {"tp": 2}),
    *_both("glm-4.7-flash", "1xa100-80g"),
    # Kimi-K2.5: the same with experts in 4 bits, and a tower
    Row("kimi-k2.5", "1xa100-80g", None, {"max_batch_size": 64}, layers=2),
    Row("kimi-k2.5", "1xh100", 0, {"max_batch_size": 32}, layers=2),
    Row("kimi-k2.5", "2xa100-80g", None, {"tp": 2, "max_batch_size": 32}, layers=2),
    # LoRA adapters, and contexts that overrides lengthen: with --only "LoRA|long". Since
    # Transformers 4.52 the decoder is called model.language_model.layers.
    Row("qwen2.5-0.5b", "1xrtx3060", loras=((16, ALL), (64, ("q_proj", "v_proj")))),
    Row("qwen2.5-0.5b", "1xt4", layers=2, loras=((64, ALL),)),
    Row("qwen2.5-0.5b", "1xh100", layers=2, loras=((128, ATTENTION), (8, ALL))),
    Row(
        "qwen2.5-7b",
        "1xrtx3090",
        0,
        layers=3,
        loras=((8, ALL), (64, ("q_proj", "v_proj")), (32, ATTENTION), (16, ALL)),
    ),
    Row("qwen2.5-7b", "1xa100-40g", layers=3, loras=((128, ALL),)),
    Row(
        "qwen2.5-7b",
        "1xrtx3090",
        None,
        {"max_batch_size": 2, "max_prefill_token_num": 256},
        layers=2,
        loras=((16, ALL),),
    ),
    Row("llama-3.1-8b", "1xl4", layers=2, loras=((8, ALL), (12, ALL), (16, ALL))),
    Row(
        "qwen3-8b",
        "1xrtx3090",
        0,
        {"eager_mode": True},
        layers=2,
        loras=((8, ALL), (64, ("q_proj", "v_proj"))),
    ),
    Row("qwen3-30b-a3b", "1xa100-40g", layers=1, loras=((16, ATTENTION),)),
    Row("qwen2-vl-2b", "1xrtx3060", layers=2, loras=((16, ALL),)),
    Row(
        "qwen2.5-vl-3b",
        "1xl4",
        layers=2,
        loras=((32, ATTENTION),),
        called="model.language_model.layers",
    ),
    Row(
        "qwen3-vl-2b",
        "1xrtx3060",
        layers=4,
        loras=((32, ALL),),
        called="model.language_model.layers",
    ),
    # LMDeploy's mp executor copies what is left of a message for each MiB: larger pictures took
    # minutes.
    Row(
        "qwen2-vl-2b",
        "2xrtx3060",
        None,
        {**_MP, "image_size": (1344, 1568)},
        layers=2,
        loras=((16, ALL),),
    ),
    # modules that InternVL's class joins: stacked copies
    Row("internvl2-1b", "1xrtx3060", loras=((8, ALL),), called=_INSIDE),
    Row(
        "internvl3-8b",
        "1xrtx3090",
        layers=2,
        called=_INSIDE,
        loras=((16, ALL), (8, ("q_proj", "v_proj"))),
    ),
    Row("internvl3.5-8b", "1xrtx3090", layers=2, loras=((16, ALL),), called=_INSIDE),
    Row("internvl2-2b", "1xl4", layers=2, loras=((16, INTERNLM2),), called=_INSIDE),
    Row("internvl2-2b", "2xrtx3060", None, {"tp": 2}, 2, ((16, INTERNLM2),), _INSIDE),
    Row("internvl3-8b", "2xrtx3060", None, {"tp": 2}, 2, ((8, ALL),), _INSIDE),
    # towers whose modules have the names of the decoder's: adapters of o_proj and the MLP alone
    Row("internvl3-8b-hf", "1xrtx3090", layers=2, loras=((16, BESIDE_TOWER),), called=_INSIDE),
    Row("llava-1.5-7b", "1xrtx3090", layers=2, loras=((16, BESIDE_TOWER),), called=_INSIDE),
    Row("llama-3.1-8b", "2xrtx3090", None, _MP, layers=2, loras=((64, ALL),)),
    Row("qwen2.5-0.5b", "2xrtx3060", None, {"tp": 2}, layers=2, loras=((16, ALL),)),
    Row("qwen2.5-0.5b", "1xrtx3060", None, _LONG, layers=2),
    Row("qwen2.5-7b", "1xrtx3090", None, _LONG, layers=2, loras=((16, ALL),)),
    Row(
        "qwen2-vl-2b",
        "1xrtx3060",
        None,
        {**_LONG, "hf_overrides": f'{{"text_config": {_YARN}}}'},
        layers=2,
    ),
    # Drafts, with FlashAttention-3's stand-in
    Row("llama-3.1-8b", "1xa100-40g", 0, {"max_batch_size": 128}, layers=8, draft=("eagle3", 3)),
    Row("llama-3.1-8b", "1xh100", None, {"max_batch_size": 48}, layers=7, draft=("eagle", 5)),
    Row("llama-3.2-1b", "1xrtx3060", 0, {"max_batch_size": 32}, layers=7, draft=("eagle3", 1)),
    Row(
        "llama-3.1-8b",
        "2xrtx3090",
        0,
        {"tp": 2, "distributed_executor_backend": "mp", "max_batch_size": 64},
        layers=8,
        draft=("eagle3", 3),
    ),
    Row(
        "llama-3.1-8b",
        "2xa100-40g",
        None,
        {"tp": 2, "distributed_executor_backend": "mp", "max_batch_size": 32},
        layers=7,
        draft=("eagle", 2),
    ),
    # Drafts that are layers of the checkpoint
    Row("glm-4.5-air", "1xa100-40g", 0, {"max_batch_size": 64}, layers=3, draft=(MTP, 1)),
    Row("glm-4.5-air", "1xa100-80g", None, {"max_batch_size": 32}, layers=3, draft=(MTP, 3)),
    Row("glm-4.5", "1xh100", 0, {"max_batch_size": 16}, layers=4, draft=(MTP, 2)),
    Row("glm-4.7-flash", "1xh100", 0, {"max_batch_size": 64}, layers=4, draft=(MTP, 1)),
    Row("glm-4.7-flash", "1xh200", None, {"max_batch_size": 32}, layers=3, draft=(MTP, 3)),
    Row("glm-4.5-air", "2xa100-40g", 0, {"tp": 2, "max_batch_size": 64}, layers=3, draft=(MTP, 1)),
)


def formula(
    model: str, tp: int, cache: dict[str, Any], drafts: int = 0, *, everywhere: bool = False
) -> int:
    """Return the number of cache blocks by the formula, for the rank with the fewest.

    ``drafts`` are the bytes of a draft's block, which the first rank has, or ranks ``everywhere``.
    """
    text = resolve_model(model).text
    rows = cache["block_size"] * max(1, text.kv_heads // tp)
    # Latents have no values beside them.
    kinds = _BITS[cache["quant_policy"]][: 1 if text.cached_latent else 2]
    sizes = [rows * text.head_dim * bits // 8 for bits in kinds]
    sizes += [rows * scales * 2 for scales in _SCALES.get(cache["quant_policy"], ())]
    block = text.attention_layers * sum(-(-size // 256) * 256 for size in sizes)
    runtime = (cache["max_prefill_token_num"] + 2 * cache["max_batches"]) * text.vocab * 2
    ratio = cache["cache_max_entry_count"]
    rooms = [int((free - runtime) * ratio) for free in cache["free"]]
    other = block + drafts * everywhere
    return min(rooms[0] // (block + drafts), *[room // other for room in rooms])


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


class Found(NamedTuple):
    """The result of a row: its cells, and the figures that are too far off."""

    cells: tuple[str, ...]
    missed: list[str]
    versions: dict[str, str]


def compare(row: Row) -> Found:
    """Plan a row, rehearse it, and check how far off each figure is."""
    with tempfile.TemporaryDirectory() as scratch:
        if row.layers:
            row = row._replace(model=_cut(row, Path(scratch)))
        if row.draft is not None:
            row = row._replace(options={**row.options, **_drafted(row, Path(scratch))})
        if row.loras:
            row = row._replace(options={**row.options, "adapters": _written(row, Path(scratch))})
        return _compare(row)


def _written(row: Row, scratch: Path) -> tuple[str, ...]:
    """Write a row's adapters, in 32 bits as peft trains them; return their words."""
    model = resolve_model(row.model)
    return tuple(
        f"lora{n}={write_adapter(model, scratch / f'lora{n}', rank, modules, layers=row.called)}"
        for n, (rank, modules) in enumerate(row.loras)
    )


def _drafted(row: Row, scratch: Path) -> dict[str, Any]:
    """Write a row's draft; return its options."""
    assert row.draft is not None
    algorithm, tokens = row.draft
    if algorithm == MTP:
        return {SPECULATIVE[0]: algorithm, SPECULATIVE[2]: tokens}
    folder = write_draft(resolve_model(row.model), scratch / algorithm, algorithm)
    return dict(zip(SPECULATIVE, (algorithm, str(folder), tokens), strict=True))


def _cut(row: Row, scratch: Path) -> str:
    """Write a folder with the first layers of a model, each of its full size; returns the path."""
    model = resolve_model(row.model)
    text, moe = model.text, model.text.moe
    if moe is not None:
        moe = replace(moe, layers=row.layers - (text.layers - moe.layers))
    cut = replace(model, text=replace(text, layers=row.layers, moe=moe))
    if row.draft is not None and row.draft[0] == MTP:
        cut = with_draft(cut, MTP, None, row.draft[1])
    return str(checkpoint_for(cut, scratch / row.model))


def _compare(row: Row) -> Found:
    plan = api.plan(row.model, on=row.on, engine="pytorch", margin=row.margin, **dict(row.options))
    if not plan.fits:
        return Found((row.name, "no plan", *[""] * 10), [f"no plan: {plan.verdict}"], {})
    document = plan_document(plan)
    cards = list(with_rehearsed_terms(plan.engines[0], document))
    missed: list[str] = []
    if document["outcome"] != "served":
        death = document["death"] or {}
        missed.append(f"{document['outcome']}: {death.get('phase')}: {death.get('message')}")
        return Found((row.name, document["outcome"], *[""] * 10), missed, document["versions"])
    refused = broken_promise(plan, plan.engines[0], document)
    if refused is not None:
        missed.append(f"{refused.phase}: {refused.where}")
    cells = (
        row.name,
        document["outcome"],
        *_start(row, plan, cards, document, missed.append),
        _cases(plan, cards[_fullest(document)], missed.append),
    )
    return Found(cells, missed, document["versions"])


def _fullest(document: dict[str, Any]) -> int:
    gpus = document["gpus"]
    return min(range(len(gpus)), key=lambda i: gpus[i]["left_at_peak"])


def _start(
    row: Row, plan: Plan, cards: list[GpuLedger], document: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[str, ...]:  # fmt: skip
    i = _fullest(document)
    card, cache = cards[i], document["cache"] or {}
    told = {term.term: term for term in card.terms}
    blocks = cache.get("num_gpu_blocks") or 0
    settings, draft = plan.engines[0].settings, plan.model.draft
    drafts = 0
    if draft:  # of one layer
        ranks = settings.tp if draft.is_own else 1
        heads = max(1, draft.text.kv_heads // ranks)
        numbers = (1 if draft.text.cached_latent else 2) * heads * draft.text.head_dim
        drafts = 2 * settings.cache_block_seq_len * numbers
    own, wanted = bool(draft) and draft.is_own, 0
    if cache.get("free"):
        wanted = formula(row.model, settings.tp, cache, drafts, everywhere=own)
    if blocks != wanted:
        say(f"{blocks} blocks, {wanted} by the formula")
    tokens = (blocks - 2) * (cache.get("block_size") or 0)
    if tokens < plan.engines[0].kv.tokens:
        say(f"{tokens} tokens, {plan.engines[0].kv.tokens} promised")
    weights = sum(t.bytes for t in card.terms if t.term.startswith("weights."))
    requested = document["terms"][i].get("weights")
    for name in ("load_fragmentation", POOL_WARMUP):
        size = told[name].bytes
        if draft and name == POOL_WARMUP:
            size += told["draft_graphs"].bytes
        _hold(name, size, told[name].rehearsed, card.total, say)
    live, reserved = _peaks(plan, document, i)
    held = segments(plan.engines[0].settings) == "fixed" or draft
    _hold("peak", card.peak, live, card.total, say, upper=max(live, reserved) if held else None)
    return (
        f"{plan.engines[0].kv.tokens:,} / {tokens:,}",
        f"{blocks} / {wanted}",
        f"{mib(weights)} / {mib(requested)}",
        *(f"{mib(told[n].bytes)} / {mib(told[n].rehearsed)}" for n in
          ("load_fragmentation", POOL_WARMUP)),
        mib(card.peak),
        mib(live),
        mib(reserved),
        f"{(card.peak - live) / card.total:.2%}",
    )  # fmt: skip


def _peaks(plan: Plan, document: dict[str, Any], i: int) -> tuple[int, int]:
    """Return the most bytes of a card that were live over all cases, and that were reserved."""
    gpu, late = document["gpus"][i], charged(plan).gpus[i].late
    used = gpu["used_by_others"]
    cases = [gpu["phases"].get(f"case {case['name']}", {}) for case in document["cases"]]
    live = max((case.get("allocated_peak", 0) for case in cases), default=0)
    return used + late + gpu["contexts"] + live, used + gpu["peak"]


def _cases(plan: Plan, card: GpuLedger, say: Callable[[str], None]) -> str:
    fixed = segments(plan.engines[0].settings) == "fixed"
    said = []
    terms = [term for term in card.terms if term.phase == "transient"]
    # Short prompts of all sequences meet before they are sampled: more than sampling itself where
    # few rows are sampled, or where each has a state. The ledger charges the largest.
    states = any(term.term == "state_cache" for term in card.terms)
    largest = max(term.bytes for term in terms)
    of_text = (term.bytes for term in terms if term.term in ("text_prefill", "sampling"))
    charged_with = {"sampling": max(of_text)}
    for term in terms:
        if term.rehearsed is None:
            continue
        forecast = largest if states else charged_with.get(term.term, term.bytes)
        upper = forecast if fixed or states else None
        _hold(term.term, forecast, term.rehearsed, card.total, say, upper=upper)
        name = f"**{term.term}**" if term.worst else term.term
        said.append(f"{name} {mib(term.bytes)} / {mib(term.rehearsed)} ({term.note})")
    return "; ".join(said)


def _hold(
    what: str, forecast: int, seen: int | None, card: int, say: Callable[[str], None],
    upper: int | None = None,
) -> None:  # fmt: skip
    """Report a forecast below what was seen, or too far above it (or above ``upper``)."""
    if seen is None:
        return
    most = seen if upper is None else upper
    over, told = forecast - most, f"{mib(forecast)} forecast, {mib(most)} seen"
    if seen > forecast:
        say(f"{what} is under: {mib(forecast)} forecast, {mib(seen)} seen")
    elif over > SHARE * card:
        say(f"{what} is {over / card:.1%} of the card over: {told}")


def text_of(found: Mapping[str, Found]) -> str:
    """Return the page of all results."""
    versions: dict[str, str] = {}
    for one in found.values():
        versions |= one.versions
    missed = [f"- {name}: {word}" for name, one in found.items() for word in one.missed]
    kept = sum(not one.missed for one in found.values())
    return HEAD.format(
        date=dt.date.today().isoformat(),
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        share=f"{SHARE:.0%}",
        told=f"**{kept} of {len(found)} rows keep every bar.**",
        starts=table(
            "row | outcome | tokens promised / held | blocks / formula | weights forecast / seen"
            " | lost forecast / seen | warm-up forecast / seen | peak forecast | live | reserved"
            " | over | worst cases",
            [one.cells for one in found.values()],
        ),
        missed="\n## Missed\n\n" + "\n".join(missed) + "\n" if missed else "",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.planned", description=__doc__)
    parser.add_argument("--only", help="rows whose name has a match of this expression")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Found] = {}
    for row in ROWS:
        if args.only and not re.search(args.only, row.name):
            continue
        one = found[row.name] = compare(row)
        missed = (("MISSED", word) for word in one.missed)
        for cells in (one.cells, *missed):
            print(*cells, sep=" | ", file=sys.stderr)
        if args.out:
            args.out.write_text(text_of(found), encoding="utf-8")
    if not args.out:
        print(text_of(found))
    return 1 if any(one.missed for one in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
