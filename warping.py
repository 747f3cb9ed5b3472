"""E*_warp: how much a clip changes along its own motion (Sec. 4.1, Tab. 1; Lai et al., 2018).

    frames i and i+1 of a clip --RAFT or DIS--> flow forth and back --> mask: what both show
                               --warp: i+1 as seen from i, minus i--> squares, averaged under the mask

Flow is (n 2 h w), the (dx, dy) in pixels by which what frame i shows at a place has moved in frame i+1.
"""

import math
from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from runtime import needs
from video import to_unit

# What finds it, (first, second (n 3 h w) in [0, 1]) -> flow; or exact flows forward and backward of a clip.
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
    clip: Tensor, flow: Flow, convention: str = "corrected", visible: Tensor | None = None
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
        v = F.interpolate(v.double(), scale_factor=0.5, mode="bilinear")
        below, right = (-v.shape[-2] % 8, -v.shape[-1] % 8) if convention == "evalcrafter" else (0, 0)
        return F.pad(v, (right // 2, right - right // 2, below // 2, below - below // 2), "replicate")

    frames = shrink(to_unit(clip))  # float64, so that a still clip gives 0 and not a rounding error
    first, second = frames[:-1], frames[1:]
    if callable(flow):
        forward, backward = flow(first, second), flow(second, first)
    else:
        forward, backward = (shrink(f) / 2 for f in flow)
    mask = unoccluded(forward, backward) if visible is None else shrink(visible) == 1
    if convention == "corrected":
        mask = mask & in_frame(forward)
    distance = squared(warp(second, forward) - first)
    return 1000 * (distance * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
