"""Tries settings on the real engine under a load, and keeps the best."""
