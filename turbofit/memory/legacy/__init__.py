"""The memory accounts of LMDeploy's engines before 0.18: one account for each engine.

Releases that allocate alike are one generation, a row of `presets/engines/generations.yaml`.
"""
