"""What kernels.py gains in model.py, on one GPU in five minutes: python tests/gpu_speed.py [GROUP ...]

It puts the changes into the network itself, one after the other; tables as JSON into $OUT where that is set.

Each group is a process of its own with a time limit: what fails or hangs costs only itself.

    correct    kernels and rewritten layers against float64, the network in bf16 against float32
    network    the clip 25x128x128 and the stream 480x270 -> 1080p, one change after the other; a profile
    train      steps of stage 1 and 2 with and without kernels, and their profiles
    layers     single layers: settings of the norm kernels, two forms of folded upsampling, attention
    others     DOVE and AdcSR at random weights, for the ratio of Table 1

On a CPU everything runs in small. model_before.py, if there, is timed as what was before
(git show 5d64265:model.py > model_before.py).
"""

import json
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402
import model  # noqa: E402
from model import PRESETS, SCALE, AdcVSR  # noqa: E402

ROOT = Path(__file__).parent.parent
LIMITS = {"correct": 120, "network": 120, "train": 150, "layers": 70, "others": 80}  # seconds
ON_GPU = torch.cuda.is_available() and not kernels.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
FULL = PRESETS["full"]
if not ON_GPU:  # the same topology, 12 channels wide
    FULL = FULL | dict(unet_channels=[16] * 4, heads=[2] * 4, decoder_channels=[8] * 4, norm_groups=2)
CLIP = (25, 128, 128) if ON_GPU else (2, 16, 16)
HD = (8, 270, 480) if ON_GPU else (2, 16, 32)
RESULTS: dict = {}
START = time.perf_counter()


def say(key: str, **values) -> None:
    """One line now, and the value into the JSON file of this group."""
    RESULTS[key] = values
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"[{time.perf_counter() - START:6.1f}] {key:44} {shown}", flush=True)
    if "OUT" in os.environ:
        path = Path(os.environ["OUT"]) / f"gpu_{GROUP}.json"
        path.write_text(json.dumps(RESULTS, indent=1))


