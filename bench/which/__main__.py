"""``python -m bench.which [--count 400] [--seed 1] [--write]``: what `plan` says, in 3 seconds.

Times `turbofit which` for each preset model over all preset cards, and for machines over all preset
models; then plans random pairs of both and compares: whether it fits, what is missing, engine,
shape, tokens, requests at once and the forecast of speed.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import turbofit
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.which import Serving
from turbofit.machine.presets import preset_names
from turbofit.model.presets import known_presets
from turbofit.planning.resolve import resolve
from turbofit.planning.serving import far_too_large, serving
from turbofit.planning.which_request import WhichRequest

HERE: Final = Path(__file__).parent
_COUNTS: Final = (1, 2, 4, 8)
_MACHINES: Final = ("1xrtx3060", "1xrtx4090", "2xl4", "4xrtx3090", "8xa100-80g")


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.which", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="pairs that are compared")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args(argv)
    models = sorted(_timed(model=name) for name in known_presets())
    machines = [(_timed(on=name), name) for name in _MACHINES]
    different, fits = compared(args.count, args.seed)
    middle, most = models[len(models) // 2][0], models[-1]
    page = "\n".join(
        (
            "# How long `turbofit which` takes, and whether it says what `turbofit plan` says",
            "",
            f"`python -m bench.which --count {args.count} --seed {args.seed} --write`,"
            f" {datetime.now(timezone.utc).date()}, Python {platform.python_version()}. Seconds of"
            " processor time in one process, without the start of Python (0.4 s).",
            "",
            "| question | seconds |",
            "|---|--:|",
            f"| one model, all {len(preset_names())} cards: median of {len(models)} models |"
            f" {middle:.1f} |",
            f"| the slowest: {most[1]} | {most[0]:.1f} |",
            *(
                f"| one machine, all {len(models)} models: {name} | {seconds:.1f} |"
                for (seconds, _), name in machines
            ),
            "",
            f"{args.count} random pairs of a model and 1, 2, 4 or 8 of a card, planned by both"
            f" ({fits} fit): **{len(different)} differ.**",
            "",
            *(f"- {one}" for one in different),
        )
    ).rstrip()
    print(page)
    if args.write:
        (HERE / "RESULTS.md").write_text(page + "\n")
    return bool(different)


def _timed(**question: Any) -> tuple[float, str]:
    """Seconds of processor time, and of what."""
    name = str(question.get("model") or question.get("on"))
    began = time.process_time()
    try:
        turbofit.which(**question)
    except TurbofitError:
        return 0.0, name
    return time.process_time() - began, name


def compared(count: int, seed: int) -> tuple[list[str], int]:
    """What differs between both commands over random pairs, and how many fit."""
    chance, different, fits = random.Random(seed), [], 0
    for _ in range(count):
        model = chance.choice(known_presets())
        on = f"{chance.choice(_COUNTS)}x{chance.choice(preset_names())}"
        options: dict[str, Any] = {}
        if chance.random() < 0.3:
            options["concurrency"] = chance.choice((2, 8, 32))
        if chance.random() < 0.3:
            options["context"] = chance.choice((2048, 8192))
        if chance.random() < 0.2:
            options["least"] = True
        why = differs(model, on, options)
        fits += why is None
        if why:
            different.append(f"{model} on {on} with {options}: {why}")
            print(different[-1], flush=True)
    return different, fits


def differs(model: str, on: str, options: dict[str, Any]) -> str | None:
    """What differs; empty where neither fits and nothing differs, None where both fit alike."""
    request = WhichRequest.of(model=model, on=on, **options)
    try:
        plan = turbofit.plan(model, on=on, **options)
    except TurbofitError as exc:
        return _refused(request, exc)
    resolved = resolve(request)
    if far_too_large(request, resolved):
        return f"far too large, and plan says {plan.verdict}" if plan.fits else ""
    row = serving(request, resolved, on)
    seen, planned = _figures_of_row(row), _figures_of_plan(plan)
    if seen != planned:
        return f"{seen} by which, {planned} by plan"
    return None if plan.fits else ""


def _refused(request: WhichRequest, error: TurbofitError) -> str:
    try:
        resolved = resolve(request)
        serving(request, resolved, str(request.on))
    except TurbofitError as exc:
        return "" if exc.message == error.message else f"{exc.message}, and {error.message}"
    return "" if far_too_large(request, resolved) else f"serves, and plan says {error.message}"


def _figures_of_row(row: Serving) -> tuple[object, ...]:
    fits = bool(row.kv_tokens or row.requests_at_once)
    if not fits:
        return (False, row.engine)
    return (
        True, row.engine, row.tp, row.replicas, row.kv_tokens, row.context, row.image_limit,
        row.requests_at_once, row.requests_per_second, row.seconds_to_first_token,
    )  # fmt: skip


def _figures_of_plan(plan: Plan) -> tuple[object, ...]:
    if not plan.fits:
        return (False, plan.engine.name)
    speed = plan.throughput
    return (
        True, plan.engine.name, max(map(len, plan.parallel.groups)), plan.parallel.replicas,
        plan.kv.total_tokens, plan.settings.session_len, plan.limits.image_limit,
        plan.requests_at_once, speed and speed.requests_per_second,
        speed and speed.seconds_to_first_token,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
