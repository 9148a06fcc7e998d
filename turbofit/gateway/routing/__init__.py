"""Chooses the engine that gets a request, and brings the request there."""
