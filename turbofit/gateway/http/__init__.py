"""The public side of the gateway: connections, bodies, routes, pages, refusals."""
