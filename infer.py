"""A clip in, its x4 clip out: `python infer.py clip.mp4` writes clip_x4.mp4 beside it.

    a thread: video.py, shots.py    another: stream.py, model.py         this one: video.py
    VideoReader --> shots, chunks --> the network, one exact stream a shot --> ResumableWriter --> clip_x4.mp4

Frames pass as streams: memory does not grow with the clip, and the result is that of whole shots at once.
Finished segments survive any interruption: the same command goes on where it stopped. Several GPUs share the
work: `torchrun --nproc_per_node=8 infer.py clip.mp4`. Paper: Sec. 4.1 for `--protocol adcvsr`; the rest is
what users of such a tool need.
"""

import ctypes
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import chain, groupby, islice, pairwise, repeat
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

from compact import load_student
from jobs import Crew, Job, clips_in, default_output, jobs_for, missing_segments, suffixed
from memory import peak_gb
from model import SCALE, Student, bicubic
from pretrained import adcsr_files, from_adcsr
from runtime import UserError, WeightsError, ahead, explained, fast_dtype, printable, run
from segments import SEGMENT, ResumableWriter
from shots import AROUND, in_shots
from stream import CONTEXT, in_windows, stream
from video import (
    CRF,
    PROTOCOL_FRAMES,
    PROTOCOL_SIDE,
    VIDEO_FORMATS,
    X264_PRESET,
    Frame,
    VideoReader,
    centre,
    is_hidden,
    to_clip,
    to_frames,
    to_network,
    to_uint8,
)

SHIPPED = Path(__file__).parent / "weights" / "compact"
DEMO_NOTICE = (
    "note: weights/compact shows the paper's idea on a small network. For full quality: --weights "
    "FOLDER_OR_HUB_ID, or frame by frame --adcsr (AdcSR's official weights, fetched once)."
)
MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1)}  # glibc's malloc.h
CHUNK = 8  # Choice: frames a step, enough to keep a GPU busy
ROOM = 0.85  # share of a GPU's memory for the tensors that are counted
MOST = 40  # Choice: GB of them on any card: at 4K two frames a step, as many pixels as CHUNK has at 1080p
BYTES = {"video": 0.15, "png": 2.0}  # rough size on disk of an output pixel, for the plan

# --- Command line ------------------------------------------------------------------------------------


# Frame times are fractions: as floats, most of them would fall before or behind their frame.
TYRO = {"is_instance": lambda value: True, "str_from_instance": lambda value: [str(value)]}
SECONDS = PrimitiveConstructorSpec(1, "SECONDS", lambda words: Fraction(words[0]), **TYRO)
ADCSRS = PrimitiveConstructorSpec("*", "[NET_PARAMS HALF_DECODER]", tuple, **TYRO)


@dataclass(frozen=True)
class Args:
    input: tyro.conf.Positional[tuple[Path, ...]]  # video, folder of frames, image, or folder of clips
    # default: <name>_x4 beside the input; a folder for several inputs
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="PATH")] = None
    weights: str = str(SHIPPED)  # folder, training checkpoint or hub id
    # AdcSR frame by frame: from the hub, or its two official files
    adcsr: Annotated[tuple[str, ...] | None, ADCSRS] = None
    chunk: int = 0  # frames a step (0: 8, or fewer where the GPU's memory asks for it)
    window: int = 0  # windows of N frames instead of one exact stream (0: stream)
    attention: Literal["full", "windows"] = "full"  # windows: each position of a frame sees those around it
    shots: Literal["auto", "none"] = "auto"  # auto: no shot sees another; none: the clip is one
    color: Literal["auto", "none", "adain", "wavelet"] = "auto"  # from the input; auto: adain with --adcsr
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where it is fast
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: a GPU if there is one
    crf: int = CRF  # H.264 quality, 0 best, 51 worst
    # of H.264: the slower, the smaller the file
    x264_preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow", "veryslow"] = X264_PRESET
    start: Annotated[Fraction, SECONDS] = Fraction(0)  # seconds to skip
    duration: Annotated[Fraction | None, SECONDS] = None  # seconds to upscale
    compare: bool = False  # also <output>_compare: bicubic left, result right
    dry_run: bool = False  # print the plan and stop
    fresh: bool = False  # forget the finished segments of an interrupted run
    protocol: Literal["adcvsr"] | None = None  # the paper's test input: 25 frames, centre crop to 128x128
    downscale: Literal[1, 4] = 1  # with --protocol: 4 for LQ stored at HR size


