"""Merges a LoRA adapter into a checkpoint, one tensor at a time, and converts original LLaVA.

`merge.merge` is the entry point. Only this room needs torch, and imports it when it runs.
"""
