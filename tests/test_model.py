"""What the paper and its users rely on in model.py: sizes, parity, identity, loaders, layout in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import PRESETS, SCALE, AdcVSR, TemporalBlock
from runtime import WeightsError
from stream import stream

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL_KEYS = ROOT / "../shared/docs/adcsr_state_dict_keys.txt"
needs_keys = pytest.mark.skipif(
    not OFFICIAL_KEYS.is_file(), reason="AdcSR's key list in ../shared is not here"
)

# The topology and all 38 temporal blocks of the full network, 12 channels wide.
SMALL = dict(
    PRESETS["full"], unet_channels=[16] * 4, heads=[2] * 4, decoder_channels=[8] * 4, norm_groups=2
)  # fmt: skip
# Widths that differ from level to level, for everything that moves weights between networks.
UNEVEN = dict(SMALL, unet_channels=[16, 32, 48, 48], heads=[1, 2, 3, 3], decoder_channels=[4, 8, 8, 12])
NORMS = {"norm_groups": 2}  # what a single block reads of the config


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def same_numbers_every_time(monkeypatch):
    """Of one seed, on the GPU where there is one, and there in all of float32's bits and in one order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def awake(net: nn.Module) -> nn.Module:
    """net with random values wherever training starts from zeros: every layer has its say in the output."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net.eval()


def clip(b: int = 1, t: int = 2, h: int = 16, w: int = 16, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(b, t, 3, h, w, dtype=dtype) * 2 - 1


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Sizes and names


@pytest.mark.parametrize(
    "temporal, parameters, blocks",
    [("none", 456_073_683, 0), ("layer", 572_935_443, 38), ("block", 487_190_163, 9)],
)
def test_full_size_is_the_papers(temporal, parameters, blocks):
    with torch.device("meta"):
        net = AdcVSR(**{**PRESETS["full"], "temporal": temporal})
    assert size(net) == parameters
    assert sum(isinstance(m, TemporalBlock) for m in net.modules()) == blocks
    assert net.lag == 2 * blocks


def test_each_part_of_the_full_network_has_adcsrs_size_groups_and_heads():
    with torch.device("meta"):
        net = AdcVSR(**{**PRESETS["full"], "temporal": "none"})
    unet, decoder = net.unet, net.decoder
    assert size(unet) == 443_695_696
    assert size(unet.conv_in) == 26_160
    assert [size(b) for b in unet.down_blocks] == [4_677_360, 17_764_320, 71_010_240, 33_189_120]
    assert size(unet.mid_block) == 49_795_200
    assert [size(b) for b in unet.up_blocks] == [88_500_480, 133_709_760, 35_751_840, 8_717_520]
    assert size(unet.conv_norm_out) + size(unet.conv_out) == 553_696
    assert size(decoder.mid_block) == 2_626_048
    assert [size(b) for b in decoder.up_blocks] == [4_133_632, 4_133_632, 1_215_232, 267_584]
    assert size(decoder.conv_norm_out) + size(decoder.conv_out) == 128 + 1_731
    groups = {m.num_channels: m.num_groups for m in unet.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {240: 24, 720: 24, 480: 32, 960: 32, 1440: 32, 1920: 32}
    attentions = [m for m in unet.modules() if isinstance(m, model.SelfAttention)]
    assert {m.to_q.out_features / m.heads for m in attentions} == {48}


def test_tiny_has_at_most_8_million_parameters_and_16_megabytes(tmp_path):
    net = AdcVSR(**PRESETS["tiny"])
    assert net.lag == 2 * sum(isinstance(m, TemporalBlock) for m in net.modules()) > 0
    assert size(net) <= 8_000_000
    net.half().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 16_000_000


def official_keys() -> dict[str, tuple[str, tuple]]:
    """{key: (key whose storage it shares or "", shape)}, of AdcSR's net_params and of its half decoder."""
    lines = [
        line.split("\t")
        for line in OFFICIAL_KEYS.read_text().splitlines()
        if not line.startswith("#") and line
    ]
    return {
        key: (rest[0].removeprefix("= ") if rest else "", tuple(json.loads(shape)))
        for key, shape, *rest in lines
    }


