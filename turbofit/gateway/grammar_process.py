"""Tries grammars, each in a fork of this process: compiles it, and looks for its dearest token.

``python grammar_process.py BYTES TOKEN FOLDER TRUST [OPTION…]`` loads a model's tokenizer, and the
parsers that LMDeploy's options name. The first answer is a line of JSON: ``{}``, or ``{"unable":
why, "lacks": package}``, after which the process ends. Then each line of input is a trial:
``{"chat": …, "seconds": …, "said": …}``. The process answers each trial with a line of JSON:

- ``{"price": seconds}``: the grammar was compiled, and no token found that takes longer than this;
- ``{}``: LMDeploy compiles no grammar for this chat;
- ``{"wrong": text}``: XGrammar cannot compile the grammar;
- ``{"over": "time"}``: the fork took more than ``seconds`` of processor time;
- ``{"over": "memory"}``: the fork was refused memory beyond ``BYTES`` in addition to this process;
- ``{"over": "token"}``: one token takes more than ``TOKEN`` seconds of processor time;
- ``{"stopped": 0}``: an empty line of input stopped the trial;
- ``{"ended": signal}``: the fork was ended from outside, or got no thread of the host; this says
  nothing of the grammar.

An empty line outside a trial is ignored. The end of the input ends a running trial and the process.
This program imports nothing of turbofit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import heapq
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

#: The most seconds of a fork's life; it may wait for a core for most of them.
_LONGEST = 240
#: The most tokens that the search of the dearest token tries: some two seconds of processor time.
#: It ends at a number, so that a grammar gets the same verdict on a host whose cores are slow.
_TRIED = 80_000
#: The search ends in any case after so many seconds of processor time: one second before the limit
#: of the trial, but not before the first of these, and not after the second.
_SEARCHED, _SEARCHED_MOST = 2.0, 5.0
#: How often the search branches from equal states of the parser.
_EQUAL = 2
#: The tokens after which a walk through equal states ends, unless it meets a new one; and the
#: number of first bytes that it looks at before each token.
_WALKED, _LOOKED_AT = 300, 32
#: A mask that takes this share of the limit is computed again, and the least time counts: other
#: programs slow the first one down through the caches.
_SURE = 0.1
#: A fork is ended in the middle of a mask after this multiple of the limit.
_ENDED = 10
#: The most characters of an error in an answer.
_TOLD = 500
#: Bytes of address space that a thread with its stack and its heap may take.
_THREAD = 144 << 20
_PR_SET_PDEATHSIG = 1
#: Signals that a fork raises by a fault of its own: XGrammar's threads abort where memory is
#: refused, and a deep recursion overflows the stack. An engine would meet the same fault.
_FAULTS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)

#: Compiles a chat's grammar; returns None if LMDeploy compiles none.
Compile = Callable[[Any], Any]


def compiler_of(folder: str, trust: str, options: Sequence[str]) -> tuple[Compile, Tokens]:
    """Return a function that compiles a chat's grammar as LMDeploy's server does, and the tokens.

    The function uses the Python package xgrammar, as LMDeploy's server does; TurboMind itself
    compiles with its own copy of XGrammar.
    """
    import xgrammar
    from lmdeploy._guided_decoding import compile_response_format
    from lmdeploy.serve.openai.protocol import ChatCompletionRequest
    from lmdeploy.serve.parsers import ResponseParserManager
    from lmdeploy.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder, trust_remote_code=trust == "trust").model.model
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    given = dict(pairwise(options))
    parser = ResponseParserManager.get("default")
    parser.set_parsers(given.get("--reasoning-parser"), given.get("--tool-call-parser"), tokenizer)

    def compile_of(chat: Any) -> Any:
        try:
            request = parser(ChatCompletionRequest(model="", messages=[], **chat)).request
        except (TypeError, ValueError):
            return None  # LMDeploy refuses the request before it compiles anything
        if request.response_format is None:
            return None
        return compile_response_format(compiler, request.response_format)

    return compile_of, tokens_of(info)


class Tokens(NamedTuple):
    """The tokens of a vocabulary by their first byte, the short ones first, and the first bytes."""

    ids: Any
    first: Any


def tokens_of(info: Any) -> Tokens:
    """Return the tokens of XGrammar's ``TokenizerInfo``."""
    import numpy as np

    words = info.decoded_vocab
    first = np.array([word[0] if word else -1 for word in words])
    ids = np.lexsort((np.array([len(word) for word in words]), first))
    return Tokens(ids, first[ids])


