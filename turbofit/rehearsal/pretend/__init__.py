"""A pretend machine: replacements of CUDA, cuBLAS and NCCL count memory and compute nothing."""
