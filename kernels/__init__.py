"""Tensor operations, each beside its plain-torch reference. Knows tensors, nothing else."""
