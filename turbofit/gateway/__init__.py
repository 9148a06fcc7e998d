"""Holds every client to the plan, in front of LMDeploy.

``limits`` and ``bodies`` are pure: what a request may hold, and where each API hides images.
``app`` is an ASGI app around them; ``server`` runs it, alone or beside the engines. Start there.
"""
