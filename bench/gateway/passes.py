"""turbofit's command line, with the processor time of each pass of its event loop.

    python -m bench.gateway.passes FILE gateway --plan …

A text's request takes about five passes; whatever else a pass does it waits for. Processor time of
the loop's thread, so that what runs beside on the machine does not count. asyncio's own loop, not
uvloop. ``FILE`` gets the milliseconds, the longest first, when the loop has ended; the first pass,
which starts the server, is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.base_events import BaseEventLoop
from pathlib import Path
from typing import Any

from turbofit.gateway import server


def run_loop(main: Any) -> None:
    """As the gateway's own, but for uvloop."""
    sys.setswitchinterval(server.SWITCH_SECONDS)
    asyncio.run(main)


def main() -> None:
    file, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
    one_pass, taken = BaseEventLoop._run_once, []

    def timed(loop: BaseEventLoop) -> None:
        began = time.thread_time()
        one_pass(loop)
        taken.append(time.thread_time() - began)

    BaseEventLoop._run_once = timed
    server.run_loop = run_loop
    from turbofit.cli.main import entry

    try:
        entry()
    finally:
        file.write_text(json.dumps([round(s * 1e3, 2) for s in sorted(taken[1:], reverse=True)]))


if __name__ == "__main__":
    main()
