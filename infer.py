"""A clip in, its x4 clip out: `python infer.py clip.mp4` writes clip_x4.mp4 beside it.

    video.py reads frames -> chunks in [-1, 1] -> AdcVSR.stream (model.py) -> colour -> video.py writes frames

Frames pass as a stream: memory does not grow with the clip, frames out = frames in, and the result is the one that
the whole clip at once would give. Paper: Sec. 4 (`--protocol adcvsr`); the rest is what users of such tools need.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from model import SCALE, AdcVSR, WeightsError
from runtime import UserError, run
from video import Frame, VideoReader, VideoWriter, to_network, to_uint8

SHIPPED = Path(__file__).parent / "weights" / "tiny"
DEMO_NOTICE = (
    "note: weights/tiny is a small demonstration. Full quality: --adcsr net_params_200.pkl halfDecoder.ckpt "
    "(AdcSR's official files) or --weights FOLDER_OR_HUB_ID."
)
CHUNK = 8  # frames a step: Choice, large enough to keep a GPU busy, small enough for 16 GB at 720p
PROTOCOL_FRAMES, PROTOCOL_SIDE = 25, 128  # Paper: Sec. 4.1, the first 25 frames, output 512x512


# ---------------------------------------------------------------------------------------------------------------
# Colour and protocol


def match_statistics(sr: Tensor, lr: Tensor) -> Tensor:
    """Gives each channel of each whole frame the mean and deviation of the input (AdcSR's "adain" colour fix).

    sr (t 3 4h 4w), lr (t 3 h w), both in [-1, 1].
    """
    sr_std, sr_mean = torch.std_mean(sr, dim=(-2, -1), keepdim=True)
    lr_std, lr_mean = torch.std_mean(lr, dim=(-2, -1), keepdim=True)
    return (sr - sr_mean) / sr_std.clamp_min(1e-6) * lr_std + lr_mean


def protocol_crop(rgb: np.ndarray, downscale: int) -> np.ndarray:
    """The paper's input: the centre 128x128 of a frame (h w 3) uint8, or the whole side where it is smaller.

    Choice: LQ that is stored at HR size (RealVSR, MVSR4x; downscale 4) is cropped to the centre 512x512 and
    reduced bicubically.
    """
    side = PROTOCOL_SIDE * downscale
    top, left = (max(0, n - side) // 2 for n in rgb.shape[:2])
    rgb = rgb[top : top + side, left : left + side]
    if downscale == 1:
        return rgb
    x = rearrange(to_network(torch.from_numpy(rgb.copy())), "h w c -> 1 c h w")
    x = F.interpolate(x, scale_factor=1 / downscale, mode="bicubic", antialias=True)
    return rearrange(to_uint8(x), "1 c h w -> h w c").numpy()


# ---------------------------------------------------------------------------------------------------------------
# The stream


def chunks_of(frames: Iterator[Frame], size: int, waiting: deque, device: torch.device) -> Iterator[Tensor]:
    """Frames -> chunks (1 t 3 h w) in [-1, 1]; every frame also joins `waiting` until its result arrives."""
    while batch := list(islice(frames, size)):
        waiting.extend(batch)
        rgb = torch.from_numpy(np.stack([f.rgb for f in batch])).to(device)
        yield to_network(rearrange(rgb, "t h w c -> 1 t c h w"))


def upscale(net: AdcVSR, frames: Iterator[Frame], chunk: int, color: str) -> Iterator[tuple[Frame, np.ndarray]]:
    """(source frame, its x4 frame (4h 4w 3) uint8), in order."""
    device = next(net.parameters()).device
    waiting: deque[Frame] = deque()
    for sr in net.stream(chunks_of(frames, chunk, waiting, device)):
        sources = [waiting.popleft() for _ in range(sr.shape[1])]
        sr = sr[0].float()
        if color == "adain":
            lr = torch.from_numpy(np.stack([f.rgb for f in sources])).to(device)
            sr = match_statistics(sr, to_network(rearrange(lr, "t h w c -> t c h w")))
        if not torch.isfinite(sr).all():
            raise UserError(f"the network's output at {float(sources[0].time):.2f} s is not finite. Try --dtype float32.")
        yield from zip(sources, rearrange(to_uint8(sr), "t c h w -> t h w c").cpu().numpy())


def side_by_side(rgb: np.ndarray, sr: np.ndarray) -> np.ndarray:
    """Bicubic x4 of the input on the left, the result on the right: (4h 8w 3) uint8."""
    x = rearrange(to_network(torch.from_numpy(rgb.copy())), "h w c -> 1 c h w")
    bicubic = to_uint8(F.interpolate(x, scale_factor=float(SCALE), mode="bicubic"))
    return np.concatenate([rearrange(bicubic, "1 c h w -> h w c").numpy(), sr], axis=1)


# ---------------------------------------------------------------------------------------------------------------
# Network and files


def load_network(args: argparse.Namespace) -> AdcVSR:
    """The network that the flags ask for, on its device, in its dtype."""
    if args.adcsr:
        # Temporal blocks start as the identity, so AdcSR needs none.
        net = AdcVSR.from_adcsr(*args.adcsr, trust_pickle=args.trust_pickle, temporal="none")
    else:
        net = AdcVSR.from_pretrained(args.weights)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        net = net.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available here. Use --device cpu.") from error
    dtype = getattr(torch, choose_dtype(device) if args.dtype == "auto" else args.dtype)
    return net.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def choose_dtype(device: str) -> str:
    """bfloat16 where the machine computes it fast, else float32."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16") else "float32"