@needs_keys
def test_keys_and_shapes_are_the_official_ones():
    with torch.device("meta"):
        own = {
            k: tuple(v.shape)
            for k, v in AdcVSR(**{**PRESETS["full"], "temporal": "none"}).state_dict().items()
        }
    official = {k: shape for k, (alias, shape) in official_keys().items() if not alias}
    own_unet = {k.replace("unet.", "body.1.", 1): v for k, v in own.items() if k.startswith("unet.")}
    own_mid = {
        k.replace("decoder.mid_block.", "body.2.", 1): v
        for k, v in own.items()
        if k.startswith("decoder.mid_block.")
    }
    assert own_unet | own_mid == {k: v for k, v in official.items() if k.startswith("body.")}
    half_decoder = {k: v for k, v in official.items() if not k.startswith(("body.", "conv_in."))}
    assert {k.removeprefix("decoder."): v for k, v in own.items() if k.startswith("decoder.")} == half_decoder


def test_attention_over_time_is_the_naive_one():
    """Table 5's variant: at every pixel, a softmax over the frames of the clip, head by head, where queries
    and keys, as complex numbers, are turned by an angle for each frame (RoFormer)."""
    block = awake(model.TemporalAttention(32)).double()
    x = torch.randn(2, 5, 32, 2, 3, dtype=torch.float64)
    clip, out = (rearrange(v, "b t c h w -> b h w t c") for v in (x, block(x)))
    q, k, v = block.qkv(F.layer_norm(clip, (32,), block.norm.weight, block.norm.bias)).chunk(3, dim=-1)
    turn = torch.exp(1j * torch.arange(5)[:, None] * torch.tensor([1, 1 / 100], dtype=torch.float64))
    heads = []
    for i in range(0, 32, 4):
        (q_i, k_i) = (torch.complex(y[..., i : i + 2], y[..., i + 2 : i + 4]) * turn for y in (q, k))
        weights = ((q_i @ k_i.mH).real / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., i : i + 4])
    assert block.heads == 8 and distance(out, clip + block.out(torch.cat(heads, dim=-1))) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", model.TEMPORAL_KINDS)
@pytest.mark.parametrize("t", [5, 40])
def test_the_order_of_the_frames_matters(kind, t):
    """What looks along time makes of a shuffled clip more than its result shuffled, at any length."""
    block, x, order = awake(model.TEMPORAL_KINDS[kind](16)), torch.randn(1, t, 16, 2, 2), torch.randperm(t)
    assert distance(block(x[:, order]), block(x)[:, order]) > 1e-3


@torch.no_grad()
def test_attention_over_time_counts_from_frame_to_frame_not_from_the_start():
    """Its positions are relative: what two frames have to do with each other depends on their distance."""
    q, k = torch.randn(2, 1, 8).double()
    for t in 3, 30:
        products = model.rotary(q.expand(t, 8)) @ model.rotary(k.expand(t, 8)).mT
        for apart in range(1 - t, t):
            diagonal = products.diagonal(apart)
            assert distance(diagonal, diagonal[:1].expand_as(diagonal)) < 1e-12


def test_importing_the_model_does_not_import_diffusers():
    code = "import sys, model; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Equality with diffusers, weights copied by name

