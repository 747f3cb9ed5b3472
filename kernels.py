"""What a GPU needs and the paper does not: the layers between convolutions, each in one pass over its input.

Convolutions, linears and attention are a quarter of the student's time where everything else is a chain of
torch's own operations: each of those reads and writes the whole tensor. Here they are

    norm_silu(x, norm, bias)         silu(norm(x + bias)), also backwards; group_norm: the same without SiLU
    add_bias(y, bias, shortcut)      y + bias + shortcut, or relu(y + bias)
    geglu(x)                         a * gelu(gate), also backwards
    conv_along_time(x, ...)          a convolution along time as matrix products, without a copy
    without_bias(layer, x)           a layer's output and its bias apart, which one of the above then adds

computed in float32 and rounded once, the same numbers in every run. `fused` decides whether Triton's kernels
run; elsewhere (CPU, MPS, no Triton) two plain lines of torch do, and say what the kernels compute.
To a kernel a picture, channels-last in memory, is rows of c channels, one row for each position.
`fold_upsampling` and `stack_linears` make layers cheaper, exactly, and `window_places` attention, with other
results; they need no kernel.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Triton comes with torch on Linux. It takes a while to import, so it is only where something will run it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly: for tests
if find_spec("triton") and (torch.cuda.is_available() or INTERPRETED):
    import triton
    import triton.language as tl

    jit = partial(triton.jit, do_not_specialize=("rows", "each", "stretches"))  # or each size compiles anew
else:
    triton, jit = None, lambda kernel: kernel

ENABLED = True  # False: torch's own operations everywhere, to compare with

TILE = 4096  # elements that a program works on at a time: 16 for each of its threads
PROGRAMS = 1024  # that share a tensor, 8 for each of a big GPU's processors: enough loads in flight
WARPS = 8


def fused(x: Tensor, channels_axis: int = -3) -> bool:
    """Whether kernels run on x: on a GPU, with its channels next to each other in memory."""
    return (
        ENABLED
        and triton is not None
        and x.device.type == ("cpu" if INTERPRETED else "cuda")
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.movedim(channels_axis, -1).is_contiguous()
        and not torch.compiler.is_compiling()  # which fuses by itself
    )


# ------------------------------------------------------------------------------------------------------
# Normalisation


def norm_silu(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None = None) -> Tensor:
    """silu(norm(x + bias)); x (n c h w), bias (c): of the convolution before (`without_bias`).

    With a bias x is that convolution's output and has no other reader: without gradients it is overwritten.
    """
    return normalised(x, norm, bias, silu=True)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """norm(x); x (n c h w)."""
    return normalised(x, norm, None, silu=False)


def normalised(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None, silu: bool) -> Tensor:
    if fused(x):
        if tracked(x, norm.weight, norm.bias, bias):
            return Normalised.apply(x, norm.weight, norm.bias, bias, norm.num_groups, norm.eps, silu)
        out = like(x) if bias is None else x
        return normalise(x, norm.weight, norm.bias, bias, norm.num_groups, norm.eps, silu, out)[0]
    x = x if bias is None else x + bias[:, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


def normalise(
    x, gamma, beta, bias, groups: int, eps: float, silu: bool, out: Tensor
) -> tuple[Tensor, Tensor]:
    """What `normalised` says, written to out (n c h w); and the table (n 3 c) for the way back."""
    n, c, rows = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    table = x.new_empty(n, 3, c, dtype=torch.float32)
    if x.numel():
        wide, step, each, stretches = share(n, rows, c)
        sums = x.new_empty(n, stretches, 2, c, dtype=torch.float32)
        tile = dict(WIDE=wide, STEP=step, num_warps=WARPS)
        with torch.cuda.device_of(x):
            channel_sums[stretches, n](x, sums, rows, each, c, **tile)
            group = dict(WIDE=triton.next_power_of_2(c // groups), MANY=64, num_warps=4)
            statistics[groups, n](x, sums, bias, table, rows, stretches, eps, c, c // groups, **group)
            normalise_rows[stretches, n](x, table, gamma, beta, out, rows, each, c, SILU=silu, **tile)
    return out, table


class Normalised(torch.autograd.Function):
    """`normalise` with gradients: x, one table and the weights are kept, no float32 copy of anything."""

    @staticmethod
    def forward(ctx, x, gamma, beta, bias, groups, eps, silu):
        y, table = normalise(x, gamma, beta, bias, groups, eps, silu, like(x))
        ctx.save_for_backward(x, table, gamma, beta, bias)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, table, gamma, beta, bias = ctx.saved_tensors
        n, c, rows = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        dx, back = like(x), x.new_zeros(n, 5, c, dtype=torch.float32)
        if x.numel():
            dy = dense(dy)
            wide, step, each, stretches = share(n, rows, c)
            sums = x.new_empty(n, stretches, 2, c, dtype=torch.float32)
            tile = dict(SILU=ctx.silu, WIDE=wide, STEP=step, num_warps=WARPS)
            with torch.cuda.device_of(x):
                gradient_sums[stretches, n](x, dy, table, gamma, beta, sums, rows, each, c, **tile)
                group = dict(WIDE=triton.next_power_of_2(c // ctx.groups), MANY=64, num_warps=4)
                gradient_statistics[ctx.groups, n](
                    sums, table, gamma, back, rows, stretches, c, c // ctx.groups, **group
                )
                gradient_rows[stretches, n](x, dy, table, gamma, beta, back, dx, rows, each, c, **tile)
        dgamma, dbeta, dbias = back[:, :3].sum(dim=0)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), dbias, None, None, None


@jit
def channel_sums(x, sums, rows, each, C, WIDE: tl.constexpr, STEP: tl.constexpr):
    """A stretch of a picture's rows -> for each channel the sums of x - pivot and of its squares.

    The pivot is the picture's first value of the channel: squares of what is far from zero would drown what
    it varies by. No atomics: each program writes its own sums (n stretches 2 C).
    """
    first = tl.program_id(0) * each * STEP
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDE)
    pivot = tl.load(x + n * rows * C + c, mask=c < C, other=0.0).to(tl.float32)
    x += (n * rows + first) * C
    total = tl.zeros((STEP, WIDE), tl.float32)
    squares = tl.zeros((STEP, WIDE), tl.float32)
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        v = tl.where(there, tl.load(x + r * C + c, mask=there, other=0.0).to(tl.float32) - pivot, 0.0)
        total += v
        squares += v * v
    sums += (n * tl.num_programs(0) + tl.program_id(0)) * 2 * C
    tl.store(sums + c, tl.sum(total, 0), mask=c < C)
    tl.store(sums + C + c, tl.sum(squares, 0), mask=c < C)


@jit
def statistics(x, sums, bias, table, rows, stretches, eps, C, PER, WIDE: tl.constexpr, MANY: tl.constexpr):
    """One group of PER channels -> table (n 3 C): centre and scale, so that (x - centre) * scale has mean 0
    and variance 1 over its group, as x + bias would; and the sum of that over the channel's rows."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * PER + tl.arange(0, WIDE)
    ok = tl.arange(0, WIDE) < PER
    total = tl.zeros((WIDE,), tl.float32)
    squares = tl.zeros((WIDE,), tl.float32)
    for start in range(0, stretches, MANY):
        k = start + tl.arange(0, MANY)[:, None]
        at = sums + (n * stretches + k) * 2 * C + c
        total += tl.sum(tl.load(at, mask=ok & (k < stretches), other=0.0), 0)
        squares += tl.sum(tl.load(at + C, mask=ok & (k < stretches), other=0.0), 0)
    b = tl.zeros((WIDE,), tl.float32)
    if bias is not None:
        b = tl.load(bias + c, mask=ok, other=0.0).to(tl.float32)
    pivot = tl.load(x + n * rows * C + c, mask=ok, other=0.0).to(tl.float32) + b
    # The group's mean, too, is found as what lies between it and one of its values.
    base = tl.sum(tl.where(c == tl.program_id(0) * PER, pivot, 0.0))
    off = tl.where(ok, pivot - base, 0.0)
    mean = tl.sum(off + total / rows) / PER
    off = tl.where(ok, off - mean, 0.0)  # pivot - the group's mean
    variance = tl.sum(squares / rows + off * (2 * total / rows + off)) / PER
    scale = tl.rsqrt(tl.maximum(variance, 0.0) + eps) + tl.zeros((WIDE,), tl.float32)
    table += n * 3 * C + c
    tl.store(table, base + mean - b, mask=ok)
    tl.store(table + C, scale, mask=ok)
    tl.store(table + 2 * C, (total + rows * off) * scale, mask=ok)


