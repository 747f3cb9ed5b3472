"""Where one shot of a clip ends and the next begins, found while its frames are read.

    frames --small pictures--> difference of neighbours --large, alone, and lasting--> a cut

The paper's clips are single shots. Its temporal layers reach 76 frames to either side, so the end of one shot
would flow into the next: `infer.py` makes every shot a stream of its own, `data.py` skips windows with a cut.

Choice: a few lines of our own. PySceneDetect compares neighbouring frames only: its content detector takes
flashes of light and fast pans for cuts, its adaptive one flashes (docs/choices.md has the counts). Here a cut
is where nothing before it looks like anything behind it:

- two frames differ if their colours do, and neither is the other one moved: a pan is no cut;
- they differ several times as much as frames do around: a fast zoom is none;
- so do all pairs of a few frames before and behind: a flash is none, what was there returns.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, product, repeat
from statistics import median
from typing import NamedTuple

import cv2
import numpy as np

from video import Frame

AROUND = 5  # Choice: frames looked at on either side of a cut; flashes are shorter
DIFFERENT = 0.1  # Choice: of 0 to 1. 99 of 100 cuts are above 0.3, without colour 0.13; motion is below 0.07
STANDS_OUT = 3  # Choice: times the median difference around
SIDE = 64  # pixels a side of the small pictures, whatever the frame's shape
BINS = 16  # a channel, of the histogram of colours
NOISE = 6.0  # grey levels by which small pictures of the same may differ: black frames, compressed
HANN = cv2.createHanningWindow((SIDE, SIDE), cv2.CV_32F)  # the borders of two frames never correspond


class Small(NamedTuple):
    """What is kept of a frame."""

    picture: np.ndarray  # (SIDE SIDE 3) float32: YCrCb, the mean of Y taken away, so that light may change
    luma: np.ndarray  # (SIDE SIDE), its Y
    colours: np.ndarray  # (BINS^3,), share of the pixels
    energy: float  # mean variance of its channels, and NOISE


def small(rgb: np.ndarray) -> Small:
    """Of a frame (h w 3) uint8."""
    some = cv2.resize(rgb, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_NEAREST)  # all would take long
    rgb = cv2.resize(some, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    ycc = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)
    colours = cv2.calcHist([ycc], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3).ravel() / SIDE**2
    mean, deviation = cv2.meanStdDev(ycc)
    picture = ycc.astype(np.float32) - np.float32([mean[0, 0], 0, 0])
    energy = float(np.square(deviation).mean()) + NOISE**2
    return Small(picture, picture[..., 0].copy(), colours, energy)


def difference(a: Small, b: Small) -> float:
    """0 where two frames show the same, be it moved; 1 where they have nothing in common."""
    other_colours = 1 - np.minimum(a.colours, b.colours).sum()
    (x, y), _ = cv2.phaseCorrelate(a.luma, b.luma, HANN)
    return float(other_colours * min(residual(a, b), residual(a, b, round(x), round(y)), 1))


def residual(a: Small, b: Small, x: int = 0, y: int = 0) -> float:
    """What is left of two frames' energy once a is moved by (x, y) and taken from b; 1 for strangers."""
    if max(abs(x), abs(y)) > 2 * SIDE // 3:  # too little is seen in both
        return 1.0
    here = a.picture[max(0, -y) : SIDE - max(0, y), max(0, -x) : SIDE - max(0, x)]
    there = b.picture[max(0, y) : SIDE + min(0, y), max(0, x) : SIDE + min(0, x)]
    return cv2.norm(here, there, cv2.NORM_L2SQR) / here.size / (a.energy + b.energy)


def is_cut(before: Sequence[Small], behind: Sequence[Small]) -> bool:
    """Whether a shot ends between the last of the frames `before` and the first of those `behind`."""
    if not before or (step := difference(before[-1], behind[0])) < DIFFERENT:
        return False
    around = [difference(a, b) for a, b in chain(pairwise(before), pairwise(behind))]
    if around and step < STANDS_OUT * median(around):
        return False
    return all(difference(a, b) >= DIFFERENT for a, b in product(before, behind))


def in_shots(frames: Iterable[Frame]) -> Iterator[tuple[int, Frame]]:
    """Each frame behind the number of its shot, from 0 on; it comes once AROUND - 1 more are read.

    Whether there is a cut depends on AROUND frames before and behind alone, wherever the reading began.
    """
    shot, before, behind = 0, deque(maxlen=AROUND), deque()
    for read in chain(((frame, small(frame.rgb)) for frame in frames), repeat(None, AROUND - 1)):
        behind.append(read)
        if len(behind) == AROUND:
            shot += is_cut(before, [picture for _, picture in filter(None, behind)])
            frame, picture = behind.popleft()
            before.append(picture)
            yield shot, frame
