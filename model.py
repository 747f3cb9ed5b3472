"""The student: a pruned 2D diffusion backbone with 1D temporal convolutions (paper Sec. 3.2, Fig. 2; AdcSR).

One frame of 128x128 on its way through the full-size network (c x h x w), time only where marked:

    lr 3x128x128 -> unshuffle 12x64x64 -> UNet, with temporal blocks -> 256x64x64      pruned SD2.1 UNet
                 -> decoder mid block -> features f_S 256x64x64                         half VAE decoder
                 -> decoder tail (up blocks) -> sr 3x512x512

There is no noise, no time step, no text and no cross-attention: one pass, the output is the picture.
A clip stays (b t c h w) from end to end. Spatial layers see its frames one by one (`per_frame`); only
`TemporalConv` looks at neighbours in time. `stream.py` takes clips of any length through it, in chunks.
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    add_bias,
    channels_last,
    conv_along_time,
    fold_upsampling,
    fused,
    geglu,
    group_norm,
    norm_silu,
    stack_linears,
    window_places,
    without_bias,
)
from runtime import UserError, WeightsError, explained

SCALE = 4  # output size over input size
WINDOW = 64  # positions a side of a window of attention, as many as the frames of training have
UNSHUFFLE = 2  # pixel-unshuffle factor: the UNet works at half the LR size          AdcSR Sec. 3.2
LATENTS = 4  # channels of SD2.1's latents
KEEP = 0.75  # share of SD2.1's UNet channels that is kept                          AdcSR Sec. 3.2
GROUPS = (32, 24, 16, 12, 8, 6, 4, 2, 1)  # GroupNorm: the first that divides the kept channels    AdcSR

PRESETS = {
    # SD2.1's own widths; the network keeps 75 % of them.
    "full": dict(
        unet_channels=[320, 640, 1280, 1280],
        heads=[5, 10, 20, 20],  # never pruned, so a head is 48 wide where SD2.1's is 64
        attention=[True, True, True, False],
        decoder_channels=[64, 128, 256, 256],
        decoder_attention=True,
        norm_groups=32,
        temporal="layer",
        temporal_kind="conv",
        pixel_skip=False,
    ),
    # The same topology for two CPU cores. No attention on fine grids: it grows with the square of the frame.
    "tiny": dict(
        unet_channels=[64, 128, 128, 128],
        heads=[1, 2, 2, 2],
        attention=[False, False, True, False],
        decoder_channels=[8, 16, 48, 96],
        decoder_attention=False,
        norm_groups=8,
        temporal="layer",
        temporal_kind="conv",
        pixel_skip=True,  # Choice: tiny starts from nothing, and without the skip stays far below bicubic.
    ),
}


def kept(channels: int) -> int:
    """Channels left of `channels` after pruning: the first 75 %, whatever their values (AdcSR's rule)."""
    return int(KEEP * channels)


# ------------------------------------------------------------------------------------------------------
# Clips and their frames: in memory always "b t h w c", so that a view is all that lies between the two


def frames(clip: Tensor) -> Tensor:
    """(b t c h w) -> (b*t c h w), channels-last."""
    return channels_last(rearrange(clip, "b t c h w -> (b t) h w c"))


def per_frame(layer, *clips: Tensor) -> Tensor:
    """A layer of pictures on every frame of a clip (or of several): (b t c h w) -> (b t c' h' w')."""
    return layer(*map(frames, clips)).unflatten(0, clips[0].shape[:2])


def concatenate(*pictures: Tensor) -> Tensor:
    return torch.cat(pictures, dim=1)


# ------------------------------------------------------------------------------------------------------
# Time: the temporal convolution, the temporal residual block


class TemporalConv(nn.Conv1d):
    """1D convolution along time, kernel 3, at every pixel: x (b t c h w) -> the same shape. Paper: Sec. 3.2.

    Choice: zeros stand beyond the clip's two ends. While a chunk of a stream is inside, what comes out lags
    by one frame: see `stream.py`.
    """

    stream = None

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        h, w = x.shape[-2:]
        x, padding = rearrange(x, "b t c h w -> b t (h w) c"), 1
        if self.stream:
            x, padding = self.stream.with_neighbours(self, x), 0
        # At a stream's start nothing comes out: no frame there has both neighbours yet.
        y = x[:, :0] if x.shape[1] + 2 * padding < 3 else conv_along_time(x, weight, bias, padding)
        return rearrange(y, "b t (h w) c -> b t c h w", h=h, w=w)


class Delay(nn.Module):
    """Where a branch that ran ahead meets one that looked along time and has t frames.

    A whole clip passes. In a stream the branch waits for the later one: see `stream.py`.
    """

    stream = None

    def forward(self, early: Tensor, t: int) -> Tensor:
        return self.stream.wait(self, early, t) if self.stream else early


class TemporalBlock(nn.Module):
    """Temporal residual block: x + conv(ReLU(conv(x))) along time; x (b t c h w). Paper: Sec. 3.2.

    Starts as the identity, so that the augmented network starts as the 2D one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2, self.delay = TemporalConv(channels), TemporalConv(channels), Delay()
        # Choice: only the last convolution starts at zero. Zeroing both kills every gradient but its bias's.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y, bias = without_bias(self.conv1, x)
        y, bias = without_bias(self.conv2, add_bias(y, bias, relu=True))
        return add_bias(y, bias, self.delay(x, y.shape[1]))


class TemporalAttention(nn.Module):
    """Self-attention over the frames at every pixel, plus the input. Paper: Table 5, "Temporal Attention".

    Every frame looks at every other, so it needs the whole clip: it cannot stream.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        # Choice: eight heads, as in video UNets, or as many as leave each an even width, for `rotary`.
        self.heads = next(n for n in (8, 4, 2, 1) if channels % (2 * n) == 0)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.qkv(self.norm(rearrange(x, "b t c h w -> (b h w) t c")))
        q, k, v = rearrange(y, "n t (three m d) -> three n m t d", three=3, m=self.heads)
        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v)
        y = self.out(rearrange(y, "n m t d -> n t (m d)"))
        return x + rearrange(y, "(b h w) t c -> b t c h w", h=h, w=w)


