from __future__ import annotations

import subprocess
import sys


def fresh(code: str) -> str:
    """What a Python that has imported nothing yet prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip


def test_it_imports_nothing_by_itself() -> None:
    code = (
        "import sys\n"
        "from turbofit.core.process.log import LazyLogger\n"
        "LazyLogger('x').info('said')\n"
        "print('logging' in sys.modules)"
    )
    assert fresh(code) == "False"


def test_a_program_that_sets_a_handler_hears_a_plan_and_no_other_is_set() -> None:
    code = (
        "import logging, sys, turbofit\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(name)s')\n"
        "turbofit.plan('internvl2-8b', on='1xrtx3090')\n"
        "loggers = [one for name, one in logging.Logger.manager.loggerDict.items()\n"
        "           if name.startswith('turbofit') and isinstance(one, logging.Logger)]\n"
        "print(len(loggers) > 2, [one.handlers for one in loggers if one.handlers])"
    )
    *names, last = fresh(code).splitlines()
    assert {"turbofit.model.source", "turbofit.machine.source", "turbofit.tuner.search.search"} <= {
        *names
    }
    assert last == "True []"


def test_another_thread_that_imports_logging_is_waited_for() -> None:
    code = (
        "import importlib.machinery as machinery, sys, threading\n"
        "from turbofit.core.process.log import LazyLogger\n"
        "begun, go = threading.Event(), threading.Event()\n"
        "class Slow(machinery.SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        begun.set(), go.wait()\n"
        "        super().exec_module(module)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'logging':\n"
        "            spec = machinery.PathFinder.find_spec(name)\n"
        "            spec.loader = Slow(name, spec.origin)\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
        "importing = threading.Thread(target=__import__, args=('logging',))\n"
        "importing.start(), begun.wait()\n"
        "speaking = threading.Thread(target=LazyLogger('x').info, args=('said',))\n"
        "speaking.start(), go.set(), speaking.join()\n"
        "print('ended')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("ended\n", "")