@jit
def normalise_rows(
    x, table, gamma, beta, out, rows, each, C,
    SILU: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A stretch of rows: x normalised by its table, gamma and beta, through SiLU."""
    first = tl.program_id(0) * each * STEP
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDE)
    weight = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    offset = tl.load(beta + c, mask=c < C, other=0.0).to(tl.float32)
    centre = tl.load(table + n * 3 * C + c, mask=c < C, other=0.0)
    scale = tl.load(table + n * 3 * C + C + c, mask=c < C, other=0.0) * weight
    x += (n * rows + first) * C
    out += (n * rows + first) * C
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        v = tl.load(x + r * C + c, mask=there, other=0.0).to(tl.float32) - centre
        z = v * scale + offset
        z = z * tl.sigmoid(z) if SILU else z
        tl.store(out + r * C + c, z.to(out.dtype.element_ty), mask=there)


@jit
def before_silu(dy, x, gamma, beta, SILU: tl.constexpr):
    """The gradient dy behind silu(gamma * x + beta), taken back to before the SiLU."""
    if SILU:
        z = gamma * x + beta
        p = tl.sigmoid(z)
        dy *= p * (1 + z * (1 - p))
    return dy


@jit
def gradient_sums(
    x, dy, table, gamma, beta, sums, rows, each, C,
    SILU: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A stretch of rows -> for each channel the sums of dz and of dz * x, x normalised (n stretches 2 C)."""
    first = tl.program_id(0) * each * STEP
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDE)
    weight = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    offset = tl.load(beta + c, mask=c < C, other=0.0).to(tl.float32)
    centre = tl.load(table + n * 3 * C + c, mask=c < C, other=0.0)
    scale = tl.load(table + n * 3 * C + C + c, mask=c < C, other=0.0)
    x += (n * rows + first) * C
    dy += (n * rows + first) * C
    total = tl.zeros((STEP, WIDE), tl.float32)
    product = tl.zeros((STEP, WIDE), tl.float32)
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        v = (tl.load(x + r * C + c, mask=there, other=0.0).to(tl.float32) - centre) * scale
        dz = tl.load(dy + r * C + c, mask=there, other=0.0).to(tl.float32)  # 0 beyond the end, whatever v is
        dz = before_silu(dz, v, weight, offset, SILU)
        total += dz
        product += dz * v
    sums += (n * tl.num_programs(0) + tl.program_id(0)) * 2 * C
    tl.store(sums + c, tl.sum(total, 0), mask=c < C)
    tl.store(sums + C + c, tl.sum(product, 0), mask=c < C)


