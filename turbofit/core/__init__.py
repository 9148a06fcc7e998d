"""Types, errors, units and processes for all of turbofit; imports no other part of turbofit."""
