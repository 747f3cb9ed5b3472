"""Networks too large for one card: weights, gradients and Adam's moments in equal parts on all cards.

    net --shard--> every block in parts, gathered while it computes
    ShardedWorld, ShardedRun: runtime.py's `World` and training.py's `Run` for such networks. Checkpoints are
    whole, so any number of processes goes on from them.

Plumbing, as runtime.py: nothing of a paper belongs here.
"""

import copy
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from runtime import UserError, World
from training import Run, checksum

LEARNING = 16  # bytes a weight: float32 master, gradient and two moments of Adam
ROOM = 0.75  # share of a card for them; the rest is for activations


def shard(net: nn.Module, kind: type[nn.Module], world: World) -> nn.Module:
    """net, in place, its modules of this kind each in parts over all processes, then what is left of it.

    On a GPU what is gathered is bfloat16; the parts stay as they are. Whole state dicts load into it. Every
    process must come with the same weights: `UserError` otherwise.
    """
    if not world.same(checksum(net.parameters())):
        raise UserError("the processes begin with different weights; do all see the same files?")
    on_gpu = world.device.type == "cuda"
    # Inputs stay as they are: in bfloat16 a time step would lose the digits that tell it from its neighbours.
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if on_gpu else {}
    # What is left of a net is in parts again after its forward, too: others look at its weights then.
    how = {"mesh": init_device_mesh(world.device.type, (world.size,)), "reshard_after_forward": True}
    how["mp_policy"] = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    for module in [module for module in net.modules() if isinstance(module, kind)]:
        fully_shard(module, **how)
    fully_shard(net, **how)

    def load_parts(module: nn.Module, state: dict, *_) -> None:
        state.update({name: parted(state[name], own) for name, own in module.state_dict().items()})

    net.register_load_state_dict_pre_hook(load_parts)
    return net


def take_parts(optimiser: torch.optim.Optimizer, saved: dict) -> dict:
    """This process's parts of an optimiser's whole state."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    state = {
        i: {name: parted(value, weights[i]) if value.ndim else value for name, value in moments.items()}
        for i, moments in saved["state"].items()
    }
    return saved | {"state": state}


def parted(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like`."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


@dataclass(frozen=True)
class ShardedWorld(World):
    """A world whose sharded weights begin alike (`shard` has seen to it) and whose gradients are averaged in
    the backward pass."""

    def broadcast(self, tensors) -> None:
        super().broadcast(tensor for tensor in tensors if not isinstance(tensor, DTensor))

    def average_gradients(self, parameters) -> None:
        """Nothing is left to do."""


class Whole:
    """A network or an optimiser put together again on the first process's CPU: all that saving asks of it."""

    def __init__(self, part, keep: bool):
        def gather(value):
            value = value.full_tensor() if isinstance(value, DTensor) else value  # all processes take part
            return (value.cpu() if isinstance(value, Tensor) else value) if keep else None

        self.state = tree_map(gather, part.state_dict())

    def state_dict(self) -> dict:
        return self.state


class ShardedRun(Run):
    """A `Run` of sharded networks."""

    def __init__(self, cfg, world: ShardedWorld, student: nn.Module, optimiser, **parts):
        for part in (optimiser, *parts.values()):
            if isinstance(part, torch.optim.Optimizer):
                part.register_load_state_dict_pre_hook(take_parts)
        super().__init__(cfg, world, student, optimiser, **parts)

    def save(self) -> None:
        """As `Run.save`; the processes hold different parts, which cannot come apart."""
        local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in self.trained)
        if self.world.any(not all(weight.isfinite().all() for weight in local)):
            raise UserError(f"step {self.step}: the weights are not finite; the last checkpoint is kept")
        whole, main = copy.copy(self), self.world.is_main
        whole.trained, state = [], Whole(self.student, main).state
        whole.parts = {name: Whole(part, main) for name, part in self.parts.items()}
        if main:
            with torch.device("meta"):
                whole.student = type(self.student)(**self.student.config)  # FSDP's class makes the plain one
            whole.student.load_state_dict(state, assign=True)
        Run.save(whole)


def require_room(gb: float, processes: int, what: str, device: torch.device) -> None:
    """Says what a run holds on each card; `UserError` where that is more than there is.

    gb: of all weights, gradients and moments; processes: that share it, 1 where each holds a copy.
    """
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory / 1e9
    else:  # shared by the processes of this machine
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1e15
        there = pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 1e9
    share = gb / processes
    line = f"{what}: {share:.3g} GB a card of weights, gradients and Adam's moments, activations on top"
    if share > there:
        enough = math.ceil(gb / (ROOM * there))
        way_out = f"Give --shard and torchrun --nproc_per_node={enough} or more"
        raise UserError(f"{line}; there are {there:.3g}. {way_out}, each on a card of its own.")
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
