"""The backend that LMDeploy decodes videos with, where the environment names one."""

from __future__ import annotations

import sys

import pytest

from tests.diagnose.doctor.support import Find, Make, two
from turbofit.diagnose.doctor.about_videos import _BACKENDS, video_finding

READS = "def read_video(filename):\n    ...\n"
#: What torchvision 0.28 has instead.
READS_NONE = "from pytorch.vision.fb.io.video import read_video\n"


def test_where_nobody_names_one_there_is_nothing_to_say(sources: Make) -> None:
    assert video_finding(sources()) is None


@pytest.mark.parametrize(
    ("name", "modules", "text", "seen"),
    [
        ("decord", {"decord"}, None, None),
        ("decord", {"cv2"}, None, "decord is not installed"),
        ("opencv", {"cv2"}, None, "LMDeploy knows only cv2, decord, torchcodec, torchvision"),
        ("torchvision", {"torchvision", "av"}, READS, None),
        ("torchvision", {"torchvision"}, READS, "its read_video needs PyAV"),
        ("torchvision", {"torchvision", "av"}, READS_NONE, "torchvision 0.28 has no read_video"),
        ("torchvision", {"torchvision", "av"}, "", "torchvision 0.28 has no read_video"),
        ("torchvision", {"av"}, None, "torchvision is not installed"),
    ],
)
def test_what_it_cannot_work_with(
    find: Find, sources: Make, name: str, modules: set[str], text: str | None, seen: str | None
) -> None:
    places = sources(LMDEPLOY_VIDEO_BACKEND=name)
    places.modules |= modules
    places.packages["torchvision"] = "0.28"
    if text is not None:
        folder = places.root / "torchvision/io"
        folder.mkdir(parents=True)
        if text:  # torchvision 0.27 has no such file
            (folder / "video.py").write_text(text)
    found = find("videos", two(), places)
    assert found.state == ("ok" if seen is None else "warning")
    assert (seen or "") in found.seen


@pytest.mark.lmdeploy
def test_lmdeploys_own_loader_refuses_what_we_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    video = pytest.importorskip("lmdeploy.vl.media.video")
    monkeypatch.setenv("LMDEPLOY_VIDEO_BACKEND", "opencv")
    with pytest.raises(ValueError, match="is not valid") as refused:
        video.VideoMediaIO(None)
    assert all(f"'{name}'" in str(refused.value) for name in _BACKENDS)
    monkeypatch.setenv("LMDEPLOY_VIDEO_BACKEND", "decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match="is not available"):
        video.VideoMediaIO(None)
