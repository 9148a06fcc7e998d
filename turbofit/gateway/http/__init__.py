"""The public side: connections, bodies, routes, pages, refusals."""
