"""Clips whose content and motion are known, for the tests of metrics."""

import torch
import torch.nn.functional as F


def texture(h: int, w: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture (3 h w) in [0.1, 0.9], float64."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, h // 4 + 2, w // 4 + 2, generator=rng, dtype=torch.float64)
    return 0.1 + 0.8 * F.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0, 1)[0]


def translation(t: int = 4, h: int = 64, w: int = 96, dx: int = 4, dy: int = 2):
    """A clip (t 3 h w) whose scene moves by (dx, dy) a frame, and its exact flows forward and backward."""
    world = texture(h + t * dy, w + t * dx)
    clip = torch.stack([world[:, (t - i) * dy :, (t - i) * dx :][:, :h, :w] for i in range(t)])
    forward = torch.tensor([dx, dy], dtype=torch.float64).view(1, 2, 1, 1).expand(t - 1, 2, h, w)
    return clip, (forward, -forward)
