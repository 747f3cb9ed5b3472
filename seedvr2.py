"""SeedVR2 (arXiv 2506.05301), a second teacher: one step of a diffusion transformer on a video VAE's latents.

A clip of 4k+1 frames, already enlarged bicubically, on its way through (`latents` n = 16):

    x (b 4k+1 3 8h 8w) --VideoVAE.encode--> blur (b k+1 n h w)
    [noise, blur, 1] (b t h w 2n+1), text (m c), step 1000 --NaDiT--> v (b t h w n)
    z0 = noise - v --VideoVAE.decode--> (b 4k+1 3 8h 8w)

Two networks differ in more than their size: the 7B (version 1) and the 3B distilled from it (version 2).
Layers, names and numbers are those of the official code, ByteDance-Seed/SeedVR at 673b563, whose weights load
as they are; where it departs from the paper, this file follows the code, since the weights do.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from safetensors.torch import load_file
from torch import Tensor, nn

from model import maybe_checkpoint
from runtime import WeightsError, explained

WINDOWS = (4, 3, 3)  # windows in a clip of the training's size, along t, h, w              Sec. 3.2
LONGEST = 30  # longer clips, in latent frames, have more windows, not longer ones         Eq. 1
PATCH = 2  # latent pixels along each side of a token
LAST_STEP = 1000.0  # where the path from data (0) to noise ends, and where the one step starts
EPS = 1e-5  # of the transformer's norms
LATENT_SCALE = 0.9152  # of the VAE's latents

PRESETS = {
    # area: tokens of a frame in training, 720 x 1280 pixels; separate: layers whose text has its own weights.
    "3b": dict(
        width=2560, heads=20, layers=32, separate=10, text=5120, latents=16, area=45 * 80, version=2,
    ),
    "7b": dict(
        width=3072, heads=24, layers=36, separate=36, text=5120, latents=16, area=45 * 80, version=1,
    ),
    # For two CPU cores, on residual pixels in place of latents: 3 colours of 4 x 4 pixels.
    "tiny": dict(
        width=96, heads=3, layers=4, separate=1, text=32, latents=48, area=144, version=2,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------
# Windows and places


def window_size(grid: tuple[int, int, int], area: int) -> tuple[int, int, int]:
    """Tokens (t h w) of a window in a clip of grid (t h w) tokens.

    A frame of the same shape and the training's `area` would have 3 x 3 of them, so a window keeps its size
    and a larger picture has more. Paper: Sec. 3.2.
    """
    t, h, w = grid
    scale = math.sqrt(area / (h * w))
    proxy = min(t, LONGEST), round(h * scale), round(w * scale)  # Paper: Eq. 2; the code rounds
    return tuple(max(1, math.ceil(side / n)) for side, n in zip(proxy, WINDOWS))  # Paper: Eq. 1


def windows(grid: tuple[int, int, int], area: int, shifted: bool) -> list[tuple[slice, ...]]:
    """The windows that a clip of grid (t h w) tokens is cut into: each token is in exactly one.

    shifted: by half a window along each axis that has more than one; what sticks out at the borders is cut
    off, not rolled around. The slices are those of t, h and w; t runs fastest.
    """

    def cut(extent: int, size: int) -> list[slice]:
        first = -size / 2 if shifted and size < extent else 0
        edges = (int(first + i * size) for i in range(math.ceil((extent - first) / size) + 1))  # towards 0
        edges = [min(edge, extent) if edge > 0 else 0 for edge in edges]
        return [slice(a, b) for a, b in zip(edges, edges[1:]) if a < b]

    t, h, w = (cut(extent, size) for extent, size in zip(grid, window_size(grid, area)))
    return [(i, j, k) for k in w for j in h for i in t]


class Partition(NamedTuple):
    """A clip's tokens (l) window by window, windows of one size side by side, so that they share a call."""

    order: Tensor  # (l), where each token stands in the clip
    back: Tensor  # (l), the inverse
    places: Tensor  # (l 3), of each token in its window, along t, h, w
    groups: list[tuple[int, int]]  # of windows of one size: how many, tokens in each


