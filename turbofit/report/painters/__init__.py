"""Writes the blocks of a report as text for a terminal, Markdown or HTML."""
