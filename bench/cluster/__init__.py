"""Serving and planning on a Ray cluster."""
