"""Limits of a request: fields, images, videos, grammars. The functions are pure."""
