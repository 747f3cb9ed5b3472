"""The paper's nine metrics and a picture of time (Sec. 4.1, Tab. 1).

prediction, ground truth --video.py--> frames in step --> PSNR, SSIM, LPIPS, DISTS    against the ground truth
                                                      --> MANIQA, CLIPIQA, MUSIQ      each frame alone
                                                      --> E*_warp: flow, mask, warp   neighbouring frames
                                                      --> DOVER                       the whole clip
Averaged over the frames of a clip, then over clips, unweighted. PSNR, SSIM, DISTS (also a loss, Eq. 2) and
E*_warp are written out here; the others belong to their packages, imported when asked for, never required.
"""

import argparse
import csv
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from torch import Tensor, nn

from video import VideoReader

METRICS = {  # Paper: Tab. 1, its columns: (needs a ground truth, decimals)
    "psnr": (True, 2), "ssim": (True, 4), "lpips": (True, 4), "dists": (True, 4),
    "maniqa": (False, 4), "clipiqa": (False, 4), "musiq": (False, 2),
    "ewarp": (False, 2), "dover": (False, 4),
}  # fmt: skip


# ---- PSNR and SSIM ---------------------------------------------------------------------------------------

LUMA = {  # weights of R, G, B and the offset, for values in [0, 1]
    "yiq": ((0.299, 0.587, 0.114), 0.0),
    "ycbcr": ((65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255),  # BT.601, studio range
}
PYIQA_EPS = 1e-8  # added to the mean squared error by pyiqa's PSNR, whose scale therefore ends at 80 dB


def to_unit(frames: Tensor) -> Tensor:
    """Frames of any shape, uint8 or float in [0, 1], as float in [0, 1]; ValueError for any other range."""
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    low, high = frames.min().item(), frames.max().item()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(f"frames have values from {low:.3g} to {high:.3g}; give uint8, or float in [0, 1]")
    return frames


def comparable(pred: Tensor, gt: Tensor, color: str, crop: int) -> Tensor:
    """Both (... 3 h w) as one float tensor in [0, 1] in the asked colour, (2 ... c h w), borders cropped."""
    if pred.shape != gt.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and ground truth {tuple(gt.shape)} differ in shape")
    h, w = pred.shape[-2:]
    if not 0 <= 2 * crop < min(h, w):
        raise ValueError(f"--crop {crop} does not fit frames of {w}x{h}")
    pair = torch.stack([to_unit(pred), to_unit(gt)])[..., crop : h - crop, crop : w - crop]
    if color == "rgb":
        return pair
    weights, offset = LUMA[color]
    return torch.einsum("... c h w, c -> ... h w", pair, pair.new_tensor(weights)).unsqueeze(-3) + offset


def psnr(pred: Tensor, gt: Tensor, color: str = "rgb", crop: int = 0, eps: float = 0.0) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, infinite for equal frames (80 with PYIQA_EPS).

    pred, gt (... 3 h w), uint8 or float in [0, 1]. Returns (...). `color` rgb, or the luma yiq or ycbcr.
    """
    pred, gt = comparable(pred, gt, color, crop)
    return -10 * torch.log10((pred - gt).square().mean((-3, -2, -1)) + eps)


def ssim(pred: Tensor, gt: Tensor, color: str = "yiq", crop: int = 0) -> Tensor:
    """Structural similarity of each frame (Wang et al., 2004), in every detail pyiqa's default.

    pred, gt (... 3 h w), uint8 or float in [0, 1], at least 11x11. Returns (...) float64, at most 1. `color`
    rgb (mean over channels), yiq or ycbcr. Gaussian window 11x11 of sigma 1.5, valid region, values rounded
    to 0..255, contrast term not below 0, no downsampling.
    """
    pair = (255 * comparable(pred, gt, color, crop).double()).round()
    h, w = pair.shape[-2:]
    if min(h, w) < 11:
        raise ValueError(f"SSIM needs frames of at least 11x11 pixels, these have {w}x{h}")
    x, y = pair
    gauss = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]

    def blur(v: Tensor) -> Tensor:  # shifted sums: several times faster than conv2d, which is slow in float64
        for dim in (-2, -1):
            size = v.shape[dim] - 10
            total = torch.zeros_like(v.narrow(dim, 0, size))
            for i, weight in enumerate(gauss):
                total.add_(v.narrow(dim, i, size), alpha=weight / sum(gauss))
            v = total
        return v

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * contrast.clamp(min=0)).mean((-3, -2, -1))


# ---- what may not be here --------------------------------------------------------------------------------


class Unavailable(ValueError):
    """A metric whose package or weights are not here; the message is the one line the user sees."""


@contextmanager
def needs(metric: str, packages: str, weights: Path, instead: str = ""):
    """Whatever a missing package or a failed download raises, in one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (packages raise what they like)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        way_out = f"needs pip install {packages}, and {weights}, downloaded at first use{instead}"
        raise Unavailable(f"{metric} not computed: {reason}; {way_out}") from None


def hub_file(name: str, folder: str = "checkpoints") -> Path:
    return Path(torch.hub.get_dir()) / folder / name


# ---- DISTS: metric and loss ------------------------------------------------------------------------------

VGG16 = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions and channels of each stage


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al., 2020): frozen, differentiable in its images.

    Compares means (texture) and covariances (structure) of whole feature maps with learned weights alpha and
    beta per channel. The maps are the image itself and the stages of a VGG, pooled by an L2 norm under a Hann
    window. As built, the VGG is seeded noise and all weights are equal: no judge of quality, but a loss that
    needs no download.
    """

    def __init__(self, stages: tuple[tuple[int, int], ...] = VGG16, seed: int = 0):
        super().__init__()
        rng, c = torch.Generator().manual_seed(seed), 3
        self.stages = nn.ModuleList()
        for depth, width in stages:
            widths = [c] + [width] * depth
            self.stages.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))
            c = width
        for conv in chain(*self.stages):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=rng)
            nn.init.zeros_(conv.bias)
        self.widths = [3] + [width for _, width in stages]
        hann = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("hann", torch.outer(hann, hann) / hann.sum() ** 2)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.register_buffer("alpha", torch.ones(sum(self.widths)))
        self.register_buffer("beta", torch.ones(sum(self.widths)))
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls) -> "DISTS":
        """torchvision's ImageNet VGG16, and the published alpha and beta, which torchmetrics ships."""
        dists = cls()
        with needs("DISTS", "torchmetrics torchvision", hub_file("vgg16-397923af.pth")):
            package = Path(import_module("torchmetrics").__file__).parent / "functional/image/dists_models"
            learned = torch.load(package / "weights.pt", weights_only=True)
            weights = import_module("torchvision.models").VGG16_Weights.IMAGENET1K_V1
            vgg = weights.get_state_dict(progress=False)
        dists.load_vgg(vgg, learned["alpha"], learned["beta"])
        return dists

    def load_vgg(self, vgg: dict[str, Tensor], alpha: Tensor, beta: Tensor) -> None:
        """torchvision's VGG state dict, whose convolutions stand in order, and the learned weights."""
        tensors = iter([tensor for name, tensor in vgg.items() if name.startswith("features.")])
        for conv in chain(*self.stages):
            conv.weight.copy_(next(tensors))
            conv.bias.copy_(next(tensors))
        self.alpha.copy_(alpha.flatten())
        self.beta.copy_(beta.flatten())

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (n 3 h w) in [0, 1] -> the images and a map (n c h/2^k w/2^k) of each stage k."""
        maps, h = [x], (x - self.mean) / self.std
        for k, stage in enumerate(self.stages):
            if k > 0:
                hann = self.hann.expand(h.shape[1], 1, 3, 3)
                h = (F.conv2d(h.square(), hann, stride=2, padding=1, groups=len(hann)) + 1e-12).sqrt()
            for conv in stage:
                h = F.relu(conv(h))
            maps.append(h)
        return maps

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Distance of each frame: pred, gt (... 3 h w) in [0, 1] -> (...), 0 for equal frames."""
        (pred, lead), (gt, _) = (pack([frames], "* c h w") for frames in (pred, gt))
        weights = torch.stack([self.alpha, self.beta]) / (self.alpha + self.beta).sum()
        similarity = 0.0
        maps = zip(self.features(pred), self.features(gt), weights.split(self.widths, dim=1))
        for x, y, (alpha, beta) in maps:
            x, y = x.float(), y.float()  # statistics of whole maps: too fine for half precision
            mean_x, mean_y = x.mean((-2, -1)), y.mean((-2, -1))
            var_x, var_y = x.var((-2, -1), correction=0), y.var((-2, -1), correction=0)
            covariance = (x * y).mean((-2, -1)) - mean_x * mean_y
            texture = (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)
            structure = (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)
            similarity = similarity + (alpha * texture + beta * structure).sum(1)
        return unpack(1 - similarity, lead, "*")[0]


