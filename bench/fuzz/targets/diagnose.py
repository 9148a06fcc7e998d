"""A log from its bytes to the answer of `turbofit diagnose`, model and machine as it names them."""

from __future__ import annotations

from bench.fuzz.targets import logs
from turbofit.core.errors import UsageError
from turbofit.core.struct import to_json
from turbofit.diagnose.explain import diagnose

WORDS = logs.WORDS


def one(data: bytes) -> None:
    """There is always an answer; a model or a machine that cannot be meant is a UsageError."""
    try:
        to_json(diagnose([data]))
    except UsageError:
        return


def seeds() -> list[bytes]:
    """Whole logs, and the beginnings of them."""
    return [data for data in logs.seeds() if data.count(b"\n") > 1]
