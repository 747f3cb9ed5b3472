"""kernels.py: the same functions as torch's layers, at every width and size of the networks.

Triton's kernels run where a GPU is. Elsewhere the first test runs this file again in Triton's interpreter.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import (
    add_bias,
    conv_along_time,
    fold_upsampling,
    fused,
    geglu,
    group_norm,
    norm_silu,
    stack_linears,
    without_bias,
)
from model import PRESETS, AdcVSR, ResnetBlock, TemporalBlock, TransformerBlock, Upsample
from perceptual import DISTS

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"
rounding = pytest.mark.skipif(
    kernels.INTERPRETED, reason="Triton's interpreter cuts bfloat16 off where a GPU rounds"
)
by_kernels = pytest.mark.skipif(kernels.triton is None, reason="needs a GPU or Triton's interpreter")


def norms_of_the_networks() -> list[tuple[int, int]]:
    """(channels, groups) of every GroupNorm in the presets."""
    with torch.device("meta"):
        nets = [AdcVSR(**preset) for preset in PRESETS.values()]
    modules = (m for net in nets for m in net.modules())
    return sorted({(m.num_channels, m.num_groups) for m in modules if isinstance(m, nn.GroupNorm)})


def picture(*shape: int, dtype=torch.float32, mean=0.5, std=2.0) -> torch.Tensor:
    """Random (... c h w), dense and channels-last."""
    *rest, c, h, w = shape
    x = torch.randn(*rest, h, w, c, device=DEVICE) * std + mean
    return x.movedim(-1, -3).to(dtype)


def random_norm(channels: int, groups: int, dtype=torch.float32) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(DEVICE, dtype)


def plain_norm(x, gamma, beta, bias, groups: int, silu: bool):
    y = F.group_norm(x if bias is None else x + bias[:, None, None], groups, gamma, beta, 1e-6)
    return F.silu(y) if silu else y


def with_gradients(function, *tensors, dy: torch.Tensor) -> list[torch.Tensor]:
    """function's result and, dy being the result's, the gradients of the tensors that are not None."""
    tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = function(*tensors)
    given = [x for x in tensors if x is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the reference's root mean square, or over 1 where that is smaller."""
    reference = reference.double()
    return ((x.double() - reference).abs().max() / reference.square().mean().sqrt().clamp(min=1)).item()


def rms_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    return ((x.double() - reference).norm() / reference.norm()).item()


def norm_and_reference(x, norm, bias, silu=True) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (ours, float64's of the same numbers): result and gradients of x, gamma, beta and bias."""
    dy, tensors = torch.randn_like(x), [x, norm.weight, norm.bias, bias]
    exact = [None if t is None else t.double() for t in tensors]
    reference = with_gradients(lambda *t: plain_norm(*t, norm.num_groups, silu), *exact, dy=dy.double())
    assert fused(x)
    x, bias = (None if t is None else t.detach().requires_grad_() for t in (x, bias))
    y = norm_silu(x, norm, bias) if silu else group_norm(x, norm)
    given = [t for t in (x, norm.weight, norm.bias, bias) if t is not None]
    return list(zip([y.detach(), *torch.autograd.grad(y, given, dy)], reference))


# ------------------------------------------------------------------------------------------------------
# Where kernels run


@pytest.mark.skipif(kernels.triton is not None, reason="kernels run in this process")
@pytest.mark.skipif(not find_spec("triton"), reason="Triton comes with torch on Linux only")
def test_all_of_this_file_in_tritons_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in result.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-4000:]


@pytest.mark.skipif(kernels.triton is not None, reason="kernels run in this process")
def test_without_a_gpu_triton_is_not_even_imported():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    work = "import sys, kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", work], cwd=ROOT, env=env).returncode == 0


@by_kernels
def test_other_layouts_and_float64_take_the_plain_lines():
    norm, x = random_norm(24, 4), picture(2, 24, 3, 5)
    assert fused(x)
    for other in (x.contiguous(), x.double(), x[:, :, :, ::2], x[:, 2:]):
        assert not fused(other)
    nchw = x.contiguous()
    assert error(norm_silu(nchw, norm), norm_silu(x, norm)) < 2e-6


# ------------------------------------------------------------------------------------------------------
# Norms