# ---- E*_warp: flow, mask, warping error ------------------------------------------------------------------

# first, second (n 3 h w) in [0, 1] -> (n 2 h w): the (dx, dy), in pixels, by which the first frame moves
Flow = Callable[[Tensor, Tensor], Tensor]
RAFT, DIS = "torchvision raft_large C_T_V1, 20 updates", "OpenCV DIS, medium"


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Dense inverse search, which needs no download. Shapes as `Flow`."""
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rgb = (255 * torch.stack([first, second])).round().byte().cpu()
    rgb = rearrange(rgb, "pair n c h w -> n pair h w c").numpy()
    gray = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair] for pair in rgb]
    flow = torch.from_numpy(np.stack([dis.calc(a, b, None) for a, b in gray]))
    return rearrange(flow, "n h w c -> n c h w").to(first)


class RaftFlow:
    """RAFT-large, 20 updates, frames of any size. Shapes as `Flow`.

    `literal` repeats EvalCrafter's slip: its RAFT divides frames that already lie in [0, 1] by 255 again.
    """

    def __init__(self, network: nn.Module, literal: bool = False):
        self.network, self.white = network.eval(), 255 if literal else 1

    @classmethod
    def from_pretrained(cls, device: str, literal: bool = False) -> "RaftFlow":
        with needs("E*_warp", "torchvision", hub_file("raft_large_C_T_V1-22a6c225.pth"), "; or --flow dis"):
            flows = import_module("torchvision.models.optical_flow")
            weights = flows.Raft_Large_Weights.C_T_V1  # the port of raft-things; the default is another model
            return cls(flows.raft_large(weights=weights, progress=False).to(device), literal)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        h, w = first.shape[-2:]
        below, right = (max(128, math.ceil(size / 8) * 8) - size for size in (h, w))  # RAFT: 8k, at least 128
        pair = (2 * v.float() / self.white - 1 for v in (first, second))
        pair = [F.pad(v, (0, right, 0, below), "replicate") for v in pair]
        return self.network(*pair, num_flow_updates=20)[-1][..., :h, :w].to(first)


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


def unoccluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Pixels of the first frame that the second still shows, (n 1 h w) bool (Lai et al., 2018).

    Hidden: where the way forth and back ends elsewhere than it began, and where the flow has an edge.
    """

    def squared(v: Tensor) -> Tensor:
        return v.square().sum(1, keepdim=True)

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
    clip: Tensor,
    flow: Flow | tuple[Tensor, Tensor],
    convention: str = "corrected",
    half: bool = True,
    visible: Tensor | None = None,
) -> Tensor:
    """E*_warp of each pair of neighbouring frames: 1000 x squared RGB distance to the successor warped back.

    clip (t 3 h w), t >= 2, uint8 or float in [0, 1]. `flow`: a provider, or the exact flows forward and
    backward, each (t-1 2 h w) in pixels of the clip. `visible` (t-1 1 h w) bool replaces the occlusion test
    where it is known. Returns (t-1,) float64, summed over RGB, averaged over the mask, 0 where that is empty;
    the clip's E*_warp is the mean. A blurred clip scores better: never read this number alone.

    `convention`: "corrected" leaves out pixels that land outside the frame. "evalcrafter" is the code behind
    the published numbers (EvalCrafter, as in DOVE) to the letter: these pixels count against the repeated
    border, and frames are padded to 8k first. (Its second division by 255 is `RaftFlow(literal=True)`.)
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
    distance = (warp(second, forward) - first).square().sum(1, keepdim=True)
    return 1000 * (distance * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)


# ---- the packages' metrics -------------------------------------------------------------------------------

PYIQA = {  # pyiqa's name of the metric, and the weights file it looks for
    "maniqa": ("maniqa-pipal", "pyiqa/MANIQA_PIPAL-ae6d356b.pth"),  # Choice: AdcSR's; the paper is silent
    "clipiqa": ("clipiqa", "clip/RN50.pt"),
    "musiq": ("musiq", "pyiqa/musiq_koniq_ckpt-e95806b9.pth"),
}


def load_lpips(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS v0.1 on AlexNet, the definition pyiqa takes by default, from torchmetrics (Apache-2.0)."""
    with needs("LPIPS", "torchmetrics torchvision", hub_file("alexnet-owt-7be5be79.pth")):
        package = import_module("torchmetrics.image.lpip")
        net = package.LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
    return lambda pred, gt: net(pred, gt, normalize=True).flatten()  # normalize: input in [0, 1]


