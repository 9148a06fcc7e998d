"""Holds every client to the plan, in front of LMDeploy.

``limits`` has pure functions: what a request may contain, and where each API puts images.
``http.app`` is an ASGI app that uses them; ``server`` runs the app, alone or beside the engines.
Start reading at ``server``.
"""
