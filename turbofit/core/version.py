"""Turbofit's own version, and the version of LMDeploy that plans are for."""

from __future__ import annotations

from typing import Final

#: The package, its plans and the build read the version here.
__version__ = "0.1.0"
#: The release of LMDeploy that plans assume if nobody names a version. Comments about LMDeploy's
#: code refer to it. docs/adding.md says what a newer release needs.
REFERENCE: Final = "0.18"
