"""Triton: a program searches the border of one row. R rows of N entries; T entries of a step.

A sort of long rows costs a GPU more than all else that a selection does. Floats that are not
negative are ordered like their bits, so that 16 passes of comparisons and sums find the value at
which the sum passes the goal, two bits each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384


@triton.jit
def largest_within_kernel(x_ptr, values_ptr, num_equal_ptr, num, goal, BLOCK: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * num
    entries = tl.arange(0, BLOCK)  # [T]
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num, BLOCK):
        x = tl.load(x_ptr + start + entries, mask=start + entries < num, other=0.0)
        largest = tl.maximum(largest, x)
    high = tl.max(largest, 0).to(tl.int32, bitcast=True)
    # What lies above `low` sums to more than the goal, unless it is -1; what above `high`, not.
    low = tl.full([], -1, tl.int32)
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        one = low + quarter
        two = tl.minimum(one + quarter, high)
        three = tl.minimum(two + quarter, high)
        above_one = tl.zeros([BLOCK], tl.float32)
        above_two = tl.zeros([BLOCK], tl.float32)
        above_three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num, BLOCK):
            x = tl.load(x_ptr + start + entries, mask=start + entries < num, other=0.0)
            bits = x.to(tl.int32, bitcast=True)
            above_one += tl.where(bits > one, x, 0.0)
            above_two += tl.where(bits > two, x, 0.0)
            above_three += tl.where(bits > three, x, 0.0)
        one_fits = tl.sum(above_one, 0) <= goal
        two_fits = tl.sum(above_two, 0) <= goal
        # What lies above `high` fits, whatever the rounding of a sum says.
        three_fits = (tl.sum(above_three, 0) <= goal) | (three == high)
        low = tl.where(one_fits, low, tl.where(two_fits, one, tl.where(three_fits, two, three)))
        smaller = tl.where(two_fits, two, tl.where(three_fits, three, high))
        high = tl.where(one_fits, one, smaller)
    value = high.to(tl.float32, bitcast=True)
    total = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num, BLOCK):
        keep = start + entries < num
        x = tl.load(x_ptr + start + entries, mask=keep, other=0.0)
        total += tl.where(x > value, x, 0.0)
        equal += (keep & (x == value)).to(tl.int32)
    room = (goal - tl.sum(total, 0)) / tl.maximum(value, 1e-37)
    room = tl.where(value > 0.0, room, num.to(tl.float32))
    num_equal = tl.minimum(room, tl.sum(equal, 0).to(tl.float32)).to(tl.int64)
    tl.store(values_ptr + row, value)
    tl.store(num_equal_ptr + row, num_equal)


def largest_within(x: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.largest_within.reference.largest_within`."""
    x = x.contiguous()
    values = x.new_empty(len(x), 1)
    num_equal = torch.empty(len(x), 1, dtype=torch.int64, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(x.shape[1]))
    largest_within_kernel[(len(x),)](
        x, values, num_equal, x.shape[1], float(goal), BLOCK=block, num_warps=max(1, block // 1024)
    )
    return values, num_equal
