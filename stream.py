"""A clip of any length through the student, in chunks: exactly as if it were one clip, or window by window.

A convolution over time gives frame i once it has frame i+1, so it holds one frame back, and whatever
ran ahead of it, a residual or a UNet skip, waits in a queue. Nothing is computed twice:

    chunks in          0 1 2 3 | 4 5 6 7 | end
    after one conv     0 1 2   | 3 4 5 6 | 7
    after two          0 1     | 2 3 4 5 | 6 7     + residual, which waits: 0 1 | 2 3 4 5 | 6 7

Zeros stand beyond the clip's own two ends, at each convolution's own input, as in training. The paper says
nothing about long clips; the network of Sec. 3.2 is convolutions over time, so it needs nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from einops import rearrange
from torch import Tensor, nn

from model import SCALE, Delay, Student, TemporalAttention, TemporalConv
from runtime import UserError

CONTEXT = 4  # Choice: frames that a window shares with either neighbour


class Stream:
    """What a network remembers between two chunks of one clip. Temporal attention cannot: `UserError`."""

    def __init__(self, net: nn.Module):
        if any(isinstance(m, TemporalAttention) for m in net.modules()):
            raise UserError("temporal attention sees the whole clip and cannot stream: infer.py --window 25")
        self.parts = [m for m in net.modules() if isinstance(m, TemporalConv | Delay)]
        self.past: dict[nn.Module, Tensor | list[Tensor]] = {}

    def step(self, network: Callable, chunk: Tensor, ended: range = range(0)):
        """network(chunk), chunk (b t 3 h w), where all that looks along time goes on from the chunk before.

        ended: the convolutions, counted in their order in the network, whose input is over with this chunk.
        If the network raises an error, the stream stands where it stood: the past is never changed in place.
        """
        self.held, self.convs, self.ended = {}, 0, ended
        # The parts know this stream only while a chunk is inside: so every signature in model.py is free of
        # it, and two streams may take turns. The price: one thread a network.
        try:
            for part in self.parts:
                part.stream = self
            result = network(chunk)
        finally:
            for part in self.parts:
                part.stream = None
        self.past = self.held
        return result

    def with_neighbours(self, conv: TemporalConv, x: Tensor) -> Tensor:
        """x (b t n c) -> (b t' n c): the two frames before it in front, a zero frame at the clip's ends."""
        ends, zero = self.convs in self.ended, x.new_zeros(x.shape[0], 1, *x.shape[2:])
        self.convs += 1
        x = torch.cat([self.past.get(conv, zero), x] + [zero] * ends, dim=1)
        if not ends:
            self.held[conv] = x[:, -2:].clone()
        return x

    def wait(self, delay: Delay, early: Tensor, t: int) -> Tensor:
        """The next t frames of a branch that ran ahead: early (b t' c h w) -> (b t c h w).

        The queue is a list of pieces (b t h w c), so that what goes on waiting is not copied.
        """
        early = rearrange(early, "b t c h w -> b t h w c")
        ready, waiting = [], []
        for piece in [*self.past.get(delay, []), early]:
            now, later = piece[:, :t], piece[:, t:]
            t -= now.shape[1]
            if now.shape[1]:
                ready.append(now)
            if later.shape[1]:  # a part is copied, or it would keep all of its piece in memory
                waiting.append(later.clone() if now.shape[1] else piece)
        if waiting:
            self.held[delay] = waiting
        x = ready[0] if len(ready) == 1 else torch.cat(ready or [early[:, :0]], dim=1)
        return rearrange(x, "b t h w c -> b t c h w")

    def nbytes(self) -> int:
        """Bytes that the queues hold between two chunks."""
        held = (x if isinstance(x, list) else [x] for x in self.past.values())
        return sum(x.nbytes for x in chain.from_iterable(held))


def in_halves(work: Callable, x: Sequence) -> Iterator:
    """work(x), or, where that does not fit into GPU memory, work of both halves of x, in order.

    A single item that does not fit raises torch.OutOfMemoryError.
    """
    try:
        whole = work(x)
    except torch.OutOfMemoryError:
        if len(x) < 2:
            raise
        whole = None  # and the error, which holds on to tensors, is gone before the next try
    if whole is None:
        middle = (len(x) + 1) // 2
        yield from chain(in_halves(work, x[:middle]), in_halves(work, x[middle:]))
    else:
        yield whole


@torch.no_grad()
def stream(net: Student, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """A clip of any length: chunks (b t_i 3 h w) -> results (b t_j 3 4h 4w), both iterators, in order.

    Equal to `net` of the whole clip, whatever the chunks; memory does not grow with its length.
    The first result comes once `net.lag` + 1 frames are in; at the end the frames still inside flow out.
    What does not fit into GPU memory is halved and tried again, chunks as well as the groups of frames that
    are decoded; a single frame that does not fit raises torch.OutOfMemoryError.
    """
    state, chunk = Stream(net), None

    def feed(frames: Tensor) -> tuple[Tensor, Tensor]:  # (t b 3 h w)
        return state.step(net.encode, frames.transpose(0, 1))

    def end(convs: range) -> tuple[Tensor, Tensor]:
        return state.step(net.encode, chunk[:, :0], ended=convs)

    for chunk in chunks:
        for ready in in_halves(feed, chunk.transpose(0, 1)):
            yield from decoded(net, *ready, chunk.shape)
    if chunk is None:
        return
    # The clip has ended. Convolutions learn it in their order, as many at a time as a chunk has frames, so
    # that what flows out comes in pieces no larger than a chunk.
    size = max(1, chunk.shape[1])
    for first in range(0, net.lag, size):
        for ready in in_halves(end, range(net.lag)[first : first + size]):
            yield from decoded(net, *ready, chunk.shape)


def decoded(net: Student, features: Tensor, lr: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """What `encode` made of clips of `shape` (b _ _ h w) -> (b t_j 3 4h 4w), a few frames at a time."""
    h, w = shape[-2:]

    def decode(t: range) -> Tensor:
        sr = net.decode(features[:, t.start : t.stop], lr[:, t.start : t.stop])
        return sr[..., : SCALE * h, : SCALE * w]

    for first in range(0, features.shape[1], net.TAIL_FRAMES):
        yield from in_halves(decode, range(features.shape[1])[first : first + net.TAIL_FRAMES])


@torch.no_grad()
def in_windows(net: Student, chunks: Iterable[Tensor], window: int) -> Iterator[Tensor]:
    """The other way through a long clip: windows of `window` frames, each on its own, as training saw clips.

    The outer CONTEXT frames of a window overlap with its neighbours and are cut off. chunks (b t_i 3 h w) ->
    results (b t_j 3 4h 4w), in order.
    """
    held, overlap = None, 0
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=1)
        while held.shape[1] >= window:
            yield net(held[:, :window])[:, overlap : window - CONTEXT]
            held, overlap = held[:, window - 2 * CONTEXT :], CONTEXT
    if held is not None:
        yield net(held)[:, overlap:]
