"""Benchmarks, each a table: `python bench.py infer`, or another of these:

    infer     seconds a frame of the shipped network, and in ncnn; start-up and whole runs of infer.py
    network   a clip and a stream in torch's operations, with kernels.py's, and folded: error, speed, profile
    layers    single layers, in torch's operations and in kernels.py's
    attention full attention against windows of it: PSNR between both results, and whether borders show
    end2end   infer.py from file to file with x264, and the network alone: full attention and windows
    table1    parameters and seconds of the teachers, AdcSR and AdcVSR, the paper's Table 1 beside them
    train1    one step of stage 1 on one clip: seconds, memory, operations, profile
    train2    one step of stage 2
    gpu       in six minutes what a GPU has to say: network, layers, end2end, train1, train2, table1
    data      seconds of a core for each part of loading; a list of a million files

On a GPU at the paper's size with random weights, on a CPU in small, each in under a minute.
Times are of this machine at this moment: compare rows of one run, not rows of two machines. Where $OUT is
set, rows are lines of JSON, too, in the file bench.jsonl in that folder.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

import infer as infer_script
import kernels
import train_stage1
import train_stage2
from compact import CompactVSR, load_student
from data import Sources, TrainingClips, generator
from dead_leaves import procedural_clip
from degrade import degrade, one_thread
from discriminators import BACKBONE, FeatureDiscriminator, PixelDiscriminator, convnext
from files import list_files
from infer import CHUNK, SHIPPED, choose_device_and_dtype
from metrics import psnr
from model import (
    PRESETS,
    SCALE,
    UNSHUFFLE,
    WINDOW,
    AdcVSR,
    DecoderMidBlock,
    GroupNorm,
    TemporalConv,
    Upsample,
)
from perceptual import DISTS, VGG16
from runtime import UserError, World, machine, run
from seedvr2 import PRESETS as SEEDVR2
from seedvr2 import NaDiT, VideoVAE
from shots import in_shots
from stream import Stream, decoded
from teacher import DoveTeacher, FeatureEncoder, SeedVR2Teacher
from training import peak_memory
from video import (
    VIDEO_SUFFIXES,
    Frame,
    VideoReader,
    VideoWriter,
    centre,
    to_clip,
    to_network,
    to_uint8,
)

ROOT = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Args:
    what: Annotated[Positional[str], tyro.conf.arg(metavar="WHAT")]  # the table
    videos: str = ""  # clips, a folder or a list, for attention and data
    images: str = ""  # photos, for data
    validation: str = ""  # those of both that training left out, said as in training, for data
    weights: tuple[str, ...] = (str(SHIPPED),)  # students, for attention
    clips: int = 8  # for attention and data
    backbone: str = BACKBONE  # for train2, on a GPU: D_pixel's ConvNeXt
    methods: tuple[str, ...] = ()  # for table1: these rows alone


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median wall seconds of work(), after one call to warm up."""
    return in_turns({"work": work}, repeats)["work"]


