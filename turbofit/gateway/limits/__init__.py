"""Limits of a request: fields, images, videos, grammars. Pure functions without input, output."""