class DearToken(Exception):  # noqa: N818 - a verdict
    """A token of the grammar takes longer than the limit."""


class Search:
    """Looks for the dearest token of a compiled grammar, on several paths of the parser's states.

    Before each token XGrammar computes a mask of the allowed tokens, while all clients of the
    engine wait. With ``(.{1,32}){1,31}`` this takes minutes, although the grammar compiles in a
    second. A mask costs more where the parser is in more states at once.

    The search goes on in turn from the state with the most parser states, from the newest and from
    the oldest one: the first finds dear tokens soon, the second goes deep, and the third takes each
    branch. From a state it tries the shortest and the longest token of each first byte. Equal
    states are not branched from again, so literals without end cost little. But XGrammar's states
    do not show how often a part was repeated, as in ``[a-z]{2000}``. So in each fourth turn the
    search walks on through equal states, always to the one that was met least.
    """

    def __init__(self, grammar: Any, tokens: Tokens, most: float) -> None:
        import xgrammar

        self._tokens, self._most = tokens, most
        self._mask = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
        self._matcher = xgrammar.GrammarMatcher(grammar)
        #: The seconds of processor time of the dearest token so far.
        self.price = 0.0
        #: States to go on from, by their numbers; and the same numbers, most parser states first.
        self._open: dict[int, Any] = {}
        self._order, self._by_states = deque[int](), list[tuple[int, int]]()
        self._met: dict[int, int] = {}
        self._number, self._tried = 0, 0
        #: Equal states to walk on from, and the tokens of the walk since a new one.
        self._walks = deque[Any](maxlen=64)
        self._walked = 0
        self._chance = random.Random(1)

    def follow(self, said: str) -> None:
        """Follow the text of an answer as far as the grammar allows it, and price its tokens."""
        for character in said:
            self._fill(self._matcher)
            if not self._matcher.accept_string(character) or self._matcher.is_terminated():
                return

    def run(self, until: float) -> None:
        """Search until all states were met, `_TRIED` tokens tried, or ``until`` (processor time).

        Raises:
            DearToken: a token takes more than the limit.
        """
        self._open_at(self._matcher, 1)
        turn = 0
        while time.process_time() < until and self._tried < _TRIED and (self._open or self._walks):
            turn += 1
            if self._walks and (turn % 4 == 3 or not self._open):
                self._go_on(self._walks.pop(), _LOOKED_AT)
                self._walked += 1
            else:
                self._go_on(self._next(turn))
            if not self._open and self._walked > _WALKED:
                return

    def _next(self, turn: int) -> Any:
        """Take the state from which the search goes on."""
        while True:
            if turn % 4 == 0:
                _, number = heapq.heappop(self._by_states)
            else:
                number = self._order.pop() if turn % 4 == 1 else self._order.popleft()
            if number in self._open:  # another turn may have taken it
                return self._open.pop(number)

    def _go_on(self, matcher: Any, most: int | None = None) -> None:
        """Compute the mask of a state, and note the states after its tokens.

        ``most``: look at the tokens of so many first bytes, instead of all.
        """
        self._fill(matcher)
        rare: tuple[int, int, int] | None = None
        for token in self._choices(most):
            begun = time.thread_time()
            self._tried += 1
            if not matcher.accept_token(token):
                continue
            self._note(time.thread_time() - begun)
            if not matcher.is_terminated():
                state, count = _state(matcher)
                met = self._met.get(state, 0)
                if met < _EQUAL:
                    self._met[state] = met + 1
                    self._open_at(matcher.fork(), count)
                elif rare is None or met <= rare[0]:
                    rare = met, state, token
            matcher.rollback(1)
        if rare is not None:
            self._met[rare[1]] += 1
            matcher.accept_token(rare[2])
            self._walks.append(matcher)

    def _open_at(self, matcher: Any, states: int) -> None:
        """Let the search go on from a new state of the parser, which consists of ``states``."""
        self._number, self._walked = self._number + 1, 0
        self._open[self._number] = matcher
        self._order.append(self._number)
        heapq.heappush(self._by_states, (-states, self._number))

    def _choices(self, most: int | None) -> list[int]:
        """Return the shortest and the longest allowed token of each first byte."""
        import numpy as np

        bits = np.unpackbits(self._mask.numpy().view(np.uint8), bitorder="little")
        allowed = bits[self._tokens.ids].astype(bool)
        ids, first = self._tokens.ids[allowed], self._tokens.first[allowed]
        if not ids.size:
            return []
        begins: Any = np.append(0, np.flatnonzero(first[1:] != first[:-1]) + 1)
        ends: Any = np.append(begins[1:], ids.size) - 1
        if most is not None and len(begins) > most:
            chosen = self._chance.sample(range(len(begins)), most)
            begins, ends = begins[chosen], ends[chosen]
        return [*dict.fromkeys([*ids[begins].tolist(), *ids[ends].tolist()])]

    def _fill(self, matcher: Any) -> None:
        """Compute the mask of the next token, and note how long this takes."""
        # By default this signal ends the process, in the middle of a mask.
        signal.setitimer(signal.ITIMER_PROF, _ENDED * self._most)
        seconds = self._seconds(matcher)
        if seconds > _SURE * self._most:
            seconds = min(seconds, self._seconds(matcher))
        signal.setitimer(signal.ITIMER_PROF, 0)
        self._note(seconds)

    def _seconds(self, matcher: Any) -> float:
        begun = time.thread_time()
        matcher.fill_next_token_bitmask(self._mask)
        return time.thread_time() - begun

    def _note(self, seconds: float) -> None:
        self.price = max(self.price, seconds)
        if seconds > self._most:
            raise DearToken


