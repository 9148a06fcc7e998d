"""The only reader of logs: a table of (words, pattern, event), applied once to each line.

`serve` follows its engine with this reader, and `diagnose` reads the logs that people paste. The
reader knows the lines of LMDeploy from 0.2 on, torch, Transformers, Accelerate, the kernel,
nvidia-smi, LMDeploy's check_env and torch's collect_env. Since 0.15 TurboMind's messages begin with
``[TM][LEVEL][MMDD.HH:MM:SS.uuuuuu][file.cc:line]``. A line that is unknown, or has a damaged
figure, gives None. The time of each pattern is linear in the length of the line.
"""

from __future__ import annotations

import re
from codecs import iterdecode
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

from turbofit.core.struct import Struct
from turbofit.core.units import KIB, MIB
from turbofit.logs import log_events as events
from turbofit.machine.nvidia_smi import SmiGpu, listed
from turbofit.machine.torch_memory import torch_memory

_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][0-9A-B])")
#: What journald prints between the time and the line: the host, the unit, the pid.
_UNIT = r"[\w.-]+ [\w@.\\/-]+\[\d+\]:\s?"
#: Prefixes of lines, by pytest, a quotation, an exception group, Ray, torchrun, srun, docker
#: compose, kubectl, containerd, `journalctl`, vLLM, LLaVA's worker, ms-swift, LMDeploy's checks and
#: `grep -n`.
_LINE_PREFIX: Final = re.compile(
    r"(?:E {7}|> (?![>$ ])| {2,8}\| (?!.*\|$)|\(\w[\w.]*(?: rank=\d+)? pid=\d+(?:, ip=[\d.]+)?\)\s?"
    r"|(?:ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[?\w+\.py:\d+\] ?"
    r"|\d{4}-\d\d-\d\d [\d:]{8} \| [A-Z]+ \| \w+ \| |\[(?:INFO|ERROR|WARNING):\w+\] "
    r"|\d{4}-\d\d-\d\d [\d:,]+ - lmdeploy - ERROR - (?=\w+(?:Error|Exception): )"
    r"|\d{1,6}:(?=\[TM\]|\[\d{4}-|INFO: )"
    r"|\[?rank\d+\]?:\s?(?:\[rank\d+\]:\s?)?"
    r"|\[\d+\]:\s?|\d{1,4}:\s"
    r"|\[pod/[\w.-]+/[\w.-]+\]\s"
    r"|[\w.-]+-\d+\s+\|\s?|[\w.-]+ +\|\s"
    rf"|[A-Z][a-z][a-z] [ \d]\d [\d:.]{{8,15}} {_UNIT}"
    rf"|\d{{4}}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:?\d\d)\s(?:{_UNIT}|std(?:out|err) [FP]\s)?)+"
)
#: What stands before an error's own line: the prefix of a logger in any form, Chinese words, or
#: what failed.
_LOGGED: Final = re.compile(
    r"[^'\"=]{0,120}?(?:(?P<said>[\u3000-\uffef][^'\"=A-Za-z]{0,12}|\b[Ff]ailed\b[^'\"=:]{0,60}: )"
    r"|\b(?:ERROR|CRITICAL|FATAL|error|fatal)\b[^'\"=A-Za-z]{0,12}(?:[\w.]+:[\w<>]+:\d+ - )?)"
    r"(?=(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): )"
)
_TRACEBACK: Final = "Traceback (most recent call last)"
_LONGEST_PREFIX: Final = 120
#: Where a new row begins inside a line. A progress bar writes several rows with carriage returns,
#: and an engine prints in the middle of a bar. An error's text that quotes a TurboMind line is one
#: row.
_NEXT_ROW: Final = re.compile(
    r"\r|(?<!Error:)(?<!Error: )(?<!Error: b')(?<!what\(\):)(?<!what\(\): )(?<!what\(\):  )"
    r"(?=\[TM\]\[)"
)
#: The words of LMDeploy's or vLLM's request log before the text of a client or of the model.
_REQUEST: Final = re.compile(
    r".{0,240}?(?: - logger\.py:\d+ - session=[^,]*, |\bReceived request \S+: )"
)
_LONGEST: Final = 8192
_T = TypeVar("_T")
_ZEROS: Final = bytes.maketrans(b"123456789", b"0" * 9)
#: ``_FORMS``: how many forms are kept; a server prints some hundred. ``LONGEST_FORM``: the most
#: characters of a form that is kept.
_FORMS, LONGEST_FORM = 4096, 400
#: A progress bar before an engine's own words in one line.
_BAR: Final = re.compile(r".*?\d%\|.*?(?=\[TM\]\[)")
_PREFIX: Final = re.compile(r"\[TM\]\[[A-Z]+\](?:\[[^\]]*\])?\[([^\]]*)\] (.*)")
#: The messages of torch, cuBLAS and Triton when CUDA itself has no memory.
_CUDA_MEMORY: Final = re.compile(
    r"CUDA (?:driver )?error: ?(?:out of memory|CUBLAS_STATUS_ALLOC_FAILED)"
    r"|Triton Error \[CUDA\]: out of memory"
)


