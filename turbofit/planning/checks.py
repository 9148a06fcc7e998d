"""The checks before a launch: one list with the name, the occasions and the effect of each check.

The code of a check is a function of the same name in a module of `planning.examine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Final, NamedTuple

from turbofit.core.errors import (
    DoesNotFitError,
    LaunchError,
    MachineError,
    PackageError,
    TurbofitError,
)
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.core.struct import NA, Struct
from turbofit.core.version import REFERENCE
from turbofit.planning.examine.scene import Answer, Scene, Sources, State, When

DOCTOR_SCHEMA: Final = "turbofit.doctor/1"
_STOPS: Final = 3
_NO_MACHINE: Final = 4
#: Checks that read this machine's driver. If `--on` names other cards, "unreadable" is no finding.
_OF_CARDS: Final = ("driver_cuda", "torch_architectures")


class Finding(Struct):
    """The result of one check.

    ``check`` is the check's name, on which scripts may rely. ``seen`` is what the check found,
    ``why`` its effect on this machine, and ``fix`` the remedy. A value that could not be read is
    ``unreadable``, never ``ok``.
    """

    check: str
    state: State
    seen: str
    why: str = ""
    fix: str = ""


class DoctorReport(Struct):
    """All findings. ``machine`` is the machine's name, or None if it could not be read."""

    schema: str = DOCTOR_SCHEMA
    machine: str | None
    source: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """The exit code: 4 without a readable machine, 3 if a finding stops serving, else 0."""
        if self.machine is None:
            return _NO_MACHINE
        return _STOPS if any(finding.state == "stops" for finding in self.findings) else 0

    def count(self, state: State) -> int:
        """Return the number of findings with a state."""
        return sum(finding.state == state for finding in self.findings)


class Check(NamedTuple):
    """One check of a machine before a launch.

    ``of`` names the field of the `Scene` that the check needs; a check whose field is None does not
    apply. ``why`` is the effect of a failure. ``error`` is the exception that a launch raises after
    a failure. An answer may replace the effect and the exception.
    """

    name: str
    module: str
    when: tuple[When, ...]
    why: str
    of: str = "sources"
    error: type[TurbofitError] = LaunchError

    def answer(self, scene: Scene) -> Answer | None:
        """Return the check's answer; None if it does not apply."""
        subject = getattr(scene, self.of)
        if subject is None:
            return None
        body = getattr(import_module(f"turbofit.planning.examine.{self.module}"), self.name)
        answer: Answer | None = body(subject, scene)
        return answer


#: The checks, in the order in which people repair things.
CHECKS: Final = (
    Check("lmdeploy", "packages", ("install",),
          f"plans rest on an account of LMDeploy {REFERENCE}"),
    Check("pairing", "packages", ("install",),
          "LMDeploy's wheels are built and tested against the versions that they require"),
    Check("driver_cuda", "packages", ("install",),
          "a driver older than torch's CUDA stops every engine", of="machine"),
    Check("torch_architectures", "packages", ("install",),
          "without code for a card, torch fails at its first kernel: no kernel image is available",
          of="machine"),
    Check("kernels", "packages", ("install",),
          "on a card without code TurboMind fails at its first kernel", of="machine"),
    Check("front_ends", "packages", ("install", "plan", "launch"),
          "LMDeploy reads configs and images through Transformers; some versions of it fail",
          error=PackageError),
    Check("modules", "packages", ("install", "launch"),
          "LMDeploy imports these modules for this model alone, and ends without them",
          error=PackageError),
    Check("image_library", "packages", ("install",),
          "Pillow alone resizes the images of models with tiles, in five times the processor time"),
    Check("same_machine", "cards", ("lease",),
          "somebody took memory that the plan counted on", of="plan", error=DoesNotFitError),
    Check("gpus", "cards", ("install",),
          "an engine on such a GPU fails or hangs", of="machine"),
    Check("cuda_visible_devices", "cards", ("install",),
          "an engine would run on the wrong cards", of="machine"),
    Check("free_memory", "cards", ("install",),
          "plans leave used memory to its holders; if a holder takes more, the engine dies. Memory"
          " without a visible process belongs to another container or another user", of="machine"),
    Check("slices", "cards", ("install",),
          "a slice has no peer access; plans take no more than the slice, but TurboMind by itself"
          " sees the whole card", of="machine"),
    Check("peer_access", "cards", ("install",),
          "without peer access tensor parallelism is slower, and cuda-ipc does not work",
          of="machine"),
    Check("host_memory", "host", ("install", "start"),
          "a server process takes about 4 GiB, pinned buffers and images come on top; without"
          " free memory, the kernel kills the engine (exit code 137)", of="host",
          error=DoesNotFitError),
    Check("shared_memory", "host", ("install", "start"),
          "NCCL between GPUs without peer access, and Ray, exchange data through /dev/shm; Docker"
          " gives a container 64 MiB", of="host"),
    Check("disk", "host", ("install",),
          "weights are downloaded to this disk: 16 GiB for a model of 8 B parameters"),
    Check("port", "host", ("install", "start"),
          "often an earlier server has the port, and still holds its GPU memory"),
    Check("run_disk", "host", ("start",), "logs and the run's record need this disk", of="folder"),
    Check("open_files", "host", ("start",), "connections are refused", of="plan"),
    Check("rank_launcher", "host", ("install", "plan", "launch"),
          "TurboMind drives all GPUs of a group from one process"),
)  # fmt: skip