def _state(matcher: Any) -> tuple[int, int]:
    """Return what identifies the state of a matcher's parser, and the number of its states."""
    # The text lists all states; where a rule began is no part of what it may still become.
    text = matcher._handle._debug_print_internal_state().partition("[")[2]
    return hash(re.sub(r"rule_start_pos=-?\d+", "", text)), text.count("\n")


class Input:
    """The lines of standard input, which may also come during a trial."""

    def __init__(self) -> None:
        self._data = b""

    def trials(self) -> Iterator[bytes]:
        """Yield the lines that are not empty, until the input ends."""
        while self._more():
            *lines, self._data = self._data.split(b"\n")
            yield from filter(None, lines)

    def stops(self) -> bool:
        """Read what came during a trial, which is to stop; False if the input has ended."""
        more, self._data = self._more(), b""
        return more

    def _more(self) -> bool:
        data = os.read(0, 1 << 20)
        self._data += data
        return bool(data)


def tried(compile_of: Compile, tokens: Tokens, trial: Any, token: float) -> Any:
    """Compile a trial's grammar, and search for its dearest token; return the answer."""
    try:
        grammar = compile_of(trial["chat"])
        if grammar is None:
            return {}
        search = Search(grammar, tokens, token)
        search.follow(trial["said"])
        search.run(_end_of_search(trial["seconds"]))
        return {"price": search.price}
    except DearToken:
        return {"over": "token"}
    except BaseException as exc:  # noqa: BLE001 - the client hears of every error
        if isinstance(exc, MemoryError) or "bad_alloc" in str(exc):
            return {"over": "memory"}
        if os.strerror(errno.EAGAIN) in str(exc):  # no thread: of memory, or of the host's threads
            return {"over": "memory"} if _memory_was_short() else {"ended": 0}
        # XGrammar's messages begin with a time and a place in its sources.
        text = re.sub(r"^\[[\d:]+\] \S+ ", "", str(exc).strip()) or type(exc).__name__
        return {"wrong": text[:_TOLD]}


