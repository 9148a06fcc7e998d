"""Two versions, each in one place: turbofit's own, and LMDeploy's that plans are for."""

from __future__ import annotations

from typing import Final

#: The package, its plans and the build read it here.
__version__ = "0.1.0"
#: The releases of LMDeploy that plans are for where nobody names a version: what is read of
#: LMDeploy's behaviour is read there. docs/adding.md has what is to do for a newer one.
REFERENCE: Final = "0.18"
