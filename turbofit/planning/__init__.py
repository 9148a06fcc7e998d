"""From what a person asks for to a plan: one request, resolved, searched and given its commands."""
