"""Turbofit's own version, and the version of LMDeploy that plans are for."""

from __future__ import annotations

from typing import Final

#: The package, its plans and the build read the version here.
__version__ = "0.1.0"
#: The release of LMDeploy that plans assume without `--lmdeploy`, and that comments about
#: LMDeploy's code refer to. docs/adding.md has the steps for a newer release.
REFERENCE: Final = "0.18"
