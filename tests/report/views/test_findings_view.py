"""The findings of `doctor`: what stops serving first, what is in order in one line."""

from __future__ import annotations

from turbofit.planning.checks import DoctorReport, Finding
from turbofit.report.painters.terminal import paint
from turbofit.report.views.findings_view import doctor_view


def test_findings_are_counted_and_the_worst_come_first() -> None:
    found = (
        Finding(check="disk", state="ok", seen="9 GiB free"),
        Finding(check="ports", state="warning", seen="busy", why="a server", fix="another"),
        Finding(check="driver", state="stops", seen="none", why="no CUDA", fix="install it"),
        Finding(check="kernels", state="stops", seen="missing"),
    )
    report = DoctorReport(machine="box", source="nvml", findings=found)
    short = paint(doctor_view(report, full=False)).splitlines()
    assert short[:2] == ["box (nvml)", "2 stop serving, 1 warning, 1 in order"]
    assert short.index("kernels: missing") < short.index("ports: busy")
    assert "9 GiB free" in paint(doctor_view(report, full=True))
