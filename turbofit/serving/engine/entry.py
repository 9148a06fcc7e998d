"""Runs a Python module as LMDeploy's command line, immediately or after a message.

``python entry.py MODULE ARGUMENTS...`` runs the module immediately. ``TURBOFIT_ENGINE_KEY`` has the
engine's API key, which becomes an argument here: every user can read a command line, but only the
owner can read an environment.

``python entry.py --standby NAMES...`` imports these names (and calls the function of a name like
``module:function``). Then the program waits for a line of JSON on its input, a socket: the module,
its arguments, and environment variables. The program answers with a line, and runs the module. The
program ends with its input, since the turbofit at the other end has then ended.
"""

from __future__ import annotations

import json
import logging
import os
import pkgutil
import runpy
import select
import sys
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

#: Set for engines that prepare images; the same name as `serving.images.preparation.THREADS`.
_IMAGES = "TURBOFIT_IMAGE_THREADS"
#: The prefix of files that a process opens when it begins to use a card.
_CARD = "/dev/nvidia"
#: First words of command lines with which this program imports LMDeploy. Transformers' engine is
#: left out: its freed tensors need early garbage collections.
_WITH_LMDEPLOY = ("lmdeploy", "turbofit.rehearsal.turbomind.server", "--standby")


def forget_urls() -> None:
    """Stop `urllib.parse` from caching URLs: URLs that contain images take gigabytes."""
    parse: Any = urllib.parse
    parse.urlsplit = lru_cache(maxsize=0)(getattr(parse.urlsplit, "__wrapped__", parse.urlsplit))


def without_texts(record: logging.LogRecord) -> bool:
    """Remove clients' stop words and their tokens from a warning of LMDeploy's log.

    Returns True: the warning itself is logged.
    """
    if record.funcName == "indexes_containing_token":
        record.msg, record.args = "a stop word has no token of its own, or too many", ()
    return True


def stand_by(names: Sequence[str]) -> list[str]:
    """Import ``names``, wait for an engine's command and variables, and return the command."""
    for name in names:
        # A name may be missing in another LMDeploy. The engine's own start shows such errors.
        with suppress(Exception):
            found = pkgutil.resolve_name(name)
            if ":" in name:
                found()
    # If a card is open, CUDA has chosen its cards already, and they may not be the engine's.
    opened = any(map(_of_card, os.listdir("/proc/self/fd")))
    if opened and not select.select([0], [], [], 0)[0]:
        sys.exit("turbofit: importing has opened a GPU: no standby")
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit(0)
    with suppress(OSError):  # a server that saw the imports work has closed its end
        os.write(0, b"begun\n")
    message = json.loads(line)
    for name, value in message["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    words: list[str] = message["words"]
    if opened:  # by an import, before the engine's cards were known: begin again with these cards
        os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *words])
    return words


def _of_card(descriptor: str) -> bool:
    """Return whether a file descriptor of this process belongs to a card."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(_CARD)
    except OSError:  # the descriptor of the folder itself
        return False


def main() -> None:
    """Run the module of the command line, or of a standby's message, as LMDeploy's command line."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    sys.path.append(str(Path(__file__).parents[3]))  # for a checkout that is not installed
    words = sys.argv[1:]
    if words[0] in _WITH_LMDEPLOY:
        from turbofit.core.process.interpreter import collect_after

        collect_after(600_000)  # not during the import, which makes 520,000 lasting objects
    if words[0] == "--standby":
        words = stand_by(words[1:])
    module, *arguments = words
    key = os.environ.pop("TURBOFIT_ENGINE_KEY", "")
    if key:
        arguments += ["--api-keys", key]
    forget_urls()
    logging.getLogger("lmdeploy").addFilter(without_texts)
    if module in _WITH_LMDEPLOY:
        from turbofit.serving.engine import first_tokens, grammar_threads

        grammar_threads.install()
        first_tokens.install()
    if _IMAGES in os.environ:
        from turbofit.serving.images.preparation import install

        install()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
