"""bench.py: what it counts as detail."""

import cv2
import numpy as np
import torch

from bench import high_frequencies


def waves(cycles: float, size: int = 64) -> torch.Tensor:
    """A clip of two frames (2 3 h w) whose rows swing by so many cycles a pixel."""
    row = 128 + 100 * torch.sin(2 * torch.pi * cycles * torch.arange(size))
    return row.round().to(torch.uint8).expand(2, 3, size, size)


def energy(clip: torch.Tensor) -> float:
    return float(high_frequencies(clip).abs().pow(2).sum())


def test_detail_is_what_swings_faster_than_lr_can_show():
    """LR's finest pattern has half a cycle a pixel, an eighth of a cycle in HR."""
    assert energy(waves(0.25)) > 1e4 * energy(waves(0.0625))
    assert energy(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)) < 1e-9


def test_blur_takes_detail_away_and_brightness_leaves_it():
    noise = np.random.default_rng(0).integers(64, 128, (64, 64, 3), dtype=np.uint8)
    blurred, brighter = cv2.GaussianBlur(noise, (0, 0), 2), noise + 50
    sharp, soft, bright = (
        energy(torch.from_numpy(frame).permute(2, 0, 1)[None]) for frame in (noise, blurred, brighter)
    )
    assert soft < 0.01 * sharp and abs(bright / sharp - 1) < 1e-6
