"""Merges a LoRA adapter into a checkpoint, one tensor at a time, and converts original LLaVA.

`merge.merge` is the entry point. Torch is imported only when a merge runs.
"""
