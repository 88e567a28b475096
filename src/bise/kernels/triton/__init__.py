"""The Triton backend: the hot ops of `kernels/torch.py` as kernels for one GPU (docs/gpu.md)."""