def rotary(x: Tensor) -> Tensor:
    """x (... t d), each pair of its features turned by an angle that grows with the frame's index.

    Then products of queries and keys know how many frames lie between the two, whatever the clip's length.
    Choice: the paper says nothing about positions; these are RoFormer's, with its base of 10,000.
    """
    (t, d), dtype = x.shape[-2:], torch.promote_types(x.dtype, torch.float32)
    index, pair = (torch.arange(n, device=x.device, dtype=dtype) for n in (t, d // 2))
    angle = index[:, None] * 10_000 ** (-2 * pair / d)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


TEMPORAL_KINDS = {
    "conv": TemporalBlock,
    "double": lambda channels: nn.Sequential(TemporalBlock(channels), TemporalBlock(channels)),  # Table 5
    "attention": TemporalAttention,
}


# ------------------------------------------------------------------------------------------------------
# Space: the layers of SD2.1, frame by frame, under diffusers' parameter names. Where kernels.py has a faster
# way, a convolution's bias waits for what comes next: the norm, or the sum.


class GroupNorm(nn.GroupNorm):
    """x (n c h w). Its groups follow from the width: 24 for 240 and 720 channels, 32 for 480, 960, ..."""

    def __init__(self, channels: int, config: dict, eps: float):
        groups = next(g for g in GROUPS if g <= config["norm_groups"] and channels % g == 0)
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self)


class ResnetBlock(nn.Module):
    """(GroupNorm, SiLU, conv 3x3) twice, plus the input; x (n c h w)."""

    def __init__(self, c_in: int, c_out: int, config: dict, eps: float = 1e-5):
        super().__init__()
        self.norm1 = GroupNorm(c_in, config, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(c_out, config, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, bias = without_bias(self.conv1, norm_silu(x, self.norm1))
        y, bias = without_bias(self.conv2, norm_silu(y, self.norm2, bias))
        return add_bias(y, bias, *without_bias(self.conv_shortcut, x))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of one frame, or of windows of it; x (n h w c)."""

    window, shift = None, 0  # None: every position sees the whole frame. See `Student.set_attention`

    def __init__(self, channels: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        for name in ("weight_qkv", "bias_qkv"):
            self.register_buffer(name, None, persistent=False)  # a checkpoint never has it

    @torch.no_grad()
    def fold(self) -> None:
        """q, k and v become one linear, for inference."""
        self.weight_qkv, self.bias_qkv = stack_linears(self.to_q, self.to_k, self.to_v)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):  # at a stream's start no frame has come this deep, and CUDA's kernels refuse none
            return x
        n, h, w, _ = x.shape
        in_windows = self.window and max(h, w) > self.window
        folded = None if self.weight_qkv is None else (self.weight_qkv, self.bias_qkv)
        y = F.linear(x, *folded or stack_linears(self.to_q, self.to_k, self.to_v)).flatten(1, 2)
        if in_windows:
            shown, answer = window_places(h, w, self.window, self.shift, x.device)
            y = rearrange(y[:, shown], "n windows l c -> (n windows) l c")
        q, k, v = rearrange(y, "n l (three m d) -> three n m l d", three=3, m=self.heads)
        # Softmax scale d^-0.5 of the pruned head (d = 48 at full size), as AdcSR's weights were trained with.
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "n m l d -> n l (m d)")
        if in_windows:
            y = rearrange(y, "(n windows) l c -> n (windows l) c", n=n)[:, answer]
        return self.to_out(y).view(x.shape)


class LayerNorm(nn.LayerNorm):
    """x (... c), computed in float32 and rounded once to x's dtype, where autocast would return float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class GEGLU(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward; SD2.1's cross-attention (attn2, norm2) is removed. x (n h w c)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads, qkv_bias=False)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class TransformerBlock(nn.Module):
    """GroupNorm, linear in, one transformer layer, linear out, plus the input; x (n c h w)."""

    def __init__(self, channels: int, heads: int, config: dict):
        super().__init__()
        self.norm = GroupNorm(channels, config, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerLayer(channels, heads)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_in(rearrange(self.norm(x), "n c h w -> n h w c"))
        y = self.proj_out(self.transformer_blocks[0](y))
        return x + rearrange(y, "n h w c -> n c h w")


class DecoderAttention(SelfAttention):
    """The VAE decoder's one-head attention with its own norm, plus the input; x (n c h w)."""

    def __init__(self, channels: int, config: dict):
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = GroupNorm(channels, config, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(self.group_norm(x), "n c h w -> n h w c"))
        return x + rearrange(y, "n h w c -> n c h w")


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest x2, conv 3x3; x (n c h w). On a GPU one transposed convolution of both: `fold`, once, is for
    inference; in training, where weights change, they are folded at each call."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)  # a checkpoint never has it

    def fold(self) -> None:
        self.folded = fold_upsampling(self.conv.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        folded = self.folded
        if folded is None and torch.is_grad_enabled() and fused(x):
            folded = fold_upsampling(self.conv.weight)
        if folded is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return add_bias(F.conv_transpose2d(x, folded, stride=2, padding=1), self.conv.bias)


# ------------------------------------------------------------------------------------------------------
# The pruned UNet: four down blocks, a mid block, four up blocks, temporal blocks in between


class UNetBlock(nn.Module):
    """What down, mid and up blocks share: resnets, transformers after them, and a temporal block after each.

    `temporal`: "layer" after every resnet and every transformer block, "block" once at the end, "none".
    """

    def __init__(self, widths: list[tuple[int, int]], attentions: int, heads: int, config: dict):
        super().__init__()
        c_out, temporal = widths[-1][1], config["temporal"]

        def temporal_block(placement: str) -> nn.Module:
            return TEMPORAL_KINDS[config["temporal_kind"]](c_out) if temporal == placement else nn.Identity()

        self.resnets = nn.ModuleList(ResnetBlock(a, b, config) for a, b in widths)
        self.attentions = nn.ModuleList(TransformerBlock(c_out, heads, config) for _ in range(attentions))
        self.temporal_resnets = nn.ModuleList(temporal_block("layer") for _ in self.resnets)
        self.temporal_attentions = nn.ModuleList(temporal_block("layer") for _ in self.attentions)
        self.temporal_end = temporal_block("block")

    def layer(self, i: int, x: Tensor) -> Tensor:
        """Resnet i and, where there is one, transformer i, each followed by its temporal block."""
        x = self.temporal_resnets[i](per_frame(self.resnets[i], x))
        if i < len(self.attentions):
            x = self.temporal_attentions[i](per_frame(self.attentions[i], x))
        return x


class DownBlock(UNetBlock):
    def __init__(self, c_in, c_out, layers, attention, heads, downsample, config):
        super().__init__([(c_in, c_out)] + [(c_out, c_out)] * (layers - 1), layers * attention, heads, config)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x)
            skips.append(x)
        for down in self.downsamplers:
            x = per_frame(down, x)
            skips.append(x)
        return self.temporal_end(x), skips  # "block": the skips bypass the temporal block


class MidBlock(UNetBlock):
    def __init__(self, channels, heads, config):
        super().__init__([(channels, channels)] * 2, 1, heads, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_end(self.layer(1, self.layer(0, x)))


class UpBlock(UNetBlock):
    def __init__(self, c_in, c_skips, c_out, attention, heads, upsample, config):
        widths = [(a + skip, c_out) for a, skip in zip([c_in] + [c_out] * (len(c_skips) - 1), c_skips)]
        super().__init__(widths, len(widths) * attention, heads, config)
        self.delays = nn.ModuleList(Delay() for _ in widths)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """skips: one for each resnet, in the order in which the down path made them; the last goes first."""
        for i, skip in enumerate(reversed(skips)):
            x = per_frame(concatenate, x, self.delays[i](skip, x.shape[1]))
            x = self.layer(i, x)
        for up in self.upsamplers:
            x = per_frame(up, x)
        return self.temporal_end(x)


class UNet(nn.Module):
    """SD2.1's UNet without 25 % of its channels, time embedding and cross-attention, plus temporal blocks.

    forward: x (b t 12 h/2 w/2) -> (b t c h/2 w/2), c = the decoder's inner width.
    The UNet's end takes the place of the decoder's first convolution, so no 4-channel latent stands between.
    """

    LAYERS = 2  # resnets in a down block; an up block has one more   SD2.1

    def __init__(self, config: dict):
        super().__init__()
        self.checkpointing = False
        widths = [kept(c) for c in config["unet_channels"]]
        levels = list(zip(widths, config["attention"], config["heads"]))
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(3 * UNSHUFFLE**2, widths[0], 3, padding=1)
        self.down_blocks, c, c_skips = nn.ModuleList(), widths[0], [widths[0]]
        for i, (width, attention, heads) in enumerate(levels):
            self.down_blocks.append(DownBlock(c, width, self.LAYERS, attention, heads, i < last, config))
            c_skips += [width] * (self.LAYERS + (i < last))
            c = width
        self.mid_block = MidBlock(c, config["heads"][-1], config)
        self.up_blocks = nn.ModuleList()
        for i, (width, attention, heads) in enumerate(reversed(levels)):
            skips = [c_skips.pop() for _ in range(self.LAYERS + 1)]
            self.up_blocks.append(UpBlock(c, skips, width, attention, heads, i < last, config))
            c = width
        self.conv_norm_out = GroupNorm(c, config, eps=1e-5)
        self.conv_out = nn.Conv2d(c, config["decoder_channels"][-1], 3, padding=1)

    def forward(self, x: Tensor, conv_in: nn.Module | None = None) -> Tensor:
        """conv_in: another first layer for another kind of input (the feature discriminator has its own)."""
        x = per_frame(conv_in or self.conv_in, x)
        skips = [x]
        for block in self.down_blocks:
            x, new_skips = maybe_checkpoint(self.checkpointing, block, x)
            skips += new_skips
        x = maybe_checkpoint(self.checkpointing, self.mid_block, x)
        for block in self.up_blocks:
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            x = maybe_checkpoint(self.checkpointing, block, x, own)
        return per_frame(self.out, x)

    def out(self, x: Tensor) -> Tensor:
        """x (n c h/2 w/2) of SD's first width -> of the decoder's."""
        return self.conv_out(norm_silu(x, self.conv_norm_out))


# ------------------------------------------------------------------------------------------------------
# The half VAE decoder: mid block (its output is the feature f_S) and tail, strictly frame by frame


class DecoderMidBlock(nn.Module):
    """x (n c h/2 w/2) -> features of the same shape."""

    def __init__(self, channels: int, config: dict):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config, eps=1e-6) for _ in range(2))
        attention = DecoderAttention(channels, config) if config["decoder_attention"] else nn.Identity()
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DecoderUpBlock(nn.Module):
    LAYERS = 3  # SD2.1

    def __init__(self, c_in: int, c_out: int, upsample: bool, config: dict):
        super().__init__()
        widths = [c_in] + [c_out] * self.LAYERS
        self.resnets = nn.ModuleList(ResnetBlock(a, b, config, eps=1e-6) for a, b in zip(widths, widths[1:]))
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class HalfDecoder(nn.Module):
    """SD2.1's VAE decoder at half width, from its mid block on (conv_in is what the UNet's end replaces)."""

    def __init__(self, config: dict):
        super().__init__()
        widths = config["decoder_channels"][::-1]
        self.checkpointing = False
        self.mid_block = DecoderMidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            DecoderUpBlock(c_in, c_out, i < len(widths) - 1, config)
            for i, (c_in, c_out) in enumerate(zip([widths[0]] + widths, widths))
        )
        self.conv_norm_out = GroupNorm(widths[-1], config, eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def tail(self, features: Tensor) -> Tensor:
        """features (n c h/2 w/2) -> (n 3 4h 4w)."""
        # In the layout of its own weights: on a CPU, training wants another than channels-last here, in which
        # PyTorch's gradient of the normalisation of wide frames with few channels is ten times slower.
        if self.conv_out.weight.is_contiguous():
            features = features.contiguous()
        for block in self.up_blocks:
            features = block(features)
        return self.conv_out(norm_silu(features, self.conv_norm_out))


# ------------------------------------------------------------------------------------------------------
# The whole student


class Student(nn.Module, PyTorchModelHubMixin):
    """What all students have: a folder with `config.json` (plain values, and the class) and weights, or a hub
    id, to and from; and `lag`. They are called alike, and `stream.py` takes each of them."""

    TAIL_FRAMES = 4  # frames that are decoded together in a stream: the 4x frames never pile up
    attention = "full"  # see `set_attention`

    @property
    def lag(self) -> int:
        """Frames that a stream holds back: one for each temporal convolution, all on one path."""
        return sum(isinstance(m, TemporalConv) for m in self.modules())

    def for_inference(self, dtype: torch.dtype, attention: str = "full") -> "Student":
        """In place, where it is: frozen, in this dtype and in the layout in which its layers are fast.

        attention: see `set_attention`.
        """
        self.set_attention(attention)
        for part in self.modules():
            # Not on a CPU, whose transposed convolutions are slow.
            upsampling = isinstance(part, Upsample) and part.conv.weight.is_cuda
            if upsampling or isinstance(part, SelfAttention):
                part.fold()  # before rounding
        return self.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def set_attention(self, attention: str, window: int = WINDOW) -> None:
        """What each position of a frame sees: "full", as in training, all others; in "windows" of so many
        positions a side those around it, another result, and less work where a frame has more positions than
        those of training. `UserError` where there is no spatial attention.
        """
        attentions = [part for part in self.modules() if isinstance(part, SelfAttention)]
        if attention == "windows" and not attentions:
            raise UserError(f"--attention windows: {type(self).__name__} has no attention over a frame")
        # Choice: in all of them, which changes little but the finest grid, where the work is: on a coarser
        # one a window reaches two or four times as far, or is the frame. Every second attention has its
        # windows shifted by half of one, so that no border stays one.
        for i, part in enumerate(attentions):
            part.window = window if attention == "windows" else None
            part.shift = i % 2 * (window // 2)
        self.attention = attention

    def save_pretrained(self, folder: str | Path, **options):
        """Writes the folder that `from_pretrained` reads."""
        config = {"network": type(self).__name__} | self.config
        return super().save_pretrained(folder, config=config, **options)

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, **options):
        """The Hub mixin's loader, strict, with every failure in one line (`WeightsError`)."""
        way_out = "Give a folder with config.json and model.safetensors, or a hub id."
        with explained(f"{folder_or_id}: cannot load {cls.__name__} weights", way_out, WeightsError):
            with redirect_stdout(StringIO()):  # the mixin prints where it reads from
                return super().from_pretrained(folder_or_id, **{**options, "strict": True})


class AdcVSR(Student):
    """The AdcVSR student: lr (b t 3 h w) in [-1, 1] -> sr (b t 3 4h 4w) in about [-1, 1]. Paper: Sec. 3.2.

    Any h, w, t >= 1. Frames are padded inside to a multiple of 16 and the result is cropped to exactly 4x.
    Arguments are plain JSON values (`PRESETS`).

    unet_channels, heads, attention: for each level, SD2.1's widths before pruning; decoder_channels: the half
    decoder's, fine to coarse; temporal: "layer" (38 temporal blocks, the 0.57 B of the paper's Table 1),
    "block" (9), "none" (AdcSR); temporal_kind: "conv", or Table 5's "double" and "attention";
    pixel_skip: add the bicubic x4 of the input to the output.
    """

    MULTIPLE = 16  # 2 from the unshuffle, 8 from three downsamplings

    def __init__(
        self,
        unet_channels: list[int],
        heads: list[int],
        attention: list[bool],
        decoder_channels: list[int],
        decoder_attention: bool = True,
        norm_groups: int = 32,
        temporal: str = "layer",
        temporal_kind: str = "conv",
        pixel_skip: bool = False,
    ):
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        # Choice: "after each UNet block" reads both ways; "layer" is what gives the paper's 0.57 B.
        if temporal not in ("layer", "block", "none"):
            raise ValueError(f"temporal {temporal}: give layer, block or none")
        if temporal_kind not in TEMPORAL_KINDS:
            raise ValueError(f"temporal_kind {temporal_kind}: give {', '.join(TEMPORAL_KINDS)}")
        self.pixel_skip = pixel_skip
        self.unet = UNet(self.config)
        self.decoder = HalfDecoder(self.config)
        self.delay = Delay()  # of the input, which the result is added to
        if pixel_skip:  # Choice: the untrained network is the bicubic x4.
            nn.init.zeros_(self.decoder.conv_out.weight)
            nn.init.zeros_(self.decoder.conv_out.bias)

    def forward(self, lr: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """A whole clip: lr (b t 3 h w) in [-1, 1] -> sr (b t 3 4h 4w).

        With return_features also f_S (b t c h/2 w/2), the decoder mid block's output, at the padded size.
        """
        h, w = lr.shape[-2:]
        features, padded = self.encode(lr)
        sr = self.decode(features, padded)[..., : SCALE * h, : SCALE * w]
        return (sr, features) if return_features else sr

    def encode(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """lr (b t 3 h w) -> f_S (b t c h/2 w/2) and the frames (b t 3 h w) it belongs to, both padded."""
        x = pad_to_multiple(lr.flatten(0, 1), self.MULTIPLE).unflatten(0, lr.shape[:2])
        y = rearrange(x, "b t c (h p) (w q) -> b t h w (c p q)", p=UNSHUFFLE, q=UNSHUFFLE)
        y = rearrange(y, "b t h w c -> b t c h w").to(self.unet.conv_in.weight.dtype)
        y = self.unet(y)
        features = maybe_checkpoint(self.unet.checkpointing, per_frame, self.decoder.mid_block, y)
        return features, self.delay(x, y.shape[1])

    def decode(self, features: Tensor, lr: Tensor) -> Tensor:
        """f_S (b t c h/2 w/2) and its frames (b t 3 h w) -> sr (b t 3 4h 4w), `TAIL_FRAMES` at a time."""
        parts = zip(frames(features).split(self.TAIL_FRAMES), lr.flatten(0, 1).split(self.TAIL_FRAMES))
        sr = [maybe_checkpoint(self.decoder.checkpointing, self.tail, *part) for part in parts]
        return torch.cat(sr).unflatten(0, lr.shape[:2])

    def tail(self, features: Tensor, lr: Tensor) -> Tensor:
        """f_S (n c h/2 w/2), lr (n 3 h w) -> sr (n 3 4h 4w)."""
        sr = self.decoder.tail(features).to(lr.dtype)
        return sr + bicubic(lr) if self.pixel_skip else sr

    def for_training(self, checkpointing: str, device: torch.device) -> None:
        """In place: what the backward pass recomputes, "all", the "tail" alone or "none"; and the layout."""
        self.unet.checkpointing, self.decoder.checkpointing = checkpointing == "all", checkpointing != "none"
        # On a CPU, normalising wide frames with few channels is ten times slower in channels-last.
        (self if device.type == "cuda" else self.unet).to(memory_format=torch.channels_last)


def maybe_checkpoint(on: bool, function, *args):
    """function(*args); with `on`, the backward pass recomputes its activations instead of keeping them."""
    if on and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def bicubic(x: Tensor) -> Tensor:
    """Frames (n 3 h w) -> (n 3 4h 4w)."""
    return F.interpolate(x, scale_factor=float(SCALE), mode="bicubic")


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x (n c h w) padded right and below by reflection, by replication where x is too small for that."""
    h, w = x.shape[-2:]
    right, below = -w % multiple, -h % multiple
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < w else "replicate")
    return F.pad(x, (0, 0, 0, below), mode="reflect" if below < h else "replicate")
