"""``turbofit watch [RUN]``: a running server, live in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli import options

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser
    from turbofit.observe.live import Now
    from turbofit.report.saved import Saved

__all__ = ["add_arguments", "run"]

_EVERY: Final = 2.0
_LEAST: Final = 0.2
#: States of a run that is over.
_OVER: Final = ("ended", "failed")
#: To the terminal's first cell, and nothing below what is painted.
_HOME: Final = "\x1b[H"
_BELOW: Final = "\x1b[J"
_LINE_END: Final = "\x1b[K\n"


def add_arguments(parser: Parser) -> None:
    """Which run, how often, and with which key."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's folder or name (default: the newest run)"
    )
    parser.add_argument("--url", help="the gateway, where it is not the run's own")
    parser.add_argument("--api-key", metavar="KEY", help="default: $TURBOFIT_API_KEYS's first")
    parser.add_argument(
        "--interval", type=float, default=_EVERY, metavar="SECONDS", help="between looks (2)"
    )
    parser.add_argument("--once", action="store_true", help="one look, for scripts")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look until Ctrl-C or the run's end; one look where stdout is no terminal."""
    import sys
    import time

    from turbofit.core.errors import UsageError
    from turbofit.report.saved import newest_run, read_saved

    if not args.interval >= _LEAST:
        raise UsageError(
            f"--interval {args.interval:g} is too short", hint=f"give {_LEAST} seconds or more"
        )
    place = args.run or newest_run()
    live = sys.stdout.isatty() and not (args.once or args.json or args.md)
    before: tuple[Now, float] | None = None
    while True:
        saved = read_saved(place)
        if saved.run is None:
            raise UsageError(
                f"{place} is a plan, not a run", hint="turbofit watch, or a run's name"
            )
        began = time.monotonic()
        now = _look_patiently(args, saved) if live else _look(args, saved)
        if not live and not args.json and now is not None and before is None:
            # Rates need two looks.
            time.sleep(args.interval)
            before, now = (now, args.interval), _look(args, saved)
        _tell(args, saved, now, before, live=live)
        if not live or saved.run.state in _OVER:
            return 0
        time.sleep(args.interval)
        before = (now, time.monotonic() - began) if now is not None else None


def _look_patiently(args: argparse.Namespace, saved: Saved) -> Now | None:
    """A gateway that is closed for a moment, between two starts, is no reason to leave."""
    from turbofit.core.errors import UsageError

    try:
        return _look(args, saved)
    except UsageError:
        if args.url:
            raise
        return None


def _look(args: argparse.Namespace, saved: Saved) -> Now | None:
    """What the gateway says; None while the run's own is not open."""
    import os

    from turbofit.observe.live import fetch_page, now_of

    assert saved.run is not None
    urls = [args.url] if args.url else list(saved.run.urls)
    if not urls or (saved.run.state != "ready" and not args.url):
        return None
    key = args.api_key or os.environ.get("TURBOFIT_API_KEYS", "").split(",")[0].strip()
    return now_of(fetch_page(urls[0], key or None))


def _tell(
    args: argparse.Namespace,
    saved: Saved,
    now: Now | None,
    before: tuple[Now, float] | None,
    *,
    live: bool,
) -> None:
    from turbofit.cli.output import answer, painted, show
    from turbofit.report.watch_view import watch_view

    assert saved.run is not None
    used = {} if saved.run.pretend else _used(saved)
    if args.json:
        answer(_json(saved, now, used))
        return
    blocks = watch_view(saved.plan, saved.run, now, before, used)
    if live:
        answer(_HOME + painted(blocks).replace("\n", _LINE_END) + _BELOW)
    else:
        show(blocks, markdown=args.md)


def _used(saved: Saved) -> dict[int, int]:
    from turbofit.launch.sentinel import used_now

    return used_now(saved.plan)


def _json(saved: Saved, now: Now | None, used: dict[int, int]) -> str:
    from turbofit.core.struct import to_json

    assert saved.run is not None
    document: dict[str, Any] = {
        "schema": "turbofit.watch/1",
        "model": saved.plan.model.name,
        "state": saved.run.state,
        "pretend": saved.run.pretend,
        "now": now,
        "used": {str(index): size for index, size in used.items()},
        "forecast": {
            str(one.index): {"steady": one.steady, "peak": one.peak, "margin": one.margin}
            for one in saved.plan.gpus
        },
    }
    return to_json(document)
