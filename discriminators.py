"""Dual-head discriminators: detail and consistency, judged apart (paper Sec. 3.3, Fig. 2 b, Eq. 2-5).

    pixels x    (b t 3 H W) -> frozen ConvNeXt -> maps at 1/4 ... 1/32 -> 1x1 convs, one grid H/8 -+
    features f  (b t c h w) -> conv -> frozen UNet of stage 1, temporal blocks included -----------+
                                                                                                   v
              scores of detail (b t 192 h w) <-- 1x1 --+-- conv 2D <-- conv 1D over time <-- conv 2D
         scores of consistency (b t  64 h w) <-- 1x1 --+                                      (`Tail`)

A score above 0 says real, below 0 fake. Each head learns from five types of clip, labelled so that detail and
consistency vary independently: neither can be bought with the other.
"""

import copy
from typing import NamedTuple

import huggingface_hub
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from model import UNSHUFFLE, AdcVSR, Memory, TemporalConv, UNet, maybe_checkpoint, pad_to_multiple
from runtime import UserError, freeze

# Paper: Eq. 5. What the two heads should say of each type of clip: +1 real, -1 fake, 0 not asked.
LABELS = {
    #               (detail, consistency)
    "student":        (-1, -1),  # what the student makes
    "video":          ( 0, +1),  # its details are no model: most real videos are less sharp than photos
    "shuffled_video": ( 0, -1),  # the same frames in random order
    "image":          (+1, +1),  # one photo, repeated: a still clip
    "random_images":  (+1, -1),  # photos that have nothing to do with each other
}  # fmt: skip

# Each table of labels that the paper compares.
LABEL_TABLES = {
    "full": LABELS,
    # Paper: Table 3. Choice: one question, "is this a real clip?", for all channels; two heads with the same
    # labels are one. Real is what neither head calls fake, so the clips stay those of the full table.
    "single": {name: (-1, -1) if -1 in label else (+1, +1) for name, label in LABELS.items()},
    # Paper: Table 7, "No Types 3 & 5".
    "three_types": {name: LABELS[name] for name in ("student", "video", "image")},
    # Paper: Table 7, "Real Videos as Detail-Real".
    "detailed_video": LABELS | {"video": (+1, +1)},
}

WIDTH = 256  # channels of the last features, shared out among the heads                 Paper: Sec. 4.1
HEADS = (192, 64)  # of them for detail and for consistency                              Paper: Sec. 4.1
SLOPE = 0.2  # Choice: of the leaky ReLU, as in HYPIR, whose ConvNeXt this is
BACKBONE = "convnext_xxlarge.clip_laion2b_soup"  # OpenCLIP's laion2b_s34b_b82k_augreg_soup, in timm
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]                      OpenCLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-2  # Choice: of normalisations; the rounding in flat areas is amplified less than with 1e-6


class Scores(NamedTuple):
    """What the two heads say of a clip at each place of each frame, real > 0 > fake."""

    detail: Tensor  # (b t n h w), n = the head's channels, 0 where there is no such head
    consistency: Tensor


# ------------------------------------------------------------------------------------------------------
# Labels and losses


def labels(table: str = "full", heads: tuple[int, int] = HEADS) -> dict[str, tuple[int, int]]:
    """A table of `LABEL_TABLES` as heads of these widths use it. Raises `UserError` for an unknown one.

    A head of width 0 is not asked, and a clip type that no head is asked about is left out.
    """
    if table not in LABEL_TABLES:
        raise UserError(f"--labels {table}: there are {', '.join(LABEL_TABLES)}")
    asked = {
        name: (detail * (heads[0] > 0), consistency * (heads[1] > 0))
        for name, (detail, consistency) in LABEL_TABLES[table].items()
    }
    return {name: label for name, label in asked.items() if any(label)}


def discriminator_loss(scores: Scores, label: tuple[int, int]) -> Tensor:
    """One summand of Eq. 4, for one type of clip: Softplus(-y D) over the heads, y = (detail, consistency).

    A label of 0 costs nothing; its constant Softplus(0) is left out.
    """
    loss, width = scores.detail.new_zeros((), dtype=torch.float32), sum(x.shape[2] for x in scores)
    for score, y in zip(scores, label):
        if y and score.shape[2]:
            # Choice: the paper gives no reduction. Every channel has the same weight, so a head weighs as
            # much as it is wide (192 : 64), for the discriminator as for the student. Means over each head
            # would cancel the widths, which the paper finds to matter (Table 6).
            loss = loss + score.shape[2] / width * F.softplus(-y * score.float()).mean()  # Paper: Eq. 4
    return loss


def adversarial_loss(scores: Scores) -> Tensor:
    """Softplus(-D), a mean over all channels: the student wants to be called real. Paper: Eq. 2, 3."""
    return discriminator_loss(scores, (+1, +1))


def mean_scores(scores: Scores) -> dict[str, Tensor]:
    """The mean score of each head that has channels, for the log, without a gradient."""
    return {head: x.detach().float().mean() for head, x in scores._asdict().items() if x.numel()}


