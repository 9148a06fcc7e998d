"""The gateway in front of LMDeploy, which holds every client to the plan.

``limits`` has pure functions: what a request may contain, and where each API puts images.
``http.app`` is an ASGI app that uses them; ``server`` runs the app, alone or beside the engines.
Start reading at ``server``.
"""