def partition(grid, area: int, shifted: bool, text: int, version: int, device: torch.device) -> Partition:
    """Of `windows`. Places run from -1 to 1 in version 1; in version 2 they are whole numbers from 0, in time
    from the length of the text."""

    def size(window: tuple[slice, ...]) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in window)

    def axis(start: int, n: int) -> Tensor:
        place = torch.arange(start, start + n) if version == 2 else torch.linspace(-1, 1, n)
        return place.float().to(device)

    tokens = torch.arange(math.prod(grid), device=device).view(grid)
    cuts = sorted(windows(grid, area, shifted), key=size)
    order = torch.cat([tokens[window].flatten() for window in cuts])
    places = torch.cat([torch.cartesian_prod(*map(axis, (text, 0, 0), size(window))) for window in cuts])
    groups = [(len(list(same)), math.prod(sides)) for sides, same in groupby(cuts, key=size)]
    return Partition(order, order.argsort(), places, groups)


# ------------------------------------------------------------------------------------------------------
# Files

COMPLETE = "Is this the official file, and the download complete?"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A flat pickle of tensors, left on the disk until they are used, or safetensors."""
    path = Path(path)
    with explained(f"{path}: cannot be read", COMPLETE, WeightsError):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not a dictionary of weights. {COMPLETE}")
    return state


# ------------------------------------------------------------------------------------------------------
# The transformer


class Frequencies(nn.Module):
    """Radians a place, a third of them for each axis. Computed, never loaded: a float16 file's are off."""

    def __init__(self, head: int, version: int):
        super().__init__()
        self.head, self.version = head, version

    def forward(self, device: torch.device | None = None) -> Tensor:
        """(f) in float32."""
        if self.version == 2:  # as in language models
            per_axis = self.head // 3
            exponents = torch.arange(0, per_axis, 2, device=device)[: per_axis // 2].float() / per_axis
            return 1.0 / 10000**exponents
        return torch.linspace(1, 128, self.head // 12, device=device) * math.pi

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "freqs"] = self()

    def _load_from_state_dict(self, *args):
        pass


class Rotary(nn.Module):
    """Turns pairs of channels by angles that grow with a token's place; what the axes leave over stays."""

    def __init__(self, head: int, version: int):
        super().__init__()
        self.rope = Frequencies(head, version)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (b l m d), places (l 3): first the channels turned by time, then those by height and width."""
        angles = rearrange(places[..., None] * self.rope(x.device), "l three f -> l 1 (three f)")
        n = 2 * angles.shape[-1]
        even, odd = rearrange(x[..., :n].float(), "b l m (f two) -> two b l m f", two=2)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., n:]], dim=-1)


class Pair(nn.Module):
    """One layer for the clip's tokens and one for the text's, or the same for both (`all`)."""

    def __init__(self, make: Callable[[], nn.Module], separate: bool, text: bool = True):
        """text: False where nothing is done to the text, and it passes."""
        super().__init__()
        self.names, self.text = ("vid", "txt") if separate else ("all", "all"), text
        for name in dict.fromkeys(self.names[: 1 + text]):
            self.add_module(name, make())

    def forward(self, vid: Tensor, txt: Tensor, *args) -> tuple[Tensor, Tensor]:
        for_vid, for_txt = self.names
        vid = self.get_submodule(for_vid)(vid, *args)
        return vid, self.get_submodule(for_txt)(txt, *args) if self.text else txt


class Modulation(nn.Module):
    """Shift, scale and gate of a sublayer: what the time embedding says, plus a learned vector each."""

    def __init__(self, width: int, names: Sequence[str]):
        super().__init__()
        for name in names:
            start = torch.randn(width) / width**0.5 + name.endswith("scale")
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, x: Tensor, emb: Tensor, name: str, after: bool = False) -> Tensor:
        """x (b l c), emb (b 1 c 3) -> x scaled and shifted before the sublayer `name`, gated after it."""
        shift, scale, gate = emb.unbind(-1)
        if after:
            return x * (gate + getattr(self, f"{name}_gate"))
        return x * (scale + getattr(self, f"{name}_scale")) + (shift + getattr(self, f"{name}_shift"))


class WindowAttention(nn.Module):
    """Attention of each window to itself and to the whole text. The text attends in every window; its
    answers are averaged."""

    def __init__(self, width: int, heads: int, separate: bool, version: int):
        super().__init__()
        head, self.heads, self.version = width // heads, heads, version
        self.proj_qkv = Pair(lambda: nn.Linear(width, 3 * width, bias=False), separate)
        self.proj_out = Pair(lambda: nn.Linear(width, width), separate)
        self.norm_q = Pair(lambda: nn.RMSNorm(head, EPS), separate)
        self.norm_k = Pair(lambda: nn.RMSNorm(head, EPS), separate)
        self.rope = Rotary(head, version)

    # fmt: off
    def forward(self, vid: Tensor, txt: Tensor, cut: Partition) -> tuple[Tensor, Tensor]:
        """vid (b l c), txt (b m c)."""
        both = self.proj_qkv(vid[:, cut.order], txt)
        (q, k, v), text = (
            rearrange(x, "b l (three m d) -> three b l m d", three=3, m=self.heads) for x in both
        )
        q, text_q = self.norm_q(q, text[0])
        k, text_k = self.norm_k(k, text[1])
        q, k = self.rope(q, cut.places), self.rope(k, cut.places)
        if self.version == 2:  # the text's token n lies at (n, n, n)
            diagonal = repeat(torch.arange(txt.shape[1], device=txt.device), "m -> m three", three=3)
            text_q, text_k = self.rope(text_q, diagonal), self.rope(text_k, diagonal)

        answers, text_answers = [], 0
        lengths = [n * length for n, length in cut.groups]
        for (n, length), *parts in zip(cut.groups, *(x.split(lengths, dim=1) for x in (q, k, v))):
            parts = [rearrange(x, "b (n l) m d -> (b n) m l d", n=n) for x in parts]
            texts = [repeat(x, "b l m d -> (b n) m l d", n=n) for x in (text_q, text_k, text[2])]
            y = F.scaled_dot_product_attention(*(torch.cat(x, dim=2) for x in zip(parts, texts)))
            y, text_y = y.split([length, txt.shape[1]], dim=2)
            answers.append(rearrange(y, "(b n) m l d -> b (n l) (m d)", n=n))
            text_answers = text_answers + reduce(text_y.float(), "(b n) m l d -> b l (m d)", "sum", n=n)
        mean = text_answers / sum(n for n, _ in cut.groups)
        return self.proj_out(torch.cat(answers, dim=1)[:, cut.back], mean.to(vid.dtype))
    # fmt: on


class MLP(nn.Module):
    """Two layers with a GELU (version 1), or SwiGLU, without biases (version 2)."""

    def __init__(self, width: int, version: int):
        super().__init__()
        gated = version == 2
        hidden = 256 * math.ceil(8 * width // 3 / 256) if gated else 4 * width
        self.proj_in = nn.Linear(width, hidden, bias=not gated)
        self.proj_in_gate = nn.Linear(width, hidden, bias=False) if gated else None
        self.proj_out = nn.Linear(hidden, width, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.proj_in_gate is None:
            return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))
        return self.proj_out(F.silu(self.proj_in_gate(x)) * self.proj_in(x))


def norm(x: Tensor) -> Tensor:
    """RMS norm without weights, before each modulation."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class Block(nn.Module):
    """Attention, then MLP, on clip and text, each between its two modulations; vid (b l c), txt (b m c)."""

    VECTORS = [f"{layer}_{kind}" for layer in ("attn", "mlp") for kind in ("shift", "scale", "gate")]

    def __init__(self, width: int, heads: int, separate: bool, version: int, last: bool):
        super().__init__()
        text = not last or version == 1  # nobody reads the text after the last layer
        self.attn = WindowAttention(width, heads, separate, version)
        self.mlp = Pair(lambda: MLP(width, version), separate, text)
        self.ada = Pair(lambda: Modulation(width, self.VECTORS), separate, text)

    def forward(self, vid: Tensor, txt: Tensor, emb: Tensor, cut: Partition) -> tuple[Tensor, Tensor]:
        """emb (2 b 1 c 3): for attention and MLP, three numbers a channel."""
        y = self.ada(norm(vid), norm(txt), emb[0], "attn")
        y = self.ada(*self.attn(*y, cut), emb[0], "attn", True)
        vid, txt = vid + y[0], txt + y[1]
        y = self.ada(norm(vid), norm(txt), emb[1], "mlp")
        y = self.ada(*self.mlp(*y), emb[1], "mlp", True)
        return vid + y[0], txt + y[1]


class TimeEmbedding(nn.Module):
    """step (b) -> (b 6c): sines and cosines of the step at 128 frequencies each, three layers."""

    SINUSOIDS = 256

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(self.SINUSOIDS, width)
        self.proj_hid = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, 6 * width)

    def forward(self, step: Tensor) -> Tensor:
        half = self.SINUSOIDS // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=step.device) / half)
        angles = step.float()[:, None] * frequencies
        x = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.proj_in.weight.dtype)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(x)))))


