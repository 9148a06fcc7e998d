"""LMDeploy's own HTTP server on a pretend machine.

Run by ``python -m turbofit.rehearse.turbomind.server ARGS…``.

``ARGS`` are those of the ``lmdeploy`` command (``serve api_server MODEL …``). Preprocessing,
scheduling, memory, errors and death are real; the text of the answers is not. The environment must
be that of ``server_launch``.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.pretend.build import build
from turbofit.pretend.documents import dumped, loaded
from turbofit.pretend.environment import cuda_site, find_turbofit, pretend_environment
from turbofit.pretend.libraries import check_surface
from turbofit.pretend.library import LibraryAccount
from turbofit.pretend.scenario import Scenario, write_scenario
from turbofit.rehearse.packages import engine_library

_MACHINE = "TURBOFIT_PRETEND_MACHINE"
NOTICE = (
    "turbofit: PRETEND GPUs: memory, admission, errors and death are real; "
    "the words that this server generates mean nothing"
)


@dataclass(frozen=True)
class ServerLaunch:
    """How to start the server: command, environment, and where its timeline will be."""

    argv: list[str]
    env: dict[str, str]
    timeline: Path


def server_launch(
    machine: Scenario,
    lmdeploy_arguments: Sequence[str],
    folder: Path,
    *,
    shared: str = "",
) -> ServerLaunch:
    """Prepares LMDeploy's server on a pretend machine.

    Args:
        machine: with what is charged to it beforehand.
        lmdeploy_arguments: what would follow the word ``lmdeploy``.
        folder: an own folder, for the scenario and the timeline.
        shared: the file through which several processes share the machine.
    """
    site = cuda_site()
    libraries = build(site=site)
    check_surface(engine_library(), libraries)
    folder.mkdir(parents=True, exist_ok=True)
    scenario, timeline = folder / "scenario", folder / "timeline"
    write_scenario(scenario, machine, str(timeline), shared)
    (folder / "machine.json").write_text(dumped(machine), encoding="utf-8")
    env = pretend_environment(libraries, scenario, site=site)
    env[_MACHINE] = str(folder / "machine.json")
    env["HF_HUB_OFFLINE"] = env["TRANSFORMERS_OFFLINE"] = "1"
    env["TM_LOG_LEVEL"] = "INFO"
    find_turbofit(env)
    argv = [sys.executable, "-m", "turbofit.rehearse.turbomind.server", *lmdeploy_arguments]
    return ServerLaunch(argv, env, timeline)


def main(arguments: list[str]) -> int:
    """Installs the pretend machine in this process and hands over to LMDeploy's command line."""
    try:
        path, libraries = os.environ.get(_MACHINE), os.environ.get("TURBOFIT_PRETEND_LIBRARIES")
        if not path or not libraries:
            raise UsageError(
                "this command is started by turbofit, in an environment of its own",
                hint="use turbofit serve --pretend",
            )
        machine = loaded(Path(path).read_bytes(), Scenario)
    except TurbofitError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    from turbofit.rehearse.turbomind.hfconfig import plain_gpt_oss_parser
    from turbofit.rehearse.turbomind.hooks import install

    sys.stderr.write(f"{NOTICE}\n")
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    account = LibraryAccount(Path(libraries))
    account.mark("import")
    install(
        machine,
        account,
        tokenizer=True,
        ready=lambda _engine, _staged: account.mark("serving"),
    )
    plain_gpt_oss_parser()
    from lmdeploy.cli.entrypoint import run

    sys.argv = ["lmdeploy", *arguments]
    run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
