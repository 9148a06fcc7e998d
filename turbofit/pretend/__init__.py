"""A pretend machine: stand-ins for CUDA, cuBLAS and NCCL that account for memory.

Nothing is computed here and no GPU is touched: what runs on a pretend machine
allocates, fills its cards and dies as it would on real ones, and that is all.
"""
