"""`turbofit page`: a static site that says what fits; all its answers are planned beforehand."""
