from __future__ import annotations

import pytest

from turbofit.batch.batch_spec import BatchSpec
from turbofit.core.errors import UsageError


@pytest.mark.parametrize(
    ("given", "url", "message"),
    [
        ({"prompt": "a", "prompt_file": "b"}, "http://x", "--prompt and --prompt-file"),
        ({"patience": 5.0}, None, "--patience is for a server"),
        ({"shrink": True}, "http://x", "--shrink is for a server that is started"),
        ({"allowed_media_domains": ("x",)}, "http://x", "--allowed-media-domains is for a server"),
        ({"pretend": True}, "http://x", "--pretend is for a server that is started"),
        ({"no_rehearse": True}, "http://x", "--no-rehearse is for a server that is started"),
    ],
)
def test_what_does_not_go_together_is_said(given, url, message) -> None:
    with pytest.raises(UsageError, match=message):
        BatchSpec.of(**given).check(url=url)


def test_what_goes_together_passes() -> None:
    BatchSpec.of(prompt="a", shrink=True, pretend=True, no_rehearse=True).check(url=None)
    BatchSpec.of(prompt_file="a", patience=1.0, in_order=True).check(url="http://x")
