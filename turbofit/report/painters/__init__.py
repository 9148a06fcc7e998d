"""Documents as text, Markdown and bars."""
