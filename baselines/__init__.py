"""The methods PBS-Attn is compared with, one file each, on the same plans and kernels."""
