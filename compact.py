"""AdcVSR's idea on a small pretrained 2D network (paper Sec. 3.2, in small): --preset compact of both stages.

    lr (b t 3 h w) --(conv, PReLU) x 33, a TemporalBlock after every fourth--> features (b t 64 h w)
                   --conv, pixel shuffle--> + nearest x4 of lr --> sr (b t 3 4h 4w)

The paper takes a good 2D network, which generates detail, and adds a few 1D temporal convolutions, which
make it consistent; two heads judge both apart. Its 2D network is AdcSR, pruned from SD2.1 (456 M weights).
Here it is Real-ESRGAN's small general one (SRVGGNetCompact, 1.2 M weights, trained by its authors with a GAN
on photographs), which two CPU cores can run and train. Temporal blocks, losses, discriminators are the same.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from metrics import dis_flow, dists_loss, in_frame, unoccluded, warp
from model import (
    SCALE,
    TEMPORAL_KINDS,
    AdcVSR,
    Delay,
    Student,
    WeightsError,
    per_frame,
    read_pickle,
    require_shapes,
)
from runtime import UserError, explained, freeze

REALESRGAN = Path(__file__).parent / "weights" / "realesr-general-x4v3.pth"  # the 2D start, half precision


class CompactVSR(Student):
    """lr (b t 3 h w) in [-1, 1] -> sr (b t 3 4h 4w) in about [-1, 1]; any h, w, t >= 1. Called as `AdcVSR`.

    features, layers: channels and inner convolutions of the 2D network; every: how many of its convolutions
    stand between two temporal blocks; temporal_kind: as `AdcVSR`'s, or "none". At start it is the 2D network,
    frame by frame.
    """

    pixel_skip = True  # the input is part of the output: what the network paints is a residual

    def __init__(self, features: int = 64, layers: int = 32, every: int = 4, temporal_kind: str = "conv"):
        super().__init__()
        self.config = dict(features=features, layers=layers, every=every, temporal_kind=temporal_kind)
        self.body = nn.ModuleList()  # under the names of the official file: conv 0, PReLU 1, conv 2, ...
        for c_in in [3] + [features] * layers:
            self.body += [nn.Conv2d(c_in, features, 3, padding=1), nn.PReLU(features)]
        self.body.append(nn.Conv2d(features, 3 * SCALE**2, 3, padding=1))
        # After which convolutions, the first of all being number 0; their PReLU comes before the block.
        after = range(every, layers + 1, every) if temporal_kind != "none" else ()
        self.temporal = nn.ModuleDict(
            {str(2 * n + 1): TEMPORAL_KINDS[temporal_kind](features) for n in after}
        )
        self.delay = Delay()

    def forward(self, lr: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """A whole clip. With return_features also what the last convolution reads, (b t features h w)."""
        features, lr = self.encode(lr)
        sr = self.decode(features, lr)
        return (sr, features) if return_features else sr

    def encode(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """lr (b t 3 h w) -> features (b t features h w) and the frames they belong to."""
        x = (lr / 2 + 0.5).to(self.body[0].weight.dtype)  # the 2D network takes and gives [0, 1]
        for i, layer in enumerate(self.body[:-1]):
            x = per_frame(layer, x)
            if str(i) in self.temporal:
                x = self.temporal[str(i)](x)
        return x, self.delay(lr, x.shape[1])

    def decode(self, features: Tensor, lr: Tensor) -> Tensor:
        """features (b t features h w), lr (b t 3 h w) -> sr (b t 3 4h 4w)."""
        detail = per_frame(lambda x: F.pixel_shuffle(self.body[-1](x), SCALE), features)
        return 2 * detail.to(lr.dtype) + lr.repeat_interleave(SCALE, -2).repeat_interleave(SCALE, -1)

    def for_training(self, checkpointing: str, device: torch.device) -> None:
        """As `AdcVSR.for_training`; its activations are few, and always kept."""
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_realesrgan(cls, path: str | Path = REALESRGAN, **config):
        """With the 2D weights of Real-ESRGAN's official `realesr-general-x4v3.pth`, key by key; temporal
        blocks start as the identity. Raises `WeightsError`."""
        net = cls(**config)
        state = read_pickle(path).get("params", {})
        require_shapes(path, state, {f"body.{k}": v.shape for k, v in net.body.state_dict().items()})
        net.load_state_dict(net.state_dict() | state)
        return net


# ------------------------------------------------------------------------------------------------------
# Its recipe: two terms beside those of Eq. 2


class Anchors(nn.Module):
    """What keeps the small student sharp and steady while it learns from HR, added to Eq. 2's terms.

    Choice: not in the paper, whose students learn from a video teacher. HR in its place says neither how much
    detail a frame can bear, which the 2D network knows, nor that what was made up must stay from frame to
    frame.
    """

    def __init__(self, dists: nn.Module, lambda_2d: float, lambda_warp: float):
        super().__init__()
        self.dists, self.lambda_2d, self.lambda_warp = dists, lambda_2d, lambda_warp
        self.frame_by_frame = freeze(CompactVSR.from_realesrgan())

    def forward(self, x_s: Tensor, clips: dict[str, Tensor]) -> Tensor:
        """x_s (b t 3 4h 4w); clips: its lr (b t 3 h w) and hr, all in [-1, 1]. Returns ()."""
        term = x_s.new_zeros(())
        if self.lambda_2d:
            term = term + self.lambda_2d * dists_loss(self.dists, x_s, self.frame_by_frame(clips["lr"]))
        if self.lambda_warp:
            term = term + self.lambda_warp * warping_loss(x_s, clips["hr"])
        return term


def load_anchors(cfg, dists: nn.Module | None) -> Anchors | None:
    """The anchors that a training asks for (`lambda_2d`, `lambda_warp`), None if none. Raises `UserError`."""
    if not (cfg.lambda_2d or cfg.lambda_warp):
        return None
    if cfg.lambda_2d and not dists:
        raise UserError("--lambda-2d: the distance is measured by --dists, which is none")
    return Anchors(dists, cfg.lambda_2d, cfg.lambda_warp)


def warping_loss(x_s: Tensor, hr: Tensor) -> Tensor:
    """Mean L1 between each frame of x_s (b t 3 h w) and the next one, moved back along HR's motion: ()."""

    def neighbours(clip: Tensor) -> list[Tensor]:
        return [rearrange(part, "b t c h w -> (b t) c h w") for part in (clip[:, :-1], clip[:, 1:])]

    first, second = neighbours(hr / 2 + 0.5)
    forward, backward = dis_flow(first, second), dis_flow(second, first)
    mask = unoccluded(forward, backward) & in_frame(forward)
    now, after = neighbours(x_s.float())
    return (mask * (warp(after, forward.float()) - now)).abs().mean()


# ------------------------------------------------------------------------------------------------------


def load_student(folder_or_id: str | Path) -> Student:
    """The student in a folder or under a hub id: of the class that its `config.json` names, `AdcVSR` if none;
    from a .pth file, Real-ESRGAN's small network, frame by frame. Raises `WeightsError`.
    """
    if str(folder_or_id).endswith(".pth"):
        return CompactVSR.from_realesrgan(folder_or_id)
    way_out = "Give a folder with config.json and model.safetensors, or a hub id."
    with explained(f"{folder_or_id}: cannot load a student", way_out, WeightsError):
        inside = Path(folder_or_id) / "config.json"
        config = inside if Path(folder_or_id).is_dir() else hf_hub_download(str(folder_or_id), "config.json")
        name = json.loads(Path(config).read_text()).get("network", "AdcVSR")
    return {"AdcVSR": AdcVSR, "CompactVSR": CompactVSR}.get(name, AdcVSR).from_pretrained(folder_or_id)
