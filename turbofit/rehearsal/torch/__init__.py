"""Rehearses the PyTorch engine and Transformers on a pretend machine."""
