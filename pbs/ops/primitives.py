"""What several kernels need."""

# exp(x) = exp2(x LOG2_E): the hardware has exp2.
LOG2_E = 1.4426950408889634
