"""A pretend machine: stand-ins for CUDA, cuBLAS and NCCL that account for memory.

Nothing is computed here and no GPU is touched: programs on a pretend machine allocate, fill its
cards and run out of memory as on real ones, and nothing else is real.
"""
