"""A pretend machine: stand-ins for CUDA's libraries count memory and compute nothing."""