@by_kernels
@pytest.mark.parametrize("channels, groups", norms_of_the_networks())
def test_norm_silu_and_its_gradients_equal_torchs_at_every_width_of_the_networks(channels, groups):
    x = picture(1, channels, 3, 5)
    bias = torch.randn(channels, device=DEVICE)
    for ours, reference in norm_and_reference(x, random_norm(channels, groups), bias):
        assert error(ours, reference) < 5e-6


@by_kernels
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 9), (3, 3, 1), (2, 5, 7)])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_silu_at_any_size_shared_among_any_number_of_programs(size, biased, monkeypatch):
    n, h, w = size
    x, norm = picture(n, 24, h, w), random_norm(24, 2)
    bias = torch.randn(24, device=DEVICE) if biased else None
    for tile, programs in (4096, 1024), (64, 5):
        monkeypatch.setattr(kernels, "TILE", tile)
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        for ours, reference in norm_and_reference(x, norm, bias):
            assert error(ours, reference) < 5e-6


@by_kernels
def test_group_norm_and_its_gradients_equal_torchs():
    for ours, reference in norm_and_reference(picture(2, 48, 5, 3), random_norm(48, 8), None, silu=False):
        assert error(ours, reference) < 5e-6


@by_kernels
@rounding
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])  # float32 weights as under autocast
def test_in_bfloat16_one_rounding_is_never_worse_than_torchs_chain(weights):
    x, bias = picture(2, 48, 9, 7, dtype=torch.bfloat16), torch.randn(48, device=DEVICE).to(weights)
    norm = random_norm(48, 8, weights)
    pairs = norm_and_reference(x, norm, bias)
    chain = plain_norm(x, *(t.to(x) for t in (norm.weight, norm.bias, bias)), norm.num_groups, True)
    assert rms_error(*pairs[0]) < 1.05 * rms_error(chain, pairs[0][1])
    assert all(rms_error(ours, reference) < 4e-3 for ours, reference in pairs)  # a rounding is 2e-3


