"""One target under libFuzzer, in a process of its own, as `__main__` starts it.

    python -m bench.fuzz.child TARGET FOLDER SECONDS

It may be killed at any moment: libFuzzer writes each new input of the corpus at once, findings are
files, and the count is written every few seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Final

import atheris

from bench.fuzz.check import check
from bench.fuzz.corpus import name_of
from bench.fuzz.mutate import bent

#: An input's longest, in bytes: bugs of readers need no more, and what is short is fast.
_LONGEST: Final = 8192
_EVERY: Final = 2.0
#: Instrumented code is slower: whether a call takes too long is decided without it.
_SLACK: Final = 4.0
#: Address space in bytes: what a header claims must not be allocated.
_SPACE: Final = 6 << 30


class Tally:
    """Processor seconds and calls of this process, in a file."""

    def __init__(self, path: Path) -> None:
        self.calls, self._path, self._next = 0, path, 0.0

    def count(self) -> None:
        """One more call."""
        self.calls += 1
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY
            used = resource.getrusage(resource.RUSAGE_SELF)
            fact = {"seconds": round(used.ru_utime + used.ru_stime, 1), "calls": self.calls}
            half = self._path.with_suffix(".half")
            half.write_text(json.dumps(fact))
            half.replace(self._path)


def main() -> None:
    """Until the time is over."""
    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    # Never left: turbofit imports many modules where it needs them.
    atheris.instrument_imports(include=["turbofit", "PIL"]).__enter__()
    from bench.fuzz.targets import load

    target = load(name)
    for seed in target.seeds():  # what is imported late is instrumented late, and takes its time
        check(target.one, seed, 60.0)
    found = folder / "found" / name
    tally = Tally(folder / "tally" / f"{name}-{os.getpid()}-{int(time.time())}.json")
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE, _SPACE))

    def one(data: bytes) -> None:
        finding = check(target.one, data, _SLACK)
        if finding is not None:
            _keep(found / finding.name, data, finding.text)
        tally.count()

    words = folder / f"{name}.dict"
    words.write_text("".join(f'"{_quoted(word)}"\n' for word in target.WORDS))
    corpus = folder / "corpus" / name
    options = (
        f"-max_total_time={int(seconds)}", f"-max_len={_LONGEST}", f"-dict={words}", "-timeout=60",
        f"-artifact_prefix={found}/hard-", "-rss_limit_mb=3000", "-verbosity=0", "-reload=0",
    )  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=_mutated)
    atheris.Fuzz()


def _mutated(data: bytes, longest: int, seed: int) -> bytes:
    made = bent(data, seed) if seed % 2 else None
    if made is not None and len(made) <= longest:
        return made
    mutated: bytes = atheris.Mutate(data, longest)
    return mutated


def _quoted(word: str) -> str:
    r"""As libFuzzer's dictionaries want it; ``\x..`` in a word is a byte already."""
    plain = word.encode().replace(b"\\", b"\\\\").replace(b"\\\\x", b"\\x")
    return "".join(chr(one) if 32 <= one < 127 and one != 34 else f"\\x{one:02x}" for one in plain)


def _keep(path: Path, data: bytes, text: str) -> None:
    """The shortest input of one bug, and what it raised."""
    if not path.exists() or len(data) < path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_name(f"{path.name}.txt").write_text(f"{name_of(data)}\n{text}")


if __name__ == "__main__":
    main()