def answers(scene: Scene) -> Iterator[tuple[Check, Answer]]:
    """Yield each check that applies, with its answer."""
    for check in CHECKS:
        answer = check.answer(scene) if scene.when in check.when else None
        if answer is not None:
            yield check, answer


def refuse(scene: Scene) -> list[str]:
    """Raise one error for all checks that stop a launch; without such a check, return warnings.

    Raises:
        TurbofitError: the error has the type of the first check; the hint has all fixes.
    """
    found = list(answers(scene))
    stopping = [(check, answer) for check, answer in found if answer.state == "stops"]
    if not stopping:
        return [answer.seen for _, answer in found if answer.state == "warning"]
    check, first = stopping[0]
    seen = dict.fromkeys(answer.seen for _, answer in stopping)
    fixes = dict.fromkeys(answer.fix for _, answer in stopping if answer.fix)
    raise (first.error or check.error)("; ".join(seen), hint="; ".join(fixes))


def plan_warnings(plan: Plan, sources: Sources | None = None) -> list[str]:
    """Return the warnings that this machine's packages and environment give about a plan.

    The plan may be launched on another machine.
    """
    scene = Scene(sources or Sources(), "plan", plan=plan)
    return [answer.seen for _, answer in answers(scene) if answer.state in ("warning", "stops")]


def examine(
    sources: Sources | None = None,
    *,
    on: str | None = None,
    model: Model | None = None,
    port: int | None = None,
    server: str = "",
) -> DoctorReport:
    """Check this machine and its environment.

    Args:
        sources: the sources of the checks; tests replace them.
        on: a SPEC or snapshot; its GPUs are checked instead of this machine's GPUs. The checked
          environment is always this machine's.
        model: the model whose weights the disk must hold.
        port: the port that a server will use.
        server: the run of turbofit that already listens on ``port``; empty if none does.

    Raises:
        UsageError: ``on`` is not valid.
    """
    from turbofit.machine.nvml_machine import measure_in_time
    from turbofit.machine.source import machine_from

    places = sources or Sources()
    machine: Machine | None = None
    try:
        machine = machine_from(on) if on is not None else measure_in_time(places.environ)
        text = f"driver {machine.driver}, CUDA {machine.cuda} ({machine.source})"
        nvml = Finding(check="nvml", state="ok", seen=text)
    except (MachineError, PackageError) as exc:
        nvml = Finding(
            check="nvml",
            state="stops",
            seen=exc.message,
            why="no plan for this machine is possible; driver and kernels were not checked",
            fix=f"{exc.hint}; turbofit serve MODEL --pretend --on SPEC serves without a GPU",
        )
    described = machine is not None and machine.host.ram_available != NA
    host = machine.host if machine is not None and described else places.host()
    scene = Scene(
        places, "install", machine=machine, host=host, model=model, port=port, server=server
    )
    findings = [nvml]
    for check, (state, text, fix, why, _) in answers(scene):
        if on is not None and state == "unreadable" and check.name in _OF_CARDS:
            continue
        matters = "" if state == "ok" else why or check.why
        findings.append(Finding(check=check.name, state=state, seen=text, why=matters, fix=fix))
    return DoctorReport(
        machine=machine.name if machine else None,
        source=machine.source if machine else "none",
        findings=tuple(findings),
    )