def tried(name: str, work, *args):
    """work(*args); an error is printed, and the next section gets its turn."""
    try:
        return work(*args)
    except Exception as error:
        traceback.print_exc()
        say(f"FAILED {name}", error=f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def milliseconds(work, repeats: int = 5, warm: int = 2) -> float:
    """Median of work(), on a GPU by its own clock."""
    times = []
    for _ in range(warm + repeats):
        if ON_GPU:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            work()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b))
        else:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[warm:])[repeats // 2]


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0


def reset_peak() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(name: str, work) -> None:
    """work() once: the kernels by time, how many launches, how many copies. 60 of them into the JSON."""
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as prof:
        work()
        if ON_GPU:
            torch.cuda.synchronize()
    events = prof.key_averages()
    if ON_GPU:
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        spent = [(e.self_device_time_total / 1e3, e.count, e.key) for e in events]
    else:
        spent = [(e.self_cpu_time_total / 1e3, e.count, e.key) for e in events]
    spent.sort(reverse=True)
    copies = [
        (ms, n) for ms, n, key in spent if any(k in key.lower() for k in ("copy", "nchwtonhwc", "nhwctonchw"))
    ]
    RESULTS[f"kernels of {name}"] = [(round(ms, 4), n, key[:200]) for ms, n, key in spent[:60]]
    say(f"profile {name}", kernels_ms=sum(s[0] for s in spent), launches=sum(s[1] for s in spent),
        copies=sum(n for _, n in copies), copies_ms=sum(ms for ms, _ in copies))  # fmt: skip
    for ms, n, key in spent[:16]:
        print(f"    {ms:9.3f} ms {n:6}  {key[:150]}", flush=True)


# ------------------------------------------------------------------------------------------------------
# The network's layers with each change on or off

ON: set[str] = set()  # of these
CHANGES = ("norm", "bias", "fold", "geglu", "qkv")
STACKED: dict = {}


def norm(x, layer, bias=None, silu=True):
    if "norm" in ON:
        return kernels.normalised(x, layer, bias, silu)
    y = layer(x if bias is None else x + bias[:, None, None])
    return F.silu(y) if silu else y


def conv(layer, x):
    return kernels.without_bias(layer, x) if "bias" in ON else (layer(x), None)


def add(y, bias, shortcut=None, relu=False):
    if "bias" in ON:
        return kernels.add_bias(y, bias, shortcut, relu)
    assert bias is None
    y = y if shortcut is None else shortcut + y
    return F.relu(y) if relu else y


def resnet(self, x):
    y, bias = conv(self.conv1, norm(x, self.norm1))
    y, bias = conv(self.conv2, norm(y, self.norm2, bias))
    if isinstance(self.conv_shortcut, nn.Identity):
        return add(y, bias, x)
    x, more = conv(self.conv_shortcut, x)
    return add(y, None if bias is None else bias + more, x)


def transformer(self, x):
    h, w = x.shape[-2:]
    y = self.proj_in(rearrange(norm(x, self.norm, silu=False), "n c h w -> n (h w) c"))
    y = self.proj_out(self.transformer_blocks[0](y))
    return add(rearrange(y, "n (h w) c -> n c h w", h=h, w=w), None, x)


def decoder_attention(self, x):
    h, w = x.shape[-2:]
    y = self_attention(self, rearrange(norm(x, self.group_norm, silu=False), "n c h w -> n (h w) c"))
    return add(rearrange(y, "n (h w) c -> n c h w", h=h, w=w), None, x)


def self_attention(self, x):
    if not len(x):
        return x
    linears = self.to_q, self.to_k, self.to_v
    if "qkv" in ON:
        key = self, self.to_q.weight.dtype
        if key not in STACKED or torch.is_grad_enabled():
            STACKED[key] = kernels.stack_linears(*linears)
        q, k, v = rearrange(
            F.linear(x, *STACKED[key]), "n l (three m d) -> three n m l d", three=3, m=self.heads
        )
    else:
        q, k, v = (rearrange(f(x), "n l (m d) -> n m l d", m=self.heads) for f in linears)
    x = F.scaled_dot_product_attention(q, k, v)
    return self.to_out(rearrange(x, "n m l d -> n l (m d)"))


def geglu(self, x):
    x = self.proj(x)
    if "geglu" in ON:
        return kernels.geglu(x)
    a, gate = x.chunk(2, dim=-1)
    return a * F.gelu(gate)


def upsample(self, x):
    if "fold" not in ON:
        y, bias = conv(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y if bias is None else add(y, bias)
    weight = kernels.fold_upsampling(self.conv.weight) if torch.is_grad_enabled() else self.folded
    y = F.conv_transpose2d(x, weight.to(memory_format=torch.channels_last), stride=2, padding=1)
    return kernels.add_bias(y, self.conv.bias)


def downsample(self, x):
    y, bias = conv(self.conv, x)
    return y if bias is None else add(y, bias)


def over_time(conv, x, bias):
    """TemporalConv.forward with this bias."""
    h, w = x.shape[-2:]
    rows, padding = rearrange(x, "b t c h w -> b t (h w) c"), (1, 0)
    if conv.stream:
        rows, padding = conv.stream.with_neighbours(conv, rows), (0, 0)
        if rows.shape[1] < 3:
            return x[:, :0]
    y = F.conv2d(model.channels_last(rows), conv.weight[..., None], bias, padding=padding)
    return rearrange(y, "b c t (h w) -> b t c h w", h=h, w=w)


def temporal(self, x):
    if "bias" not in ON:
        y = self.conv2(F.relu(self.conv1(x)))
        return self.delay(x, y.shape[1]) + y
    y = kernels.add_bias(over_time(self.conv1, x, None), self.conv1.bias, relu=True)
    y = over_time(self.conv2, y, None)
    return kernels.add_bias(y, self.conv2.bias, self.delay(x, y.shape[1]))


def unet_out(self, x):
    y, bias = conv(self.conv_out, norm(x, self.conv_norm_out))
    return y if bias is None else add(y, bias)


def tail(self, features):
    for block in self.up_blocks:
        features = block(features)
    return self.conv_out(norm(features, self.conv_norm_out))


for cls, forward in {
    model.ResnetBlock: resnet, model.TransformerBlock: transformer, model.DecoderAttention: decoder_attention,
    model.SelfAttention: self_attention, model.GEGLU: geglu, model.Upsample: upsample,
    model.Downsample: downsample, model.TemporalBlock: temporal,
}.items():  # fmt: skip
    cls.forward = forward
model.UNet.out, model.HalfDecoder.tail = unet_out, tail


def switch(*changes: str) -> None:
    ON.clear()
    ON.update(changes)
    STACKED.clear()


def random_network(cls=AdcVSR, dtype=torch.bfloat16, **changes):
    """At random weights, the temporal blocks and the norms' weights too."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        net = cls(**FULL | changes).eval().requires_grad_(False)
        for name, x in net.named_parameters():
            if "temporal" in name and "conv2" in name:
                x.normal_(std=0.02)
            if "norm" in name:
                x.add_(torch.randn_like(x), alpha=0.2)
    return prepared(net, dtype)


def prepared(net, dtype):
    """net in dtype, channels-last; what is folded is folded before it is rounded."""
    for m in net.modules():
        if isinstance(m, model.Upsample):
            m.register_buffer("folded", kernels.fold_upsampling(m.conv.weight).detach(), persistent=False)
    return net.to(dtype).to(memory_format=torch.channels_last)


def random_clip(t: int, h: int, w: int) -> torch.Tensor:
    return torch.rand(1, t, 3, h, w, device=DEVICE) * 2 - 1


def rms(x, reference) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


# ------------------------------------------------------------------------------------------------------
# Groups


def correct() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tried("kernels", check_kernels)
    tried("layers", check_layers)
    with torch.no_grad():
        tried("network", check_network)


def check_kernels() -> None:
    """Ours and torch's own chain in bf16, each against float64: y and the gradients."""
    with torch.device("meta"):
        net = AdcVSR(**FULL)
    norms = sorted({(m.num_channels, m.num_groups) for m in net.modules() if isinstance(m, nn.GroupNorm)})
    worst = 0.0
    for c, groups in norms:
        x = (torch.randn(2, 33, 31, c, device=DEVICE) * 2 + 1).bfloat16().permute(0, 3, 1, 2)
        gamma, beta, bias = (torch.randn(c, device=DEVICE) for _ in range(3))
        dy = torch.randn_like(x)
        layer = nn.GroupNorm(groups, c, 1e-6, device=DEVICE)
        layer.weight, layer.bias = nn.Parameter(gamma), nn.Parameter(beta)

        def chain(x, gamma, beta, bias):
            return F.silu(F.group_norm(x + bias[:, None, None], groups, gamma, beta, 1e-6))  # noqa: B023

        def gradients(function, cast, dy):
            given = [cast(v.detach()).requires_grad_() for v in (x, gamma, beta, bias)]  # noqa: B023
            y = function(*given)
            return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]

        def ours(x, gamma, beta, bias):
            return kernels.Normalised.apply(x, gamma, beta, bias, groups, 1e-6, True)  # noqa: B023

        exact = gradients(chain, torch.Tensor.double, dy)
        torchs = gradients(chain, torch.Tensor.bfloat16, dy)
        got = gradients(ours, lambda v: v, dy) if kernels.fused(x) else torchs
        again = gradients(ours, lambda v: v, dy) if kernels.fused(x) else torchs
        names = ("y", "dx", "dgamma", "dbeta", "dbias")
        ratio = {k: rms(a, e) / rms(t, e) for k, a, t, e in zip(names, got, torchs, exact)}
        same = all(map(torch.equal, got, again))
        with torch.no_grad():
            inplace = kernels.norm_silu(x.clone(memory_format=torch.preserve_format), layer, bias)
            same &= torch.equal(inplace, got[0]) or not kernels.fused(x)
        worst = max(worst, ratio["y"], ratio["dx"])
        say(f"norm_silu {c} in {groups}", y=rms(got[0], exact[0]), dx=rms(got[1], exact[1]), same=same,
            **{f"{k}/torch": v for k, v in ratio.items()})  # fmt: skip
    say("kernels, worst error over torch's", ratio=worst, ok=worst <= 1.05)
    for c in (960, 3840):
        x, dy = torch.randn(3, 77, 2 * c, device=DEVICE).bfloat16(), torch.randn(3, 77, c, device=DEVICE)
        a = x.double().requires_grad_()
        b = x.clone().requires_grad_()
        exact = a.chunk(2, -1)[0] * F.gelu(a.chunk(2, -1)[1])
        got = kernels.geglu(b)
        da, db = torch.autograd.grad(exact, a, dy.double())[0], torch.autograd.grad(got, b, dy.bfloat16())[0]
        say(f"geglu {c}", y=rms(got, exact), dx=rms(db, da))
    for c in (64, 240, 960):
        y, x = (torch.randn(1, 3, 17, 19, c, device=DEVICE).bfloat16().movedim(-1, -3) for _ in range(2))
        bias = torch.randn(c, device=DEVICE)
        exact = F.relu(y.double() + bias[:, None, None] + x.double())
        say(f"add_bias {c}", error=rms(kernels.add_bias(y, bias, x, relu=True), exact))


def check_layers() -> None:
    for c in (128, 256, 480):
        layer = nn.Conv2d(c, c, 3, padding=1, device=DEVICE)
        x = torch.randn(2, 33, 31, c, device=DEVICE).permute(0, 3, 1, 2)
        exact = layer.double()(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"))
        layer.bfloat16()
        x16 = x.bfloat16()
        plain = layer(F.interpolate(x16, scale_factor=2.0, mode="nearest"))
        folded = F.conv_transpose2d(
            x16, kernels.fold_upsampling(layer.weight), layer.bias, stride=2, padding=1
        )
        four = four_phases(x16, layer)
        say(
            f"upsampling {c}", plain=rms(plain, exact), transposed=rms(folded, exact), phases=rms(four, exact)
        )


def check_network() -> None:
    t, side = (8, 64) if ON_GPU else (2, 16)
    lr = random_clip(t, side, side)
    net = random_network(dtype=torch.float32)
    switch()
    exact = net(lr)
    switch(*CHANGES)
    say("network in float32, all changes", error=rms(net(lr), exact))
    if ON_GPU:
        from stream import stream

        long = random_clip(88, side, side)
        pieces = torch.cat(list(stream(net, long.split(8, dim=1))), dim=1)
        say("stream of 88 frames in float32", error=rms(pieces, net(long)))
    net.bfloat16()
    before = None
    for n in range(len(CHANGES) + 1):
        switch(*CHANGES[:n])
        error = rms(net(lr), exact)
        before = before or error
        say(f"network in bf16, + {CHANGES[n - 1] if n else 'nothing'}", error=error, ratio=error / before,
            same=torch.equal(net(lr), net(lr)))  # fmt: skip


def network() -> None:
    with torch.no_grad():
        tried("rates", rates)
        tried("before", clip_before)
        net = random_network()
        tried("clip", clip_ladder, net)
        tried("stream", stream_ladder, net)
        switch(*CHANGES)
        lr = random_clip(*CLIP)
        tried("profile", profile, "clip", partial(net, lr))
        hd = random_clip(*HD)
        tried("profile", profile, "1080p", partial(net, hd))


def rates() -> None:
    """The card's own two rates."""
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    n = 8192 if ON_GPU else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**29 if ON_GPU else 2**20, dtype=torch.bfloat16, device=DEVICE)
    other = torch.empty_like(big)
    say(name, torch=torch.__version__, tflops=2 * n**3 / 1e9 / milliseconds(lambda: a @ b),
        tbs=2 * big.nbytes / 1e9 / milliseconds(lambda: other.copy_(big)))  # fmt: skip


def clip_before() -> None:
    if not find_spec("model_before"):
        return say("before: no model_before.py")
    import model_before

    net = random_network(model_before.AdcVSR)
    for name, shape in ("clip", CLIP), ("8 frames of 1080p", HD):
        lr = random_clip(*shape)
        reset_peak()
        say(f"before: {name}", ms=milliseconds(partial(net, lr), 3, 2), peak_gb=peak_gb())


def clip_ladder(net: AdcVSR) -> None:
    lr = random_clip(*CLIP)
    for n in range(len(CHANGES) + 1):
        switch(*CHANGES[:n])
        net(lr)
        reset_peak()
        ms = milliseconds(partial(net, lr))
        start = time.perf_counter()
        net(lr)
        launched = 1e3 * (time.perf_counter() - start)
        say(f"clip, + {CHANGES[n - 1] if n else 'nothing'}", ms=ms, peak_gb=peak_gb(), launch_ms=launched)
    for frames in (1, 2, 8, 25):
        net.TAIL_FRAMES = frames
        reset_peak()
        say(f"clip, tail of {frames} frames", ms=milliseconds(partial(net, lr), 3, 1), peak_gb=peak_gb())
    net.TAIL_FRAMES = AdcVSR.TAIL_FRAMES


def stream_ladder(net: AdcVSR) -> None:
    """A chunk in mid-stream: what waits in the queues is made once, then each rung goes on from there."""
    from stream import Stream, decoded

    t, h, w = HD
    switch(*CHANGES)
    state, frames = Stream(net), 0
    while frames <= net.lag + t:
        state.step(net.encode, random_clip(t, h, w))
        frames += t
    say("stream: queues", gb=state.nbytes() / 1e9, frames=frames)

    def piece():
        lr = random_clip(t, h, w)
        return [x.shape for x in decoded(net, *state.step(net.encode, lr), lr.shape)]

    for n in (*range(len(CHANGES) + 1), "tail of 8", "tail of 2"):
        if isinstance(n, int):
            switch(*CHANGES[:n])
        else:
            switch(*CHANGES)
            net.TAIL_FRAMES = int(n.split()[-1])
        piece()
        reset_peak()
        ms = milliseconds(piece, 3, 1)
        name = n if isinstance(n, str) else f"+ {CHANGES[n - 1] if n else 'nothing'}"
        say(f"stream, {name}", ms_a_frame=ms / t, frames_s=1e3 * t / ms, peak_gb=peak_gb())
    net.TAIL_FRAMES = AdcVSR.TAIL_FRAMES


def train() -> None:
    import train_stage1
    import train_stage2

    for script in (train_stage1, train_stage2):
        tried(script.__name__, steps, script)
        switch()


def steps(script) -> None:
    """Steps of one clip, whose teacher video comes from a cache; networks placed as the scripts do."""
    from discriminators import BACKBONE, FeatureDiscriminator, PixelDiscriminator, convnext
    from metrics import DISTS, VGG16
    from runtime import World
    from teacher import FeatureEncoder

    second = script.__name__.endswith("2")
    cfg = script.PRESETS["full" if ON_GPU else "smoke"]
    switch()
    with torch.device(DEVICE):
        torch.manual_seed(0)
        student = AdcVSR(**FULL | {"pixel_skip": False})
        dists = DISTS.seeded(VGG16) if ON_GPU else DISTS.seeded()
        encoder = sd_encoder(student) if ON_GPU else FeatureEncoder.seeded(student.config)
        judges = nn.ModuleDict()
        if second:
            backbone = convnext(BACKBONE if ON_GPU else "tiny", pretrained=False)
            judges["pixel"] = PixelDiscriminator(backbone, checkpointing=True)
            judges["feature"] = FeatureDiscriminator(student.unet, checkpointing=True)
    for net in (student, encoder, dists, judges):
        net.to(DEVICE)
    student.unet.checkpointing = True
    student.to(memory_format=torch.channels_last)
    for d in judges.values():
        d.backbone.to(torch.bfloat16, memory_format=torch.channels_last)
    groups = [student.parameters()] + [judges.parameters()] * second
    optimisers = [torch.optim.Adam(g, lr=1e-7, fused=ON_GPU) for g in groups]
    others = (judges, optimisers) if second else optimisers
    clips = {k: torch.rand(1, cfg.frames, 3, cfg.size, cfg.size, device=DEVICE) for k in ("hr", "video")}
    clips |= {"lr": clips["hr"][..., ::SCALE, ::SCALE].contiguous(), "image": clips["hr"][:, :1]}
    clips |= {"random_images": clips["video"], "order": torch.arange(cfg.frames, device=DEVICE)[None].flip(1)}
    world = World(0, 1, torch.device(DEVICE))
    seeing = [encoder]

    def step():
        return script.train_step([clips], student, None, seeing[0], dists, *others, world, cfg)

    for name, changes in {"plain": (), "all changes": CHANGES}.items():
        switch(*changes)
        step()
        reset_peak()
        start = time.perf_counter()
        for _ in range(2):
            losses = step()
        losses = {k: float(v) for k, v in losses.items() if "/" not in k}  # waits for the GPU
        say(f"{script.__name__}, {name}", s=(time.perf_counter() - start) / 2, peak_gb=peak_gb(), **losses)
        if changes or not second:
            tried("profile", profile, f"{script.__name__} {name}", step)
    encoder.to(torch.bfloat16, memory_format=torch.channels_last)

    def in_bfloat16(x):
        with torch.autocast(DEVICE, enabled=False):
            return encoder(x)

    seeing[0] = in_bfloat16
    tried("frozen", timed, f"{script.__name__}, encoder in bf16 outside autocast", step)
    student.unet.checkpointing = False
    tried("no checkpointing", timed, f"{script.__name__}, and the student keeps all activations", step)


def timed(name: str, step) -> None:
    step()
    reset_peak()
    say(name, s=milliseconds(step, 1, 0) / 1e3, peak_gb=peak_gb())


def sd_encoder(student: AdcVSR):
    from diffusers import AutoencoderKL

    from teacher import FeatureEncoder

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    )  # fmt: skip
    mid = model.DecoderMidBlock(256, student.config)
    return FeatureEncoder(vae, nn.Conv2d(4, 256, 3, padding=1), mid)