@jit
def gradient_statistics(
    sums, table, gamma, back, rows, stretches, C, PER, WIDE: tl.constexpr, MANY: tl.constexpr
):
    """One group of PER channels -> back (n 5 C): this picture's share of the gradients of gamma, beta and the
    bias; then p and q, with which dx = scale * gamma * dz + p + q * x, x normalised."""
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * PER + tl.arange(0, WIDE)
    ok = tl.arange(0, WIDE) < PER
    total = tl.zeros((WIDE,), tl.float32)
    product = tl.zeros((WIDE,), tl.float32)
    for start in range(0, stretches, MANY):
        k = start + tl.arange(0, MANY)[:, None]
        at = sums + (n * stretches + k) * 2 * C + c
        total += tl.sum(tl.load(at, mask=ok & (k < stretches), other=0.0), 0)
        product += tl.sum(tl.load(at + C, mask=ok & (k < stretches), other=0.0), 0)
    weight = tl.load(gamma + c, mask=ok, other=0.0).to(tl.float32)
    scale = tl.load(table + n * 3 * C + C + c, mask=ok, other=0.0)
    p = -scale * (tl.sum(weight * total) / PER / rows)
    q = -scale * (tl.sum(weight * product) / PER / rows)
    of_x = tl.load(table + n * 3 * C + 2 * C + c, mask=ok, other=0.0)
    back += n * 5 * C + c
    tl.store(back, product, mask=ok)
    tl.store(back + C, total, mask=ok)
    tl.store(back + 2 * C, scale * weight * total + rows * p + q * of_x, mask=ok)  # the sum of dx
    tl.store(back + 3 * C, p, mask=ok)
    tl.store(back + 4 * C, q, mask=ok)


