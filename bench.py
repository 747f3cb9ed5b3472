"""All benchmarks: `python bench.py infer | degrade | data | metrics`. Each prints a table, none asserts.

Times are of this machine at this moment: compare rows of one run, not rows of two machines.
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent
SIZES = ((128, 96), (320, 240), (640, 360))  # LR width and height


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median wall seconds of work(), after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def machine() -> str:
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def bench_infer(frames: int = 4) -> None:
    """Seconds a frame by size and dtype, start-up, and on a GPU peak memory, with the shipped weights."""
    from infer import SHIPPED
    from model import AdcVSR

    print(f"tiny, {frames} frames a chunk, {machine()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        net = AdcVSR.from_pretrained(SHIPPED).to(device, dtype).to(memory_format=torch.channels_last).eval()
        for width, height in SIZES:
            lr = torch.rand(1, frames, 3, height, width, device=device) * 2 - 1
            with torch.no_grad():
                spent = seconds(lambda: net(lr)) / frames  # noqa: B023
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if device == "cuda" else ""
            print(f"{str(dtype)[6:]:9} {width}x{height} -> x4  {spent:7.3f} s/frame {memory}", flush=True)
    print(f"start-up, process start to first frame on the network: {start_up():.1f} s")


def start_up() -> float:
    """Seconds from the start of a process until the sample's first frame has been through the network."""
    work = (
        "import infer, itertools; args = infer.parse(['sample.mp4']); net = infer.load_network(args); "
        "reader = infer.VideoReader('sample.mp4'); frames = itertools.islice(reader, 1); "
        "next(infer.upscale(net, frames, 1, 'none')); print('ready')"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", work], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def bench_degrade(clips: int = 6) -> None:
    """CPU seconds a 25x512x512 clip on one core: the per-frame port, ours, ours with a faster x264."""
    from data import procedural_clip
    from degrade import draw_steps, one_thread
    from tests.reference_degrade import apply_step

    spent: dict[str, list[float]] = {}
    columns = ("port", "ours", "ours, veryfast")
    with one_thread():
        for seed in range(clips):
            clip = procedural_clip(np.random.default_rng(seed), 25, (512, 512)).frames
            for column, name in enumerate(columns):
                steps = draw_steps(
                    np.random.default_rng(seed), *clip.shape[:3], "realbasicvsr",
                    "veryfast" if name.endswith("veryfast") else "medium",
                )  # fmt: skip
                frames = list(clip)
                for step in steps:
                    start = time.process_time()
                    frames = (
                        apply_step(frames, step, own_noise=True)
                        if name == "port"
                        else list(step.apply(frames))
                    )
                    row = spent.setdefault(type(step).__name__, [0.0] * len(columns))
                    row[column] += (time.process_time() - start) / clips
    spent["whole chain"] = [sum(column) for column in zip(*spent.values())]
    print(f"CPU seconds for a 25x512x512 clip, mean of {clips}; {machine()}, one core")
    print(f"{'':12} " + " ".join(f"{c:>16}" for c in columns))
    for name, row in spent.items():
        print(f"{name:12} " + " ".join(f"{s:8.3f} ({row[0] / s:5.2f}x)" for s in row))


def bench_data(videos: str, images: str, clips: int = 8, size: int = 512) -> None:
    """Clips a second and core of each part of loading, and the cores that a training speed needs."""
    from data import TrainingClips

    torch.set_num_threads(1)
    kinds = {
        "videos": dict(images=None),
        "photos": dict(videos=None),
        "procedural": dict(procedural=1.0),
        "videos and photos 1:1": {},
    }
    print(f"25x{size}x{size}, one core, {machine()}")
    for name, options in kinds.items():
        source = TrainingClips(**{"videos": videos, "images": images, "size": size, **options})
        start = time.process_time()
        for index in range(clips):
            source[index]
        spent = (time.process_time() - start) / clips
        print(
            f"{name:24} {1 / spent:6.2f} clips/s   {8 * spent:5.1f} cores for 1 step/s of 8 clips", flush=True
        )


def bench_metrics(frames: int = 25, size: int = 512) -> None:
    """Frames a second of what metrics.py computes itself."""
    import metrics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gt = torch.rand(frames, 3, size, size, device=device)
    pred = (gt + 0.05 * torch.randn_like(gt)).clamp(0, 1)
    judges = {
        "psnr": lambda: metrics.psnr(pred, gt),
        "ssim": lambda: metrics.ssim(pred, gt),
        "ewarp, DIS": lambda: metrics.warping_errors(pred, metrics.dis_flow),
    }
    try:
        raft = metrics.RaftFlow.from_pretrained(device)
        judges["ewarp, RAFT"] = lambda: metrics.warping_errors(pred, raft)
    except metrics.Unavailable as error:
        print(error)
    print(f"{frames}x{size}x{size}, {machine()}")
    for name, judge in judges.items():
        with torch.no_grad():
            print(f"{name:12} {frames / seconds(judge, 1):8.1f} frames/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("infer", "degrade", "data", "metrics"))
    parser.add_argument("--videos", default="datasets/videos", help="for data")
    parser.add_argument("--images", default="datasets/images", help="for data")
    args = parser.parse_args()
    work = {
        "infer": bench_infer,
        "degrade": bench_degrade,
        "data": lambda: bench_data(args.videos, args.images),
        "metrics": bench_metrics,
    }
    work[args.what]()


if __name__ == "__main__":
    main()