def layers() -> None:
    with torch.no_grad():
        tried("norm", tune_norm)
        tried("pointwise", pointwise)
        tried("upsampling", upsampling)
        tried("temporal", temporal_conv)
        tried("attention", attention)


def nhwc(n, c, h, w):
    return torch.randn(n, h, w, c, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)


SHAPES = [(4, 64, 512, 512), (25, 240, 64, 64), (25, 960, 16, 16), (4, 64, 1088, 1920), (8, 240, 136, 240)]
SHAPES = SHAPES if ON_GPU else [(1, 16, 8, 8)]


def tune_norm() -> None:
    for shape in SHAPES[:4]:
        x, c = nhwc(*shape), shape[1]
        layer = nn.GroupNorm(24 if c % 32 else 32, c) if ON_GPU else nn.GroupNorm(2, c)
        layer.to(DEVICE, torch.bfloat16)
        gb = 3 * x.nbytes / 1e9  # read twice, written once
        ms = milliseconds(lambda: F.silu(layer(x)).contiguous(memory_format=torch.channels_last))  # noqa: B023
        say(f"norm torch {shape}", ms=ms, tbs=gb / ms)
        for tile, warps, programs in (
            (4096, 8, 1024), (4096, 8, 2048), (4096, 8, 4096), (4096, 4, 2048), (8192, 8, 1024),
            (8192, 8, 2048), (2048, 4, 4096), (2048, 4, 2048),
        ):  # fmt: skip
            kernels.TILE, kernels.WARPS, kernels.PROGRAMS = tile, warps, programs
            ms = milliseconds(lambda: kernels.norm_silu(x, layer), 10)  # noqa: B023
            say(f"norm {shape} tile {tile} warps {warps} programs {programs}", ms=ms, tbs=gb / ms)
    kernels.TILE, kernels.WARPS, kernels.PROGRAMS = 4096, 8, 1024


