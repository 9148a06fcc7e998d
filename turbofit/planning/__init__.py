"""Turns a person's request into a plan: it is resolved, searched, and given its commands."""
