"""Quantisation schemes, one a file: each takes the fused graph and writes its own weights beside the old ones."""
