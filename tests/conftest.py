"""What all tests share: their order, Hypothesis without deadlines, a state folder, signals."""

from __future__ import annotations

import gc
import inspect
import os
import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.runner import runtestprotocol
from hypothesis import settings
from hypothesis.internal.conjecture import providers

from tests import virtual_time
from tests.support.processes import Child, sharing_libraries
from tests.support.standin.standin_engine import mend_torchvision, mend_transformers
from tests.support.waiting import HANG
from tests.sweep import part
from turbofit.cli.terminal import screen

#: The same examples on every machine in the check, others at each `--all`, five times as many.
settings.register_profile(
    "turbofit",
    deadline=None,
    derandomize="CHECK_ALL" not in os.environ,
    max_examples=part(100, 5),
)
#: Hypothesis draws constants of local modules too, of those that a worker happens to have loaded.
providers.is_local_module_file = lambda path: False
settings.register_profile("explore", deadline=None)
settings.load_profile("turbofit")
mend_torchvision()
mend_transformers()
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # `safe_load` takes it, in a tenth
gc.disable()  # what is made while tests are collected stays

pytest_plugins = ["tests.support.nvml", "tests.support.leftovers", "tests.support.browser"]

#: Files that take longest, the first by the clock, the others by seconds of a processor. A file is
#: one worker's.
LONGEST = (
    "serving/test_serve_pretend.py", "gateway/test_grammar_process.py",
    "serving/test_serve_pretend_pytorch.py", "serving/test_serve_lmdeploy.py",
    "serving/test_pretend_pipeline.py", "serving/test_run.py",
    "rehearsal/pretend/inside/test_turbofit_values.py", "test_wheel.py", "test_house.py",
    "bench/test_golden.py", "measure/test_calibrate_program.py", "rehearsal/test_planned.py",
    "planning/search/test_evaluate.py", "logs/test_first_step.py", "test_plain_install.py",
    "test_adding.py", "serving/test_supervised_processes.py", "cli/commands/test_pretend.py",
    "report/schema/test_schema.py", "serving/test_tune_pretend.py", "measure/test_tune_runner.py",
    "logs/test_account.py", "test_readme.py", "logs/test_prose.py", "measure/test_tune_space.py",
    "planning/test_remedies.py", "planning/search/test_lowered_limit.py",
)  # fmt: skip
#: Files of one worker, which imports LMDeploy and Transformers or Ray, or starts Chromium, once.
TOGETHER = (
    "model/test_(oracle_|parameters|loading)|model/families/|gateway/test_oracle_lmdeploy"
    "|serving/test_((planned_)?pipeline|passthrough|fallback_server)|serving/fallback/|serving/images/"
    "|memory/transformers/test_oracle_|rehearsal/.*/test_(hfconfig|readings)"
    "|memory/pytorch/test_oracle_|bench/test_registry|model/(merge/|quantize/test_read)"
    "|planning/test_commands|core/images/test_video|gateway/limits/test_sharing|cli/commands/test_merge"
    "|tests/test_(api|users_cases)",
    "(report|gateway)/.*_chromium",
    "serving/cluster/test_(serve_cluster|ray_adapter)",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file is not imported where all its tests have a mark that ``-m`` leaves out."""
    left_out = re.findall(r"\bnot (\w+)", config.option.markexpr)
    if not left_out or collection_path.suffix != ".py":
        return None
    marks = re.search(
        r"^pytestmark = .*?\n(?=\S)", collection_path.read_text(), re.MULTILINE | re.DOTALL
    )
    return True if marks and set(left_out) & set(re.findall(r"mark\.(\w+)", marks[0])) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes file by file, or all files that go together."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((names for names in TOGETHER if re.search(names, file)), file)

    return Together(config, log)


def pytest_collection_finish() -> None:
    """No later collection goes through what the collected tests hold."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000)  # a plan makes 60,000 objects, which need no collection


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What goes together and the longest files come first.

    Tests of LMDeploy are skipped where it is not.
    """
    if find_spec("lmdeploy") is None:
        for item in items:
            if item.get_closest_marker("lmdeploy"):
                item.add_marker(pytest.mark.skip(reason="needs LMDeploy"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = {Path(__file__).parent / name: at for at, name in enumerate(LONGEST)}
    first = re.compile("|".join(TOGETHER))
    items.sort(
        key=lambda item: (
            not first.search(item.nodeid), order.get(item.path, len(order)), item.path not in slow
        )
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A worker reports no set-up and no end that went well: each costs both sides half a ms."""
    if not hasattr(item.config, "workerinput"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine runs in virtual time."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    virtual_time.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """Children of tests start as from a terminal, whatever the shell in front of pytest ignored.

    A script's ``./scripts/check &`` runs with SIGINT ignored, and children inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Plans and runs of the tests are kept in a folder of theirs, not among the user's."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_STATE_HOME", sharing_libraries(folder))
        yield folder


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test's own folder of plans, runs and what was learned."""
    monkeypatch.setenv("XDG_STATE_HOME", sharing_libraries(tmp_path))
    return tmp_path / "turbofit"


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Processes that a test starts; what is left of them is killed."""
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


@pytest.fixture(scope="session", autouse=True)
def no_progress() -> Iterator[None]:
    """A busy machine would add lines of progress to what commands of this process say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "_PATIENCE", HANG)
        yield