@by_kernels
def test_under_autocast_the_result_has_the_inputs_type():
    norm, bias = random_norm(24, 4), torch.randn(24, device=DEVICE)
    x = picture(1, 24, 6, 5, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert norm_silu(x, norm, bias).dtype == torch.bfloat16
        assert add_bias(x, bias, x).dtype == geglu(x.movedim(1, -1)).dtype == torch.bfloat16


@by_kernels
@pytest.mark.parametrize("value", [0.0, -3.0, 1000.3])
def test_a_constant_picture_becomes_the_norms_bias_and_has_no_gradient(value):
    norm = random_norm(24, 4)
    x = torch.full_like(picture(2, 24, 5, 7), value).requires_grad_()
    y = norm_silu(x, norm)
    assert error(y, F.silu(norm.bias)[:, None, None].expand_as(y)) < 1e-6
    y.square().sum().backward()
    assert x.grad.isfinite().all()


@by_kernels
def test_what_is_far_from_zero_keeps_its_variance():
    x = picture(1, 24, 16, 16, mean=5000.0, std=1.0)
    exact = plain_norm(x.double(), torch.ones(24).to(x).double(), None, None, 24, False)
    layer = nn.GroupNorm(24, 24).to(DEVICE)
    assert error(group_norm(x, layer), exact) < 2e-3  # float32's steps at 5000 are 5e-4


@by_kernels
def test_no_frame_gives_no_frame_and_gradients_of_zero():
    norm, bias = random_norm(24, 4), torch.zeros(24, device=DEVICE, requires_grad=True)
    x = picture(0, 24, 4, 4).requires_grad_()
    y = norm_silu(x, norm, bias)
    assert y.shape == (0, 24, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not norm.weight.grad.any() and not norm.bias.grad.any() and not bias.grad.any()
    with torch.no_grad():
        assert add_bias(y, bias, y, relu=True).shape == y.shape
        assert geglu(torch.zeros(0, 5, 8, device=DEVICE)).shape == (0, 5, 4)


@by_kernels
def test_pictures_do_not_mix():
    x, norm = picture(3, 24, 5, 7), random_norm(24, 4)
    together = norm_silu(x, norm)
    assert all(torch.equal(norm_silu(one[None], norm)[0], y) for one, y in zip(x, together))


@by_kernels
def test_two_calls_give_the_same_bits():
    x, norm = picture(2, 48, 9, 11), random_norm(48, 2)
    dy = torch.randn_like(x)

    def once():
        return with_gradients(lambda x: norm_silu(x, norm), x, dy=dy)

    assert all(map(torch.equal, once(), once()))


@by_kernels
def test_a_convolutions_output_is_overwritten_only_without_gradients_and_never_what_has_no_bias():
    x, norm, bias = picture(1, 24, 5, 7), random_norm(24, 4), torch.randn(24, device=DEVICE)
    before = x.clone()
    expected = norm_silu(x, norm, bias)  # the norm's own weights want gradients
    assert torch.equal(x, before)
    with torch.no_grad():
        group_norm(x, norm)
        norm_silu(x, norm)
        assert torch.equal(x, before)
        y = norm_silu(x, norm, bias)
    assert y.data_ptr() == x.data_ptr() and torch.equal(y, expected)


@by_kernels
def test_results_are_channels_last_for_one_picture_with_odd_strides_too():
    odd = picture(1, 24, 5, 7)
    odd = odd.as_strided(odd.shape, (24, *odd.stride()[1:]))  # an axis of size 1 may have any stride
    norm = random_norm(24, 4)
    for y in (norm_silu(odd, norm), add_bias(odd, norm.bias)):
        assert y.stride() == (5 * 7 * 24, 1, 7 * 24, 24)


@by_kernels
def test_recomputed_activations_give_the_same_gradients():
    x, norm, dy = picture(1, 24, 3, 5), random_norm(24, 2), torch.randn(1, 24, 3, 5, device=DEVICE)
    kept = with_gradients(lambda x: norm_silu(x, norm), x, dy=dy)
    again = with_gradients(lambda x: checkpoint(norm_silu, x, norm, use_reentrant=False), x, dy=dy)
    assert all(map(torch.equal, kept, again))


# ------------------------------------------------------------------------------------------------------
# Biases, residuals, GEGLU


@by_kernels
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 3, 240, 2, 3), (2, 1, 3, 1, 9)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_add_bias_and_its_gradients_equal_the_plain_sum(shape, relu, added):
    y, bias = picture(*shape), torch.randn(shape[-3], device=DEVICE)
    tensors = [y, bias, picture(*shape) if added else None]
    dy = torch.randn_like(y)

    def plain(y, bias, shortcut):
        y = y + bias[:, None, None] + (0 if shortcut is None else shortcut)
        return F.relu(y) if relu else y

    assert fused(y)
    ours = with_gradients(lambda *t: add_bias(*t, relu=relu), *tensors, dy=dy)
    reference = with_gradients(plain, *tensors, dy=dy)
    assert all(error(a, b) < 2e-6 for a, b in zip(ours, reference))
    with torch.no_grad():
        assert torch.equal(add_bias(*tensors, relu=relu), ours[0])


@by_kernels
@rounding
def test_add_bias_rounds_once():
    y, shortcut = (picture(2, 24, 5, 7, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(24, device=DEVICE)
    expected = y.float() + bias[:, None, None] + shortcut.float()
    assert torch.equal(add_bias(y, bias, shortcut), expected.bfloat16())


@by_kernels
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 15, 96), (3, 5, 480)])
def test_geglu_and_its_gradient_equal_torchs(shape):
    torch.manual_seed(0)  # a single number near gelu's zero would be all rounding
    x = torch.randn(shape, device=DEVICE) * 2
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE)

    def plain(x):
        a, gate = x.chunk(2, dim=-1)
        return a * F.gelu(gate)

    for dtype, worst in (torch.float32, 1e-6), (torch.bfloat16, 1e-2):
        assert fused(x.to(dtype), channels_axis=-1)
        ours = with_gradients(geglu, x.to(dtype), dy=dy)
        reference = with_gradients(plain, x.to(dtype).double(), dy=dy.to(dtype).double())
        assert all(rms_error(a, b) < worst for a, b in zip(ours, reference))


def test_a_layer_without_its_bias_and_the_bias_added_are_the_layer():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, device=DEVICE).to(memory_format=torch.channels_last)
    x = picture(2, 8, 7, 9)
    y, bias = without_bias(conv, x)
    assert (bias is not None) == fused(x)
    assert error(add_bias(y, bias), conv(x)) < 2e-6
    assert without_bias(nn.Conv2d(8, 4, 1, bias=False, device=DEVICE), x)[1] is None


