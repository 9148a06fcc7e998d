"""Least plans before LMDeploy's own engine, on pretend GPUs.

    python -m bench.rehearsal.least [--out bench/rehearsal/LEAST.md]

Each plan has the smallest cache, batch and buffers that keep its promise (`turbofit plan --least`).
Its worst requests must be served, within what was forecast. Needs LMDeploy 0.18 and a C compiler.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import turbofit
from turbofit.core.footprint import Footprint
from turbofit.core.plan import Plan
from turbofit.core.units import MIB

#: Models, cards, and what is asked of them.
_CASES: Final[tuple[tuple[str, str, dict[str, Any]], ...]] = (
    ("internvl2-8b", "1xa100-80g", {"context": 4096}),
    ("internvl2-8b", "1xrtx3090", {"context": 4096, "concurrency": 4}),
    ("internvl2-2b", "1xrtx3060", {}),
    ("qwen2.5-7b", "1xl4", {"context": 8192, "concurrency": 2}),
    ("internvl2-26b", "4xrtx3090", {}),
    ("internvl2-1b", "1xt4", {"images": 2, "concurrency": 8}),
)
#: Which runs here: rehearsals of the PyTorch engine need a CUDA build of torch.
_ENGINE: Final = "turbomind"
_HEAD: Final = (
    "model", "machine", "asked", "ratio", "batch", "prefill", "tokens: promised / held",
    "peak, forecast MiB", "peak, rehearsed MiB", "left for others", "engines", "outcome",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Rehearse each; 1 where one is not served, or takes more than was forecast."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.least", description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows, kept = [], True
    for model, on, options in _CASES:
        plan = turbofit.plan(model, on=on, least=True, rehearse=True, engine=_ENGINE, **options)
        rows.append(_row(on, options, plan))
        kept &= _kept(plan)
        print(*rows[-1], sep=" | ", flush=True)
    lines = [f"| {' | '.join(row)} |" for row in (_HEAD, ["---"] * len(_HEAD), *rows)]
    today = datetime.now(timezone.utc).date()
    text = "\n".join(
        (
            "# Least plans before the engine",
            "",
            f"`python -m bench.rehearsal.least`, {today}, LMDeploy {version('lmdeploy')}.",
            "",
            "Plans of `--least`, rehearsed by LMDeploy's own engine on pretend GPUs with their"
            " worst requests. *Engines*: how many such engines the same GPUs hold, by the account."
            " It ends with 1 where one is not served, takes more than was forecast, or holds fewer"
            " tokens than were promised.",
            "",
            *lines,
            "",
        )
    )
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0 if kept else 1


def _peak(plan: Plan) -> int:
    """Bytes of the fullest GPU, as the engine allocated them."""
    assert plan.rehearsal is not None
    return max((peak for case in plan.rehearsal.cases for peak in case.peak), default=0)


def _held(plan: Plan) -> int:
    """Tokens of the cache that the engine made; 0 where it made none."""
    assert plan.rehearsal is not None
    cache = plan.rehearsal.cache
    return 0 if cache is None else cache.tokens or 0


def _kept(plan: Plan) -> bool:
    """Whether it served, within the forecast and with no fewer tokens."""
    assert plan.rehearsal is not None
    within = _peak(plan) <= max(gpu.peak - gpu.used for gpu in plan.gpus)
    return plan.rehearsal.outcome == "served" and within and _held(plan) >= plan.kv.tokens


def _row(on: str, options: dict[str, Any], plan: Plan) -> tuple[str, ...]:
    footprint, settings = plan.footprint, plan.settings
    assert isinstance(footprint, Footprint)
    assert plan.rehearsal is not None
    return (
        plan.model.name,
        on,
        ", ".join(f"{name} {value}" for name, value in options.items()) or "nothing",
        f"{settings.cache_max_entry_count:.3f}",
        str(settings.max_batch_size),
        f"{settings.max_prefill_token_num:,}",
        f"{plan.kv.tokens:,} / {_held(plan):,}",
        f"{max(gpu.peak - gpu.used for gpu in plan.gpus) // MIB:,}",
        f"{_peak(plan) // MIB:,}",
        f"{footprint.left // MIB:,} MiB",
        str(footprint.servers),
        plan.rehearsal.outcome,
    )


if __name__ == "__main__":
    sys.exit(main())