def in_turns(works: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """Median wall seconds of each, after a call to warm up; in turns, so that other work of the machine slows
    them all."""
    times = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if ON_GPU:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(spent[1:])[repeats // 2] for name, spent in times.items()}


def report(row: str, **values: float) -> None:
    print(f"{row:32}" + "".join(f"  {k} {v:.4g}" for k, v in values.items()), flush=True)
    record(row, **values)


def record(row: str, **values: float) -> None:
    if out := os.environ.get("OUT"):
        with open(Path(out) / "bench.jsonl", "a") as file:
            file.write(json.dumps({"row": row, "machine": machine()} | values) + "\n")


def attempt(row: str, work: Callable[[], object]) -> None:
    """work(), whose failure costs this row alone."""
    try:
        work()
    except torch.OutOfMemoryError:
        report(f"{row}: more than this card has")
    except Exception as error:
        traceback.print_exc()
        report(f"FAILED: {row}, {type(error).__name__}")
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(row: str, work: Callable[[], object], shown: int = 15) -> None:
    """Where the time of work() goes: its longest kernels, and how many of all only copy."""
    kind = "CUDA" if ON_GPU else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        work()
        if ON_GPU:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    spent = [(getattr(e, time_of) / 1e3, e.count, e.key) for e in profiler.key_averages()]
    spent = sorted((s for s in spent if s[0]), reverse=True)
    copies = [s for s in spent if re.search("copy|nchwtonhwc|nhwctonchw", s[2].lower())]
    totals = {"ms": sum(s[0] for s in spent), "kernels": sum(s[1] for s in spent)}
    report(f"{row}: profile", **totals, copies_ms=sum(s[0] for s in copies), copies=sum(s[1] for s in copies))
    for ms, count, name in spent[:shown]:
        report(f"  {name[:150]}", ms=ms, count=count)


# ---- Inference --------------------------------------------------------------------------------------------


SHIPPED_NETWORK = """
import torch, compact
w, h = map(int, sys.argv[1:])
device, dtype = infer.choose_device_and_dtype("auto", "auto")
net = compact.load_student(infer.SHIPPED).to(device).for_inference(dtype).requires_grad_(False)
lr = torch.rand(1, 2, 3, h, w, device=device) * 2 - 1
net(lr)
"""


def infer(args: Args) -> None:
    """The shipped network beside the 2D one it began as, here and in ncnn; the same where the memory of large
    tensors goes back after each use; then infer.py, whole."""
    infer_script.keep_memory()  # as infer.py does, before there are tensors
    device, dtype = choose_device_and_dtype("auto", "auto")
    print(f"{str(dtype)[6:]}, {machine()}; seconds a frame")
    flat = CompactVSR.from_realesrgan(temporal_kind="none")
    there = {} if ON_GPU else in_ncnn(flat)
    here = {"shipped": load_student(SHIPPED), "2D": flat}
    here = {name: net.to(device).for_inference(dtype) for name, net in here.items()}
    for w, h in (128, 96), (320, 240), (640, 360):
        lr = torch.rand(1, 2, 3, h, w, device=device) * 2 - 1
        with torch.no_grad():
            works = {name: partial(net, lr) for name, net in here.items()}
            spent = in_turns(works | {name: partial(net, lr[0, 0]) for name, net in there.items()})
        report(f"{w}x{h} -> x4", **{k: s / 2 if k in here else s for k, s in spent.items()})
    for w, h in (320, 240), (640, 360):
        for memory, keep in ("given back", ""), ("kept", "; infer.keep_memory()"):
            code, setup = "for _ in range(4): net(lr).cpu()", f"import infer{keep}{SHIPPED_NETWORK}"
            spent, _, peak = as_process(code, w, h, setup=setup)
            report(f"{w}x{h}, memory {memory}", shipped=spent / 8, mb=peak)
    with TemporaryDirectory() as folder:
        for length in (1, 80, 160):
            clip = Path(folder) / f"{length}.mp4"
            write_sample(clip, length, (48, 64))
            spent, _, peak = as_process("import runpy; runpy.run_path('infer.py', run_name='__main__')", clip)
            report(f"infer.py, {length:3} frames of 64x48", s=spent, mb=peak)


def in_ncnn(net: CompactVSR) -> dict[str, Callable[[Tensor], Tensor]]:
    """The 2D network in ncnn, a library made for small machines, on the CPU, in float32 as it does it by
    default: a frame (3 h w) in [-1, 1] -> (3 4h 4w). Nothing where the package is not installed."""
    if not find_spec("ncnn"):
        print("no row of ncnn: pip install ncnn")
        return {}
    import ncnn

    # Its file of layers: 7767517, the mark of the format; how many layers and tensors; then of each layer
    # its type, name, inputs, outputs, their names, numbered settings. Weights are a tag
    # for their type, 0 being float32, then the numbers; biases and slopes the numbers alone.
    layers, weights = ["Input x 0 1 x", "Split two 1 2 x y0 small"], []
    for i, layer in enumerate(net.body):
        names = f"l{i} 1 1 y{i} y{i + 1}"
        if isinstance(layer, torch.nn.Conv2d):
            size = f"0={layer.out_channels} 1=3 4=1 5=1 6={layer.weight.numel()}"
            layers.append(f"Convolution {names} {size}")
            weights += [torch.zeros(1), layer.weight, layer.bias]
        else:
            layers.append(f"PReLU {names} 0={layer.num_parameters}")
            weights.append(layer.weight)
    end = len(net.body)
    layers += [f"PixelShuffle shuffle 1 1 y{end} detail 0={SCALE}",
               f"Interp nearest 1 1 small large 0=1 1={SCALE}.0 2={SCALE}.0",
               "BinaryOp sum 2 1 detail large sr 0=0"]  # fmt: skip
    twin = ncnn.Net()
    twin.opt.num_threads, twin.opt.use_vulkan_compute = torch.get_num_threads(), False
    with TemporaryDirectory() as folder:
        param, file = Path(folder) / "net.param", Path(folder) / "net.bin"
        param.write_text(f"7767517\n{len(layers)} {len(layers) + 1}\n" + "\n".join(layers) + "\n")
        file.write_bytes(b"".join(w.detach().float().numpy().tobytes() for w in weights))
        twin.load_param(str(param))
        twin.load_model(str(file))

    def frame(lr: Tensor) -> Tensor:
        run, pixels = twin.create_extractor(), (lr / 2 + 0.5).numpy()  # which `Mat` reads, and does not copy
        run.input("x", ncnn.Mat(pixels))
        return 2 * torch.from_numpy(np.array(run.extract("sr")[1])) - 1

    return {"2D_in_ncnn": frame}


def write_sample(path: Path, frames: int, size: tuple[int, int]) -> None:
    """A clip of `size` (h, w), 25 frames a second."""
    pictures = procedural_clip(generator(0), 50, size).frames
    with VideoWriter(path, *size[::-1], 25) as out:
        for i in range(frames):
            out.write(pictures[min(i % 100, 99 - i % 100)])  # to and fro


PROBE = """
import sys, time
def held(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1000
{setup}
before, start = held(), time.perf_counter()
{code}
print(); print(time.perf_counter() - start, before, held())
"""


def as_process(code: str, *arguments, setup: str = "") -> tuple[float, float, float]:
    """Seconds of Python code in a process of its own; the most MB held before it and after it (Linux)."""
    # Not by getrusage: there a child begins with its parent's peak.
    command = [sys.executable, "-c", PROBE.format(setup=setup, code=code), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"this failed: {code} {arguments}: {done.stderr}")
    spent, before, after = map(float, done.stdout.split()[-3:])
    return spent, before, after


# ---- The network, with kernels.py and without --------------------------------------------------------------


def random_student() -> AdcVSR:
    """At random weights, also where training starts from zeros and ones."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        net = AdcVSR(**PRESETS["full" if ON_GPU else "tiny"] | {"pixel_skip": False}).requires_grad_(False)
        for name, weight in net.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.2)
            elif ".temporal_" in name and "conv2" in name:
                weight.normal_(std=0.02)
    return net


@torch.no_grad()
def network(args: Args) -> None:
    """A clip of 25x128x128, and eight frames in the middle of a stream, 480x270 -> 1080p."""
    clip, hd, small = ((25, 128, 128), (8, 270, 480), (8, 64, 64)) if ON_GPU else ((2, 16, 16),) * 3
    lr, lr_hd, lr_small = (torch.rand(1, t, 3, h, w, device=DEVICE) * 2 - 1 for t, h, w in (clip, hd, small))
    print(f"bfloat16, {machine()}")
    if ON_GPU:
        a, big = torch.randn(8192, 8192, device=DEVICE).bfloat16(), torch.empty(2**30, device=DEVICE).char()
        rates = {"TFLOP_per_s": 2 * 8.192**3 / seconds(lambda: a @ a) / 1e3}
        report("the card's own rates", **rates, TB_per_s=2 * big.nbytes / 1e12 / seconds(big.clone))
    torch.backends.cudnn.allow_tf32 = False
    net, kernels.ENABLED = random_student(), False
    exact = net(lr_small)
    kernels.ENABLED = True
    error = (net(lr_small) - exact).norm() / exact.norm()
    report("kernels, in float32", error=error.item())
    torch.backends.cudnn.allow_tf32 = True
    net.for_inference(torch.bfloat16)
    folded = {part: part.folded for part in net.modules() if isinstance(part, Upsample)}
    state = in_mid_stream(net, lr_hd)
    chunk = partial(one_more, net, state, lr_hd)

    def rung(name: str) -> None:
        error = (net(lr_small) - exact).norm() / exact.norm()
        same = torch.equal(net(lr_small), net(lr_small))
        spent, peak = seconds(partial(net, lr), 5), peak_memory()
        start = time.perf_counter()
        net(lr)
        launched = time.perf_counter() - start
        report(f"clip, {name}", error=error.item(), same=same, s=spent, launched_s=launched, gb=peak)
        spent = seconds(chunk, 3) / hd[0]
        held = {"gb": peak_memory(), "queues_gb": state.nbytes() / 1e9}
        report(f"stream, {name}", s_a_frame=spent, frames_per_s=1 / spent, **held)

    for name, kernels.ENABLED, fold in (("torch", False, 0), ("kernels", True, 0), ("folded", True, 1)):
        for part, weight in folded.items():
            part.folded = weight if fold else None
        attempt(name, partial(rung, name))
    if ON_GPU:
        attempt("graph", lambda: report("clip, one CUDA graph", s=seconds(recorded(partial(net, lr)), 5)))
    attempt("clip", partial(profile, "clip", partial(net, lr), 30))
    attempt("stream", partial(profile, "stream", chunk))
    for net.TAIL_FRAMES in (2, 8):
        attempt("tail", partial(rung, f"tail of {net.TAIL_FRAMES} frames"))


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """What work() launches, to be launched again as a whole: so the GPU waits for no CPU."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def in_mid_stream(net: AdcVSR, chunk: Tensor) -> Stream:
    """A stream of such chunks, after so many that what goes in comes out."""
    state = Stream(net)
    for _ in range(-(-(net.lag + 1) // chunk.shape[1]) + 1):
        state.step(net.encode, chunk)
    return state


def one_more(net: AdcVSR, state: Stream, chunk: Tensor) -> None:
    deque(decoded(net, *state.step(net.encode, chunk), chunk.shape), maxlen=0)


# ---- Single layers -----------------------------------------------------------------------------------------


@torch.no_grad()
def layers(args: Args) -> None:
    """Layers at the network's sizes: ms, TB/s of what has to be read and written, or TFLOP/s."""
    print(f"bfloat16, {machine()}")
    t, side = (25, 512) if ON_GPU else (2, 64)

    def picture(n: int, c: int, h: int, w: int) -> Tensor:
        return torch.randn(n, h, w, c, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    def row(name: str, work: Callable[[], object], **total: float) -> None:
        spent = seconds(work, 5)
        report(
            name, ms=1e3 * spent, **{f"{unit}_per_s": amount / 1e12 / spent for unit, amount in total.items()}
        )

    def rows(name: str, work: Callable[[], object], **total: float) -> None:
        for kernels.ENABLED in (False, True):
            attempt(name, partial(row, f"{name}, {'kernels' if kernels.ENABLED else 'torch'}", work, **total))

    def step(net: Callable, x: Tensor) -> None:
        with torch.enable_grad(), torch.autocast(DEVICE, torch.bfloat16):
            net(x.requires_grad_()).square().mean().backward()

    sizes = ((4, 64, 512, 512), (25, 240, 64, 64), (4, 64, 1088, 1920)) if ON_GPU else ((1, 64, 16, 16),)
    for size in sizes:
        x, y = picture(*size), picture(*size)
        with torch.device(DEVICE):
            norm = GroupNorm(size[1], PRESETS["full"], 1e-6)
        rows(f"norm and SiLU of {size}, a step", partial(step, partial(kernels.norm_silu, norm=norm), x))
        norm.bfloat16()
        rows(f"norm and SiLU of {size}", partial(kernels.norm_silu, x, norm), TB=2 * x.nbytes)
        rows(f"bias and residual of {size}", partial(kernels.add_bias, y, norm.bias, x), TB=3 * x.nbytes)
    x = picture(t, 128, side // 2, side // 2)
    with torch.device(DEVICE):
        up, conv = Upsample(128), TemporalConv(240).bfloat16()
        encoder = feature_encoder(AdcVSR(**PRESETS["full" if ON_GPU else "tiny"]))
    rows("upsampling and convolution, a step", partial(step, up.to(memory_format=torch.channels_last), x))
    encoder = World(0, 1, torch.device(DEVICE)).place_frozen(encoder)
    rows("feature encoder", partial(encoder, torch.rand(1, t, 3, side, side, device=DEVICE)))
    up.bfloat16()
    for name, fold in ("nearest", lambda: None), ("folded", up.fold):
        fold()
        attempt(name, partial(row, f"upsampling and convolution, {name}", partial(up, x)))
    for size in ((25, 240, 64, 64), (10, 240, 136, 240)) if ON_GPU else ((2, 240, 8, 8),):
        clip = picture(*size)[None]
        rows(f"along time, {size}", partial(conv, clip), TFLOP=2 * 3 * 240 * clip.numel())
    for n, places in ((125, 4096), (40, 32640)) if ON_GPU else ((2, 64),):  # frames times heads
        qkv = [torch.randn(1, n, places, 48, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if ON_GPU else ("FLASH_ATTENTION",):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                work, flop = partial(F.scaled_dot_product_attention, *qkv), 4 * n * places**2 * 48
                attempt(
                    "attention", partial(row, f"attention, {places}, {backend.lower()}", work, TFLOP=flop)
                )


# ---- Attention in windows ----------------------------------------------------------------------------------


@torch.no_grad()
def attention(args: Args) -> None:
    """Results of students with attention over whole frames and in windows, on real clips or procedural ones.

    seams: the mean step from a pixel to the next across a window's border over that elsewhere, near 1 where
    no border shows: in both results, and in the difference between them, where no picture hides it.
    """
    frames, h, w = (25, 270, 480) if ON_GPU else (2, 240, 320)
    device, dtype = choose_device_and_dtype("auto", "auto")
    print(f"{frames}x{h}x{w} or what a clip has of it, {str(dtype)[6:]}, {machine()}")
    paths = islice(list_files(args.videos, VIDEO_SUFFIXES), args.clips) if args.videos else ()
    clips = {path.name: first_frames(path, frames, (h, w)) for path in paths}
    clips = clips or {str(k): procedural_clip(generator(k), frames, (h, w)).frames for k in range(args.clips)}
    for name in args.weights:
        net = load_student(name).to(device).for_inference(dtype)
        if "attention" not in net.config:
            raise UserError(f"{name}: has no attention over frames. Give --weights of an AdcVSR student.")
        # Windows of 64 positions of the finest grid are as wide as the frames of training. For a student with
        # attention on coarser grids alone, as tiny, they are as wide in pixels: there have to be borders.
        level = net.config["attention"].index(True)
        rows = []
        for clip, rgb in clips.items():
            lr, results = to_network(to_clip(rgb)).to(device)[None], []
            for kind in "full", "windows":
                net.set_attention(kind, WINDOW >> level)
                results.append(to_uint8(net(lr))[0].cpu())
            full, windows = results
            values = {"psnr": psnr(windows, full).mean().item()}
            shown = {"full": full, "windows": windows, "difference": windows.float() - full.float()}
            border = WINDOW // 2 * UNSHUFFLE * SCALE  # pixels from one, shifted or not, to the next
            values |= {f"seams_{side}": seams(picture, border) for side, picture in shown.items()}
            report(f"{Path(name).name}, {clip}", **values)
            rows.append(list(values.values()))
        report(f"{Path(name).name}, mean", **dict(zip(values, np.mean(rows, axis=0).tolist())))


def first_frames(path: Path, frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """The first frames (h w 3) of a video, their centre where they are larger than size (h, w)."""
    with VideoReader(path) as reader:
        return [frame.rgb[centre(frame.rgb.shape[:2], size)] for frame in islice(reader, frames)]


def seams(x: Tensor, border: int) -> float:
    """x (... h w): mean step between two pixels at each multiple of `border`, over that everywhere else."""
    across, within = [], []
    for picture in (x.float(), x.float().mT):
        step = picture.diff(dim=-1).abs().flatten(0, -2).mean(dim=0)
        there = torch.arange(1, picture.shape[-1]) % border == 0
        across.append(step[there])
        within.append(step[~there])
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()


@torch.no_grad()
def end2end(args: Args) -> None:
    """The network alone and infer.py from file to file, with attention over whole frames and in windows.

    Frames a second of infer.py without its start: of the frames that a longer run has more than a short one.
    """
    (h, w), preset, (short, long) = ((270, 480), "full", (40, 240)) if ON_GPU else ((48, 64), "tiny", (8, 40))
    with torch.device(DEVICE):  # untrained it is the bicubic x4, so that x264 gets pictures
        net = AdcVSR(**PRESETS[preset] | {"pixel_skip": True}).for_inference(torch.bfloat16)
    print(f"{w}x{h} -> x4, bfloat16, {machine()}")
    lr = torch.rand(1, CHUNK, 3, h, w, device=DEVICE) * 2 - 1

    def network_alone(kind: str) -> None:
        net.set_attention(kind)
        state = in_mid_stream(net, lr)
        spent = seconds(partial(one_more, net, state, lr), 3) / CHUNK
        report(f"stream, {kind}", s_a_frame=spent, frames_per_s=1 / spent, gb=peak_memory())

    def clip(t: int, side: int) -> None:
        x, results = torch.rand(1, t, 3, side, side, device=DEVICE) * 2 - 1, []
        for kind in "full", "windows":
            net.set_attention(kind)
            results.append(net(x))
            report(f"clip of {t}x{side}x{side}, {kind}", s=seconds(partial(net, x), 3), gb=peak_memory())
        report("clip, both the same", same=torch.equal(*results))  # a window is as large as its frames

    def upscale(frames: int, *flags: str) -> float:
        start, result = time.perf_counter(), folder / "x4.mp4"
        command = ["infer.py", str(sample), "-o", str(result), "--duration", str(frames / 25), *flags]
        with patch.object(sys, "argv", command):
            infer_script.main()
        result.unlink()
        return time.perf_counter() - start

    def whole(kind: str, x264: str) -> None:
        net.set_attention(kind)
        flags = "--attention", kind, "--x264-preset", x264, "--dtype", "bfloat16"
        with patch.object(infer_script, "load_network", lambda _: net):
            start, spent = upscale(short, *flags), upscale(long, *flags)
        rate = (long - short) / (spent - start)
        report(f"infer.py, {kind}, x264 {x264}", frames_per_s=rate, frames=long, s=spent, gb=peak_memory())

    def process() -> None:
        net.save_pretrained(folder / "weights")
        code = "import runpy; runpy.run_path('infer.py', run_name='__main__')"
        spent, _, mb = as_process(code, sample, "--weights", folder / "weights", "--dtype", "bfloat16")
        report("infer.py, a process", frames_per_s=long / spent, frames=long, s=spent, host_gb=mb / 1e3)

    for kind in "full", "windows":
        attempt(f"stream, {kind}", partial(network_alone, kind))
    attempt("clip", partial(clip, *((25, 128) if ON_GPU else (2, 16))))
    with TemporaryDirectory() as name:
        folder = Path(name)
        sample = folder / "sample.mp4"
        write_sample(sample, long, (h, w))
        with patch.object(infer_script, "load_network", lambda _: net):
            upscale(short, "--dtype", "bfloat16")  # to warm up
        for kind, x264 in (("full", "medium"), ("windows", "veryfast")):
            attempt(f"infer.py, {kind}, x264 {x264}", partial(whole, kind, x264))
        attempt("process", process)


# ---- All of it ---------------------------------------------------------------------------------------------


GPU = {  # table: seconds that it may take
    "network": 65, "layers": 30, "end2end": 95, "train1": 55, "train2": 70,
    "table1 --methods DOVE AdcVSR 'AdcSR, frame by frame'": 45,
}  # fmt: skip


def gpu(args: Args) -> None:
    """Each table in a process of its own, so that what fails or hangs costs only itself."""
    for table, limit in GPU.items():
        start = time.perf_counter()
        print(f"==== {table}", flush=True)
        try:
            command = [sys.executable, __file__, *shlex.split(table)]
            status = subprocess.run(command, cwd=ROOT, timeout=limit if ON_GPU else None).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        print(f"==== status {status}, {time.perf_counter() - start:.0f} s", flush=True)


# ---- Table 1 ----------------------------------------------------------------------------------------------

# Paper: Table 1: parameters in billions, seconds.
PAPER = {"DOVE": (10.55, 4.42), "SeedVR2": (8.24, 60.61), "AdcSR, frame by frame": (0.46, 0.52),
         "AdcSR, a batch": (0.46, 0.52), "AdcVSR": (0.57, 0.55)}  # fmt: skip
T5 = 4_762_310_656  # weights of DOVE's text encoder, which the paper counts; its only prompt is a file here


def table1(args: Args) -> dict[str, float]:
    """Seconds of a clip of 25x128x128 -> 512x512, in bfloat16; on a CPU of small twins on 5x16x16."""
    t, side, preset = (25, 128, "full") if ON_GPU else (5, 16, "tiny")
    lr, spent = torch.rand(1, t, 3, side, side, device=DEVICE) * 2 - 1, {}
    print(f"{t}x{side}x{side} -> x4, {machine()}" + ("" if ON_GPU else "; seconds: of small twins"))
    print(f"{'':22} parameters   seconds  faster     paper: parameters, seconds, faster")
    for name, (billions, paper) in PAPER.items():
        if args.methods and name not in args.methods:
            continue
        make = {"DOVE": dove, "SeedVR2": seedvr2, "AdcVSR": adcvsr}.get(name, adcsr)
        with torch.device(DEVICE), torch.no_grad():
            net = make(preset).to(DEVICE)
            net = net.for_inference(torch.bfloat16) if isinstance(net, AdcVSR) else net.bfloat16().eval()
            pieces = lr.split(1 if name.endswith("frame by frame") else t, dim=1)
            spent[name] = seconds(lambda: [net(piece) for piece in pieces])  # noqa: B023
        with torch.device("meta"):  # where diffusers cannot be imported with torch 2.6: by now it is
            counted = make("full")
        counted = counted.net if name == "SeedVR2" else counted  # its VAE is not in the paper's number
        size = weights_of(counted) + T5 * (name == "DOVE")
        faster = f"{spent['DOVE'] / spent[name]:6.1f}x" if "DOVE" in spent else f"{'':7}"
        ours = f"{size / 1e9:8.2f} B {spent[name]:9.3f} {faster}"
        papers = f"{billions:18.2f} B {paper:8.2f} {PAPER['DOVE'][1] / paper:6.1f}x"
        print(f"{name:22} {ours} {papers}", flush=True)
        record(f"table1, {name}", s=spent[name], parameters=size)
    return spent


def adcsr(preset: str) -> AdcVSR:
    return AdcVSR(**PRESETS[preset] | {"temporal": "none"})


def adcvsr(preset: str) -> AdcVSR:
    return AdcVSR(**PRESETS[preset])


def dove(preset: str) -> DoveTeacher:
    """DOVE at random weights: full, which is CogVideoX1.5-5B, or tiny."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    full = preset == "full"
    attention, layers, text = (48, 42, 4096) if full else (2, 2, 32)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=attention, num_layers=layers, text_embed_dim=text, patch_size_t=2,
        patch_bias=False, sample_width=300, sample_height=300, sample_frames=81,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(128, 256, 256, 512) if full else (32,) * 4, latent_channels=16,
        layers_per_block=3 if full else 1, scaling_factor=0.7,
    )  # fmt: skip
    return DoveTeacher(transformer, vae, CogVideoXDPMScheduler(), torch.zeros(226, text), seed=0)


def seedvr2(preset: str) -> SeedVR2Teacher:
    """SeedVR2 at random weights: full, which is the 7B, or tiny."""
    full = preset == "full"
    net = NaDiT(**SEEDVR2["7b"] if full else SEEDVR2["tiny"] | {"latents": VideoVAE.LATENTS})
    vae = VideoVAE() if full else VideoVAE((8, 8, 16, 16), groups=4)
    return SeedVR2Teacher(net, vae, torch.zeros(58, net.txt_in.in_features))


# ---- Training ---------------------------------------------------------------------------------------------


def train(script, args: Args) -> None:
    """Steps of a train script's `train_step` on one clip, whose teacher video comes from a cache."""
    cfg, size = (script.PRESETS["full"], "full") if ON_GPU else (script.PRESETS["smoke"], "tiny")
    world = World(0, 1, torch.device(DEVICE))
    with torch.device(DEVICE):
        student = AdcVSR(**PRESETS[size] | {"pixel_skip": False})
        encoder, dists = feature_encoder(student), DISTS.seeded(VGG16) if ON_GPU else DISTS.seeded()
        discriminators = (
            new_discriminators(student, args) if script is train_stage2 else torch.nn.ModuleDict()
        )
    nets = [net.to(DEVICE) for net in (student, encoder, dists, discriminators)]
    if ON_GPU:  # as the train scripts place them
        for net in (encoder, *(d.backbone for d in discriminators.values())):
            world.place_frozen(net)
    optimisers = [
        torch.optim.Adam([{"params": net.parameters()}], lr=1e-7, fused=world.fused)
        for net in (student, discriminators)
    ]
    judges = (discriminators, optimisers) if discriminators else optimisers[:1]
    clips = {k: torch.rand(1, cfg.frames, 3, cfg.size, cfg.size, device=DEVICE) for k in ("hr", "video")}
    clips |= {"lr": clips["hr"][..., ::SCALE, ::SCALE].contiguous(), "image": clips["hr"][:, :1]}
    clips |= {"random_images": clips["video"], "order": torch.arange(cfg.frames, device=DEVICE)[None].flip(1)}

    def step() -> dict:
        return script.train_step([clips], student, None, encoder, dists, *judges, world, cfg)

    def row(checkpointing: str, name: str) -> None:
        student.for_training(checkpointing, world.device)
        for d in discriminators.values():
            d.backbone.checkpointing = checkpointing in ("all", *["tail"] * (d.domain == "pixel"))
        spent = seconds(step, 2)
        losses = {k: float(v) for k, v in step().items() if "/" not in k}
        report(f"{script.__name__}, {name}", s=spent, gb=peak_memory(), **losses)

    print(f"{script.__name__}, one clip of {cfg.frames}x{cfg.size}x{cfg.size}, {machine()}")
    print(", ".join(f"{type(net).__name__} {weights_of(net) / 1e6:.4g} M" for net in nets))
    row("all", "recomputing all")
    attempt("profile", lambda: profile(script.__name__, step, 25))
    if ON_GPU:
        attempt("tail", lambda: row("tail", "recomputing the tail"))
        attempt("none", lambda: row("none", "recomputing nothing"))
        kernels.ENABLED = False
        attempt("torch", lambda: row("all", "recomputing all, torch"))
        kernels.ENABLED = True
    spent = seconds(step, 1)
    with FlopCounterMode(display=False) as counter:  # 2 for a multiply-add
        step()
    work = counter.get_total_flops() / 1e12
    print(f"{spent:.3g} s a step, {work:.4g} TFLOP: {work / spent:.3g} TFLOP/s; peak {peak_memory():.1f} GB")
    record(f"{script.__name__}, operations", s=spent, TFLOP=work, TFLOP_per_s=work / spent)


def weights_of(net: torch.nn.Module) -> int:
    return sum(x.numel() for x in (*net.parameters(), *net.buffers()))


def feature_encoder(student: AdcVSR) -> FeatureEncoder:
    """At random weights: SD2.1's VAE for the full student, a small stand-in for tiny."""
    from diffusers import AutoencoderKL

    if not ON_GPU:
        return FeatureEncoder.seeded(student.config)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    )  # fmt: skip
    return FeatureEncoder(vae, torch.nn.Conv2d(4, 256, 3, padding=1), DecoderMidBlock(256, student.config))


def new_discriminators(student: AdcVSR, args: Args) -> torch.nn.ModuleDict:
    backbone = convnext(args.backbone if ON_GPU else "tiny", pretrained=False)
    pixel = PixelDiscriminator(backbone, checkpointing=True)
    return torch.nn.ModuleDict(
        {"pixel": pixel, "feature": FeatureDiscriminator(student.unet, checkpointing=True)}
    )


# ---- Data -------------------------------------------------------------------------------------------------


def data(args: Args, frames: int = 25, size: int = 512) -> None:
    """Seconds of one core for each part of loading; then a list of a million names."""
    clip = procedural_clip(generator(0), frames, (size, size)).frames
    parts = {"procedural clip": lambda i: procedural_clip(generator(i), frames, (size, size))}
    parts |= {"degradation": lambda i: degrade(clip, generator(i))}
    parts |= {"search for cuts": lambda i: list(in_shots(Frame(rgb, Fraction(0)) for rgb in clip))}
    if args.videos and args.images:
        shape = {"frames": frames, "size": size}
        sources = Sources(args.videos, args.images, validation=args.validation, **shape)
        one, two = TrainingClips(sources), TrainingClips(sources, stage=2, real_types=True)
        parts |= {"video, cropped": lambda i: one.draw(one.videos, frames, i)}
        parts |= {"photo, cropped": lambda i: one.draw(one.images, frames, i)}
        parts |= {"sample of stage 1": lambda i: one[i], "sample of stage 2": lambda i: two[i]}
    print(f"{frames}x{size}x{size}, one core, {machine()}")
    with one_thread():
        for name, make in parts.items():
            start = time.process_time()
            for i in range(args.clips):
                make(i)
            spent = (time.process_time() - start) / args.clips
            print(f"{name:18} {spent:6.2f} s  {8 * spent:5.1f} cores for 1 step/s of 8", flush=True)
    with TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        names.write_text("".join(f"clips/{i // 1000:04d}/{i % 1000:03d}.mp4\n" for i in range(10**6)))
        os.utime(names, (0, 0))  # a list is kept once it is older than clocks are coarse
        setup = f"from pathlib import Path; import files; files.INDEXES = Path({folder!r})"
        for turn in "first process", "others":
            spent, before, peak = as_process("files.list_files(sys.argv[1], {'.mp4'})[0]", names, setup=setup)
            print(f"a million names, {turn}: {spent:.1f} s, {peak - before:.0f} MB", flush=True)


WORK = {
    "infer": infer, "network": network, "layers": layers, "attention": attention, "end2end": end2end,
    "table1": table1, "train1": partial(train, train_stage1), "train2": partial(train, train_stage2),
    "data": data, "gpu": gpu,
}  # fmt: skip


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.what not in WORK:
        raise UserError(f"{args.what}: no such table; give one of {', '.join(WORK)}")
    WORK[args.what](args)


if __name__ == "__main__":
    run(main)
