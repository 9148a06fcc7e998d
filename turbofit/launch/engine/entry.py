"""Runs a Python module as LMDeploy's command line, with its API key hidden from other users.

``python entry.py MODULE ARGUMENTS…``: every user can read a command line, only the owner an
environment, so the key comes in ``TURBOFIT_ENGINE_KEY`` and is appended here.
"""

from __future__ import annotations

import os
import runpy
import sys
import urllib.parse
from functools import lru_cache
from pathlib import Path
from typing import Any


def forget_urls() -> None:
    """Let `urllib.parse` keep no URLs: its last 128 may be images, gigabytes no plan counts."""
    parse: Any = urllib.parse
    parse.urlsplit = lru_cache(maxsize=0)(getattr(parse.urlsplit, "__wrapped__", parse.urlsplit))


def prepare_images() -> None:
    """Have LMDeploy prepare images on several threads, as `launch.images` says."""
    sys.path.append(str(Path(__file__).parents[3]))  # of a checkout that is not installed
    from turbofit.launch.images.preparation import install

    install()


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    module, arguments = sys.argv[1], sys.argv[2:]
    key = os.environ.pop("TURBOFIT_ENGINE_KEY", "")
    if key:
        arguments += ["--api-keys", key]
    forget_urls()
    prepare_images()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
