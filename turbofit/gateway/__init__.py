"""The gateway in front of LMDeploy, which holds every client to the plan.

``limits`` has pure functions that decide what a request may contain. ``http.app`` is the ASGI app
that calls these functions. ``server`` runs the app, alone or beside the engines; start reading
there.
"""