class LogLine(NamedTuple):
    """A line's number from 1, and its text."""

    line: int
    text: str


def log_lines(chunks: Iterable[bytes]) -> Iterator[LogLine]:
    """Yield the lines of a log without the prefixes of loggers; ``chunks`` are pieces of the log.

    Rows of one line have the line's number. The text is UTF-8, or UTF-16 as PowerShell writes it.
    """
    logged: re.Pattern[str] | None = None
    for number, line in enumerate(_lines(chunks), 1):
        for part in _parts(line):
            text = _bare(part)
            at = text.find(_TRACEBACK)
            if 0 < at <= _LONGEST_PREFIX:  # the logger writes this prefix before the frames, too
                logged = re.compile(re.sub(r"\d+", r"\\d+", re.escape(text[:at])))
            match = logged.match(text) if logged else None
            if match is None and ("Error: " in text or "Exception: " in text):
                match = _LOGGED.match(text)
                if match and match["said"]:  # words that may name a model or a card
                    yield LogLine(number, match[0])
            if text := text[match.end() :] if match else text:
                yield LogLine(number, text)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    pieces, rest = iter(chunks), ""
    first = next(pieces, b"")
    code = "utf-16" if first[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    for text in iterdecode(chain([first], pieces), code, "replace"):
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield from rest.split("\n")


def _parts(line: str) -> list[str]:
    if "\x1b" in line:
        line = _ESCAPES.sub("", line)
    line = line.strip("\r\ufeff")
    several = "\r" in line or line.find("[TM][", 1) > 0
    return _NEXT_ROW.split(line) if several else [line]


def _bare(text: str) -> str:
    """Return a line without known prefixes, and without the text of a client's request."""
    text = text[:_LONGEST].rstrip()
    match = _LINE_PREFIX.match(text)
    if match and match.end() < len(text):
        text = text[match.end() :]
    if ("session=" in text or "Received" in text) and (request := _REQUEST.match(text)):
        return request[0].rstrip()
    return "" if text.isspace() else text


class _Pattern(NamedTuple):
    """A row of the table: ``make`` makes an event of a line that has a word and the pattern."""

    words: tuple[str, ...]
    pattern: re.Pattern[str]
    make: Callable[[re.Match[str]], Struct | None]


def _pattern(words: str, pattern: str, make: Callable[[re.Match[str]], Struct | None]) -> _Pattern:
    return _Pattern(tuple(words.split("|")), re.compile(pattern), make)


#: Messages of TurboMind since 0.15, after their prefix; "MB" means MiB.
#: Source: lmdeploy _turbomind.*.so `slab_size {}, object_size {}, object_count {}, ratio {}`
#: lmdeploy _turbomind.*.so `Object cache budget: {`, lmdeploy _turbomind.*.so `Warm-up finished in`
#: lmdeploy _turbomind.*.so `hit resource limit at {}`, lmdeploy _turbomind.*.so `setup: mm_seqs=`
_TURBOMIND: Final = (
    _pattern("at ", r"(?:hit resource limit|(out of memory)) at \d+/\d+$",
         lambda m: events.Backpressure(cause="memory" if m[1] else "limit")),
    _pattern("cache budget", r"Object cache budget: ([\d.]+) MB from free ([\d.]+) MB and ratio"
         r" ([\d.]+)", lambda m: events.CacheBudget(
             budget=round(float(m[1]) * MIB), free=round(float(m[2]) * MIB), ratio=float(m[3]))),
    _pattern("slab_size", r"slab_size (\d+), object_size (\d+), object_count (\d+), ratio",
         lambda m: events.Slab(slab_size=int(m[1]), object_size=int(m[2]))
         if all(int(m[i]) for i in (1, 2, 3)) else None),
    _pattern("Warm-up lengths", r"Warm-up lengths: ([\d, ]+)",
         lambda _: events.WarmupLengths()),
    _pattern("Warm-up finished", r"Warm-up finished in [\d.]+ seconds",
         lambda _: events.WarmupFinished()),
    _pattern("error: ", r"CUDA ([Dd]river )?error: (.+)",
         lambda m: events.CudaError(message=m[2], driver=bool(m[1]))),
    _pattern("setup: mm_seqs", r"\S+(?: \S+)? setup: mm_seqs=\d+ images_batched=\d+",
         lambda _: events.VisionSetup()),
    # The line of a guarded CUDA call that failed.
    _pattern("cudaSuccess out of memory", r"Check failed: .*cudaSuccess out of memory$",
         lambda _: events.CudaError(message="out of memory")),
    _pattern("Check failed: ", r"Check failed: (.*)", lambda m: events.CheckFailed(message=m[1])),
)  # fmt: skip
#: All other lines: by older engines, Python, the server, an aborting thread, the host.
_OTHER: Final = (
    _pattern("max_context_token_num", r".*?`max_context_token_num` is not set, default to (\d+)",
         lambda m: events.Starting(session=int(m[1]))),
    _pattern("turbofit-fallback: loading", r"turbofit-fallback: loading weights",
         lambda _: events.Starting()),
    _pattern("CUDA runtime error",
         r".*?CUDA runtime error: (\S*(?:\s+\S+)*?)"
         r"(?:\s+(\S*\.(?:h|cc|cu|cpp|cuh):\d+)(?!\w).*)?\s*$",
         lambda m: events.LegacyCuda(message=m[1], where=m[2] or "")),
    _pattern("Tried to allocate|CUDA out of memory|OutOfMemoryError: Allocation on device",
         r"(?=.*(?:out of memory|Allocation on device)).*", lambda m: torch_memory(m[0])),
    _pattern("block_size = |max_block_count = |chunk_size = ",
         r".*?\b(block_size|max_block_count|chunk_size) = (\d+(?:\.\d+)?)(?: MB)?\s*$",
         lambda m: events.KvBlocks(field=m[1], value=round(
             float(m[2]) * (MIB if m[1] == "block_size" else 1)))),
    _pattern("peer access", r".*?Devicl?e (\d+) peer access Device (\d+) is not available",
         lambda m: events.PeerMissing(a=int(m[1]), b=int(m[2]))),
    # lmdeploy metrics/loggers.py `Server (succeeded/failed/routed/waiting): `, whose counts may be
    # below 0; in 0.12 `API server (completed/routed/waiting): `.
    _pattern("Server (succeeded/failed|API server (completed",
         r".{0,160}?[Ss]erver \((?:succeeded/failed|completed)/routed/waiting\): (-?\d+) / -?\d+",
         lambda m: events.ServerFigures(succeeded=int(m[1]))),
    _pattern(" @ ", r"\s+\[ ?\d+\] (.+) @ \S+:\d+\s*$", lambda m: events.Frame(name=m[1])),
    # The exception that ended a process, as libstdc++ prints it. Exceptions of CUB and Thrust have
    # the name of CUDA's error.
    _pattern("what():", r"\s*what\(\):\s+CUDA ([Dd]river )?error: (.+)",
         lambda m: events.CudaError(message=m[2], driver=bool(m[1]))),
    _pattern("what():", r"\s*what\(\):\s.*cudaErrorMemoryAllocation",
         lambda _: events.CudaError(message="out of memory")),
    # Frames of Python's traceback; frames of its faulthandler have no comma.
    _pattern('File "', r'\s*File "([^"]+)", line \d+,? in (\S+)',
         lambda m: events.PythonFrame(path=m[1], function=m[2])),
    # Frames in IPython's older and newer form (a notebook links the path), and in rich's form.
    _pattern(".py in ", r"((?:[A-Za-z]:|/)[^\s:]+\.py) in ([\w.<>]+)(?:\(.*)?$",
         lambda m: events.PythonFrame(path=m[1], function=m[2])),
    _pattern(".py:", r"(?:File \[?|│ )((?:[A-Za-z]:)?[^\s:\[\]]+\.py):\d+(?:\]\([^)]*\))?,?"
         r" in ([\w.<>]+)", lambda m: events.PythonFrame(path=m[1], function=m[2])),
    _pattern("checkpoint shards", r".*?Loading checkpoint shards:\s+(\d+)%.*?(\d+)/(\d+)\b",
         lambda m: events.ModelLoaded() if m[1] == "100" and m[2] == m[3] else None),
    _pattern("Fallback to pytorch", r".*?(Fallback to pytorch engine because .*)",
         lambda m: events.EngineFallback(message=m[1])),
    _pattern("turbofit: images: ", r"turbofit: images: (.*)",
         lambda m: events.ImagesPrepared(how=m[1])),
    _pattern("NCCL error", r".*?(NCCL error.*)", lambda m: events.NcclError(message=m[1])),
    _pattern("Loading weights from", "", lambda _: events.LoadingWeights()),
    # The bar of TurboMind's loader up to 0.14, which converts the weights.
    _pattern("Convert to turbomind", r".*?Convert to turbomind format:\s+(\d+)%",
         lambda m: events.Converting(done=m[1] == "100")),
    _pattern("Warming up ", "", lambda _: events.WarmingUp()),
    # The whole line of the engine's own record: turbofit kills an engine for this line, and an
    # error message may quote a client's text. lmdeploy engine/engine.py `'Engine main loop
    # failed.'`
    _pattern(" failed.", r"[^']* - ERROR - (?:\[pid=[^\]]*\] - )?engine(?:_loop)?\.py:\d+"
         r" - (?:Engine main loop|EngineLoop wait_tasks) failed\.\s*$",
         lambda _: events.LoopFailed()),
    _pattern("No enough gpu memory", r".*No enough gpu memory for (kv cache|runtime)\.",
         lambda m: events.NoCache(what=m[1])),
    _pattern("EOFError", r"\s*EOFError\s*$", lambda _: events.LostLock()),
    # A traceback line that every executor of the ranks prints.
    # lmdeploy executor/base.py::ExecutorBase.init `self.build_cache_engine()`
    _pattern("self.build_cache_engine()", r"\s*self\.build_cache_engine\(\)\s*$",
         lambda _: events.CacheFrame()),
    # A traceback line inside a vision tower, in the words of the models' source.
    _pattern("self.vis|self.extract_feature|self.get_image_features|self.multi_modal_proj|pixel_values",
         r"\s.*(?:self\.(?:visual|vision\w*|extract_feature\w*|get_image_features"
         r"|multi_modal_projector)\(|pixel_values)", lambda _: events.VisionFrame()),
    _pattern("Uvicorn running on |Application startup complete|Available routes are:|ready at http"
         "|double enter to end input", "",
         lambda _: events.ServerUp()),
    _pattern('"POST /', r'.*?"POST /(?:v1/|chat/){0,2}(?:completions|generate|messages)\b'
         r'[^"]*" 200\b', lambda _: events.Answered()),
    # The PyTorch engine of 0.2.2 to 0.3.0 (model_agent.py), when the worker of a rank could not
    # build its model.
    _pattern("failed with error: ", r"(?:.*? )?(rank\[\d+\] failed) with error: (.+)",
         lambda m: events.PythonError(name=m[1], message=m[2],
                                      out_of_memory=bool(_CUDA_MEMORY.search(m[2])))),
    _pattern("Killed process", r".*?(?:(?:Memory cgroup out of memory|[Oo]ut of memory)?:? ?)Killed"
         r" process (\d+) \(([^)]*)\)(?:.*?anon-rss:(\d+)kB)?(?:.*?file-rss:(\d+)kB)?",
         lambda m: events.HostKill(
             pid=int(m[1]), name=m[2], group="cgroup" in m[0],
             rss=sum(int(m[i] or 0) * KIB for i in (3, 4)) if m[3] or m[4] else None)),
    _pattern("GPU |MIG ", r"\s*(?:GPU|MIG) .*", lambda m: listed(m[0])),
    _pattern(", ", r"(\d+), ([^,]+), (\d+)(?: MiB)?, (\d+)(?: MiB)?\s*$",
         lambda m: SmiGpu(index=int(m[1]), name=m[2].strip(), used=int(m[3]) * MIB,
                                 total=int(m[4]) * MIB)),
    _pattern("Error|Exception|Exit:",
         r"((?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Exception|Exit)|Exception))(?:: ?(.*))?$",
         lambda m: events.PythonError(name=m[1], message=m[2] or "",
                                      out_of_memory=bool(_CUDA_MEMORY.search(m[2] or "")))),
)  # fmt: skip


class Form:
    """The form of a line: its text with 0 for each digit, and the answers to questions about it.

    A pattern without digits has the same answer for the form as for the line itself. A word with
    digits must have zeros in their place.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._answers: dict[Callable[[str], Any], Any] = {}

    def ask(self, question: Callable[[str], _T]) -> _T:
        """Return the answer to a question; it is computed once for all lines of this form."""
        if question not in self._answers:
            self._answers[question] = question(self.text)
        answer: _T = self._answers[question]
        return answer


def zeros(text: str) -> str:
    """Return the text with each digit replaced by 0."""
    return text.encode(errors="surrogatepass").translate(_ZEROS).decode(errors="surrogatepass")


_kept_form: Final = lru_cache(_FORMS)(Form)


def form_of(line: str) -> Form:
    form = zeros(line)
    return _kept_form(form) if len(form) <= LONGEST_FORM else Form(form)


def read_line(line: str) -> Struct | None:
    text = _ESCAPES.sub("", line).rstrip() if "\x1b" in line else line.rstrip()
    text = _BAR.sub("", text) if "%|" in text else text
    return event_in(text, form_of(text))


def event_in(text: str, form: Form) -> Struct | None:
    """Return the event of a line, or None; ``text`` has no colours and no spaces at the end."""
    prefix = _PREFIX.match(text) if text.startswith("[TM]") else None
    call, message = prefix.groups() if prefix else ("", text)
    try:
        if prefix and message.isdecimal():
            return events.WarmupLength(tokens=int(message))
        matches = ((row, row.pattern.match(message)) for row in form.ask(_patterns_in))
        made = (row.make(match) for row, match in matches if match)
        event = next((event for event in made if event is not None), None)
    except ValueError:  # a figure that a torn line damaged
        return None
    if call and isinstance(event, events.CudaError):
        return events.CudaError(message=event.message, driver=event.driver, call=call)
    return event


#: Each word of the table with its row.
_OTHER_WORDS: Final = [(word, row) for row in _OTHER for word in row.words]
_TURBOMIND_WORDS: Final = [(word, row) for row in _TURBOMIND for word in row.words] + _OTHER_WORDS


def _patterns_in(form: str) -> list[_Pattern]:
    """Return the rows of the table that share a word with a line; for most lines an empty list."""
    words = _TURBOMIND_WORDS if form.startswith("[TM]") else _OTHER_WORDS
    return [row for word, row in words if word in form]
