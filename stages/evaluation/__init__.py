"""Measuring checkpoints: unbiased pass@k, majority votes, intervals, bits per byte and the n-gram to beat."""
