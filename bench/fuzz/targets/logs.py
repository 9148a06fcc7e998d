"""A log, as a run's supervisor and `diagnose` read it, line by line; and a page of metrics.

The input is cut in two where ``|~|`` stands, as if it came in pieces; the rest is a page.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml

from turbofit.core.errors import UsageError
from turbofit.diagnose.facts import read_runs
from turbofit.diagnose.lines.rows import rows
from turbofit.observe.live import now_of
from turbofit.observe.pytorch_log import parse_pytorch_line
from turbofit.observe.transformers_log import fallback_line
from turbofit.observe.turbomind_log import CacheBudget, Slab, cached_tokens, parse_line

_GOLDEN: Final = Path(__file__).resolve().parents[2] / "golden" / "logs.yaml"
_SEPARATOR: Final = b"|~|"
WORDS: Final = (
    "|~|", "\\x0a", "\\x0d", "\\x1b[0m", "\\xff\\xfe", "[TM][INFO][1121.10:37:10.1][a.cc:1] ",
    "[TM][FATAL]",
    "Object cache budget: ", " MB from free ", " MB and ratio ", "slab_size ", ", object_size ",
    ", object_count ", ", ratio", "Warm-up lengths: ", "Warm-up finished in ", " seconds",
    "Warm-up for ", " tokens failed with status ", "out of memory at ", "cache out of memory",
    "dp0 ID ",
    "CUDA error: out of memory", "Check failed: ", "setup: mm_seqs=", " images_batched=",
    "*** stacktrace of thread ", "  [ 0] ", " @ a.cc:1",
    "torch.OutOfMemoryError: CUDA out of memory. ",
    "Tried to allocate ", " GiB", " MiB", "GPU 0 has a total capacity of ", " of which ",
    " is free",
    "this process has ", " memory in use", "allocated memory ", " is allocated by PyTorch",
    "(GPU 0; ", " total capacity; ", " already allocated; ", " reserved in total by PyTorch",
    "Killed process ", "anon-rss:", "kB", "| N/A ", "MiB / ", "Driver Version: ", "CUDA Version: ",
    "Loading checkpoint shards: 100%", "  File \\x22/a.py\\x22, line 1, in f", "RuntimeError: ",
    "at least two devices, cuda:0",
    "$ lmdeploy serve api_server internvl2-8b --tp 2 --session-len ",
    "--cache-max-entry-count ", "Devicle 0 peer access Device 1", "[BlockManager] block_size = ",
    "chunk_size = ", "session_len", "# TYPE a counter\\x0a",
    "turbofit_gateway_engine_up{engine=\\x220\\x22} 1",
    "NaN", "+Inf", "1e400", "99999999999999999999",
)  # fmt: skip


def one(data: bytes) -> None:
    """Whatever a log says, its lines become events or nothing; a page is refused (UsageError)."""
    pieces = data.split(_SEPARATOR)
    budget: CacheBudget | None = None
    found = list(rows(pieces[:2]))
    for _, text in found:
        for parse in (parse_line, parse_pytorch_line, fallback_line):
            event = parse(text)
            budget = event if isinstance(event, CacheBudget) else budget
            if budget and isinstance(event, Slab):
                assert cached_tokens(budget.budget, event, 64) >= 0
    read_runs(iter(found))
    with suppress(UsageError):
        now_of(data.decode("utf-8", "replace"))


def seeds() -> list[bytes]:
    """The logs of the golden set, whole and each line of them, and a page."""
    logs: dict[str, Any] = yaml.safe_load(_GOLDEN.read_text(encoding="utf-8"))
    texts = list(logs.values())
    lines = dict.fromkeys(line for text in texts for line in text.splitlines())
    page = "".join(
        f'turbofit_gateway_{name}{{engine="0",reason="x"}} 1\n'
        for name in ("engine_up", "engine_requests", "engine_units", "waiting", "refused_total")
    )
    return [text.encode() for text in (*texts, *lines, page)]