class NaDiT(nn.Module):
    """The transformer: noisy latents, the LR clip's, text -> velocity. Arguments: the keys of `PRESETS`."""

    def __init__(
        self, width: int, heads: int, layers: int, separate: int, text: int, latents: int, area: int,
        version: int,
    ):  # fmt: skip
        super().__init__()
        self.area, self.version, self.checkpointing = area, version, False
        token = PATCH**2
        self.vid_in = nn.ModuleDict({"proj": nn.Linear(token * (2 * latents + 1), width)})
        self.txt_in = nn.Linear(text, width)
        self.emb_in = TimeEmbedding(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, i < separate, version, last=i == layers - 1) for i in range(layers)
        )
        if version == 2:
            self.vid_out_norm = nn.RMSNorm(width, EPS)
            self.vid_out_ada = Modulation(width, ["out_shift", "out_scale"])
        self.vid_out = nn.ModuleDict({"proj": nn.Linear(width, token * latents)})

    # fmt: off
    def forward(self, x: Tensor, txt: Tensor, step: Tensor, taps: Sequence[int] = ()):
        """x (b t h w 2n+1): noisy latents, the LR clip's latents, ones; h, w even. -> velocity v (b t h w n).

        txt (m c): the text, the same for all clips. step (b) in [0, 1000]. With taps also a list of the
        clip's tokens (b t h/2 w/2 c) after so many blocks, as (16, 26, 36).
        """
        x, txt = x.to(self.txt_in.weight.dtype), txt.to(self.txt_in.weight.dtype)
        x = rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=PATCH, q=PATCH)
        t, h, w = x.shape[1:4]
        cuts = [
            partition((t, h, w), self.area, shifted, len(txt), self.version, x.device)
            for shifted in (False, True)
        ]
        vid = self.vid_in["proj"](rearrange(x, "b t h w c -> b (t h w) c"))
        txt = repeat(self.txt_in(txt), "m c -> b m c", b=len(x))
        emb = rearrange(self.emb_in(step), "b (c two three) -> two b 1 c three", two=2, three=3)
        tapped = []
        for i, block in enumerate(self.blocks):
            args = vid, txt, emb, cuts[i % 2]                                 # every second layer is shifted
            vid, txt = maybe_checkpoint(self.checkpointing, block, *args)
            if i + 1 in taps:
                tapped.append(rearrange(vid, "b (t h w) c -> b t h w c", h=h, w=w))
        if self.version == 2:
            # The attention's part of the time embedding: not as meant, but so were the weights trained.
            vid = self.vid_out_ada(self.vid_out_norm(vid), emb[0], "out")
        v = self.vid_out["proj"](vid)
        v = rearrange(v, "b (t h w) (p q c) -> b t (h p) (w q) c", h=h, w=w, p=PATCH, q=PATCH)
        return (v, tapped) if taps else v
    # fmt: on

    @classmethod
    def from_file(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "NaDiT":
        """An official checkpoint or a conversion with its keys; its sizes are those of the tensors.

        Raises `WeightsError`.
        """
        state = read_weights(path)
        with explained(f"{path}: not a transformer of SeedVR2", COMPLETE, WeightsError):
            width, token = state["vid_out.proj.weight"].T.shape
            blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
            separate = sum(f"blocks.{i}.attn.proj_qkv.txt.weight" in state for i in blocks)
            head = state["blocks.0.attn.norm_q." + ("vid" if separate else "all") + ".weight"]
            sizes = dict(
                width=width, heads=width // len(head), layers=len(blocks), separate=separate,
                text=state["txt_in.weight"].shape[1], latents=token // PATCH**2,
            )  # fmt: skip
            preset = PRESETS["3b" if "vid_out_norm.weight" in state else "7b"]
            with torch.device("meta"):
                net = cls(**preset | sizes)
            net.load_state_dict(state, assign=True)
        return net.to(dtype)


def restore(net: NaDiT, blur: Tensor, noise: Tensor, txt: Tensor) -> Tensor:
    """The one step: blur, noise (b t h w n), txt (m c) -> z0 (b t h w n), all latents scaled.

    z_t = (1 - t/T) z0 + (t/T) noise and v = noise - z0, so that z0 = z_T - v at t = T.
    """
    x = torch.cat([noise, blur, torch.ones_like(blur[..., :1])], dim=-1)
    step = torch.full((len(x),), LAST_STEP, device=x.device)
    return noise - net(x, txt, step)


# ------------------------------------------------------------------------------------------------------
# The video VAE: SD3's image VAE, its convolutions inflated to look at the two frames before

Past = dict[nn.Module, Tensor]  # what each convolution saw last; empty where the clip begins


class CausalConv(nn.Conv3d):
    """x (b c t h w): a frame sees itself and those before it; before the clip stand copies of its first."""

    def __init__(self, c_in: int, c_out: int, kernel=3, stride=1, padding=(0, 1, 1)):
        super().__init__(c_in, c_out, kernel, stride, padding)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            before = past[self] if self in past else repeat(x[:, :, 0], "b c h w -> b c n h w", n=kernel - 1)
            x = torch.cat([before, x], dim=2)
            past[self] = x[:, :, stride - kernel :].clone()
        return super().forward(x)


class FrameNorm(nn.GroupNorm):
    """Group norm of each frame alone; x (b c t h w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class Resnet(nn.Module):
    """(Norm, SiLU, convolution) twice, plus the input."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c_in, groups), CausalConv(c_in, c_out)
        self.norm2, self.conv2 = FrameNorm(c_out, groups), CausalConv(c_out, c_out)
        self.conv_shortcut = CausalConv(c_in, c_out, kernel=1, padding=0) if c_in != c_out else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), past)
        y = self.conv2(F.silu(self.norm2(y)), past)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, past))


