"""Plumbing that every script shares and that has nothing to do with the paper.

Process group, seeds, flags from a dataclass, checkpoints, log, errors in one line.
Admission test: a line that mentions a frame, a latent, a label or a loss belongs in another file.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """Something the user can mend; its message is the one line that is shown: what is wrong, what to do."""


@contextmanager
def explained(
    what: str, way_out: str, kind: type[UserError] = UserError, causes: type[Exception] | tuple = Exception
) -> Iterator[None]:
    """Whatever of `causes` fails inside becomes one line: `what (the reason). way_out`, raised as `kind`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise  # explained already, or somebody's to retry
    except causes as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what} ({reason[:200]}). {way_out}") from error


def run(main: Callable[[], None]) -> None:
    """main(), a `UserError` shown as one line with exit status 2, Ctrl-C with 130; other errors are bugs."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------
# Files and threads


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A place for a file or a folder that becomes `path` once the block has ended well: nobody ever sees half
    of it, not even after a power cut. Raises OSError where it cannot be written."""
    # As short as it is, it fits wherever the final name does; it is the same after a kill, and found again.
    partial = path.with_name(f".partial-{hashlib.sha256(path.name.encode()).hexdigest()[:8]}{path.suffix}")
    try:
        remove(partial)
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            if file.is_file():
                with open(file, "r+b") as handle:  # Windows syncs only what is open for writing
                    os.fsync(handle.fileno())
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The same items in the same order, made by a thread of their own, up to `depth` ahead.

    An error in the thread is raised here, at its place. Whoever stops early waits for the item in the making.
    """
    items, end, waiting = iter(items), object(), deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for _ in range(depth):
                waiting.append(thread.submit(next, items, end))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            if hasattr(items, "close"):
                thread.submit(items.close).result()


# ------------------------------------------------------------------------------------------------------
# Networks that never learn


def freeze(net: torch.nn.Module) -> torch.nn.Module:
    """net, in place, with buffers for parameters: no `requires_grad_` and no optimiser reaches its weights.

    The buffers are not persistent: checkpoints leave out what never changes.
    """
    for module in net.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach(), persistent=False)
    return net.eval()


# ------------------------------------------------------------------------------------------------------
# Process group and seeds


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values averaged over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist()))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by its mean over all processes. Said once a step, after every backward pass,
        where DistributedDataParallel would have to be told which of several passes is the last."""
        if self.size > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
                work.wait()
            torch._foreach_div_(gradients, self.size)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def init_world() -> World:
    """Joins torchrun's process group (NCCL on GPUs, gloo on CPUs); without torchrun a world of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over restarts: under one name, a new start reads the dead one's addresses.
        attempt = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


# ------------------------------------------------------------------------------------------------------
# Flags


def parse_config(presets: dict[str, typing.Any], description: str | None, argv: list[str] | None = None):
    """A configuration from the command line: `--preset NAME`, then a flag for every field of the dataclass.

    The default preset is the first. A field's help text is in its metadata (see `setting`).
    """
    first = next(iter(presets))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", choices=presets, default=first)
    for field in dataclasses.fields(presets[first]):
        flag = "--" + field.name.replace("_", "-")
        help_text = f"{field.metadata.get('help', '')} ({getattr(presets[first], field.name)})"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif typing.get_origin(field.type) is tuple:
            item = typing.get_args(field.type)[0]
            parser.add_argument(flag, type=item, nargs="*", default=None, help=help_text)
        else:
            parser.add_argument(flag, type=plain_type(field.type), default=None, help=help_text)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = presets[given.pop("preset")]
    return dataclasses.replace(
        config, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    )


def require_positive(config, names: str) -> None:
    """`UserError` where one of these settings is below 1."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: give 1 or more")


