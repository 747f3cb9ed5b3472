"""How much memory a clip will take, before it takes it: a twin of the network on shapes alone, counted.

    network --on_meta--> shapes --in_mid_clip--> a stream with full queues --a step, `Alive`--> bytes at once

`infer.py` chooses by it how many frames a GPU takes at a time. Nothing of the paper.
"""

from collections import deque

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Student
from stream import Stream, decoded


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, while they live: `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(result) if torch.is_tensor(x)]
        made = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        if not made.keys() <= self.bytes.keys():  # or it is a view
            self.bytes = {storage: n for storage, n in self.bytes.items() if not storage.expired()} | made
            self.peak = max(self.peak, sum(self.bytes.values()))
        return result


class FusedAttention(TorchFunctionMode):
    """Attention without the matrix of all pairs, as every device but "meta" computes it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        fused = function is F.scaled_dot_product_attention
        return torch.empty_like(args[0]) if fused else function(*args, **(kwargs or {}))


def on_meta(net: Student) -> Student:
    """A twin of the network where shapes pass and nothing is computed."""
    with torch.device("meta"):
        twin = type(net)(**net.config)
        return twin.for_inference(next(net.parameters()).dtype, net.attention)


@torch.no_grad()
def in_mid_clip(twin: Student, h: int, w: int) -> Stream:
    """Its stream of (h, w) frames, once all queues are filled."""
    state = Stream(twin)
    with FusedAttention():
        state.step(twin.encode, torch.empty(1, twin.lag + 2, 3, h, w, device="meta"))
    return state


def queue_bytes(net: Student, h: int, w: int) -> int:
    """Bytes that a stream of (h, w) frames keeps between two chunks, in this network's dtype."""
    return in_mid_clip(on_meta(net), h, w).nbytes()


@torch.no_grad()
def peak_gb(net: Student, h: int, w: int, frames: int, window: bool = False) -> float:
    """The most GB of tensors at once as (h, w) frames pass, in this network's dtype: weights, the queues of a
    stream, a step of so many frames; or a window of so many. What a library needs inside an operation comes
    on top.
    """
    twin, lr = on_meta(net), torch.empty(1, frames, 3, h, w, device="meta")
    state = None if window else in_mid_clip(twin, h, w)
    with FusedAttention(), Alive() as alive:
        if state is None:
            twin(lr)
        else:
            for part, held in state.past.items():  # chunks would have left pieces of their own length
                pieces = held if isinstance(held, list) else [held]
                copies = [x.clone() for piece in pieces for x in piece.split(frames, dim=1)]
                state.past[part] = copies if isinstance(held, list) else torch.cat(copies, dim=1)
            alive.peak = 0
            deque(decoded(twin, *state.step(twin.encode, lr), lr.shape), maxlen=0)
    return (sum(x.nbytes for x in twin.parameters()) + alive.peak) / 1e9
