"""The types that all of turbofit uses, and its processes and files; it imports no other package."""
