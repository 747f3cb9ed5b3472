"""Plumbing that every script shares and that has nothing to do with the paper.

Errors in one line, what may be missing, files and threads, frozen networks, processes. What only a training
needs is in training.py. A line that mentions a frame, a latent, a label or a loss belongs in another file.
"""

import dataclasses
import hashlib
import io
import os
import platform
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate, groupby
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def optional(module: str) -> ModuleType:
    """A module of a package that is not required. ImportError, whatever it raises: an old package that is
    installed beside newer ones may break at import in any way."""
    try:
        return import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ImportError(f"{module} cannot be imported, {reason}") from error


class WeightsError(UserError):
    """A checkpoint that does not fit; the message is one line for the user."""


class Unavailable(UserError):
    """What can be done without, and is not here."""


def needs(metric: str, packages: str, weights: str, instead: str = ""):
    """A missing package or failed download in one line; `weights` is a path inside torch's hub folder."""
    file = f"{Path(torch.hub.get_dir()) / weights}, downloaded at first use"
    way_out = f"It needs pip install {packages}, and {file}{instead}."
    return explained(f"{metric} not computed", way_out, Unavailable, (ImportError, OSError, RuntimeError))


def printable(text: object) -> str:
    """The text on one line: file names may hold line breaks and control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class Said(io.TextIOWrapper):
    """stdout or stderr as a program of hours needs them: what they cannot show is escaped, and once their
    reader is gone, what is said goes nowhere."""

    def write(self, text: str) -> int:
        with self.or_nowhere():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self.or_nowhere():
            super().flush()

    @contextmanager
    def or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def speak_anywhere() -> None:
    """Makes sys.stdout and sys.stderr `Said`; where they were closed, what is said goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif stream is getattr(sys, f"__{name}__"):  # not what a test or a notebook has put there
            flushed = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            said = Said(stream.detach(), stream.encoding, "backslashreplace", **flushed)
            setattr(sys, name, said)


def run(main: Callable[[], None]) -> None:
    """main(), a `UserError` shown as one line with exit status 2, Ctrl-C with 130; other errors are bugs."""
    speak_anywhere()
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
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
    suffix = path.suffix if len(path.suffix) < 12 else ""  # in a folder's name that may be any part of it
    partial = path.with_name(f".partial-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{suffix}")
    try:
        remove(partial)
        yield partial
        for file in partial.rglob("*") if partial.is_dir() else [partial]:
            if file.is_file():
                with open(file, "r+b") as handle:  # Windows syncs only what is open for writing
                    os.fsync(handle.fileno())
        if path.is_dir():
            remove(path)
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


def freeze(net: nn.Module) -> nn.Module:
    """net, in place, with buffers for parameters: no `requires_grad_` and no optimiser reaches its weights.

    The buffers are not persistent: checkpoints leave out what never changes.
    """
    for module in net.modules():
        tensors = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
        for name, tensor in tensors:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return net.eval()


# ------------------------------------------------------------------------------------------------------
# The machine


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware computes in it: CUDA from Ampere, CPUs with AMX or AVX512-BF16. Without,
    it is slower than float32, by far."""
    kind, fast = torch.device(device).type, False
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
        fast = can.get("amx_bf16") or can.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def machine() -> str:
    """What this program computes on, for tables."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------------
# Processes


BUCKET = 300e6  # bytes of gradients that travel together


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """bfloat16 for what is safe in it, where that is fast; float32 elsewhere."""
        fast = fast_dtype(self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    @property
    def fused(self) -> bool:
        """Whether an optimiser should update all weights in one kernel."""
        return self.device.type == "cuda"

    def place_frozen(self, net: nn.Module) -> nn.Module:
        """net, in place, on the device; on a GPU in its fast dtype. Only for what never changes: there
        nothing is lost to rounding step by step."""
        if self.device.type == "cuda":
            net.to(fast_dtype(self.device), memory_format=torch.channels_last)
        return net.to(self.device)

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

    def ask(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """Asks all processes whether any has its flag set now; what is returned waits for the answer. Neither
        waits for a GPU. A process on its own is asked when the answer is wanted."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag()), device="cpu")
        message = dist.all_reduce(flags, async_op=True)

        def answer() -> bool:
            message.wait()
            return bool(flags)

        return answer

    def same(self, number: int) -> bool:
        """Whether all processes say the same number."""
        if self.size == 1:
            return True
        high = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        return bool(high[0] == -high[1])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Fills the tensors of every process with those of the first."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its mean over all processes. Said once a step, after every backward pass,
        where DistributedDataParallel would have to be told which of several passes is the last."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        ends, sent = accumulate(gradient.nbytes for gradient in gradients), []
        # One message for many: there are hundreds of gradients, most of them small.
        for _, bucket in groupby(zip(gradients, ends), key=lambda pair: pair[1] // BUCKET):
            bucket = [gradient for gradient, _ in bucket]
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, message in sent:
            message.wait()
            parts = flat.div_(self.size).split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket)])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def shared_store() -> tuple[dist.Store, int, int]:
    """Names and numbers that all processes of a torchrun see, this one's rank, and how many there are."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun keeps its store over restarts: under one name, a new start reads the dead one's addresses.
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


def init_world() -> World:
    """Joins torchrun's process group (NCCL for GPUs, gloo for CPUs); without torchrun a world of one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, size = shared_store()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)
