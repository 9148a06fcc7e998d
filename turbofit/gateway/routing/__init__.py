"""Chooses the engine that gets a request, and sends the request there."""
