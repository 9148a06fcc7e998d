"""`turbofit page`: a static site that says what fits, from answers planned when it is written."""
