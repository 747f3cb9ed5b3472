"""What users rely on in stream.py: chunks of any size are the whole clip, in bounded memory, and nothing is
computed twice."""

import pytest
import torch
import torch.nn.functional as F
from test_model import SMALL, Convolutions, awake, clip, distance, same_numbers_every_time  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from memory import Alive, peak_gb, queue_bytes
from model import AdcVSR
from runtime import UserError
from stream import CONTEXT, Stream, in_halves, in_windows, stream


def streamed(net: AdcVSR, lr: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.cat(list(stream(net, lr.split(chunk, dim=1))), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("temporal", ["layer", "block", "none"])
def test_stream_equals_clip_for_any_chunks(temporal):
    net = awake(AdcVSR(**{**SMALL, "temporal": temporal, "pixel_skip": True})).double()
    for t, chunks in {1: [2], 2: [1], 7: [5], 20: [7], 60: [1, 25, 60]}.items():
        lr = clip(b=2, t=t, dtype=torch.float64)
        sr = net(lr)
        for chunk in chunks:
            assert distance(streamed(net, lr, chunk), sr) <= 1e-12, f"{t} frames in chunks of {chunk}"
    lr = lr.float()
    assert distance(streamed(net.float(), lr, 7), net(lr)) < 1e-4


@torch.no_grad()
def test_stream_equals_clip_for_uneven_chunks_of_odd_frames():
    net, lr = awake(AdcVSR(**SMALL)).double(), clip(b=2, t=11, h=9, w=17, dtype=torch.float64)
    result = torch.cat(list(stream(net, lr.split([4, 1, 3, 2, 1], dim=1))), dim=1)
    assert distance(result, net(lr)) <= 1e-12


@torch.no_grad()
def test_stream_equals_clip_with_attention_in_windows():
    net = awake(AdcVSR(**{**SMALL, "temporal": "block"})).double()
    lr = clip(t=7, h=18, w=40, dtype=torch.float64)
    full = net(lr)
    net.set_attention("windows", window=3)
    expected = net(lr)
    assert distance(streamed(net, lr, 4), expected) <= 1e-12 and distance(expected, full) > 1e-3


def test_an_iterator_without_chunks_gives_none():
    assert list(stream(AdcVSR(**SMALL), [])) == [] and list(in_windows(AdcVSR(**SMALL), [], 25)) == []


@torch.no_grad()
def test_a_chunk_that_does_not_fit_into_memory_is_halved_and_nothing_is_lost():
    net, lr = awake(AdcVSR(**SMALL)).double(), clip(t=16, dtype=torch.float64)
    expected = net(lr)

    def small_device(module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError

    for part in net.unet.mid_block, net.decoder.up_blocks[3]:  # in the UNet as well as in the tail
        part.register_forward_pre_hook(small_device)
    assert distance(streamed(net, lr, 8), expected) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("part", [lambda net: net.unet.mid_block, lambda net: net.decoder.up_blocks[3]])
def test_a_frame_that_does_not_fit_into_memory_ends_the_stream(part):
    net, lr = AdcVSR(**SMALL), clip(t=8)

    def no_memory(module, args):
        raise torch.OutOfMemoryError

    part(net).register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        streamed(net, lr, 8)


def test_a_stream_asks_attention_for_no_empty_batch(monkeypatch):
    """CUDA's kernels raise an error where those of the CPU return an empty result."""
    attention = F.scaled_dot_product_attention

    def refusing(q, *args, **options):
        assert len(q), "batch size must be positive"
        return attention(q, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", refusing)
    net = AdcVSR(**SMALL)
    assert sum(sr.shape[1] for sr in stream(net, clip(t=4).split(1, dim=1))) == 4


@torch.no_grad()
def test_doubled_convolutions_stream_too_and_attention_says_that_it_cannot():
    lr = clip(t=9, dtype=torch.float64)
    double = awake(AdcVSR(**{**SMALL, "temporal_kind": "double"})).double()
    assert double.lag == 4 * 38
    assert distance(streamed(double, lr, 4), double(lr)) <= 1e-12
    attention = awake(AdcVSR(**{**SMALL, "temporal_kind": "attention"})).double()
    with pytest.raises(UserError, match="cannot stream"):
        streamed(attention, lr, 4)


@torch.no_grad()
@pytest.mark.parametrize("temporal", ["layer", "block"])
def test_a_clip_longer_than_the_lag_flows_out_before_it_ends(temporal):
    net = awake(AdcVSR(**{**SMALL, "temporal": temporal})).double()
    lr, fed, results = clip(t=200, dtype=torch.float64), 0, []

    def feed():
        nonlocal fed
        for chunk in lr.split(25, dim=1):
            fed += chunk.shape[1]
            yield chunk

    for sr in stream(net, feed()):
        results.append(sr)
        assert sum(r.shape[1] for r in results) <= fed - (net.lag if fed < 200 else 0)
        if len(results) == 1:
            assert fed == -(-(net.lag + 1) // 25) * 25 < 200
    assert distance(torch.cat(results, dim=1), net(lr)) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("temporal, limit", [("layer", 160), ("block", 40)])
def test_the_first_result_comes_once_lag_plus_one_frames_are_in(temporal, limit):
    net, fed = AdcVSR(**{**SMALL, "temporal": temporal}), 0

    def feed():
        nonlocal fed
        for frame in clip(t=limit).split(1, dim=1):
            fed += 1
            yield frame

    assert next(stream(net, feed())).shape[1] == 1
    assert fed == net.lag + 1 <= limit


@torch.no_grad()
@pytest.mark.parametrize("temporal", ["layer", "block"])
def test_a_stream_computes_nothing_twice(temporal):
    net, lr = AdcVSR(**{**SMALL, "temporal": temporal}), clip(t=30)
    flops = []
    for function in (net, lambda lr: streamed(net, lr, 10)):
        with FlopCounterMode(display=False) as counter:
            function(lr)
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] and flops[1] <= 1.01 * flops[0]


@torch.no_grad()
def test_the_queues_stop_growing_and_hold_no_more_than_they_say():
    net, sizes = AdcVSR(**SMALL), []
    state = Stream(net)
    for chunk in clip(t=180).split(20, dim=1):
        state.step(net.encode, chunk)
        sizes.append(state.nbytes())
    assert sizes[0] < sizes[3] and sizes[-4] == sizes[-1]  # filled after the lag of 76 frames, then constant
    held = [x for past in state.past.values() for x in (past if isinstance(past, list) else [past])]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    assert sum(storages.values()) == state.nbytes() == queue_bytes(net, 16, 16)


@torch.no_grad()
def test_the_peak_that_is_told_is_that_of_the_tensors_of_a_real_run():
    with torch.device("cpu"):  # where the same operations run as on the device that is told of, "meta"
        net = AdcVSR(**SMALL).to(memory_format=torch.channels_last)
        weights = sum(weight.nbytes for weight in net.parameters())
        with Alive() as alive:
            for _ in stream(net, (torch.zeros(1, 8, 3, 48, 64) for _ in range(16))):
                pass
        assert peak_gb(net, 48, 64, frames=8) == pytest.approx((weights + alive.peak) / 1e9, rel=0.08)
        with Alive() as alive:
            net(torch.zeros(1, 30, 3, 48, 64))
        told = peak_gb(net, 48, 64, 30, window=True)
    assert told == pytest.approx((weights + alive.peak) / 1e9, rel=0.08)


@torch.no_grad()
def test_two_streams_of_one_network_take_turns_and_clips_may_pass_in_between():
    net = awake(AdcVSR(**{**SMALL, "temporal": "block"})).double()
    clips = [clip(t=30, dtype=torch.float64) for _ in range(2)]
    expected = [net(lr) for lr in clips]
    results = [[], []]
    for pair in zip(*(stream(net, lr.split(4, dim=1)) for lr in clips), strict=True):
        for result, sr in zip(results, pair):
            result.append(sr)
        assert torch.equal(net(clips[0]), expected[0])
    assert all(distance(torch.cat(a, dim=1), b) <= 1e-12 for a, b in zip(results, expected))


@torch.no_grad()
def test_a_chunk_that_raises_leaves_the_stream_where_it_stood_and_the_network_without_one():
    net = awake(AdcVSR(**{**SMALL, "temporal": "block"})).double()
    lr, state = clip(t=30, dtype=torch.float64), Stream(net)
    state.step(net.encode, lr[:, :20])
    expected = Stream(net)
    expected.past = state.past
    broken = net.unet.up_blocks[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        state.step(net.encode, lr[:, 20:])
    broken.remove()
    assert distance(net(lr)[:, :1], net(lr[:, :20])[:, :1]) < 1  # whole clips pass as ever
    a, b = (s.step(net.encode, lr[:, 20:])[0] for s in (state, expected))
    assert a.shape[1] == 10 and torch.equal(a, b)


def test_the_order_of_halves_is_that_of_the_whole():
    tried = []

    def work(x):
        tried.append(list(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return list(x)

    assert list(in_halves(work, range(5))) == [[0, 1], [2], [3, 4]]
    assert tried == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1], [2], [3, 4]]


@torch.no_grad()
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("t", [1, 3])
def test_no_convolution_in_the_middle_of_a_stream_has_to_copy_its_input(b, t):
    net = awake(AdcVSR(**SMALL)).to(memory_format=torch.channels_last)
    state = Stream(net)
    for _ in range(net.lag // t + 2):
        state.step(net.encode, clip(b=b, t=t, h=32, w=48))
    with Convolutions() as convolutions:
        net.decode(*state.step(net.encode, clip(b=b, t=t, h=32, w=48)))
    convolutions.assert_dense_channels_last()


@torch.no_grad()
def test_windows_see_the_clip_in_pieces_of_their_size_and_share_their_outer_frames():
    net, lr = awake(AdcVSR(**{**SMALL, "temporal": "block"})).double(), clip(t=40, dtype=torch.float64)
    for window, starts in (25, [0, 17]), (16, [0, 8, 16, 24]):
        result = torch.cat(list(in_windows(net, lr.split(7, dim=1), window)), dim=1)
        assert result.shape[1] == 40
        for start in starts:
            piece = net(lr[:, start : start + window])
            first, last = start + CONTEXT * (start > 0), min(start + window, 40) - CONTEXT
            assert distance(result[:, first:last], piece[:, first - start : last - start]) <= 1e-12
