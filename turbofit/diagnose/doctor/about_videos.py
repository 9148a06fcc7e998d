"""What LMDeploy decodes videos with, where its variable names one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.diagnose.doctor.finding import Finding, ok, warning

if TYPE_CHECKING:
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["video_finding"]

_VARIABLE: Final = "LMDEPLOY_VIDEO_BACKEND"
#: Those that it takes (vl/media/video.py of LMDeploy 0.18), in the order in which it tries them.
_BACKENDS: Final = ("cv2", "decord", "torchcodec", "torchvision")


def video_finding(sources: Sources) -> Finding | None:
    """Whether the backend that the environment names can work; None where it names none.

    LMDeploy tries no other one then, and every request with a video fails.
    """
    name = sources.environ.get(_VARIABLE)
    if name is None:
        return None
    problem = _problem(sources, name)
    if problem is None:
        return ok("videos", f"{_VARIABLE}={name}")
    return warning(
        "videos",
        f"{_VARIABLE}={name}: {problem}",
        "LMDeploy tries no other backend then: every request with a video fails",
        f"unset {_VARIABLE}, and pip install opencv-python-headless",
    )


def _problem(sources: Sources, name: str) -> str | None:
    if name not in _BACKENDS:
        return f"LMDeploy knows only {', '.join(_BACKENDS)}"
    if not sources.has_module(name):
        return f"{name} is not installed"
    if name != "torchvision":
        return None
    folder = sources.package_folder(name)
    try:
        text = None if folder is None else (folder / "io" / "video.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if text is not None and "def read_video(" not in text:
        return f"torchvision {sources.version(name)} has no read_video any more"
    return None if sources.has_module("av") else "its read_video needs PyAV, which is not installed"