# ------------------------------------------------------------------------------------------------------
# What both discriminators share


class Tail(nn.Module):
    """Three convolutions, 2D, 1D, 2D, then the heads: x (b t c h w) -> `Scores` on the same grid.

    Paper: Sec. 3.3, "three additional alternating 2D and 1D convolutional layers". Choice: three layers, not
    three pairs, so that a score sees three frames; kernels of 3, no normalisation.
    """

    def __init__(self, c_in: int, heads: tuple[int, int], width: int):
        super().__init__()
        check_split(heads, width)
        self.conv1 = nn.Conv2d(c_in, width, 3, padding=1)
        self.conv2 = TemporalConv(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        # Two 1x1 convolutions over the same features are one, its channels split; a head may have none.
        self.heads, self.split = nn.Conv2d(width, width, 1), tuple(heads)

    def forward(self, x: Tensor) -> Scores:
        b = x.shape[0]
        x = rearrange(x, "b t c h w -> (b t) c h w")
        x = F.leaky_relu(self.conv1(x), SLOPE)
        x = F.leaky_relu(self.conv2(x, Memory(batch=b)), SLOPE)
        x = F.leaky_relu(self.conv3(x), SLOPE)
        return Scores(*rearrange(self.heads(x), "(b t) c h w -> b t c h w", b=b).split(self.split, dim=2))


def check_split(heads: tuple[int, ...], width: int) -> None:
    """`UserError` unless these are two heads that share out `width` channels."""
    if len(heads) != 2 or min(heads) < 0 or sum(heads) != width:
        shown = " ".join(map(str, heads))
        raise UserError(f"--heads {shown}: give two numbers of channels that add up to {width}")


class Discriminator(nn.Module):
    """A frozen backbone and layers that learn. `parameters()` and `state_dict()` hold what learns, no more.

    embed(clip) -> maps: what is frozen and sees single frames. Done once, it serves any order of the frames.
    judge(maps) -> `Scores`: all the rest. So the five types of Eq. 4 cost three embeddings of real clips:

        video, image, random_images --embed, no gradient--> maps --data.real_clips--> four types --judge
        student                     --embed--> maps, judged in the student's step, then detached --judge
    """

    def __init__(self, backbone: nn.Module, checkpointing: bool):
        super().__init__()
        self.backbone = freeze(backbone)
        self.backbone.checkpointing = checkpointing  # recompute its activations in the backward pass

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, clip: Tensor) -> Scores:
        return self.judge(self.embed(clip))


# ------------------------------------------------------------------------------------------------------
# The pixel domain


def convnext(name: str = BACKBONE, pretrained: bool = True) -> nn.Module:
    """ConvNeXt's stem and stages: frames (n 3 H W) -> [(n c h w), ...] at 1/4, 1/8, 1/16 and 1/32.

    name: a ConvNeXt of timm. The default has 843 M weights; "convnext_base.clip_laion2b" (OpenCLIP's
    convnext_base_w) has 88 M; "tiny" is drawn at random, the same every time, and needs no download.
    Raises `UserError` where the weights are neither in the cache nor to be had.
    """
    import timm  # a second of import, only for training

    if name == "tiny":
        return tiny_convnext()
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained)
    except Exception as error:  # no such name, no network, no disk space, a damaged file: many kinds
        reason = " ".join(str(error).split())[:150]
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise UserError(
            f"--backbone {name}: cannot load it from {cache} or the Hugging Face hub ({reason}). Connect "
            "once, copy that cache from another machine (HF_HOME moves it), or do without: --domains feature."
        ) from error


def tiny_convnext() -> nn.Module:
    """A ConvNeXt for two CPU cores with random weights, always the same; see `convnext`.

    Choice: orthogonal weights, and a stem blind to flat colour, which would drown the edges that are to be
    judged. timm's own start, near zero, teaches a tail far more slowly.
    """
    import timm

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):  # timm draws weights, too, which leave no trace
        net = timm.create_model(
            "convnext_tiny", features_only=True, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256),
            ls_init_value=None, norm_eps=EPSILON,
        )  # fmt: skip
        for weight in net.parameters():
            if weight.ndim > 1:
                nn.init.orthogonal_(weight, gain=2**0.5, generator=generator)
    net.stem_0.weight.data -= net.stem_0.weight.data.mean(dim=(2, 3), keepdim=True)
    return net


