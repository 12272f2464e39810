"""The operators of prdp_kernels: checked against float64, then timed against plain and compiled torch."""
