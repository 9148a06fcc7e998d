"""The site's own functions, in Node where there is one; the page as a whole is Chromium's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import turbofit.report.fit_site
from turbofit.core.units import GIB, KIB, MIB, format_bytes, three_digits

NODE = shutil.which("node")
FOLDER = Path(turbofit.report.fit_site.__file__).parent

pytestmark = pytest.mark.skipif(NODE is None, reason="no Node is installed here")


def told(expression: str) -> Any:
    """What an expression is, beside the site's scripts that touch no page."""
    assert NODE is not None
    scripts = "".join((FOLDER / name).read_text("utf-8") for name in ("wording.js", "answer.js"))
    asked = f"{scripts}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run([NODE, "-"], input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_sizes_and_rates_read_as_in_the_terminal() -> None:
    sizes = [0, 1, 1023, KIB, 1280 * MIB, 1792 * MIB, 2304 * MIB, 99 * GIB + 256 * MIB]
    sizes += [200 * MIB + 512 * KIB, 201 * MIB + 512 * KIB, 1177 * MIB, 12 * GIB - 1, 100 * GIB]
    assert told(f"{sizes}.map(bytes)") == [format_bytes(size) for size in sizes]
    rates = [0.857142, 26.71, 999.4, 999.6, 1133.7, 242176.0]
    assert told(f"{rates}.map(three)") == [three_digits(rate) for rate in rates]


@pytest.mark.parametrize("name", ["constructor", "toString", "__proto__", "fr"])
def test_a_link_can_name_no_language_that_is_none(name: str) -> None:
    assert told(f"Boolean(WORDING[{name!r}])") is False