def pointwise() -> None:
    for shape in SHAPES[:2]:
        x, y = nhwc(*shape), nhwc(*shape)
        bias = torch.randn(shape[1], device=DEVICE, dtype=torch.bfloat16)
        gb = 3 * x.nbytes / 1e9
        torchs = milliseconds(lambda: x + y.add_(bias[:, None, None]))  # noqa: B023
        ours = milliseconds(lambda: kernels.add_bias(y, bias, x))  # noqa: B023
        say(f"bias and residual {shape}", torch_ms=torchs, ms=ours, tbs=gb / ours)
    x = torch.randn(25, SHAPES[1 % len(SHAPES)][2] ** 2, 1920, device=DEVICE, dtype=torch.bfloat16)
    torchs = milliseconds(lambda: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]))
    ours = milliseconds(lambda: kernels.geglu(x))
    say("geglu 960", torch_ms=torchs, ms=ours, tbs=1.5 * x.nbytes / 1e9 / ours)


def phase_weight(weight):
    """(c_out c_in 3 3) -> (4 c_out, c_in, 2 2), the four phases of the upsampled output in turn."""
    taps = torch.tensor(
        [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device
    )
    return torch.einsum("pai,qbj,ocij->pqocab", taps, taps, weight.float()).flatten(0, 2).to(weight.dtype)


def four_phases(x, layer, weight=None):
    n, _, h, w = x.shape
    weight = phase_weight(layer.weight) if weight is None else weight
    z = F.conv2d(x, weight, padding=1).unflatten(1, (2, 2, -1))  # (n p q c h+1 w+1)
    y = x.new_empty(n, h, 2, w, 2, layer.out_channels)
    for p in range(2):
        for q in range(2):
            y[:, :, p, :, q] = z[:, p, q, :, p : p + h, q : q + w].permute(0, 2, 3, 1)
    y = y.view(n, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)
    return y + layer.bias[:, None, None]


def upsampling() -> None:
    shapes = [(4, 256, 64, 64), (4, 256, 128, 128), (4, 128, 256, 256), (25, 480, 32, 32), (4, 128, 544, 960)]
    for shape in shapes if ON_GPU else [(1, 16, 8, 8)]:
        x, c = nhwc(*shape), shape[1]
        layer = nn.Conv2d(c, c, 3, padding=1).to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last)
        folded = kernels.fold_upsampling(layer.weight).contiguous(memory_format=torch.channels_last)
        phases = phase_weight(layer.weight).contiguous(memory_format=torch.channels_last)
        say(
            f"upsampling {shape}",
            plain=milliseconds(lambda: layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))),  # noqa: B023
            transposed=milliseconds(lambda: F.conv_transpose2d(x, folded, stride=2, padding=1)),  # noqa: B023
            phases_conv=milliseconds(lambda: F.conv2d(x, phases, padding=1)),  # noqa: B023
            phases_all=milliseconds(lambda: four_phases(x, layer, phases)),  # noqa: B023
        )


