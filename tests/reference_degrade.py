"""The degradation once more, slow and plain: each step frame by frame as its definition reads.

`apply_step` takes a step drawn by degrade.py, so both run on the same draws. With `own_noise` it is the port
that one would write first (two-dimensional filters, NumPy's legacy normal numbers, Poisson's law itself) and
the yardstick of `bench.py degrade`; without, it takes degrade.py's normal numbers, and pixels must agree.
"""

import io
import math

import av
import cv2
import numpy as np
import torch

import degrade

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "bicubic": cv2.INTER_CUBIC}


def bessel_j1(x: float) -> float:
    """The Bessel function J1 by its integral, the mean of cos(a - x sin a) for a from 0 to pi."""
    angle = (np.arange(200) + 0.5) * math.pi / 200  # exact to rounding: the integrand is periodic
    return float(np.cos(angle - x * np.sin(angle)).mean())


def one_kernel(kind: str, size: int, sigma_x, sigma_y, rotation, beta, omega) -> np.ndarray:
    """One kernel, weight by weight; `kind` as in the table, unused parameters are ignored."""
    kernel = np.zeros((size, size))
    if "aniso" not in kind:
        sigma_y, rotation = sigma_x, 0.0
    turn = np.array([[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T) if kind != "sinc" else None
    for i in range(size):
        for j in range(size):
            point = np.array([j - size // 2, i - size // 2], dtype=float)  # x, y
            if kind == "sinc":
                r = math.hypot(*point)
                value = omega**2 / (4 * math.pi)
                if r > 0:
                    value = omega * bessel_j1(omega * r) / (2 * math.pi * r)
            else:
                q = point @ inverse @ point
                value = 1 / (1 + q**beta) if "plateau" in kind else math.exp(-0.5 * q**beta)
            kernel[i, j] = value
    return kernel / kernel.sum()


def blur(frames: list, step: degrade.Blur) -> list:
    blurred = []
    for frame, kernel in zip(frames, step.kernels(), strict=True):
        blurred.append(cv2.filter2D(frame.astype(np.float32), -1, kernel))
    return blurred


def resize(frames: list, step: degrade.Resize) -> list:
    frames = [frame.astype(np.float32) for frame in frames]
    h, w = step.size
    return [cv2.resize(frame, (w, h), interpolation=INTERPOLATIONS[step.interpolation]) for frame in frames]


def noise(frames: list, step: degrade.Noise, own_noise: bool) -> list:
    generator = torch.Generator().manual_seed(step.seed)
    noisy = []
    for frame, strength in zip(frames, step.strength.tolist(), strict=True):
        if own_noise:
            normal = np.random.randn(*frame.shape).astype(np.float32)[..., : 1 if step.grey else 3]
        else:
            normal = torch.randn((*frame.shape[:2], 1 if step.grey else 3), generator=generator).numpy()
        if step.kind == "gaussian":
            noisy.append(frame + strength * normal)
            continue
        clean = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None] if step.grey else frame
        clean = np.clip(np.round(clean), 0, 255)
        v = max(2 ** math.ceil(math.log2(len(np.unique(clean)))), degrade.MIN_LEVELS)
        x = clean / 255
        if own_noise:
            deviation = np.random.poisson(x * v).astype(np.float32) / v - x
        else:
            deviation = np.sqrt(x / v) * normal
        noisy.append(frame + strength * 255 * deviation)
    return noisy


def jpeg(frames: list, step: degrade.Jpeg) -> list:
    coded = []
    for frame, quality in zip(frames, step.quality, strict=True):
        frame = np.clip(np.round(frame), 0, 255).astype(np.uint8)
        bgr = np.ascontiguousarray(frame[..., ::-1])
        _, data = cv2.imencode(".jpg", bgr, [int(cv2.IMWRITE_JPEG_QUALITY), int(quality)])
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR)
        coded.append(np.ascontiguousarray(bgr[..., ::-1]))
    return coded


def codec(frames: list, step: degrade.Codec) -> list:
    """Through an mp4 file in memory."""
    h, w = frames[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(step.codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = w + w % 2, h + h % 2, "yuv420p"
        stream.bit_rate = step.bitrate
        stream.codec_context.thread_count = 1
        if step.codec != "mpeg4":
            stream.options = {"preset": "medium", "x264-params": "mbtree=0"}
        for frame in frames:
            frame = np.clip(np.round(frame), 0, 255).astype(np.uint8)
            frame = cv2.copyMakeBorder(frame, 0, h % 2, 0, w % 2, cv2.BORDER_REFLECT)
            yuv = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(yuv, format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    decoded = []
    with av.open(file, "r", format="mp4") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for image in container.decode(video=0):
            frame = cv2.cvtColor(image.to_ndarray(format="yuv420p"), cv2.COLOR_YUV2RGB_I420)
            decoded.append(frame[:h, :w])
    return decoded


def apply_step(frames: list, step: degrade.Step, own_noise: bool = False) -> list:
    """The step's frames, from a list of frames (h w 3), float32 or uint8."""
    if isinstance(step, degrade.Noise):
        return noise(frames, step, own_noise)
    slow = {degrade.Blur: blur, degrade.Resize: resize, degrade.Jpeg: jpeg, degrade.Codec: codec}
    return slow[type(step)](frames, step)


def degrade_slowly(clip: np.ndarray, steps: list[degrade.Step], own_noise: bool = False) -> np.ndarray:
    """What `degrade.degrade` returns for the same draws: clip (t h w 3) uint8 to LR (t h/4 w/4 3) uint8."""
    frames = list(clip)
    for step in steps:
        frames = apply_step(frames, step, own_noise)
    return np.stack([np.clip(np.round(frame), 0, 255).astype(np.uint8) for frame in frames])