def _end_of_search(seconds: float) -> float:
    """Return the processor time of this fork at which the search ends, in a trial of ``seconds``.

    In a short trial this is beyond its limit, and the kernel ends it: a longer one follows.
    """
    now = time.process_time()
    return max(now + _SEARCHED, min(now + _SEARCHED_MOST, seconds - 1))


def _memory_was_short() -> bool:
    """Return whether this process had no address space left for a thread and its stack."""
    peak = re.search(r"VmPeak:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return peak is not None and (int(peak[1]) << 10) + _THREAD > most


def attempt(trial: Any, act: Callable[[], Any], most: int, given: Input) -> None:
    """Try a grammar in a fork by ``act``, and write the answer.

    The fork may take the trial's seconds of processor time, and ``most`` bytes more of host memory
    than this process.
    """
    ours, theirs = os.pipe()
    parent, fork = os.getpid(), os.fork()
    if fork == 0:
        _limit(parent, trial["seconds"], most)
        result = json.dumps(act()).encode()
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        os.write(theirs, result)
        os._exit(0)
    os.close(theirs)
    readable, _, _ = select.select([0, ours], [], [])
    stopped = 0 in readable and ours not in readable
    if stopped:
        os.kill(fork, signal.SIGKILL)
        if not given.stops():
            os._exit(0)
    said = os.read(ours, 1 << 16)
    os.close(ours)
    _, status = os.waitpid(fork, 0)
    os.write(_ANSWERS, (said or json.dumps(_end(status, stopped=stopped)).encode()) + b"\n")


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _limit(parent: int, seconds: float, most: int) -> None:
    """Let the kernel end this fork in time, and with its parent."""
    _end_with(parent)
    signal.alarm(_LONGEST)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(seconds)), hard))
    taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + most, taken + most))


def _end(status: int, *, stopped: bool) -> Any:
    """Return the answer for a fork that gave none, by its status of `os.waitpid`."""
    number = os.WTERMSIG(status)
    if stopped:
        return {"stopped": 0}
    if number == signal.SIGXCPU:
        return {"over": "time"}
    if number == signal.SIGPROF:
        return {"over": "token"}
    # Libraries exit without a signal where memory is refused, as glibc does for a thread's data.
    if not number or number in _FAULTS:
        return {"over": "memory"}
    return {"ended": number}


def main(most: str, token: str, folder: str, trust: str, *options: str) -> None:
    gc.disable()  # what is made by the imports stays, and no fork goes through it
    try:
        compile_of, tokens = compiler_of(folder, trust, options)
    except Exception as exc:  # noqa: BLE001 - a model's own code may raise anything
        lacks = exc.name if isinstance(exc, ImportError) else None
        unable = {"unable": f"{type(exc).__name__}: {exc}"[:_TOLD], "lacks": lacks}
        os.write(_ANSWERS, json.dumps(unable).encode() + b"\n")
        return
    gc.freeze()
    gc.enable()
    os.write(_ANSWERS, b"{}\n")
    given = Input()
    for line in given.trials():
        trial = json.loads(line)
        act = partial(tried, compile_of, tokens, trial, float(token))
        attempt(trial, act, int(most), given)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # engines get the cores first
    _end_with(os.getppid())  # the imports take seconds, in which nobody reads the input
    _ANSWERS = os.dup(1)
    os.dup2(2, 1)  # packages may print to stdout; such lines are no answers
    # The first entry is this folder, whose package ``http`` would hide Python's own.
    del sys.path[0]
    main(*sys.argv[1:])
