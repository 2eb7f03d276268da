"""What runs programs: Triton kernels, compiled loops, blocks of torch operations, or the callbacks as they are."""