def temporal_conv() -> None:
    for t, rows, c in (
        ((25, 4096, 240), (25, 1024, 480), (25, 256, 960), (10, 32640, 240)) if ON_GPU else ((3, 64, 16),)
    ):
        x = model.channels_last(torch.randn(1, t, rows, c, device=DEVICE, dtype=torch.bfloat16))
        weight = torch.randn(c, c, 3, 1, device=DEVICE, dtype=torch.bfloat16)
        last = weight.contiguous(memory_format=torch.channels_last)
        tflop = 2 * t * rows * c * c * 3 / 1e12
        ms = milliseconds(lambda: F.conv2d(x, weight, padding=(1, 0)))  # noqa: B023
        fast = milliseconds(lambda: F.conv2d(x, last, padding=(1, 0)))  # noqa: B023
        say(f"temporal conv {t} x {rows} x {c}", ms=ms, channels_last_weight=fast, tflops=1e3 * tflop / fast)


def attention() -> None:
    for n, heads, length in ((25, 5, 4096), (8, 5, 32640)) if ON_GPU else ((1, 1, 64),):
        q, k, v = (
            torch.randn(n, length, heads, 48, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        ms = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), 3)  # noqa: B023
        say(f"attention d=48, {length} positions", ms=ms, tflops=4 * n * heads * length**2 * 48 / 1e9 / ms)