def default_output(reader: VideoReader, tag: str) -> Path:
    """Beside the input: clip.mp4 -> clip_x4.mp4, frames/ -> frames_x4/, photo.jpg -> photo_x4.png."""
    path = reader.path
    if reader.kind == "folder":
        return path.parent / f"{path.resolve().name}{tag}"
    suffix = ".png" if reader.kind == "image" else ".mkv" if path.suffix.lower() in (".mkv", ".webm") else ".mp4"
    return path.with_name(f"{path.stem}{tag}{suffix}")


def show(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def process(path: Path, net: AdcVSR | None, args: argparse.Namespace) -> AdcVSR:
    """Upscales one clip; returns the network, which is loaded once the first clip has opened."""
    with VideoReader(path) as reader:
        output = args.output or default_output(reader, "_x4")
        if output.resolve() == path.resolve():
            raise UserError(f"{path}: the output would replace the input. Choose another -o.")
        frames, total, size = iter(reader), reader.frames, (reader.width, reader.height)
        if args.protocol:
            frames = (
                Frame(protocol_crop(f.rgb, args.downscale), f.time) for f in islice(frames, PROTOCOL_FRAMES)
            )
            total = min(total or PROTOCOL_FRAMES, PROTOCOL_FRAMES)
            size = tuple(min(n, PROTOCOL_SIDE * args.downscale) // args.downscale for n in size)
        width, height = (SCALE * n for n in size)

        def writer(output: Path, width: int) -> VideoWriter:
            return VideoWriter(output, width, height, reader.rate, source=reader, crf=args.crf)

        net = net or load_network(args)
        color = args.color or ("none" if net.pixel_skip else "adain")
        if args.weights == str(SHIPPED) and not args.adcsr:
            print(DEMO_NOTICE, file=sys.stderr)
        print(f"{path} {size[0]}x{size[1]} -> {output} {width}x{height}")
        done = 0
        with writer(output, width) as out, tqdm(total=total, unit="frame", disable=None) as bar:
            compare = writer(output.with_name(f"{output.stem}_compare{output.suffix}"), 2 * width) if args.compare else None
            for source, sr in upscale(net, frames, args.chunk, color):
                out.write(sr, source.time)
                if compare:
                    compare.write(side_by_side(source.rgb, sr), source.time)
                done += 1
                bar.update()
            if compare:
                compare.__exit__(None, None, None)
        show(reader.notes + out.notes)
        print(f"{output} {done} frames")
    return net


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("input", type=Path, help="video, folder of frames, or image")
    parser.add_argument("-o", "--output", type=Path, help="default: <name>_x4 beside the input")
    parser.add_argument("--weights", default=str(SHIPPED), help="folder, training checkpoint or hub id")
    parser.add_argument("--adcsr", nargs=2, metavar=("NET_PARAMS", "HALF_DECODER"), help="AdcSR's official files")
    parser.add_argument("--trust-pickle", action="store_true", help="let AdcSR's files run code while they load")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"frames a step ({CHUNK})")
    parser.add_argument("--color", choices=("none", "adain"), help="colour fix; default: adain, for tiny none")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--crf", type=int, default=16, help="H.264 quality, 0 best, 51 worst (16)")
    parser.add_argument("--compare", action="store_true", help="also <output>_compare: bicubic left, result right")
    parser.add_argument("--protocol", choices=("adcvsr",), help="the paper's test input: 25 frames, centre crop")
    parser.add_argument("--downscale", type=int, choices=(1, 4), default=1, help="with --protocol: LQ stored at HR size")
    args = parser.parse_args(argv)
    if args.chunk < 1:
        parser.error(f"--chunk {args.chunk}: give 1 or more")
    if args.downscale > 1 and not args.protocol:
        parser.error("--downscale: only with --protocol adcvsr")
    return args


def main() -> None:
    args = parse()
    process(args.input, None, args)


if __name__ == "__main__":
    run(main)
