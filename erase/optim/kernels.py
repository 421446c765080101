"""Triton kernels over the masked weights of many tensors; `erase.optim.cuda` launches them.

A program works on one block: BLOCK neighbouring weights of one tensor. It reads their bits of the mask (first bit
highest), and the running sum of these bits plus the number of ones before the block is the place of each masked weight
in the compact tensors. So no list of indices is ever made, and a weight outside the mask is never written.

Common arguments. bits: uint8, BLOCK / 8 for each block of all tensors. tensor, before: int32 for each block, the number
of its tensor and the ones before it in this tensor. first, total: int32 for each tensor, its first block and its
weights. addresses: int64, a row of pointers for each tensor; a tensor whose first pointer is 0 is left alone.
start: the first block of this launch. FULL: every weight is masked, and there are no bits.
"""
# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _places(bits, tensor, before, first, total, start, live, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Of each weight of the block: its place in its tensor, its place among the masked ones, and whether it is one.

    live: int32, 0 to leave the block alone.
    """
    block = start + tl.program_id(0)
    number = tl.load(tensor + block)
    within = tl.arange(0, BLOCK)
    i = (block - tl.load(first + number)) * BLOCK + within
    if FULL:
        place = i
        bit = (i < tl.load(total + number)).to(tl.int32) * live
    else:
        packed = tl.load(bits + block.to(tl.int64) * (BLOCK // 8) + within // 8).to(tl.int32)
        bit = (packed >> (7 - within % 8)) & 1
        place = tl.load(before + block) + tl.cumsum(bit, 0) - bit
        bit = bit * live
    return i, place, bit != 0


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 rounded to the nearest value of `dtype`, to even in the middle."""
    if dtype == tl.bfloat16:  # in integers, because the interpreter cuts the bits off
        word = x.to(tl.int32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        word = tl.where(x == x, word, 0x7FC0)
        return word.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["start"])
def gather(
    dense, compact, bits, tensor, before, first, total, start, ADD: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """compact = the masked values of `dense`, a whole tensor; with ADD they are added to what is there."""
    i, place, inside = _places(bits, tensor, before, first, total, start, 1, FULL, BLOCK)
    x = tl.load(dense + i, mask=inside, other=0.0)
    if ADD:
        x = _rounded(tl.load(compact + place, mask=inside, other=0.0).to(tl.float32) + x.to(tl.float32), x.dtype)
    tl.store(compact + place, x, mask=inside)


@triton.jit(do_not_specialize=["start"])
def exchange(
    addresses, bits, tensor, before, first, total, start, dtype: tl.constexpr, SWAP: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the masked weights of tensors to compact values; with SWAP the values that were there become the weights.

    addresses: [tensors, 2], of weights and of values, both of `dtype`.
    """
    row = addresses + 2 * tl.load(tensor + start + tl.program_id(0))
    address = tl.load(row)
    i, place, inside = _places(bits, tensor, before, first, total, start, (address != 0).to(tl.int32), FULL, BLOCK)
    weights = address.to(tl.pointer_type(dtype)) + i
    values = tl.load(row + 1).to(tl.pointer_type(dtype)) + place
    now = tl.load(weights, mask=inside, other=0.0)
    if SWAP:
        tl.store(weights, tl.load(values, mask=inside, other=0.0), mask=inside)
    tl.store(values, now, mask=inside)


@triton.jit(do_not_specialize=["start"])
def adam(
    addresses, scale, halt, bits, tensor, before, first, total, start, step_size, decay, one_minus_beta1, beta2,
    one_minus_beta2, root_of_correction, eps, dtype: tl.constexpr, MASTERS: tl.constexpr, SCALED: tl.constexpr,
    HALTS: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of Adam with decoupled weight decay on the masked weights of many tensors.

    addresses: [tensors, 6], of the weights, of a dense and of a gathered gradient (one of them is 0), all of `dtype`,
        and of the compact moments and masters, float32. MASTERS: the weights are rounded from masters.
    scale: float32, a factor of every gradient, if SCALED. halt: int32; if HALTS and it is not 0, nothing changes.
    step_size: lr / (1 - beta1^t). decay: lr times weight decay. root_of_correction: sqrt(1 - beta2^t).
    """
    row = addresses + 6 * tl.load(tensor + start + tl.program_id(0))
    address = tl.load(row)
    live = (address != 0).to(tl.int32)
    if HALTS:
        live = live * (tl.load(halt) == 0).to(tl.int32)
    i, place, inside = _places(bits, tensor, before, first, total, start, live, FULL, BLOCK)
    dense = tl.load(row + 1)
    is_dense = dense != 0
    gradient = tl.where(is_dense, dense, tl.load(row + 2)).to(tl.pointer_type(dtype))
    g = tl.load(gradient + tl.where(is_dense, i, place), mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.load(scale)
    weights = address.to(tl.pointer_type(dtype)) + i
    exp_avg = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + place
    exp_avg_sq = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + place
    m = tl.load(exp_avg, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq, mask=inside, other=0.0)
    if MASTERS:
        master = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + place
        w = tl.load(master, mask=inside, other=0.0)
    else:
        w = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    w = w - decay * w
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    w = w - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_of_correction) + eps)
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    if MASTERS:
        tl.store(master, w, mask=inside)
    tl.store(weights, _rounded(w, dtype), mask=inside)


@triton.jit(do_not_specialize=["start"])
def sgd(
    addresses, bits, tensor, before, first, total, start, lr, momentum, weight_decay, dtype: tl.constexpr,
    MOMENTUM: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of SGD on the masked weights of many tensors: b = momentum b + g + weight_decay w; w = w - lr b.

    addresses: [tensors, 3], of the weights and the dense gradients, both of `dtype`, and of the compact momentum b,
        float32; 0 without MOMENTUM, where b = g + weight_decay w.
    """
    row = addresses + 3 * tl.load(tensor + start + tl.program_id(0))
    address = tl.load(row)
    i, place, inside = _places(bits, tensor, before, first, total, start, (address != 0).to(tl.int32), FULL, BLOCK)
    weights = address.to(tl.pointer_type(dtype)) + i
    w = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(tl.load(row + 1).to(tl.pointer_type(dtype)) + i, mask=inside, other=0.0).to(tl.float32)
    b = g + weight_decay * w
    if MOMENTUM:
        buffer = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + place
        b = momentum * tl.load(buffer, mask=inside, other=0.0) + b
        tl.store(buffer, b, mask=inside)
    tl.store(weights, _rounded(w - lr * b, dtype), mask=inside)
