"""What mypy must say of `msgspec.structs.replace`, by `scripts/mypy_replace.py`.

mypy reads this file, and refuses a comment that ignores nothing.
"""

from __future__ import annotations

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.plan import Plan


def changed(plan: Plan) -> tuple[Plan, ...]:
    """Plans whose fields have values of other types, or that nobody may change."""
    return (
        replace(plan, usual_image=UNSET, fits=False),
        replace(plan, usual_image=None),  # type: ignore[arg-type]
        replace(plan, no_field=1),  # type: ignore[call-arg]
        replace(plan, promise=plan.promise),  # type: ignore[call-arg]  # planning alone makes it
    )