WITH_ATTENTION = {**NORMS, "decoder_attention": True}
VAE_ATTENTION = dict(heads=1, dim_head=12, norm_num_groups=2, eps=1e-6, bias=True, residual_connection=True)
VAE_RESNETS = dict(resnet_eps=1e-6, resnet_groups=2)
RESNET = dict(in_channels=12, temb_channels=None, groups=2, eps=1e-5)
BLOCKS = {  # ours; theirs
    "resnet": (model.ResnetBlock, (12, 12, NORMS), ResnetBlock2D, (), RESNET),
    "wider": (model.ResnetBlock, (12, 24, NORMS), ResnetBlock2D, (), dict(RESNET, out_channels=24)),
    "transformer": (
        model.TransformerBlock, (12, 2, NORMS),
        Transformer2DModel, (2, 6, 12), dict(norm_num_groups=2, use_linear_projection=True),
    ),
    "down": (model.Downsample, (12,), Downsample2D, (12,), dict(use_conv=True, name="op")),
    "up": (model.Upsample, (12,), Upsample2D, (12,), dict(use_conv=True)),
    "decoder attention": (model.DecoderAttention, (12, NORMS), Attention, (12,), VAE_ATTENTION),
    "decoder mid": (
        model.DecoderMidBlock, (12, WITH_ATTENTION),
        UNetMidBlock2D, (12, None), dict(attention_head_dim=12, **VAE_RESNETS),
    ),
    "decoder up": (
        model.DecoderUpBlock, (12, 8, True, NORMS),
        UpDecoderBlock2D, (12, 8), dict(num_layers=3, **VAE_RESNETS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block_equals_diffusers(name):
    ours, args, theirs, their_args, options = BLOCKS[name]
    own, reference = ours(*args), theirs(*their_args, **options)
    own.load_state_dict(awake(reference).state_dict())
    x = torch.randn(2, 12, 6, 10)
    expected = reference(x, None) if ours is model.ResnetBlock else reference(x)
    assert distance(own(x), expected[0] if name == "transformer" else expected) < 1e-5


def sd_unet(in_channels: int, out_channels: int, widths: list[int], **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=widths,
        attention_head_dim=UNEVEN["heads"],  # diffusers' name for SD2.1's numbers of heads
        cross_attention_dim=8,
        norm_num_groups=2,
        **{"use_linear_projection": True, **options},
    )


@torch.no_grad()
def test_unet_equals_diffusers_without_time_and_text():
    reference = awake(sd_unet(12, 12, [model.kept(c) for c in UNEVEN["unet_channels"]]))
    removed = ("time_embedding", "time_emb_proj", "attn2", "transformer_blocks.0.norm2")
    for key, parameter in reference.named_parameters():
        if "time_emb_proj" in key or "attn2.to_out" in key:
            parameter.zero_()
    own = AdcVSR(**{**UNEVEN, "temporal": "none"}).unet
    own.load_state_dict({k: v for k, v in reference.state_dict().items() if not any(r in k for r in removed)})
    own, reference = own.double(), reference.double()  # so deep that float32 rounding reaches 1e-5
    x, text = torch.randn(2, 12, 16, 24).double(), torch.randn(2, 7, 8).double()
    expected = reference(x, timestep=500, encoder_hidden_states=text).sample
    assert distance(own(x[None])[0], expected) < 1e-9


@torch.no_grad()
def test_half_decoder_equals_diffusers_from_its_mid_block_on():
    widths = UNEVEN["decoder_channels"]
    types = ("UpDecoderBlock2D",) * 4
    reference = Decoder(4, 3, types, widths, layers_per_block=2, norm_num_groups=2)
    reference.conv_in = nn.Identity()
    own = AdcVSR(**UNEVEN).decoder
    own.load_state_dict(awake(reference).state_dict())
    own, reference = own.double(), reference.double()  # so deep that float32 rounding reaches 1e-5
    x = torch.randn(2, widths[-1], 8, 12).double()
    assert distance(own.tail(own.mid_block(x)), reference(x)) < 1e-9


@torch.no_grad()
def test_softmax_scale_is_that_of_the_pruned_head():
    attention = model.SelfAttention(2 * 48, heads=2, qkv_bias=False)
    nn.init.normal_(attention.to_q.weight)  # sharp enough for the scale to matter
    x = torch.randn(1, 1, 5, 96)
    assert distance(attention(x), naive_attention(attention, x, 48)) < 1e-5
    assert distance(attention(x), naive_attention(attention, x, 64)) > 1e-3  # SD2.1's unpruned head


def naive_attention(attention, x, head_width, seen=True):
    """Of x (n h w c) in all pairs; seen (l l): whether a position, by row, sees another."""
    q, k, v = (
        rearrange(f(x), "n h w (m d) -> n m (h w) d", m=attention.heads)
        for f in (attention.to_q, attention.to_k, attention.to_v)
    )
    scores = (q @ k.mT * head_width**-0.5).where(torch.as_tensor(seen), -torch.inf)
    y = rearrange(torch.softmax(scores, dim=-1) @ v, "n m l d -> n l (m d)")
    return attention.to_out(y).view(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("shift", [0, 2, 3])
@pytest.mark.parametrize("h, w", [(4, 4), (5, 9), (12, 8), (3, 11), (7, 2), (13, 6)])
def test_attention_in_windows_is_that_of_all_pairs_in_one_window(h, w, shift):
    attention = model.SelfAttention(12, heads=2, qkv_bias=True).double()
    nn.init.normal_(attention.to_q.weight)
    attention.window, attention.shift = 4, shift

    def sees(i, j, size):
        if size <= 4:
            return True
        first = min(max((i + shift) // 4 * 4 - shift, 0), size - 4)  # a window never reaches over the edge
        return first <= j < first + 4

    places = [(i, j) for i in range(h) for j in range(w)]
    seen = torch.tensor([[sees(a, c, h) and sees(b, d, w) for c, d in places] for a, b in places])
    assert (seen.sum(dim=1) == min(h, 4) * min(w, 4)).all()  # everyone sees a whole window, at the edge too
    x = torch.randn(2, h, w, 12).double()
    assert distance(attention(x), naive_attention(attention, x, 6, seen)) < 1e-12
    assert attention(x[:0]).shape == (0, h, w, 12)


@torch.no_grad()
def test_temporal_conv_is_a_3d_conv_of_kernel_3_1_1():
    conv = model.TemporalConv(4)
    x = torch.randn(2, 4, 5, 3, 2)
    expected = F.conv3d(x, conv.weight[..., None, None], conv.bias, padding=(1, 0, 0))
    result = conv(rearrange(x, "b c t h w -> b t c h w"))
    assert distance(result, rearrange(expected, "b c t h w -> b t c h w")) < 1e-5


# Before training


@torch.no_grad()
@pytest.mark.parametrize("kind", model.TEMPORAL_KINDS)
@pytest.mark.parametrize("temporal", ["layer", "block"])
def test_temporal_blocks_start_as_the_identity(temporal, kind):
    flat = AdcVSR(**{**SMALL, "temporal": "none"})
    augmented = AdcVSR(**{**SMALL, "temporal": temporal, "temporal_kind": kind})
    augmented.load_state_dict({**augmented.state_dict(), **flat.state_dict()})
    lr = clip(b=2, t=3)
    assert torch.equal(augmented(lr), flat(lr))


@torch.no_grad()
def test_untrained_pixel_skip_is_bicubic():
    lr = clip(t=2, h=16, w=32)
    bicubic = F.interpolate(lr[0], scale_factor=4, mode="bicubic")[None]
    assert distance(AdcVSR(**{**SMALL, "pixel_skip": True})(lr), bicubic) < 1e-6
    lr = clip(t=2, h=17, w=31)  # padded inside: the same, away from the padded borders
    bicubic = F.interpolate(lr[0], scale_factor=4, mode="bicubic")[None]
    inside = (..., slice(-8), slice(-8))
    assert distance(AdcVSR(**{**SMALL, "pixel_skip": True})(lr)[inside], bicubic[inside]) < 1e-6


# Shapes and independence


@torch.no_grad()
@pytest.mark.parametrize("t, h, w", [(1, 1, 1), (2, 17, 31), (1, 20, 24), (3, 16, 2), (1, 9, 48)])
def test_output_is_exactly_4x_and_features_have_the_padded_size(t, h, w):
    sr, features = AdcVSR(**UNEVEN)(clip(2, t, h, w), return_features=True)
    assert sr.shape == (2, t, 3, SCALE * h, SCALE * w)
    assert features.shape == (2, t, UNEVEN["decoder_channels"][-1], -(-h // 16) * 8, -(-w // 16) * 8)
    assert sr.isfinite().all()


@torch.no_grad()
def test_batch_of_two_equals_two_singles():
    net, lr = awake(AdcVSR(**SMALL)).double(), clip(b=2, t=3, h=20, dtype=torch.float64)
    assert distance(net(lr), torch.cat([net(lr[:1]), net(lr[1:])])) < 1e-12


@torch.no_grad()
def test_frames_meet_only_in_temporal_blocks():
    lr = clip(t=3, dtype=torch.float64)
    flat = awake(AdcVSR(**{**SMALL, "temporal": "none"})).double()
    assert distance(flat(lr), torch.cat([flat(frame) for frame in lr.split(1, dim=1)], dim=1)) < 1e-12
    for temporal in ("layer", "block"):
        net = awake(AdcVSR(**{**SMALL, "temporal": temporal})).double()
        change = net(lr) - net(torch.cat([-lr[:, :1], lr[:, 1:]], dim=1))
        assert (change.abs().amax(dim=(0, 2, 3, 4)) > 1e-4).all()


@torch.no_grad()
def test_a_temporal_block_sees_two_frames_on_each_side():
    block, x = awake(TemporalBlock(4)), torch.randn(1, 9, 4, 2, 2)
    other = x.clone()
    other[:, 4] += 1
    changed = (block(x) != block(other))[0].flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


@torch.no_grad()
def test_the_tail_never_sees_more_than_its_few_frames():
    net, seen = AdcVSR(**SMALL), []
    net.decoder.conv_out.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    net(clip(b=2, t=5))
    list(stream(net, clip(b=2, t=5).split(5, dim=1)))
    assert sum(seen) == 20 and max(seen) <= AdcVSR.TAIL_FRAMES


# Training


@pytest.mark.parametrize("pixel_skip", [True, False])
@pytest.mark.parametrize("temporal", ["layer", "block"])
def test_gradients_reach_every_parameter_within_three_steps(temporal, pixel_skip):
    net = AdcVSR(**{**SMALL, "temporal": temporal, "pixel_skip": pixel_skip})
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    lr, hr, unreached = clip(t=3, h=32, w=32), clip(t=3, h=128, w=128), {k for k, _ in net.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        F.l1_loss(net(lr), hr).backward()
        unreached -= {k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    # Softmax ignores what is added to all keys alike: at best rounding errors arrive there.
    assert unreached <= {"decoder.mid_block.attentions.0.to_k.bias"}


def test_zeroing_both_temporal_convs_would_stop_training_and_zeroing_the_last_does_not():
    def reached(block: TemporalBlock) -> bool:
        optimiser, x, target = (
            torch.optim.SGD(block.parameters(), lr=0.1),
            torch.randn(1, 5, 4, 2, 2),
            torch.randn(1, 5, 4, 2, 2),
        )
        for _ in range(2):
            optimiser.zero_grad()
            F.mse_loss(block(x), target).backward()
            optimiser.step()
        return bool(block.conv1.weight.grad.any())

    trap = TemporalBlock(4)
    nn.init.zeros_(trap.conv1.weight)
    nn.init.zeros_(trap.conv1.bias)
    assert reached(TemporalBlock(4)) and not reached(trap)


@pytest.mark.parametrize("temporal", ["layer", "block"])
def test_activation_checkpointing_changes_neither_output_nor_gradients(temporal):
    net, lr = awake(AdcVSR(**{**SMALL, "temporal": temporal})).double(), clip(b=2, t=3, dtype=torch.float64)
    results = []
    for checkpointing in ("none", "tail", "all"):
        net.for_training(checkpointing, torch.device(DEVICE))
        net.zero_grad()
        sr, features = net(lr, return_features=True)
        (sr.square().mean() + features.abs().mean()).backward()
        results.append([sr.detach(), *(p.grad.clone() for p in net.parameters())])
    for plain, *others in zip(*results):
        assert all(distance(plain, recomputed) < 1e-12 for recomputed in others)


def test_each_kind_of_checkpointing_keeps_less_for_the_backward_pass_than_the_one_before():
    net, kept = AdcVSR(**SMALL), []

    def count(x):
        kept[-1] += x.nbytes
        return x

    for checkpointing in ("none", "tail", "all"):
        net.for_training(checkpointing, torch.device(DEVICE))
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            net(clip(t=3, h=32, w=32)).mean()
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2]


# Folded for inference


@torch.no_grad()
def test_a_folded_network_is_the_same_and_its_file_too(tmp_path):
    """Upsampling folded into its convolution, q, k and v into one linear: only rounding changes, and no file
    has it."""
    net, lr = awake(AdcVSR(**UNEVEN)), clip(h=17, w=31)
    before, keys = net(lr), net.state_dict().keys()
    for part in net.modules():
        if isinstance(part, model.Upsample | model.SelfAttention):
            part.fold()
    assert distance(net(lr), before) < 2e-5 and not torch.equal(net(lr), before)
    assert net.state_dict().keys() == keys
    net.save_pretrained(tmp_path)
    assert distance(AdcVSR.from_pretrained(tmp_path).to(DEVICE)(lr), before) < 1e-6


@torch.no_grad()
def test_a_network_for_inference_is_frozen_and_the_same_up_to_rounding():
    net, lr = awake(AdcVSR(**UNEVEN)), clip()
    before = net(lr)
    # On a GPU upsampling, folded, is another convolution, and cuDNN's are exact to some 1e-5.
    assert distance(net.for_inference(torch.float32)(lr), before) < (2e-5 if DEVICE == "cpu" else 2e-4)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert net.for_inference(torch.bfloat16)(lr).isfinite().all()


@torch.no_grad()
def test_windows_change_only_what_is_larger_than_a_window():
    net, keys = awake(AdcVSR(**UNEVEN)).for_inference(torch.float32), AdcVSR(**UNEVEN).state_dict().keys()
    clips = clip(h=16, w=16), clip(h=16, w=48)  # 8x8 and 8x24 positions on the finest grid
    small, wide = map(net, clips)
    net.set_attention("windows", window=8)
    assert torch.equal(net(clips[0]), small)
    assert distance(net(clips[1]), wide) > 1e-3
    net.set_attention("full")
    assert torch.equal(net(clips[1]), wide)
    assert net.state_dict().keys() == keys  # a setting of this network, not of its weights


def test_every_second_block_shifts_its_windows_by_half_of_one():
    with torch.device("meta"):
        net = AdcVSR(**PRESETS["full"]).for_inference(torch.bfloat16, "windows")
    levels = *net.unet.down_blocks[:1], *net.unet.up_blocks[-1:]
    shifts = [part.shift for m in levels for part in m.modules() if isinstance(part, model.SelfAttention)]
    assert shifts in ([0, 32, 0, 32, 0], [0, 32, 32, 0, 32])  # through whatever lies in between
    assert {part.window for part in net.modules() if isinstance(part, model.SelfAttention)} == {64}


# Files


@torch.no_grad()
def test_a_saved_float16_folder_loads_its_values_and_config(tmp_path):
    net = awake(AdcVSR(**UNEVEN))
    net.half().save_pretrained(tmp_path)
    loaded = AdcVSR.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"network": "AdcVSR"} | UNEVEN
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    lr = clip()
    assert distance(loaded.float()(lr), net.float()(lr)) < 1e-6


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def rewrite(name: str, change):
    """Breaks a saved folder: `change` maps the old bytes of file `name` to new ones, or None to remove it."""

    def apply(folder: Path) -> None:
        new = change((folder / name).read_bytes())
        (folder / name).unlink() if new is None else (folder / name).write_bytes(new)

    return apply


def configured(**changes):
    return rewrite("config.json", lambda old: json.dumps({**json.loads(old), **changes}).encode())


def weighted(change):
    return rewrite(
        "model.safetensors", lambda old: safetensors.torch.save(change(safetensors.torch.load(old)))
    )


BROKEN = {
    "missing key": weighted(lambda state: {k: v for k, v in state.items() if k != "unet.conv_in.bias"}),
    "extra key": weighted(lambda state: {**state, "unet.extra": torch.zeros(1)}),
    "other widths": configured(decoder_channels=[8] * 4),
    "unknown placement": configured(temporal="all"),
    "truncated": rewrite("model.safetensors", lambda old: old[:1000]),
    "no weights": rewrite("model.safetensors", lambda old: None),
    "config is not JSON": rewrite("config.json", lambda old: b"{"),
    "no config": rewrite("config.json", lambda old: None),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_does_not_fit_is_one_line(tmp_path, how):
    folder = tmp_path / "weights"
    AdcVSR(**UNEVEN).save_pretrained(folder)
    BROKEN[how](folder)
    with pytest.raises(WeightsError) as error:
        AdcVSR.from_pretrained(folder)
    assert str(folder) in one_line(error)


# Layout in memory


class Convolutions(TorchDispatchMode):
    """Records the pictures that convolutions get: their shapes and strides."""

    def __init__(self):
        super().__init__()
        self.pictures = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.pictures.append((args[0].shape, args[0].stride()))
        return function(*args, **(kwargs or {}))

    def assert_dense_channels_last(self, more_than: int = 100):
        assert len(self.pictures) > more_than
        for shape, stride in self.pictures:
            n, c, h, w = shape
            assert stride == (c * h * w, 1, w * c, c), shape


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("t", [1, 3])
def test_no_convolution_of_a_clip_or_of_a_training_step_has_to_copy_its_input(b, t):
    """Every picture is dense in channels-last memory, the first included, also where there is only one: what
    is not, is copied, and what follows it too."""
    net, lr = awake(AdcVSR(**SMALL)).to(memory_format=torch.channels_last), clip(b=b, t=t, h=32, w=48)
    with torch.no_grad(), Convolutions() as convolutions:
        net(lr)
    convolutions.assert_dense_channels_last()
    net.for_training("all", torch.device("cuda"))  # its layout, wherever it runs
    with Convolutions() as convolutions:
        net(lr).square().mean().backward()
    convolutions.assert_dense_channels_last()
