"""Holds every client to the plan, in front of LMDeploy.

``limits`` is pure: it says what a request may hold, and where each API hides images. ``http.app``
is an ASGI app around it; ``server`` runs the app, alone or beside the engines. Start reading there.
"""