CHANGES_RESULT = (
    "chunk window attention shots color dtype device crf x264_preset protocol downscale start duration"
)


def parse(argv: list[str] | None = None) -> Args:
    described = {"description": __doc__.partition("\n")[0], "config": (tyro.conf.FlagCreatePairsOff,)}
    args = tyro.cli(Args, args=argv, **described)
    before = ", in front of --adcsr" if args.adcsr else ""  # which takes what follows for its files
    wrong = {
        f"no input: name a video, a folder of frames, an image, or a folder of clips{before}": not args.input,
        f"--chunk {args.chunk}: give 1 or more, or 0": args.chunk < 0,
        f"--window {args.window}: give more than {2 * CONTEXT}, the frames that overlap": (
            args.window and args.window <= 2 * CONTEXT
        ),
        f"--crf {args.crf}: give 0 to 51": not 0 <= args.crf <= 51,
        "--start, --duration: give seconds, the duration more than 0": (
            args.start < 0 or (args.duration is not None and args.duration <= 0)
        ),
        "--downscale: only with --protocol adcvsr": args.downscale > 1 and not args.protocol,
    }
    for line, applies in wrong.items():
        if applies:
            raise UserError(line)
    return args


# --- Colour: detail from the network, colour from the input. sr (t 3 4h 4w), lr (t 3 h w), both in [-1, 1]


def adain(sr: Tensor, lr: Tensor) -> Tensor:
    """Gives each channel of each whole frame the input's mean and deviation, as AdcSR's code does."""
    sr_std, sr_mean = torch.std_mean(sr, dim=(-2, -1), keepdim=True)
    lr_std, lr_mean = torch.std_mean(lr, dim=(-2, -1), keepdim=True)
    return (sr - sr_mean) / sr_std.clamp_min(1e-6) * lr_std + lr_mean


def wavelet(sr: Tensor, lr: Tensor, levels: int = 5) -> Tensor:
    """Replaces the low frequencies of each frame, what `levels` widening 3x3 blurs leave, by the input's."""
    low = bicubic(lr) - sr
    taps = torch.tensor([0.25, 0.5, 0.25], device=sr.device)
    kernel = (taps[:, None] * taps).expand(3, 1, 3, 3)
    for level in range(levels):  # a blur of the difference is the difference of the blurs
        low = F.pad(low, (2**level,) * 4, mode="replicate")
        low = F.conv2d(low, kernel, dilation=2**level, groups=3)
    return sr + low


COLORS = {"adain": adain, "wavelet": wavelet}

# --- Frames in, frames out ---------------------------------------------------------------------------


def protocol_crop(rgb: np.ndarray, downscale: int) -> np.ndarray:
    """The paper's input: the centre 128x128 of a frame (h w 3) uint8, or all of a side that is shorter.

    Choice: LQ that is stored at HR size (RealVSR, MVSR4x; downscale 4) is cropped to the centre 512x512 and
    reduced bicubically.
    """
    side = PROTOCOL_SIDE * downscale
    rgb = rgb[centre(rgb.shape[:2], (side, side))]
    if downscale == 1:
        return rgb
    x = to_network(to_clip([rgb]))
    return to_frames(F.interpolate(x, scale_factor=1 / downscale, mode="bicubic", antialias=True))[0]