def plain_type(hint) -> type:
    """int of `int`, str of `str | None`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    return hint


def setting(default, help: str):
    """A field of a configuration: its default, and what it is, with unit and source."""
    return dataclasses.field(default=default, metadata={"help": help})


# ------------------------------------------------------------------------------------------------------
# Checkpoints: folders step_000123/, written aside and renamed, so that a half-written one is never seen


def newest_checkpoint(out: str | Path) -> Path | None:
    """The complete checkpoint with the highest step under `out`, if there is one."""
    steps = [p for p in Path(out).glob("step_*") if p.name[5:].isdigit() and (p / "train.pt").is_file()]
    return max(steps, key=lambda p: int(p.name[5:]), default=None)


def save_checkpoint(out: str | Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Calls write(folder) on a temporary folder, renames it to out/step_N, keeps the last `keep` ones."""
    out = Path(out)
    final, partial = out / f"step_{step:06d}", out / f".step_{step:06d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for path in partial.iterdir():  # on disk before the rename: a power cut leaves no empty file
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, in Python, torch and safetensors
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{final}: cannot save ({reason}). Earlier checkpoints are intact.") from error
    older = sorted((p for p in out.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    for path in older[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def read_training_state(folder: Path, mmap: bool = False) -> dict:
    """train.pt of a checkpoint: "step", "config" and more. mmap: tensors stay on disk until they are used."""
    path = folder / "train.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return {"step": state["step"], "config": dict(state["config"])} | state
    except Exception as error:  # cut short, or another program's: many kinds
        raise UserError(f"{path}: damaged, or not of a training run. Copy the checkpoint again.") from error


def load_training_state(folder: Path, config, may_change: frozenset[str]) -> dict:
    """train.pt of a checkpoint. `UserError` if a setting that changes the result differs from `config`."""
    state = read_training_state(folder)
    saved, now = state["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [k for k in now if k not in may_change and saved.get(k) != now[k]]
    if changed:
        named = ", ".join(f"{k} was {saved.get(k)}, now {now[k]}" for k in changed)
        raise UserError(f"{folder} was made with other settings: {named}. Use them, or another --out.")
    return state


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag, so that the loop can save and leave between two steps."""

    def __init__(self):
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C leaves at once


class Log:
    """One JSON object a line in out/log.jsonl, and TensorBoard's curves beside it where that is installed."""

    def __init__(self, out: Path, enabled: bool):
        self.file = self.board = None
        if enabled:
            out.mkdir(parents=True, exist_ok=True)
            self.file = (out / "log.jsonl").open("a", buffering=1)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"))

    def write(self, step: int, **values: float) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)


class Meter:
    """What a person sees of a run: every `every` steps a line, also in the log, of values averaged over
    processes and over the steps since the last line, speed, share of time waiting for data, peak memory.
    """

    def __init__(self, world: World, log: Log, every: int, steps: int):
        self.world, self.log, self.every, self.steps = world, log, every, steps
        self.reset()

    def reset(self) -> None:
        self.totals, self.count, self.waited, self.since = {}, 0, 0.0, time.perf_counter()

    def timed(self, batches: Iterable) -> Iterator:
        """The batches, the wait for each on the clock."""
        iterator, asked = iter(batches), time.perf_counter()
        for batch in iterator:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, step: int, values: dict[str, torch.Tensor], **more: float) -> dict[str, float]:
        """After update number `step`. Names with a slash are logged, not printed; where a line was printed,
        the means are returned. Raises `UserError` for a value that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                way_out = "The last checkpoint is kept; try a lower learning rate."
                raise UserError(f"step {step}: {name} is {float(value)}. {way_out}")
            self.totals[name] = self.totals.get(name, 0.0) + float(value)
        self.count += 1
        if step % self.every and step != self.steps:
            return {}
        spent = time.perf_counter() - self.since
        means = self.world.mean({name: total / self.count for name, total in self.totals.items()})
        more |= {"steps_per_s": self.count / spent, "data_wait": self.waited / spent, "gb": peak_memory()}
        self.log.write(step, **means, **more)
        if self.world.is_main:
            shown = " ".join(f"{k} {v:.4g}" for k, v in (means | more).items() if "/" not in k)
            left = (self.steps - step) * spent / self.count / 60
            print(f"step {step}/{self.steps} {shown} eta {left:.0f} min", flush=True)
        self.reset()
        return means


def peak_memory() -> float:
    """The most memory this process has held, in GB: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows, where infer.py needs this module too

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


TFLOPS = 250  # of a GPU in training: about a quarter of the peak of an H100 or H200 in bf16


def print_cost(networks: dict, tflop: float, samples: int, processes: int) -> None:
    """The table of --dry-run. networks: name -> module or None; tflop: work for one sample, of `samples`."""
    for name, net in networks.items():
        if net:
            size = sum(weight.numel() for weight in (*net.parameters(), *net.buffers()))
            print(f"{name:16} {size / 1e6:8.1f} M weights")
    days = tflop * samples / (TFLOPS * processes) / 86400
    print(f"{tflop:.3g} TFLOP for a sample and step, what a cache makes once not counted")
    print(f"{samples} samples on {processes} GPUs at {TFLOPS} TFLOP/s each: {days:.1f} days", flush=True)


def print_step(world: World, losses: dict[str, torch.Tensor]) -> None:
    """The last line of --dry-run: one step's losses and the memory it took."""
    if world.is_main:
        shown = " ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
        print(f"one step: {shown}; peak memory {peak_memory():.1f} GB")


def count_flops(work: Callable[[], object]) -> float:
    """Floating-point operations (2 for a multiply-add) of work(), in 1e12; its tensors may be on "meta"."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12
