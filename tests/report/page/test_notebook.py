"""A plan as a notebook shows it."""

from __future__ import annotations

import html
import re

from msgspec.structs import replace

import turbofit.api
from turbofit.core.plan import Plan


def test_a_plan_shows_its_page_in_a_frame() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090")
    shown = plan._repr_html_()
    assert shown is not None
    assert shown.startswith("<iframe ")
    assert shown.endswith("</iframe>")
    inside = re.search(r'srcdoc="([^"]*)"', shown)
    assert inside
    page = html.unescape(inside[1])
    assert "Memory from empty to full" in page
    assert "<html" in page
    assert 'sandbox="allow-scripts"' in shown  # not allow-same-origin: it reaches nothing outside


def test_a_hostile_name_stays_in_its_attribute() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090")
    odd: Plan = replace(plan, model=replace(plan.model, name='"><script>alert(1)</script>'))
    shown = odd._repr_html_()
    assert shown is not None
    assert "<script>" not in shown