def wanted_frames(reader: VideoReader, args: Args, first: int = 0) -> Iterator[Frame]:
    """The clip's frames that the flags ask for, from number `first` on."""
    reader.first = first
    for number, frame in enumerate(reader, first):
        if args.duration is not None and frame.time >= args.start + args.duration:
            return
        if args.protocol:
            if number == PROTOCOL_FRAMES:
                return
            frame = Frame(protocol_crop(frame.rgb, args.downscale), frame.time)
        yield frame


def frames_for(result: int, reader: VideoReader, args: Args, reach: int, grid: int) -> tuple[int, Iterator]:
    """What the results from number `result` on depend on: the number of the first frame, and from it on every
    frame behind the number of its shot.

    Early enough that what is before has no influence, which is `reach` frames or the shot's start, and on the
    same grid of chunks or windows, so that every number is computed as if the clip had run from its start.
    """
    # Chunks count from the clip's start, windows from that of their shot, which may lie anywhere before.
    first = 0 if args.window else max(0, result - reach - grid - AROUND)
    frames = wanted_frames(reader, args, first)
    frames = in_shots(frames) if args.shots == "auto" else zip(repeat(0), frames)
    number, start, last = -1, 0, deque(maxlen=reach + grid)
    for number, (shot, frame) in zip(range(first, result + 1), frames):
        start = number if last and shot > last[-1][0] else start
        last.append((shot, frame))
    if number < result:  # the clip has ended
        return result, iter(())
    origin = start if args.window else 0
    first = max(start, origin + (result - reach - origin) // grid * grid)
    return first, chain(islice(last, len(last) - (result + 1 - first), None), frames)


class Chunk(NamedTuple):
    """A few frames of one shot, and the same as a clip (t 3 h w) uint8."""

    shot: int
    frames: list[Frame]
    clip: Tensor


def in_chunks(
    frames: Iterator[tuple[int, Frame]], first: int, size: int, device: torch.device
) -> Iterator[Chunk]:
    """The frames from number `first` on, up to each multiple of `size` and each cut."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    for (shot, _), group in groupby(enumerate(frames, first), lambda item: (item[1][0], item[0] // size)):
        chunk = [frame for _, (_, frame) in group]
        clip = to_clip([frame.rgb for frame in chunk])
        yield Chunk(shot, chunk, clip.pin_memory() if device.type == "cuda" else clip)  # a GPU fetches it


def fetched(x: Tensor) -> Tensor:
    """x (...) on the CPU; from a GPU it has arrived when all that was asked of the GPU so far is done."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)


def super_resolve(
    net: Student, chunks: Iterable[Chunk], window: int = 0, color: str = "none"
) -> Iterator[list[tuple[Frame, np.ndarray]]]:
    """The frames whose x4 (4h 4w 3) uint8 is ready, each with it, in order; a stream a shot."""
    weight = next(net.parameters())
    device, dtype = weight.device, str(weight.dtype)[6:]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    waiting: deque[Frame] = deque()  # frames whose result is still to come

    def inputs(shot: Iterable[Chunk]) -> Iterator[Tensor]:
        for chunk in shot:
            waiting.extend(chunk.frames)
            yield to_network(chunk.clip.to(device, non_blocking=True))[None]

    def streams() -> Iterator[Tensor]:
        for _, shot in groupby(chunks, lambda chunk: chunk.shot):
            lr = inputs(shot)
            yield from in_windows(net, lr, window) if window else stream(net, lr)

    def pieces() -> Iterator[tuple]:
        for sr in streams():
            sources, sr = [waiting.popleft() for _ in range(sr.shape[1])], sr[0]
            if color in COLORS:
                lr = to_network(to_clip([frame.rgb for frame in sources]).to(device))
                sr = COLORS[color](sr.float(), lr)
            rgb = rearrange(to_uint8(sr), "t c h w -> t h w c")
            result = sources, fetched(rgb), fetched(torch.isfinite(sr).all())
            yield *result, torch.cuda.current_stream(device).record_event() if sr.is_cuda else None

    # A piece is waited for when the next one is on its way: so a GPU is never without work.
    for (sources, rgb, finite, arrived), _ in pairwise(chain(pieces(), [None])):
        if arrived:
            arrived.synchronize()
        if not finite:
            way_out = "Use other weights." if dtype == "float32" else "Use --dtype float32 --fresh."
            time = float(sources[0].time)
            raise UserError(f"the network's output at {time:.2f} s is not finite in {dtype}. {way_out}")
        yield list(zip(sources, rgb.numpy()))
    assert not waiting, "as many frames come out as go in"


def side_by_side(frame: Frame, sr: np.ndarray) -> np.ndarray:
    """Bicubic x4 of the input on the left, the result on the right: (4h 8w 3) uint8."""
    return np.concatenate([to_frames(bicubic(to_network(to_clip([frame.rgb]))))[0], sr], axis=1)


# --- The network -------------------------------------------------------------------------------------


def load_network(args: Args) -> Student:
    """The network that the flags ask for, on its device, in its dtype."""
    if args.adcsr is not None:  # without temporal blocks: they would start as the identity
        net = from_adcsr(*adcsr_files(args.adcsr), temporal="none")
    else:
        net = load_student(args.weights)
        if args.weights == str(SHIPPED) and os.environ.get("RANK", "0") == "0":
            print(DEMO_NOTICE, file=sys.stderr)
    device, dtype = choose_device_and_dtype(args.device, args.dtype)
    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available here. Use --device cpu.") from error
    return net.for_inference(dtype, args.attention)


def choose_device_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """What "auto" means: a GPU if there is one, bfloat16 where the machine computes it fast."""
    if device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's
    if dtype == "auto":
        fast = fast_dtype(device)
        return device, torch.float16 if device.startswith("cuda") and fast == torch.float32 else fast
    return device, getattr(torch, dtype)


@cache
def chunk_that_fits(net: Student, h: int, w: int, gb: float) -> int:
    """Frames a step: CHUNK, halved until a stream of (h, w) frames needs no more than ROOM of so many GB or
    MOST."""
    chunk = CHUNK
    while chunk > 1 and peak_gb(net, h, w, chunk) > min(ROOM * gb, MOST):
        chunk //= 2
    return chunk


def with_chunk(args: Args, size: tuple[int, int], network: Callable[[], Student]) -> Args:
    """args with the frames a step that a clip of `size` (w, h) gets if they are not given."""
    device = torch.device(choose_device_and_dtype(args.device, args.dtype)[0])
    if args.chunk or args.window or device.type != "cuda":
        return replace(args, chunk=args.chunk or CHUNK)
    # Another number rounds otherwise. So it must not follow from what happens to be free: the same command,
    # started again, and all processes of a torchrun have to find the same one.
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    net, (w, h) = network(), size  # first of all: it tells where there is no such device
    return replace(args, chunk=chunk_that_fits(net, h, w, min(card.total_memory for card in cards) / 1e9))


# --- One clip ----------------------------------------------------------------------------------------


def fingerprint(path: Path) -> list:
    """What tells whether a file is still the same: the files in it, their sizes and times of change."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    files = [f for f in files if f.is_file() and not is_hidden(f.name)]
    return [str(path), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def input_size(reader: VideoReader, args: Args) -> tuple[int, int]:
    """(w, h) of what the network is given."""
    side = PROTOCOL_SIDE * args.downscale if args.protocol else sys.maxsize
    return min(reader.width, side) // args.downscale, min(reader.height, side) // args.downscale


def expected_frames(reader: VideoReader, args: Args) -> int | None:
    limits = [PROTOCOL_FRAMES] if args.protocol else []
    if args.duration is not None:
        limits.append(math.ceil(args.duration * reader.rate))
    if reader.frames is not None:
        limits.append(max(1, reader.frames - int(args.start * reader.rate)))
    return min(limits, default=None)


def writers_for(output: Path, reader: VideoReader, args: Args, shared: bool = False) -> list[ResumableWriter]:
    """The result's and, with --compare, its comparison's. `UserError` where they cannot be written."""
    if output.resolve() == reader.path.resolve():
        raise UserError(f"{reader.path}: the output would replace the input. Choose another -o.")
    if output.suffix.lower() == ".png" and (expected_frames(reader, args) or 1) > 1:
        raise UserError(f"{output}: a .png holds one frame. Give a video, or a folder for PNGs.")
    made_by = {"input": fingerprint(reader.path)}
    weights = [args.weights] if args.adcsr is None else adcsr_files(args.adcsr)
    made_by |= {"weights": [fingerprint(Path(p)) for p in weights]}
    made_by |= {k: str(getattr(args, k)) for k in CHANGES_RESULT.split()}
    w, h = input_size(reader, args)
    sizes = {output: (SCALE * w, SCALE * h)}
    if args.compare:
        sizes[suffixed(output, "_compare")] = 2 * SCALE * w, SCALE * h
    settings = {"to_end": args.duration is None, "crf": args.crf, "preset": args.x264_preset}
    settings |= {"fresh": args.fresh, "shared": shared}
    return [ResumableWriter(path, *size, reader, made_by, **settings) for path, size in sizes.items()]


def print_plan(net: Student, reader: VideoReader, output: Path, done: int, args: Args) -> None:
    """What is to be done: frames, segments, memory, disk. `UserError` where the disk is too full."""
    (w, h), frames = input_size(reader, args), expected_frames(reader, args) or 0
    weight = next(net.parameters())
    rate = f" {float(reader.rate):.6g} fps" if reader.kind == "video" else ""
    lag = args.window - 1 if args.window else net.lag
    pixels = SCALE**2 * w * h * frames * (3 if args.compare else 1)
    disk = pixels * BYTES["video" if output.suffix.lower() in VIDEO_FORMATS else "png"] / 2**30
    print(
        f"{printable(reader.path)} {w}x{h}{rate} {frames or '?'} frames -> "
        f"{printable(output)} {SCALE * w}x{SCALE * h}\n"
        f"plan: {math.ceil(frames / SEGMENT) or '?'} segments of {SEGMENT} frames, "
        f"{done} done; chunks of {args.chunk} on {weight.device} in "
        f"{str(weight.dtype)[6:]}; first result after {lag + 1} frames\n"
        f"disk: {disk:.2f} GB, twice that while segments are joined"
    )
    if args.dry_run:  # which takes seconds to count
        print(f"memory: {peak_gb(net, h, w, args.window or args.chunk, bool(args.window)):.2f} GB at most")
    free = shutil.disk_usage(output.resolve().parent).free / 2**30
    if 2 * disk > free:
        needed = f"needs about {2 * disk:.1f} GB, {free:.1f} GB are free"
        raise UserError(f"{output}: {needed}. Choose another -o.")


def print_notes(notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        print(f"note: {printable(note)}", file=sys.stderr)


def upscale(job: Job, clip: Path, output: Path, net: Student, args: Args, crew: Crew) -> None:
    """A clip, or one of its parts: read -> network -> colour -> write."""
    with VideoReader(clip, args.start) as reader, ExitStack() as stack:
        args = with_chunk(args, input_size(reader, args), lambda: net)
        writers = writers_for(output, reader, args, shared=job.parts > 1)
        known, total = list(reader.notes), job.end or expected_frames(reader, args)
        reach, grid = (args.window - 1, args.window - 2 * CONTEXT) if args.window else (net.lag, args.chunk)
        color = ("none" if args.adcsr is None else "adain") if args.color == "auto" else args.color

        first, frames = frames_for(job.begin, reader, args, reach, grid)
        device = next(net.parameters()).device
        chunks = ahead(in_chunks(frames, first, grid, device))  # one thread decodes
        stack.enter_context(closing(chunks))
        results = ahead(super_resolve(net, chunks, args.window, color), depth=4)  # one computes
        stack.enter_context(closing(results))
        wanted = islice(chain.from_iterable(results), job.begin - first, job.end and job.end - first)
        hidden = crew.rank > 0 or None  # None: where there is no terminal
        bar = stack.enter_context(tqdm(total=total, initial=job.begin, unit="frame", disable=hidden))
        with ExitStack() as open_writers:  # this one encodes
            for writer in writers:
                writer.done = job.begin
                open_writers.enter_context(writer)
            for frame, sr in wanted:
                writers[0].write(sr, frame.time)
                for writer in writers[1:]:
                    writer.write(side_by_side(frame, sr), frame.time)
                bar.update()
            if not writers[0].done:
                raise UserError(f"{clip}: no frame from --start {float(args.start):g} on. Give less.")
        bar.close()
        for writer in writers if crew.joins(job) else ():
            writer.join()
        notes = chain(reader.notes, *(writer.notes for writer in writers))
        print_notes(note for note in notes if note not in known)


# --- All clips ---------------------------------------------------------------------------------------


def keep_memory() -> None:
    """glibc gives large tensors back after each use, and zeroed pages come back: a tenth of all the time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in MALLOPT.values():
            libc.mallopt(parameter, value)


def outputs_for(clips: list[Path], args: Args) -> list[Path]:
    """What each clip becomes: -o itself, or, of several clips, a file or folder in it."""
    if args.output is None:
        return [default_output(clip) for clip in clips]
    if clips == list(args.input) and len(clips) == 1:
        return [args.output]
    with explained(f"{args.output}: not a folder", "Several inputs need one.", causes=OSError):
        args.output.mkdir(parents=True, exist_ok=True)
    return [args.output / default_output(clip).name for clip in clips]


def main() -> None:
    keep_memory()
    args, crew = parse(), Crew()
    clips = [clip for path in args.input for clip in clips_in(path)]
    outputs = outputs_for(clips, args)
    network = cache(lambda: load_network(args))  # once the first clip is open

    @contextmanager
    def attempt(n: int) -> Iterator[None]:
        """Where clip n cannot be upscaled, others are not to blame."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                way_out = "Free the GPU, or use --dtype bfloat16 or --device cpu."
                error = UserError(f"{clips[n]}: out of GPU memory with a single frame. {way_out}")
            if len(clips) == 1 or isinstance(error, WeightsError):
                raise error
            crew.fail(n)
            print(f"error: {printable(error)}", file=sys.stderr)

    def plan(processes: int) -> list[Job]:
        """Prints what is to be done. Segments of clips that several jobs write are reserved until the end."""
        writers, missing, held = {}, {}, set()
        for n, (clip, output) in enumerate(zip(clips, outputs)):
            with attempt(n), VideoReader(clip, args.start) as reader:
                if output in outputs[:n]:
                    raise UserError(f"{clip}: {output} is another input's result. Give each its own -o.")
                sized = with_chunk(args, input_size(reader, args), network)
                writers[n] = writers_for(output, reader, sized)
                finished = set.intersection(*(writer.finished() for writer in writers[n]))
                print_plan(network(), reader, output, len(finished), sized)
                print_notes(reader.notes)
                missing[n] = missing_segments(finished, expected_frames(reader, args) or 0)
        jobs = [] if args.dry_run else jobs_for(missing, processes)
        for n in {job.clip for job in jobs if job.parts > 1}:
            with attempt(n):
                for writer in writers[n]:
                    reserved.enter_context(writer.reserved())
                held.add(n)
        return [job for job in jobs if job.parts == 1 or job.clip in held]

    with ExitStack() as reserved:
        try:
            for job in crew.jobs(plan):
                with attempt(job.clip):
                    upscale(job, clips[job.clip], outputs[job.clip], network(), args, crew)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the finished segments", file=sys.stderr)
            raise
    if crew.rank == 0 and crew.failed():
        raise UserError(f"{crew.failed()} of {len(clips)} clips could not be upscaled.")


if __name__ == "__main__":
    run(main)
