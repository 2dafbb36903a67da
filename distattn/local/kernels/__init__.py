"""Attention on one device as Pallas kernels, with the same file names for TPU and GPU."""
