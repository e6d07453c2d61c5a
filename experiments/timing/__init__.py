"""Timing: what a call, a stage and a whole prefill take, beside dense kernels and floors."""
