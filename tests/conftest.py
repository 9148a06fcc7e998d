"""What all tests share: Hypothesis without deadlines, since a loaded machine is no defect."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("turbofit", deadline=None)
settings.load_profile("turbofit")