def others() -> None:
    with torch.no_grad():
        tried("AdcSR", adcsr)
        tried("DOVE", dove)


def adcsr() -> None:
    net, lr = random_network(temporal="none"), random_clip(*CLIP)
    for name, changes in ("plain", ()), ("all changes", CHANGES):
        switch(*changes)
        ms = milliseconds(lambda: [net(frame) for frame in lr.split(1, dim=1)], 3, 1)
        say(f"AdcSR, frame by frame, {name}", ms=ms)
        say(f"AdcSR, a batch, {name}", ms=milliseconds(lambda: net(lr), 3, 1))


def dove() -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    from teacher import DoveTeacher

    heads, depth, text = (48, 42, 4096) if ON_GPU else (2, 2, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            transformer = CogVideoXTransformer3DModel(
                num_attention_heads=heads, num_layers=depth, text_embed_dim=text, patch_size_t=2,
                patch_bias=False, sample_width=300, sample_height=300, sample_frames=81,
                use_rotary_positional_embeddings=True,
            )  # fmt: skip
            vae = AutoencoderKLCogVideoX(
                block_out_channels=(128, 256, 256, 512) if ON_GPU else (32,) * 4, latent_channels=16,
                layers_per_block=3 if ON_GPU else 1, scaling_factor=0.7,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    prompt = torch.zeros(226, text, dtype=torch.bfloat16)
    net = DoveTeacher(transformer, vae, CogVideoXDPMScheduler(), prompt, seed=0)
    net, lr = net.to(DEVICE, torch.bfloat16), random_clip(*CLIP)
    reset_peak()
    say("DOVE", ms=milliseconds(partial(net, lr), 3, 1), peak_gb=peak_gb())


WORK = {"correct": correct, "network": network, "train": train, "layers": layers, "others": others}
GROUP = sys.argv[2] if sys.argv[1:2] == ["--only"] else ""


def main() -> None:
    if GROUP:
        return WORK[GROUP]()
    for group in sys.argv[1:] or WORK:
        start = time.perf_counter()
        print(f"==== {group}", flush=True)
        command = [sys.executable, __file__, "--only", group]
        try:
            status = subprocess.run(command, timeout=LIMITS[group] if ON_GPU else None).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        print(f"==== {group}: {status}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
