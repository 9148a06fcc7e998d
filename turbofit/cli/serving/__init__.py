"""What ``turbofit serve`` does for each kind of server: one plan, several models, a Ray cluster."""