@jit
def gradient_rows(
    x, dy, table, gamma, beta, back, dx, rows, each, C,
    SILU: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A stretch of rows: dx from x and dy."""
    first = tl.program_id(0) * each * STEP
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDE)
    weight = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    offset = tl.load(beta + c, mask=c < C, other=0.0).to(tl.float32)
    centre = tl.load(table + n * 3 * C + c, mask=c < C, other=0.0)
    scale = tl.load(table + n * 3 * C + C + c, mask=c < C, other=0.0)
    p = tl.load(back + n * 5 * C + 3 * C + c, mask=c < C, other=0.0)
    q = tl.load(back + n * 5 * C + 4 * C + c, mask=c < C, other=0.0)
    x += (n * rows + first) * C
    dy += (n * rows + first) * C
    dx += (n * rows + first) * C
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        v = (tl.load(x + r * C + c, mask=there, other=0.0).to(tl.float32) - centre) * scale
        dz = tl.load(dy + r * C + c, mask=there, other=0.0).to(tl.float32)
        dz = before_silu(dz, v, weight, offset, SILU)
        tl.store(dx + r * C + c, (scale * weight * dz + p + q * v).to(dx.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------------------------------
# Biases and residuals


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution of x (... c h w) and its bias apart, where a kernel adds it; else layer(x) and None.

    cuDNN adds no bias, and torch adds it in a pass of its own.
    """
    if getattr(layer, "bias", None) is None or not fused(x):
        return layer(x), None
    return layer._conv_forward(x, layer.weight, None), layer.bias


def add_bias(
    y: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """y + bias + shortcut + its bias, then perhaps ReLU; y, shortcut (n c h w) or (b t c h w), biases (c).

    y is a convolution's output and has no other reader: without gradients it is overwritten.
    """
    if shortcut_bias is not None:
        bias = shortcut_bias if bias is None else bias + shortcut_bias
    if fused(y) and (shortcut is None or fused(shortcut) and shortcut.dtype == y.dtype):
        if tracked(y, bias, shortcut):
            return BiasAdded.apply(y, bias, shortcut, relu)
        return bias_added(y, bias, shortcut, relu, out=y)
    y = y if bias is None else y + bias[:, None, None]
    y = y if shortcut is None else shortcut + y
    return F.relu(y) if relu else y


def bias_added(y, bias, shortcut, relu: bool, out: Tensor) -> Tensor:
    c = y.shape[-3]
    if y.numel():
        rows = y.numel() // c
        wide, step, each, stretches = share(1, rows, c)
        tile = dict(RELU=relu, WIDE=wide, STEP=step, num_warps=WARPS)
        with torch.cuda.device_of(y):
            add_rows[(stretches,)](y, bias, shortcut, out, rows, each, c, **tile)
    return out


class BiasAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, bias, shortcut, relu):
        out = bias_added(y, bias, shortcut, relu, like(y))
        ctx.save_for_backward(out if relu else None)
        ctx.bias = None if bias is None else bias.dtype
        ctx.shortcut = shortcut is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        grad = grad if out is None else torch.where(out > 0, grad, 0)
        dbias = None
        if ctx.needs_input_grad[1]:  # not in a frozen network
            rows = grad.movedim(-3, -1).flatten(0, -2)
            dbias = rows.sum(dim=0, dtype=torch.float32).to(ctx.bias)
        return grad, dbias, grad if ctx.shortcut else None, None


@jit
def add_rows(
    y, bias, shortcut, out, rows, each, C,
    RELU: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * each * STEP
    c = tl.arange(0, WIDE)
    b = tl.zeros((WIDE,), tl.float32)
    if bias is not None:
        b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    y += first * C
    out += first * C
    if shortcut is not None:
        shortcut += first * C
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        v = tl.load(y + r * C + c, mask=there, other=0.0).to(tl.float32) + b
        if shortcut is not None:
            v += tl.load(shortcut + r * C + c, mask=there, other=0.0).to(tl.float32)
        if RELU:
            v = tl.maximum(v, 0.0)
        tl.store(out + r * C + c, v.to(out.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------------------------------
# GEGLU


def geglu(x: Tensor) -> Tensor:
    """a * gelu(gate) of the two halves a and gate of x (... 2c) -> (... c)."""
    if fused(x, channels_axis=-1):
        return Geglu.apply(x) if tracked(x) else gated(x)
    a, gate = x.chunk(2, dim=-1)
    return a * F.gelu(gate)


def gated(x: Tensor) -> Tensor:
    c = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], c)
    if x.numel():
        wide, step, each, stretches = share(1, out.numel() // c, c)
        with torch.cuda.device_of(x):
            tile = dict(WIDE=wide, STEP=step, num_warps=WARPS)
            geglu_rows[(stretches,)](x, out, out.numel() // c, each, c, **tile)
    return out


class Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return gated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        c, dx, dy = x.shape[-1] // 2, torch.empty_like(x), dy.contiguous()
        if x.numel():
            wide, step, each, stretches = share(1, dy.numel() // c, c)
            with torch.cuda.device_of(x):
                tile = dict(WIDE=wide, STEP=step, num_warps=WARPS)
                geglu_gradient_rows[(stretches,)](x, dy, dx, dy.numel() // c, each, c, **tile)
        return dx


@jit
def normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)


@jit
def geglu_rows(x, out, rows, each, C, WIDE: tl.constexpr, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * each * STEP
    c = tl.arange(0, WIDE)
    x += first * 2 * C
    out += first * C
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        a = tl.load(x + r * 2 * C + c, mask=there, other=0.0).to(tl.float32)
        gate = tl.load(x + r * 2 * C + C + c, mask=there, other=0.0).to(tl.float32)
        tl.store(out + r * C + c, (a * gate * normal_cdf(gate)).to(out.dtype.element_ty), mask=there)


@jit
def geglu_gradient_rows(x, dy, dx, rows, each, C, WIDE: tl.constexpr, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * each * STEP
    c = tl.arange(0, WIDE)
    x += first * 2 * C
    dx += first * 2 * C
    dy += first * C
    for tile in range(each):
        r = (tile * STEP + tl.arange(0, STEP))[:, None]
        there = (first + r < rows) & (c < C)
        a = tl.load(x + r * 2 * C + c, mask=there, other=0.0).to(tl.float32)
        gate = tl.load(x + r * 2 * C + C + c, mask=there, other=0.0).to(tl.float32)
        d = tl.load(dy + r * C + c, mask=there, other=0.0).to(tl.float32)
        cdf = normal_cdf(gate)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
        tl.store(dx + r * 2 * C + c, (d * gate * cdf).to(dx.dtype.element_ty), mask=there)
        d *= a * (cdf + gate * density)
        tl.store(dx + r * 2 * C + C + c, d.to(dx.dtype.element_ty), mask=there)


# ------------------------------------------------------------------------------------------------------
# Convolution along time


def conv_along_time(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """x (b t n c): at each of n positions a convolution along its t frames, kernel 3 -> (b t' n c').

    As a 2D convolution over a picture of t rows and n columns: the same numbers, and no copy. On a GPU, for
    inference, as three matrix products that add up: cuDNN has no fast kernel for so wide a picture.
    """
    if not fused(x, channels_axis=-1) or x.dtype != weight.dtype or tracked(x, weight, bias):
        y = F.conv2d(channels_last(x), weight[..., None], bias, padding=(padding, 0))
        return rearrange(y, "b c t n -> b t n c")
    b, t, n, _ = x.shape
    y = x.new_empty(b, t - 2 + 2 * padding, n, len(weight))
    taps = weight.permute(2, 1, 0).contiguous()  # (3 c c')
    order = sorted(range(3), key=lambda tap: tap != padding)  # first that which reaches all frames of y
    for frames, out in zip(x, y):
        for tap in order:  # frame i + tap - padding of x adds to frame i of y
            first, last = max(0, padding - tap), min(len(out), t + padding - tap)
            part = out[first:last].flatten(0, 1)
            seen = frames[first + tap - padding : last + tap - padding].flatten(0, 1)
            torch.addmm(part, seen, taps[tap], beta=float(tap != order[0]), out=part)
    return y if bias is None else y.add_(bias)


# ------------------------------------------------------------------------------------------------------
# What the wrappers share


def share(n: int, rows: int, channels: int) -> tuple[int, int, int, int]:
    """How programs share n pictures: a tile's width and rows, tiles for each program, programs a picture."""
    wide = triton.next_power_of_2(channels)
    step = max(1, TILE // wide)
    tiles = -(-rows // step)
    each = -(-tiles * n // PROGRAMS)
    return wide, step, each, -(-tiles // each)


def tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape (... c h w), channels-last, also where an axis has size 1."""
    return x.new_empty(x.movedim(-3, -1).shape).movedim(-1, -3)


def channels_last(x: Tensor) -> Tensor:
    """Pictures (n h w c) -> (n c h w), dense in channels-last memory: a view where x is contiguous.

    From one flat axis, `view` makes every stride anew. The stride of an axis of size 1 may be anything, and
    for a batch of one it is often one with which PyTorch takes the picture for another layout and copies it.
    """
    return x.flatten().view(x.shape).permute(0, 3, 1, 2)


def dense(x: Tensor) -> Tensor:
    """x (... c h w), copied if it is not channels-last."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


# ------------------------------------------------------------------------------------------------------
# Layers made cheaper at load time


def fold_upsampling(weight: Tensor) -> Tensor:
    """Nearest x2 and then a convolution 3x3 is one transposed convolution 4x4: its weights.

    weight (c_out c_in 3 3) -> (c_in c_out 4 4), for `F.conv_transpose2d(x, ..., stride=2, padding=1)`. Each
    output pixel has 2x2 different inputs, so 4 multiplications do for 9; the weights that meet the same one
    are summed, in float32 at least.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):  # training's, which would round the parts
        return torch.einsum("ai,bj,ocij->coab", taps, taps, weight.to(dtype)).to(weight.dtype)


def stack_linears(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Linears of one input as a single one: weight (sum of c_out, c_in) and bias, or None without one."""
    biases = [f.bias for f in linears]
    return torch.cat([f.weight for f in linears]), None if None in biases else torch.cat(biases)


# ------------------------------------------------------------------------------------------------------
# Attention in windows


def window_places(h: int, w: int, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A map of h x w positions in windows of window x window, all in one call of full attention.

    Returns which position each place of each window shows (windows places), and which place of all windows in
    a row answers for each position (h w). A side no longer than a window has one window.

    Choice: windows that would reach over the frame's edge are moved inside, where they overlap others, and a
    position is answered by the window that it would be in without. So all windows are full and of one size:
    no mask, which would cost the fast kernels, and no position sees fewer others than in training.
    """
    (rows, down, row), (columns, across, column) = (
        along_axis(size, window, shift, device) for size in (h, w)
    )
    shown = rows[:, None, :, None] * w + columns[:, None, :]  # (windows down, across, places down, across)
    number, place = down[:, None] * len(columns) + across, row[:, None] * columns.shape[1] + column
    return shown.flatten(2).flatten(0, 1), (number * shown[0, 0].numel() + place).flatten()


def along_axis(size: int, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of it: each window's positions (windows places); each position's window, and place in it."""
    if size <= window:
        window, shift = size, 0
    position = torch.arange(size, device=device)
    own, windows = (position + shift) // window, (size - 1 + shift) // window + 1
    first = (torch.arange(windows, device=device) * window - shift).clamp(0, size - window)
    return first[:, None] + position[:window], own, position - first[own]
