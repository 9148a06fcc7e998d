"""RESULTS.md: the scores in words and tables."""

from bench.accuracy.score import summary


def report(scored, unscored):
    import json

    return json.dumps(summary(scored, unscored), indent=1)