def load_pyiqa(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A no-reference metric of pyiqa on frames (n 3 h w) in [0, 1] -> (n,)."""
    key, weights = PYIQA[name]
    packages = "pyiqa (its licence is for non-commercial use only)"
    with needs(name.upper(), packages, hub_file(weights, folder="")):
        metric = import_module("pyiqa").create_metric(key, device=torch.device(device))
    return lambda pred, gt: metric(pred).flatten()


SEEDED = (  # DOVER draws its fragments and start frames at random
    "import random, runpy, numpy, torch; random.seed(0); numpy.random.seed(0); torch.manual_seed(0); "
    "runpy.run_path('evaluate_one_video.py', run_name='__main__')"
)


class Dover:
    """DOVER's fused score in (0, 1), by the script of a checkout of github.com/VQAssessment/DOVER."""

    def __init__(self, checkout: Path, device: str):
        for file in (checkout / "evaluate_one_video.py", checkout / "pretrained_weights/DOVER.pth"):
            if not file.is_file():
                way_out = "--dover PATH, a checkout of github.com/VQAssessment/DOVER with its weights"
                raise Unavailable(f"DOVER not computed: no {file}; try {way_out}")
        self.checkout, self.device = checkout, device

    def __call__(self, frames: Iterable[np.ndarray]) -> float:
        """Score of the frames (h w 3) uint8, which reach the script as lossless H.264; nan where it fails."""
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
            command = [sys.executable, "-c", SEEDED, "-v", str(clip), "-f", "-d", self.device]
            done = subprocess.run(command, cwd=self.checkout, capture_output=True, text=True, check=False)
        scores = [line.split()[-1] for line in done.stdout.splitlines() if "fused overall score" in line]
        if scores and not done.returncode:
            return float(scores[-1])
        reason = (done.stderr.strip().splitlines() or ["it printed no fused overall score"])[-1]
        print(f"DOVER not computed: {self.checkout / 'evaluate_one_video.py'}: {reason}", file=sys.stderr)
        return math.nan


# ---- the picture of time ---------------------------------------------------------------------------------

PROFILE_FRAMES = 500  # of a longer clip, about the first so many are drawn


def row_over_time(clip: Tensor, row: int | None = None) -> Tensor:
    """The temporal profile: one row of pixels (default the middle one) of every frame, time downwards.

    clip (t 3 h w), any range. Returns (3 t w): steady detail draws straight streaks, flicker ragged ones.
    """
    row = clip.shape[-2] // 2 if row is None else row
    return rearrange(clip[..., row, :], "t c w -> c t w")


def write_profile(profiles: dict[str, Tensor], path: Path) -> None:
    """A PNG of profiles (3 t w) uint8, one above the other at one width, each under its name."""
    import cv2

    width, panels = max(profile.shape[-1] for profile in profiles.values()), []
    for side in sorted(profiles, key=("input", "prediction", "ground truth").index):
        label = np.full((18, width, 3), 255, np.uint8)
        cv2.putText(label, side, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        rows = rearrange(profiles[side].cpu().numpy(), "c t w -> t w c")
        height = len(rows) * max(1, 120 // len(rows))  # 25 rows alone are too thin a strip to see
        panels += [label, cv2.resize(rows, (width, height), interpolation=cv2.INTER_NEAREST)]
    picture = cv2.cvtColor(np.concatenate(panels), cv2.COLOR_RGB2BGR)
    write_whole(path, cv2.imencode(".png", picture)[1].tobytes())


def write_whole(path: Path, content: bytes) -> None:
    """A file under its final name is complete: written beside, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


# ---- clips in pairs, frames in step ----------------------------------------------------------------------

PROTOCOL_FRAMES, PROTOCOL_SIZE = 25, "512x512"  # Paper: Sec. 4.1
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
Sides = dict[str, Path]  # "prediction" and, where given, "ground truth" and "input"
Window = tuple[slice, slice]  # rows, columns


def stem(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def find_clips(path: Path, layout: tuple[str, ...] = ()) -> dict[str, Path]:
    """Clips by name: one video, image or folder of frames, or a folder of those. `layout`: DOVE's folders."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    path = next((path / folder for folder in layout if (path / folder).is_dir()), path)
    inside = [p for p in sorted(path.iterdir()) if p.name[0] != "."] if path.is_dir() else []
    clips: dict[str, Path] = {}
    for clip in [p for p in inside if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES] or [path]:
        name = stem(clip).removesuffix("_x4")  # infer.py's own suffix
        if name in clips:
            raise ValueError(f"{clips[name]} and {clip} are both clip {name!r}; keep one of them")
        clips[name] = clip
    return clips


def pair_clips(pred: Path, gt: Path | None = None, lr: Path | None = None) -> dict[str, Sides]:
    """Clips by name, each with its sides; ValueError where a prediction has no partner of its name.

    A single prediction and a single partner, both named by the user, pair whatever their names.
    """
    predictions = find_clips(pred)
    pairs: dict[str, Sides] = {name: {"prediction": path} for name, path in predictions.items()}
    for side, path, layout in (("ground truth", gt, ("GT", "GT-Video")), ("input", lr, ("LQ", "LQ-Video"))):
        if path is None:
            continue
        found = find_clips(path, layout)
        if list(found.values()) == [path] and list(predictions.values()) == [pred]:
            found = dict.fromkeys(pairs, path)
        if missing := ", ".join(name for name in pairs if name not in found):
            raise ValueError(f"predictions without {side} in {path}: {missing}")
        if idle := ", ".join(name for name in found if name not in pairs):
            print(f"note: {path} has clips without prediction: {idle}")
        for name, sides in pairs.items():
            sides[side] = found[name]
    return pairs


def windows(sizes: dict[str, tuple[int, int]], protocol: bool, allow_mismatch: bool) -> dict[str, Window]:
    """The part of each side, of sizes (h, w), that shows the same scene; ValueError where there is none.

    By the paper's protocol the input was cropped before inference, so the ground truth is cropped here, at
    4 x the input's offsets.
    """
    out, gt, lr = (sizes.get(side) for side in ("prediction", "ground truth", "input"))
    cut = {side: (slice(0, h), slice(0, w)) for side, (h, w) in sizes.items()}

    def centre(size: tuple[int, int], part: tuple[int, int], unit: int) -> Window:
        start = [max(0, a // unit - b // unit) // 2 * unit for a, b in zip(size, part)]
        return slice(start[0], start[0] + part[0]), slice(start[1], start[1] + part[1])

    if protocol and lr:  # stored at HR size in RealVSR and MVSR4x: infer.py --downscale 4
        cut["input"] = centre(lr, out, 4) if lr == gt else centre(lr, (out[0] // 4, out[1] // 4), 1)
    if gt and gt != out:
        h, w = min(gt[0], out[0]), min(gt[1], out[1])
        if protocol and (h, w) == out:
            cut["ground truth"] = centre(gt, out, 4)
        elif allow_mismatch:
            cut["prediction"] = cut["ground truth"] = (slice(0, h), slice(0, w))
        else:
            found = f"prediction {out[1]}x{out[0]}, ground truth {gt[1]}x{gt[0]}"
            way_out = "fix the output or pass --allow-mismatch (crops both at the top left)"
            raise ValueError(f"{found}: sizes differ; {way_out}")
    return cut


def in_step(sides: Sides, protocol: bool, allow_mismatch: bool) -> Iterator[dict[str, np.ndarray]]:
    """Frames (h w 3) uint8 of all sides at one time, as a stream; ValueError where one side ends early."""
    limit = PROTOCOL_FRAMES if protocol else None
    with ExitStack() as stack:
        readers = {side: stack.enter_context(VideoReader(path)) for side, path in sides.items()}
        window = windows({side: (r.height, r.width) for side, r in readers.items()}, protocol, allow_mismatch)
        streams = {side: islice(reader, limit) for side, reader in readers.items()}
        for n in count():
            frames = {side: next(stream, None) for side, stream in streams.items()}
            ended = [side for side, frame in frames.items() if frame is None]
            if len(ended) == len(frames) or (ended and allow_mismatch):
                break
            if ended:
                lengths = {s: n + (s not in ended) + sum(1 for _ in stream) for s, stream in streams.items()}
                found = ", ".join(f"{side} {length} frames" for side, length in lengths.items())
                way_out = "fix the output or pass --allow-mismatch (drops the extra frames)"
                raise ValueError(f"{found}: lengths differ; {way_out}")
            yield {side: frame.rgb[window[side]] for side, frame in frames.items()}
        for side, reader in readers.items():
            for note in reader.notes:
                print(f"note: {side} {reader.name}: {note}")


# ---- scores ----------------------------------------------------------------------------------------------

BATCH_PIXELS = 8 * 512 * 512  # of the prediction, at once on the device


def load_judges(names: list[str], settings: dict, device: str, dover: Path) -> tuple[dict, list[str]]:
    """The function behind each metric, and a line for each that cannot be had here."""
    color, crop, literal = settings["color"], settings["crop"], settings["protocol"] == "adcvsr"
    load = {
        "psnr": lambda: partial(psnr, color=color["psnr"], crop=crop, eps=PYIQA_EPS if literal else 0.0),
        "ssim": lambda: partial(ssim, color=color["ssim"], crop=crop),
        "lpips": lambda: load_lpips(device),
        "dists": lambda: DISTS.from_pretrained().to(device),
        **{name: partial(load_pyiqa, name, device) for name in PYIQA},
        "ewarp": lambda: partial(
            warping_errors,
            flow=dis_flow if settings["flow"] == DIS else RaftFlow.from_pretrained(device, literal),
            convention=settings["convention"],
        ),
        "dover": lambda: Dover(dover, device),
    }
    judges, missing = {}, []
    for name in names:
        try:
            judges[name] = load[name]()
        except Unavailable as error:
            missing.append(str(error))
    return judges, missing


@torch.no_grad()
def score_clip(
    stream: Callable[[], Iterator[dict[str, np.ndarray]]],
    judges: dict[str, Callable],
    device: str,
    profile: Path | None = None,
) -> dict:
    """Frames, size and each metric's mean of the clip that `stream()` plays; its profile drawn to a PNG."""
    frames = stream()
    first = next(frames)
    height, width = first["prediction"].shape[:2]
    frames, size = chain([first], frames), max(1, BATCH_PIXELS // (height * width))
    n, last = 0, None
    totals = dict.fromkeys([name for name in judges if name != "dover"], 0.0)
    rows: dict[str, list[Tensor]] = {side: [] for side in first}
    while batch := list(islice(frames, size)):
        clips = {side: torch.from_numpy(np.stack([frame[side] for frame in batch])) for side in first}
        clips = {side: rearrange(clip, "t h w c -> t c h w") for side, clip in clips.items()}
        if profile and n < PROFILE_FRAMES:
            for side, clip in clips.items():
                rows[side].append(row_over_time(clip).clone())  # a view would keep its whole batch
        pred = to_unit(clips["prediction"].to(device))
        gt = to_unit(clips["ground truth"].to(device)) if "ground truth" in clips else None
        linked = pred if last is None else torch.cat([last, pred])  # the pair across two batches counts too
        for name in totals:
            if name != "ewarp":
                totals[name] += judges[name](pred, gt).sum().item()
            elif len(linked) > 1:
                totals[name] += judges[name](linked).sum().item()
        n, last = n + len(batch), pred[-1:]
    if "ewarp" in judges and n < 2:
        raise ValueError("one frame, and E*_warp needs two; leave ewarp out of --metrics")
    if profile:
        write_profile({side: torch.cat(parts, dim=1) for side, parts in rows.items()}, profile)
    row = {"frames": n, "size": f"{width}x{height}"}
    row |= {name: total / (n - 1 if name == "ewarp" else n) for name, total in totals.items()}
    if "dover" in judges:
        row["dover"] = judges["dover"](frame["prediction"] for frame in stream())
    return row


# ---- command line ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("pred", type=Path, metavar="PRED", help="video, image, folder of frames, or folder of those")
    add("gt", type=Path, metavar="GT", nargs="?", help="ground truth, the same, paired by name")
    add("--input", type=Path, help="the network's input, drawn by --profile")
    add("--metrics", help=f"of {','.join(METRICS)}, or all; default psnr,ssim,ewarp or, without GT, ewarp")
    add("--color", choices=("rgb", *LUMA), help="of PSNR (default rgb) and SSIM (default yiq)")
    add("--crop", type=int, default=0, help="pixels cut off at each border for PSNR and SSIM")
    add("--flow", choices=("raft", "dis"), default="raft", help="optical flow of E*_warp")
    add("--protocol", choices=("adcvsr",), help="the paper's: 25 frames, 512x512, EvalCrafter's E*_warp")
    add("--dover", type=Path, default=Path("DOVER"), metavar="PATH", help="checkout of DOVER's repository")
    add("--allow-mismatch", action="store_true", help="crop and drop what the other side lacks")
    add("--profile", action="store_true", help="draw the middle row over time, NAME_profile.png beside PRED")
    add("--json", type=Path, metavar="F", help="write settings, clips and means here")
    add("--csv", type=Path, metavar="F", help="write clips and means here")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def chosen(asked: str | None, has_gt: bool) -> list[str]:
    """The metrics to compute, in the paper's order; ValueError for one unknown or lacking ground truth."""
    possible = [name for name, (needs_gt, _) in METRICS.items() if has_gt or not needs_gt]
    if asked == "all":
        return possible
    names = asked.split(",") if asked else ["psnr", "ssim", "ewarp"] if has_gt else ["ewarp"]
    for name in names:
        if name not in possible:
            reason = "needs a ground truth; give GT" if name in METRICS else "no such metric"
            raise ValueError(f"--metrics {name}: {reason}, or choose from {','.join(possible)}")
    return [name for name in METRICS if name in names]


def settings_of(args: argparse.Namespace) -> dict:
    """What a reader of the numbers has to know."""
    return {
        "protocol": args.protocol,
        "color": {"psnr": args.color or "rgb", "ssim": args.color or "yiq"},
        "crop": args.crop,
        "convention": "evalcrafter" if args.protocol == "adcvsr" else "corrected",
        "flow": DIS if args.flow == "dis" else RAFT,
    }


@contextmanager
def naming(clip: str):
    """Errors about one clip begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{clip}: {error}") from None


def table_line(row: dict, names: list[str]) -> str:
    values = "".join(f"{row[name]:9.{METRICS[name][1]}f}" for name in names)
    return f"{row['name'][-28:]:28} {row.get('frames', ''):6} {row.get('size', ''):>9}{values}"


def evaluate(args: argparse.Namespace) -> dict:
    """Check everything, then score and print clip by clip. Returns what --json writes."""
    settings, paper = settings_of(args), args.protocol == "adcvsr"
    names, pairs = chosen(args.metrics, args.gt is not None), pair_clips(args.pred, args.gt, args.input)
    streams = {name: partial(in_step, sides, paper, args.allow_mismatch) for name, sides in pairs.items()}
    for name, stream in streams.items():
        with naming(name):
            next(stream())  # what cannot be read or differs in size stops the run before the work
    judges, missing = load_judges(names, settings, args.device, args.dover)
    if not judges:
        raise ValueError("; ".join(missing))
    for line in missing:
        print(line, file=sys.stderr)

    print(f"{args.pred} against {args.gt or 'no ground truth'}: clips {len(pairs)}, protocol {args.protocol}")
    if args.gt:
        print("PSNR on {psnr}, SSIM on {ssim}, ".format(**settings["color"]) + f"crop {args.crop}")
    if "ewarp" in judges:
        print("E*_warp x 1000, convention {convention}, flow {flow}".format(**settings))
    print(f"{'clip':28} {'frames':>6} {'size':>9}" + "".join(f"{name:>9}" for name in judges))
    rows = []
    for name, sides in pairs.items():
        pred = sides["prediction"]
        profile = pred.with_name(f"{stem(pred)}_profile.png") if args.profile else None
        with naming(name):
            rows.append({"name": name} | score_clip(streams[name], judges, args.device, profile))
        print(table_line(rows[-1], list(judges)), flush=True)
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in judges}
    print(table_line({"name": "mean", **mean}, list(judges)))
    if paper and {(row["frames"], row["size"]) for row in rows} != {(PROTOCOL_FRAMES, PROTOCOL_SIZE)}:
        print(f"note: not the paper's {PROTOCOL_FRAMES} frames of {PROTOCOL_SIZE}; see infer.py --protocol")
    if list(judges) == ["ewarp"]:
        print("note: a blurred clip has a lower E*_warp; judge it beside a metric of detail")
    return {"settings": settings, "clips": rows, "mean": mean, "not_computed": missing}


def to_json(result: dict) -> str:
    """JSON knows neither infinity (PSNR of equal clips) nor nan (DOVER failed): written as "inf" and null."""

    def strict(value):
        if isinstance(value, dict):
            return {key: strict(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [strict(inner) for inner in value]
        return {"inf": "inf", "nan": None}.get(str(value), value)

    return json.dumps(strict(result), indent=1, allow_nan=False) + "\n"


def to_csv(result: dict) -> str:
    """A row per clip and one of means. E*_warp's column names its convention and flow."""
    head = ["name", "frames", "size", *result["mean"]]
    rows = [
        [row.get(name, "") for name in head] for row in [*result["clips"], {"name": "mean", **result["mean"]}]
    ]
    label = "ewarp ({convention}, {flow})".format(**result["settings"])
    table = io.StringIO()
    csv.writer(table).writerows([[label if name == "ewarp" else name for name in head], *rows])
    return table.getvalue()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    outputs = [(path, form) for path, form in ((args.json, to_json), (args.csv, to_csv)) if path]
    try:
        for path, _ in outputs:
            if not path.parent.is_dir():
                raise ValueError(f"{path}: there is no folder {path.parent}")
        result = evaluate(args)
        for path, form in outputs:
            write_whole(path, form(result).encode())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