class FrameAttention(nn.Module):
    """Every position of a frame attends to all of that frame, with one head; plus the input."""

    OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers'

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = FrameNorm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(self.group_norm(x), "b c t h w -> (b t) 1 (h w) c")
        y = F.scaled_dot_product_attention(self.to_q(frames), self.to_k(frames), self.to_v(frames))
        return x + rearrange(self.to_out(y), "(b t) 1 (h w) c -> b c t h w", b=len(x), h=x.shape[3])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for old, new in self.OLD_NAMES.items():
            for kind in ("weight", "bias"):
                if (key := f"{prefix}{old}.{kind}") in state_dict:
                    state_dict[f"{prefix}{new}.{kind}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Downsample(nn.Module):
    """Half the sides and, with `time`, half the frames: 1 + 2k become 1 + k."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        kernel, stride = (3 if time else 1, 3, 3), (2 if time else 1, 2, 2)
        self.conv = CausalConv(channels, channels, kernel, stride, padding=0)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), past)


class Upsample(nn.Module):
    """Twice the sides and, with `time`, the frames: 1 + k become 1 + 2k, as the first stands for one."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = 2 if time else 1
        self.upscale_conv = nn.Conv3d(channels, 4 * self.time * channels, 1)
        self.conv = CausalConv(channels, channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        pattern = "b (x y z c) t h w -> b c (t z) (h x) (w y)"
        x = rearrange(self.upscale_conv(x), pattern, x=2, y=2, z=self.time)
        if self.time == 2 and self.conv not in past:
            x = torch.cat([x[:, :, :1], x[:, :, 2:]], dim=2)
        return self.conv(x, past)


class Level(nn.Module):
    """Resnets of one width, then half or twice the sides."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down=(), up=()):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(c_out if i else c_in, c_out, groups) for i in range(layers))
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x, past)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, past)), past)


class Encoder(nn.Module):
    """x (b 3 t h w) -> mean and log variance of the latents (b 2n t/4 h/8 w/8)."""

    def __init__(self, widths: Sequence[int], groups: int):
        super().__init__()
        self.conv_in = CausalConv(3, widths[0])
        self.down_blocks = nn.ModuleList(
            Level(a, b, 2, groups, down=[Downsample(b, time=i > 0)] if i < len(widths) - 1 else [])
            for i, (a, b) in enumerate(zip([widths[0], *widths], widths))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = FrameNorm(widths[-1], groups)
        self.conv_out = CausalConv(widths[-1], 2 * VideoVAE.LATENTS)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for level in self.down_blocks:
            x = level(x, past)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x, past))), past)


class Decoder(nn.Module):
    """Latents (b n t h w) -> x (b 3 4t 8h 8w), from a clip's start on 4t - 3 frames."""

    def __init__(self, widths: Sequence[int], groups: int):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = CausalConv(VideoVAE.LATENTS, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(a, b, 3, groups, up=[Upsample(b, time=i < 2)] if i < len(widths) - 1 else [])
            for i, (a, b) in enumerate(zip([widths[0], *widths], widths))
        )
        self.conv_norm_out = FrameNorm(widths[-1], groups)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.conv_in(z, past), past)
        for level in self.up_blocks:
            x = level(x, past)
        return self.conv_out(F.silu(self.conv_norm_out(x)), past)


class VideoVAE(nn.Module):
    """Clips of 4k + 1 frames to k + 1 latents and back, a slice of time after the other.

    Slices give what the whole clip would give, since only convolutions look along time and each keeps the
    frames that the next slice needs; memory does not grow with the clip.
    """

    LATENTS = 16  # channels
    SLICE = 4  # frames encoded together, after the first; decoded together are those of one latent

    def __init__(self, widths: Sequence[int] = (128, 256, 512, 512), groups: int = 32):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, groups), Decoder(widths, groups)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (b 4k+1 3 h w) in [-1, 1] -> scaled latents (b k+1 16 h/8 w/8): the posterior's mean, or with a
        generator a sample of it; one on the CPU gives the same noise on every device."""
        if x.shape[1] % 4 != 1:
            raise ValueError(f"{x.shape[1]} frames; the VAE takes 4k + 1")
        x = rearrange(x.to(self.encoder.conv_in.weight.dtype), "b t c h w -> b c t h w")
        z, log_variance = self.sliced(self.encoder, x, self.SLICE).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
            z = z + torch.exp(log_variance.clamp(-30, 20) / 2) * noise
        return rearrange(z * LATENT_SCALE, "b c t h w -> b t c h w")

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (b k+1 16 h w) -> x (b 4k+1 3 8h 8w), about [-1, 1]."""
        z = rearrange(z.to(self.decoder.conv_in.weight.dtype), "b t c h w -> b c t h w") / LATENT_SCALE
        return rearrange(self.sliced(self.decoder, z, self.SLICE // 4), "b c t h w -> b t c h w")

    @staticmethod
    def sliced(part: nn.Module, x: Tensor, length: int) -> Tensor:
        """part(x) for x (b c t h w): the first 1 + length frames, then `length` at a time."""
        past, t = {}, x.shape[2]
        cuts = [0, *range(1 + length, t, length), t]
        return torch.cat([part(x[:, :, a:b], past) for a, b in zip(cuts, cuts[1:])], dim=2)

    @classmethod
    def from_file(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> "VideoVAE":
        """The official `ema_vae.pth` or a conversion with its keys. Raises `WeightsError`."""
        state = read_weights(path)
        with explained(f"{path}: not the video VAE of SeedVR2", COMPLETE, WeightsError):
            widths = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.bias"].numel() for i in range(4)]
            with torch.device("meta"):
                vae = cls(widths, groups=min(32, widths[0] // 2))  # no tensor tells; the official has 32
            vae.load_state_dict(state, assign=True)
        return vae.to(dtype)
