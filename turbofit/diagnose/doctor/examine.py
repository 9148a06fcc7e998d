"""All checks, in the order in which people mend things."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import MachineError, PackageError
from turbofit.diagnose.doctor.about_front_ends import front_end_finding
from turbofit.diagnose.doctor.about_gpus import condition_findings, gpu_findings, xid_finding
from turbofit.diagnose.doctor.about_host import host_findings
from turbofit.diagnose.doctor.about_links import link_findings
from turbofit.diagnose.doctor.about_modules import module_finding
from turbofit.diagnose.doctor.about_nccl import nccl_finding
from turbofit.diagnose.doctor.about_packages import package_findings
from turbofit.diagnose.doctor.about_videos import video_finding
from turbofit.diagnose.doctor.finding import DoctorReport, Finding, ok, stops
from turbofit.diagnose.doctor.health import Health, read_health
from turbofit.diagnose.doctor.sources import Sources
from turbofit.machine.nvml_machine import measure_in_time
from turbofit.machine.source import machine_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.machine import Machine
    from turbofit.core.model import Model

__all__ = ["examine"]

#: What cannot be read where no card is: it follows from that, and is no finding.
_OF_CARDS: Final = ("driver_cuda", "torch_architectures", "compute_capability")


def examine(
    sources: Sources | None = None,
    *,
    on: str | None = None,
    model: Model | None = None,
    port: int | None = None,
    drafts: bool = False,
) -> DoctorReport:
    """Check this machine and its environment.

    Args:
        sources: what is read, for tests.
        on: a SPEC or snapshot instead of this machine's GPUs; the environment is still this one's.
        model: whose weights the disk must hold.
        port: the port that will be asked for.
        drafts: whether speculative decoding will be asked for.

    Raises:
        UsageError: ``on`` cannot be meant.
    """
    places = sources or Sources()
    machine: Machine | None = None
    healths: Sequence[Health] | None = None
    try:
        if on is not None:
            machine = machine_from(on)
        else:
            machine = _whole_machine(places)
            healths = read_health(machine)
        first = ok("nvml", f"driver {machine.driver}, CUDA {machine.cuda} ({machine.source})")
    except (MachineError, PackageError) as exc:
        first = stops(
            "nvml",
            exc.message,
            "no GPU here can be planned for; driver, kernels and the cards' condition were not "
            "looked at",
            f"{exc.hint}; turbofit serve MODEL --pretend --on SPEC tries it without a GPU",
        )
    findings: list[Finding] = [first, *package_findings(places, machine)]
    findings += [front_end_finding(places, model), nccl_finding(places)]
    videos = video_finding(places)
    if videos is not None:
        findings.append(videos)
    if model is not None:
        findings.append(module_finding(places, model, drafts=drafts))
    if machine is not None:
        findings += gpu_findings(places, machine)
        if healths is not None:
            findings += condition_findings(machine, healths)
        findings += link_findings(places, machine)
    findings.append(xid_finding(places))
    findings += host_findings(places, machine, model, port)
    if healths is None:
        kept = (one.state != "unreadable" or one.check not in _OF_CARDS for one in findings)
        findings = list(compress(findings, kept))
    return DoctorReport(
        machine=machine.name if machine else None,
        source=machine.source if machine else "none",
        findings=tuple(findings),
    )


def _whole_machine(places: Sources) -> Machine:
    """The machine with what CUDA would show of it, also where that is nothing."""
    from msgspec.structs import replace

    try:
        return measure_in_time(places.environ)
    except MachineError as hidden:
        if "CUDA_VISIBLE_DEVICES" not in hidden.message:
            raise
        rest = {k: v for k, v in places.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        whole = measure_in_time(rest)
        return replace(whole, visible=(), warnings=(*whole.warnings, hidden.message))
