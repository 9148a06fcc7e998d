"""Holds the count of `turbofit quantize` against llm-compressor's own code on pretend GPUs."""