class PixelDiscriminator(Discriminator):
    """Judges x (b t 3 H W) in [-1, 1] on the grid H/8, through a ConvNeXt that never changes. H, W >= 32.

    Choice: all four stages of the backbone, from texture to meaning, each through a 1x1 convolution onto the
    grid of the second, where they add up. With scores on the clip's own grid, as the paper has it, one tensor
    of the tail would take 6.7 GB. The stem stays frozen: training it, as "first convolutions" might be read,
    would send every clip type back through the whole backbone.

    shift: rows and columns that clips lose at random, up to so many; see `embed`.
    """

    SMALLEST = 32  # side of a frame that leaves the coarsest of the backbone's maps a place
    FRAMES = 4  # that go through the backbone together, which bounds memory: 1.6 TFLOP each at 512x512

    def __init__(
        self,
        backbone: nn.Module,
        heads: tuple[int, int] = HEADS,
        width: int = WIDTH,
        checkpointing: bool = False,
        shift: int = 0,
    ):
        super().__init__(backbone, checkpointing)
        self.shift = shift
        self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in backbone.feature_info.channels())
        self.tail = Tail(width, heads, width)
        # CLIP's normalisation, for a range of [-1, 1].
        for name, values in ("mean", [2 * m - 1 for m in CLIP_MEAN]), ("std", [2 * s for s in CLIP_STD]):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, name: str = BACKBONE, **options):
        """With the weights of `convnext(name)`; options as in the constructor."""
        return cls(convnext(name), **options)

    def embed(self, clip: Tensor) -> list[Tensor]:
        """clip (b t 3 H W) in [-1, 1] -> the maps of the stages (b t c h w), fine to coarse.

        All frames lose the same rows above and columns at the left, at random up to `shift` of each.
        """
        # Choice: off, but for tiny. The stem cuts frames into cells of 4x4 pixels, whose borders lie where
        # those of the student's own upsampled cells do. A weak backbone is blind to what happens on these
        # borders, and the student hides a grid there; moving the cut shows it.
        above, left = torch.randint(self.shift + 1, (2,), device="cpu").tolist()
        clip = clip[..., above:, left:]
        frames = rearrange((clip - self.mean) / self.std, "b t c h w -> (b t) c h w")
        parts = [
            maybe_checkpoint(self.backbone.checkpointing, self.stages, part)
            for part in frames.split(self.FRAMES)
        ]
        return [rearrange(torch.cat(level), "(b t) c h w -> b t c h w", b=len(clip)) for level in zip(*parts)]

    def stages(self, frames: Tensor) -> list[Tensor]:
        """The backbone's maps, normalised over channels, much as its own next layer reads them."""
        maps = [rearrange(x, "n c h w -> n h w c") for x in self.backbone(frames)]
        dtype = maps[-1].dtype  # autocast keeps the first in float32: the largest, and for no use
        maps = [F.layer_norm(x, x.shape[-1:], eps=EPSILON).to(dtype) for x in maps]
        return [rearrange(x, "n h w c -> n c h w") for x in maps]

    def judge(self, maps: list[Tensor]) -> Scores:
        b, _, _, h, w = maps[1].shape
        x = 0
        for projection, level in zip(self.projections, maps):
            y = projection(rearrange(level, "b t c h w -> (b t) c h w"))
            x = x + F.interpolate(y, size=(h, w), mode="bilinear")
        return self.tail(rearrange(x, "(b t) c h w -> b t c h w", b=b))


# ------------------------------------------------------------------------------------------------------
# The feature domain


class FeatureDiscriminator(Discriminator):
    """Judges features f (b t c h w), as f_S and f_T, on their own grid, through stage 1's UNet, frozen.

    unet: the student's; it is copied. It sees time, so that every type of clip has to go through it.
    Choice: its frozen last convolution stays, whose 256 channels are what the tail reads.
    """

    def __init__(
        self,
        unet: UNet,
        heads: tuple[int, int] = HEADS,
        width: int = WIDTH,
        checkpointing: bool = False,
    ):
        super().__init__(copy.deepcopy(unet), checkpointing)
        features = unet.conv_out.out_channels  # the width at which the UNet ends, and f with it
        self.conv_in = first_conv(unet.conv_in, features)
        self.tail = Tail(features, heads, width)

    def embed(self, clip: Tensor) -> list[Tensor]:
        """f itself: what comes first is the convolution that learns."""
        return [clip]

    def judge(self, maps: list[Tensor]) -> Scores:
        b, _, _, h, w = maps[0].shape
        x = pad_to_multiple(rearrange(maps[0], "b t c h w -> (b t) c h w"), AdcVSR.MULTIPLE // UNSHUFFLE)
        x = self.backbone(x, Memory(batch=b), conv_in=self.conv_in)
        return self.tail(rearrange(x[..., :h, :w], "(b t) c h w -> b t c h w", b=b))


def first_conv(conv: nn.Conv2d, c_in: int) -> nn.Conv2d:
    """conv for c_in input channels: its kernels repeated, cut, and scaled to the same sum of inputs.

    Choice: AdcSR's recipe for its discriminator (4 channels to 256, divided by 64), for any two widths.
    """
    new = nn.Conv2d(c_in, conv.out_channels, conv.kernel_size, padding=conv.padding)
    old = conv.in_channels
    kernel = repeat(conv.weight.detach(), "o i h w -> o (r i) h w", r=-(-c_in // old))[:, :c_in]
    new.weight.data.copy_(kernel * old / c_in)
    new.bias.data.copy_(conv.bias.detach())
    return new
