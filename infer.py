"""A clip in, its x4 clip out: `python infer.py clip.mp4` writes clip_x4.mp4 beside it.

    video.py: frames --> chunks in [-1, 1] --> model.py: AdcVSR.stream --> colour --> clip_x4.mp4.parts/*.mp4
                                                        all segments are there --> video.py: clip_x4.mp4

Frames pass as a stream: memory does not grow with the clip, and the result is that of the whole clip at once.
Finished segments survive any interruption: the same command goes on where it stopped. Paper: Sec. 4.1 for
`--protocol adcvsr`; the rest is what users of such a tool need.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from model import SCALE, AdcVSR, WeightsError
from runtime import UserError, run
from video import (
    CRF,
    VIDEO_FORMATS,
    VIDEO_SUFFIXES,
    Frame,
    Output,
    VideoReader,
    VideoWriter,
    concatenate,
    to_network,
    to_uint8,
)

SHIPPED = Path(__file__).parent / "weights" / "tiny"
DEMO_NOTICE = (
    "note: weights/tiny is a small demonstration. For full quality: --weights FOLDER_OR_HUB_ID, or frame by "
    "frame --adcsr net_params_200.pkl halfDecoder.ckpt (AdcSR's official files)."
)
CHUNK = 8  # Choice: frames a step, enough to keep a GPU busy, few enough for its memory
CONTEXT = 4  # Choice: frames that a window of --window shares with either neighbour
SEGMENT = 96  # Choice: frames a segment, some seconds of video, which an interruption can cost
PROTOCOL_FRAMES, PROTOCOL_SIDE = 25, 128  # Paper: Sec. 4.1, the first 25 frames, output 512x512
BYTES = {"video": 0.15, "png": 2.0}  # rough size on disk of an output pixel, for the plan
PROFILE_FRAMES = 2000  # Choice: rows of --profile at most, so that its memory is bounded too
CHANGES_RESULT = "chunk window color dtype device crf protocol downscale start duration compare".split()


# --- Colour: detail from the network, colour from the input. sr (t 3 4h 4w), lr (t 3 h w), both in [-1, 1]


def enlarged(lr: Tensor) -> Tensor:
    """Bicubic x4: (t 3 h w) -> (t 3 4h 4w)."""
    return F.interpolate(lr, scale_factor=float(SCALE), mode="bicubic")


def adain(sr: Tensor, lr: Tensor) -> Tensor:
    """Gives each channel of each whole frame the input's mean and deviation, as AdcSR's code does."""
    sr_std, sr_mean = torch.std_mean(sr, dim=(-2, -1), keepdim=True)
    lr_std, lr_mean = torch.std_mean(lr, dim=(-2, -1), keepdim=True)
    return (sr - sr_mean) / sr_std.clamp_min(1e-6) * lr_std + lr_mean


def wavelet(sr: Tensor, lr: Tensor, levels: int = 5) -> Tensor:
    """Replaces the low frequencies of each frame, what `levels` widening 3x3 blurs leave, by the input's."""
    low = enlarged(lr) - sr
    taps = torch.tensor([0.25, 0.5, 0.25], device=sr.device)
    kernel = (taps[:, None] * taps).expand(3, 1, 3, 3)
    for level in range(levels):  # a blur of the difference is the difference of the blurs
        low = F.pad(low, (2**level,) * 4, mode="replicate")
        low = F.conv2d(low, kernel, dilation=2**level, groups=3)
    return sr + low


COLORS = {"none": lambda sr, lr: sr, "adain": adain, "wavelet": wavelet}

# --- The stream --------------------------------------------------------------------------------------