# ------------------------------------------------------------------------------------------------------
# Along time


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("t, padding", [(1, 1), (2, 1), (5, 1), (3, 0), (6, 0)])
def test_a_convolution_along_time_equals_conv1d_at_every_position(t, padding, bias, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    conv = nn.Conv1d(24, 16, 3, padding=padding, bias=bias).to(DEVICE).requires_grad_(False)
    x = torch.randn(2, t, 7, 24, device=DEVICE)
    expected = conv(x.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(0, (2, 7)).permute(0, 3, 1, 2)
    y = conv_along_time(x, conv.weight, conv.bias, padding)
    assert y.shape == (2, t - 2 + 2 * padding, 7, 16) and error(y, expected) < 2e-6
    tracked = conv_along_time(x, conv.weight.requires_grad_(), conv.bias, padding)
    assert tracked.requires_grad and error(tracked.detach(), expected) < 2e-6


# ------------------------------------------------------------------------------------------------------
# In the network

NORMS = {"norm_groups": 4}
BLOCKS = {
    "resnet": lambda: ResnetBlock(24, 24, NORMS),
    "resnet that widens": lambda: ResnetBlock(24, 48, NORMS),
    "transformer": lambda: TransformerBlock(24, 2, NORMS),
    "upsampling": lambda: Upsample(24),
    "temporal": lambda: TemporalBlock(24),
}


@by_kernels
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_with_kernels_and_their_gradients_equal_blocks_without(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    block = BLOCKS[name]().to(DEVICE).to(memory_format=torch.channels_last)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = picture(1, 3, 24, 6, 4) if name == "temporal" else picture(2, 24, 6, 4)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(kernels, "ENABLED", enabled)
        given = [x.detach().requires_grad_(), *block.parameters()]
        y = block(given[0])
        with torch.no_grad():  # upsampling, folded with gradients, adds up in another order
            assert error(block(x), y) < (5e-6 if name == "upsampling" else 2e-6)
        results.append([y.detach(), *torch.autograd.grad(y.square().mean(), given)])
    assert all(error(ours, reference) < 2e-5 for reference, ours in zip(*results))


@by_kernels
def test_dists_with_kernels_and_its_gradient_equal_dists_without(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    dists, (pred, gt) = DISTS.seeded((8, "M", 16)).to(DEVICE), (picture(2, 3, 12, 10) for _ in range(2))
    for layer in dists.vgg:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias)
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(kernels, "ENABLED", enabled)
        results.append(with_gradients(lambda x: dists(x, gt), pred, dy=torch.ones(2, device=DEVICE)))
    (distance, gradient), (ours, our_gradient) = results
    assert error(ours, distance) < 2e-6 and rms_error(our_gradient, gradient) < 1e-4


@by_kernels
@pytest.mark.parametrize("frozen", [False, True])
def test_only_a_bias_that_learns_costs_a_sum_over_the_whole_tensor(frozen):
    class Sums(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.sum.dim_IntList
            return function(*args, **(kwargs or {}))

    y = picture(1, 24, 5, 7).requires_grad_()
    bias = torch.randn(24, device=DEVICE, requires_grad=not frozen)
    out = add_bias(y * 1, bias, relu=True)
    with Sums() as sums:
        out.backward(torch.ones_like(out))
    assert sums.count == (not frozen)


# ------------------------------------------------------------------------------------------------------
# Layers made cheaper


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 4)])
def test_folded_upsampling_is_nearest_x2_and_the_convolution(size):
    conv = nn.Conv2d(6, 10, 3, padding=1).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    slow = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    folded = fold_upsampling(conv.weight)
    assert error(F.conv_transpose2d(x, folded, conv.bias, stride=2, padding=1), slow) < 1e-13
    assert error(fold_upsampling(conv.weight.float()), folded) < 1e-6
    assert fold_upsampling(conv.weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_linears_are_the_linears_side_by_side(bias):
    linears = [nn.Linear(12, 8, bias=bias) for _ in range(3)]
    x = torch.randn(2, 5, 12)
    apart = torch.cat([f(x) for f in linears], dim=-1)
    assert error(F.linear(x, *stack_linears(*linears)), apart) < 1e-6
