"""A pretend machine: stand-ins for CUDA, cuBLAS and NCCL account for memory and compute nothing."""