def protocol_crop(rgb: np.ndarray, downscale: int) -> np.ndarray:
    """The paper's input: the centre 128x128 of a frame (h w 3) uint8, or all of a side that is shorter.

    Choice: LQ that is stored at HR size (RealVSR, MVSR4x; downscale 4) is cropped to the centre 512x512 and
    reduced bicubically.
    """
    side = PROTOCOL_SIDE * downscale
    top, left = (max(0, n - side) // 2 for n in rgb.shape[:2])
    rgb = rgb[top : top + side, left : left + side]
    if downscale == 1:
        return rgb
    x = F.interpolate(as_network([rgb]), scale_factor=1 / downscale, mode="bicubic", antialias=True)
    return as_frames(x)[0]


def as_network(frames: list[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Frames (h w 3) uint8 -> (t 3 h w) in [-1, 1] on the device."""
    return to_network(rearrange(torch.from_numpy(np.stack(frames)).to(device), "t h w c -> t c h w"))


def as_frames(x: Tensor) -> np.ndarray:
    """(t 3 h w) in [-1, 1] -> (t h w 3) uint8."""
    return rearrange(to_uint8(x), "t c h w -> t h w c").cpu().numpy()


def wanted_frames(reader: VideoReader, args: argparse.Namespace) -> Iterator[Frame]:
    """The clip's frames that the flags ask for."""
    for number, frame in enumerate(reader):
        if args.duration is not None and frame.time >= args.start + args.duration:
            return
        if args.protocol:
            if number == PROTOCOL_FRAMES:
                return
            frame = Frame(protocol_crop(frame.rgb, args.downscale), frame.time)
        yield frame


def in_windows(net: AdcVSR, chunks: Iterator[Tensor], window: int) -> Iterator[Tensor]:
    """The other way through a long clip: windows of `window` frames, each on its own, as training saw clips.

    The outer CONTEXT frames of a window overlap with its neighbours and are cut off. chunks (1 t 3 h w) ->
    results (1 t 3 4h 4w), in order.
    """
    held, skip = None, 0
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=1)
        while held.shape[1] >= window:
            yield net(held[:, :window])[:, skip : window - CONTEXT]
            held, skip = held[:, window - 2 * CONTEXT :], CONTEXT
    if held is not None:
        yield net(held)[:, skip:]


def upscale(
    net: AdcVSR, frames: Iterator[Frame], chunk: int, window: int = 0, color: str = "none"
) -> Iterator[tuple[Frame, np.ndarray]]:
    """(source frame, its x4 frame (4h 4w 3) uint8), in order: as one stream, or in windows."""
    device = net.unet.conv_in.weight.device
    waiting: deque[Frame] = deque()  # frames whose result is still to come

    def chunks() -> Iterator[Tensor]:
        while batch := list(islice(frames, chunk)):
            waiting.extend(batch)
            yield as_network([f.rgb for f in batch], device)[None]

    for sr in in_windows(net, chunks(), window) if window else net.stream(chunks()):
        sources = [waiting.popleft() for _ in range(sr.shape[1])]
        sr = COLORS[color](sr[0].float(), as_network([f.rgb for f in sources], device))
        if not torch.isfinite(sr).all():
            at, dtype = float(sources[0].time), str(net.unet.conv_in.weight.dtype)[6:]
            way_out = "Use other weights." if dtype == "float32" else "Use --dtype float32 --fresh."
            raise UserError(f"the network's output at {at:.2f} s is not finite in {dtype}. {way_out}")
        yield from zip(sources, as_frames(sr))
    assert not waiting, "as many frames come out as go in"


def side_by_side(frame: Frame, sr: np.ndarray) -> np.ndarray:
    """Bicubic x4 of the input on the left, the result on the right: (4h 8w 3) uint8."""
    return np.concatenate([as_frames(enlarged(as_network([frame.rgb])))[0], sr], axis=1)


# --- The network -------------------------------------------------------------------------------------


def load_network(args: argparse.Namespace) -> AdcVSR:
    """The network that the flags ask for, on its device, in its dtype."""
    if args.adcsr:  # without temporal blocks: they would start as the identity
        net = AdcVSR.from_adcsr(*args.adcsr, trust_pickle=args.trust_pickle, temporal="none")
    else:
        net = AdcVSR.from_pretrained(args.weights)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available here. Use --device cpu.") from error
    return net.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def choose_device_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """What "auto" means: a GPU if there is one, bfloat16 where the machine computes it fast."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        if device.startswith("cuda"):
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        else:
            told = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
            dtype = "bfloat16" if told.get("amx_bf16") else "float32"
    return device, getattr(torch, dtype)


# --- One clip: plan, segments, final file ------------------------------------------------------------


def suffixed(path: Path, ending: str, suffix: str | None = None) -> Path:
    """clip.mp4, "_x4" -> clip_x4.mp4 beside it, with another suffix if one is given."""
    return path.with_name(path.stem + ending + (path.suffix if suffix is None else suffix))


def default_output(reader: VideoReader) -> Path:
    """Beside the input: clip.mp4 -> clip_x4.mp4, frames/ -> frames_x4/, photo.jpg -> photo_x4.png."""
    path = reader.path.resolve()
    if reader.kind == "folder":
        return path.with_name(f"{path.name}_x4")
    kept = path.suffix.lower() if path.suffix.lower() in VIDEO_FORMATS else ".mp4"
    suffix = {"image": ".png", "video": ".mkv" if path.suffix.lower() == ".webm" else kept}[reader.kind]
    return suffixed(reader.path, "_x4", suffix)


def fingerprint(path: Path) -> list:
    """What tells whether a file is still the same: the files in it, their sizes and times of change."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return [str(path), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file())]


class Job:
    """One clip: what becomes of it, where, and its segments, which live in `<output>.parts/`.

    size, total, done  (w, h) of the network's input; frames to come, None if unknown; finished segments
    targets            what is to be made, with its width: the result, and with --compare a second clip
    """

    def __init__(self, reader: VideoReader, folder: Path | None, args: argparse.Namespace):
        self.reader, self.args = reader, args
        default = default_output(reader)
        self.output = folder / default.name if folder else args.output or default
        if self.output.resolve() == reader.path.resolve():
            raise UserError(f"{reader.path}: the output would replace the input. Choose another -o.")
        self.suffix = self.output.suffix.lower()
        side = PROTOCOL_SIDE * args.downscale if args.protocol else sys.maxsize
        self.size = w, _ = [min(n, side) // args.downscale for n in (reader.width, reader.height)]
        self.targets = {self.output: SCALE * w}
        if args.compare:
            self.targets[suffixed(self.output, "_compare")] = 2 * SCALE * w
        for target in self.targets:  # refuse what cannot be written before anything is computed
            Output(target).remove_partial()
        self.total = self.expected_frames()
        if self.suffix == ".png" and (self.total or 1) > 1:
            raise UserError(f"{self.output}: a .png holds one frame. Give a video, or a folder for PNGs.")
        self.parts, self.done = self.output.with_name(f"{self.output.name}.parts"), 0
        while not args.fresh and all(self.segment(target, self.done).exists() for target in self.targets):
            self.done += 1  # a segment has its name only once it is whole

    def expected_frames(self) -> int | None:
        limits = [PROTOCOL_FRAMES] if self.args.protocol else []
        if self.args.duration is not None:
            limits.append(math.ceil(self.args.duration * self.reader.rate))
        if self.reader.frames is not None:
            limits.append(max(1, self.reader.frames - int(self.args.start * self.reader.rate)))
        return min(limits, default=None)

    def segment(self, target: Path, k: int) -> Path:
        """Segment k of a target: an .mp4, whose clock is exact, a folder of PNGs, or the one PNG."""
        suffix = ".mp4" if self.suffix in VIDEO_FORMATS else self.suffix
        return self.parts / f"{k:06d}{'' if target == self.output else '_compare'}{suffix}"

    def print_plan(self, net: AdcVSR) -> None:
        """What is to be done: frames, segments, memory, disk. `UserError` where the disk is too full."""
        (w, h), reader, output, args = self.size, self.reader, self.output, self.args
        frames, weight = self.total or 0, next(net.parameters())
        rate = f" {float(reader.rate):.6g} fps" if reader.kind == "video" else ""
        queues, lag = (0, args.window - 1) if args.window else (net.queue_bytes(h, w) / 2**30, net.lag)
        pixels = SCALE**2 * w * h * frames * (3 if args.compare else 1)
        disk = pixels * BYTES["video" if self.suffix in VIDEO_FORMATS else "png"] / 2**30
        print(
            f"{reader.path} {w}x{h}{rate} {frames or '?'} frames -> {output} {SCALE * w}x{SCALE * h}\n"
            f"plan: {math.ceil(frames / SEGMENT) or '?'} segments of {SEGMENT} frames, {self.done} done; "
            f"chunks of {args.chunk} on {weight.device} in {str(weight.dtype)[6:]}; "
            f"first result after {lag + 1} frames\n"
            f"memory: {queues:.2f} GB in queues between chunks, about twice that during a step; "
            f"disk: {disk:.2f} GB, twice that while segments are joined"
        )
        free = shutil.disk_usage(output.resolve().parent).free / 2**30
        if 2 * disk > free:
            needed = f"needs about {2 * disk:.1f} GB, {free:.1f} GB are free"
            raise UserError(f"{output}: {needed}. Choose another -o.")

    def open_parts(self) -> None:
        """The folder of finished segments, new or as it was left. `UserError` if it was made otherwise."""
        weights = [fingerprint(Path(p)) for p in self.args.adcsr or [self.args.weights]]
        plan = {"input": fingerprint(self.reader.path), "weights": weights}
        plan |= {k: str(getattr(self.args, k)) for k in CHANGES_RESULT}
        file = self.parts / "plan.json"
        if self.args.fresh:
            shutil.rmtree(self.parts, ignore_errors=True)
        if file.is_file():
            made = json.loads(file.read_text() or "{}")  # empty after a power cut
            if changed := [k for k in plan if made.get(k) != plan[k]]:
                way_out = "Use --fresh to start again, or another -o."
                raise UserError(f"{self.parts} was made with another {', '.join(changed)}. {way_out}")
            return
        try:
            self.parts.mkdir(exist_ok=True)
            (self.parts / "plan.partial").write_text(json.dumps(plan))
            os.replace(self.parts / "plan.partial", file)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise UserError(f"{self.parts}: {reason}. Choose another -o.") from error

    def write_segments(self, net: AdcVSR) -> list[Fraction]:
        """Writes the segments that are not done; returns the time of every segment's first frame.

        After an interruption the stream starts again early enough that its beginning has no influence, on the
        same grid of chunks, so that every number is computed as it would have been.
        """
        args, starts = self.args, []

        def noting_starts() -> Iterator[Frame]:
            for number, frame in enumerate(wanted_frames(self.reader, args)):
                if number % SEGMENT == 0:
                    starts.append(frame.time)
                yield frame

        keep = self.done * SEGMENT
        reach, grid = (CONTEXT, args.window - 2 * CONTEXT) if args.window else (net.lag, args.chunk)
        early = max(0, (keep - reach) // grid * grid)
        frames = islice(noting_starts(), early, None)  # decoding is far faster than the network
        color = args.color or ("none" if net.pixel_skip else "adain")
        results = islice(upscale(net, frames, grid, args.window, color), keep - early, None)
        with tqdm(total=self.total, initial=keep, unit="frame", disable=None, dynamic_ncols=True) as bar:
            for k in count(self.done):
                if (first := next(results, None)) is None:
                    return starts
                self.write_segment(k, chain([first], islice(results, SEGMENT - 1)), bar)

    def write_segment(self, k: int, results: Iterator[tuple[Frame, np.ndarray]], bar: tqdm) -> None:
        height, settings = SCALE * self.size[1], (self.reader.rate, self.reader, self.args.crf)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(VideoWriter(self.segment(target, k), width, height, *settings))
                for target, width in self.targets.items()
            ]
            for frame, sr in results:
                writers[0].write(sr, frame.time)
                for writer in writers[1:]:
                    writer.write(side_by_side(frame, sr), frame.time)
                bar.update()

    def run(self, net: AdcVSR) -> None:
        """All segments, then the final files under their names."""
        self.open_parts()
        known = list(self.reader.notes)
        starts = self.write_segments(net)
        if not starts:
            shutil.rmtree(self.parts)
            start = f"--start {float(self.args.start):g}"
            raise UserError(f"{self.reader.path}: no frame from {start} on. Give less.")
        notes = self.reader.notes
        for target in self.targets:
            segments = [self.segment(target, k) for k in range(len(starts))]
            if self.suffix == ".png":
                os.replace(segments[0], target)
            else:
                to_end = self.args.duration is None
                notes = notes + concatenate(segments, starts, target, self.reader, to_end)
        shutil.rmtree(self.parts)
        if self.args.profile:
            self.write_profile()
        print_notes(note for note in dict.fromkeys(notes) if note not in known)

    def write_profile(self) -> None:
        """<output>_profile.png: the middle row of pixels over time, bicubic above ours. Paper: Fig. 3."""
        rows = {"bicubic": [], "ours": []}
        with VideoReader(self.output) as result:
            for frame, sr in islice(zip(wanted_frames(self.reader, self.args), result), PROFILE_FRAMES):
                middle = len(frame.rgb) // 2
                # Bicubic looks two pixels away.
                band = as_network([frame.rgb[max(0, middle - 3) : middle + 3]])
                bicubic = as_frames(enlarged(band))[0]
                rows["bicubic"].append(bicubic[len(bicubic) // 2])
                rows["ours"].append(sr.rgb[SCALE * middle])
        picture = np.concatenate([np.stack(r) for r in rows.values()])
        path = suffixed(self.output, "_profile", ".png")
        with VideoWriter(path, *picture.shape[1::-1], self.reader.rate) as out:
            out.write(picture)


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


# --- command line --------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("input", type=Path, nargs="+", help="video, folder of frames, image, or folder of clips")
    add("-o", "--output", type=Path, help="default: <name>_x4 beside the input; a folder for several inputs")
    add("--weights", default=str(SHIPPED), help="folder, training checkpoint or hub id")
    add("--adcsr", nargs=2, metavar=("NET_PARAMS", "HALF_DECODER"), help="AdcSR's two official files")
    add("--trust-pickle", action="store_true", help="let AdcSR's files run code while they load")
    add("--chunk", type=int, default=CHUNK, help=f"frames a step ({CHUNK})")
    add("--window", type=int, default=0, help="windows of N frames instead of one exact stream (0: stream)")
    add("--color", choices=COLORS, help="colour from the input; default: adain, for tiny none")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--crf", type=int, default=CRF, help=f"H.264 quality, 0 best, 51 worst ({CRF})")
    add("--start", type=Fraction, default=Fraction(0), help="seconds to skip")
    add("--duration", type=Fraction, help="seconds to upscale")
    add("--compare", action="store_true", help="also <output>_compare: bicubic left, result right")
    add("--profile", action="store_true", help="also <output>_profile.png: one row over time")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--fresh", action="store_true", help="forget the finished segments of an interrupted run")
    add("--protocol", choices=("adcvsr",), help="the paper's test input: 25 frames, centre crop to 128x128")
    add(
        "--downscale", type=int, choices=(1, 4), default=1, help="with --protocol: 4 for LQ stored at HR size"
    )
    args = parser.parse_args(argv)
    if args.chunk < 1:
        parser.error(f"--chunk {args.chunk}: give 1 or more")
    if args.window and args.window <= 2 * CONTEXT:
        parser.error(f"--window {args.window}: give more than {2 * CONTEXT}, the frames that overlap")
    if not 0 <= args.crf <= 51:
        parser.error(f"--crf {args.crf}: give 0 to 51")
    if args.start < 0 or (args.duration is not None and args.duration <= 0):
        parser.error("--start, --duration: give seconds, the duration more than 0")
    if args.downscale > 1 and not args.protocol:
        parser.error("--downscale: only with --protocol adcvsr")
    return args


def clips_in(path: Path) -> list[Path]:
    """The clips that an input names: itself, or, for a folder that holds videos, those without results."""
    clips = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES) if path.is_dir() else []
    results = {p.stem + "_x4" + more for p in clips for more in ("", "_compare")}
    return [p for p in clips if p.stem.removesuffix(".partial") not in results] or [path]


def upscale_clip(clip: Path, folder: Path | None, net: AdcVSR | None, args, made: set[Path]) -> AdcVSR:
    """One clip, into `folder` if there is one. Returns the network, loaded once the first clip is open."""
    with VideoReader(clip, start=args.start) as reader:
        job = Job(reader, folder, args)
        if job.output in made:
            raise UserError(f"{clip}: {job.output} is another input's result. Give each its own -o.")
        made.add(job.output)
        if net is None:
            net = load_network(args)
            if args.weights == str(SHIPPED) and not args.adcsr:
                print(DEMO_NOTICE, file=sys.stderr)
        job.print_plan(net)
        print_notes(reader.notes)
        if not args.dry_run:
            job.run(net)
        return net


def main() -> None:
    args = parse()
    clips = [clip for path in args.input for clip in clips_in(path)]
    folder = args.output if clips != args.input or len(clips) > 1 else None
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: not a folder ({error.strerror}); several inputs need one.") from error
    net, failed, made = None, 0, set()
    for clip in clips:
        try:
            net = upscale_clip(clip, folder, net, args, made)
        except torch.OutOfMemoryError as error:
            way_out = "Free the GPU, or use --dtype bfloat16 or --device cpu."
            raise UserError(f"{clip}: out of GPU memory with a single frame. {way_out}") from error
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the finished segments", file=sys.stderr)
            raise
        except UserError as error:
            if len(clips) == 1 or isinstance(error, WeightsError):
                raise
            failed += 1  # the other clips are not to blame
            print(f"error: {error}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(clips)} clips could not be upscaled.")


if __name__ == "__main__":
    run(main)
