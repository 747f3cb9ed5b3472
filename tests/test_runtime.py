"""runtime.py: errors in one line, processes that agree."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import runtime
from runtime import World, init_world, run

ROOT = Path(runtime.__file__).parent


# ----------------------------------------------------------------- errors


def script(body: str) -> subprocess.CompletedProcess:
    """A program whose main has this body, as a process of its own."""
    text = f"from runtime import UserError, run\ndef main():\n    {body}\nrun(main)"
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)


def test_a_user_error_is_one_line_and_exit_status_2():
    done = script("raise UserError('clip.mp4: no such file. Give another.')")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: clip.mp4: no such file. Give another.\n"


def test_any_other_error_keeps_its_traceback():
    done = script("raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug\n")


def test_ctrl_c_exits_with_130_and_says_nothing(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit) as stop:
            run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


# ----------------------------------------------------------------- processes


def join(rank: int, port: int, folder: Path, function, args: tuple) -> None:
    """One of two processes, started as torchrun would: function(world, *args) is saved as folder/rank.pt."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(function(init_world(), *args), folder / f"{rank}.pt")
    dist.barrier()  # gloo aborts at times where one process leaves while the other still closes a connection
    dist.destroy_process_group()


def two_processes(folder: Path, function, *args) -> list:
    """What function(world, *args) returns in each of two real processes that form a gloo group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(join, (port, folder, function, args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def what_a_world_says(world: World) -> dict:
    mean = world.mean({"rank": float(world.rank), "loss": 0.1 + world.rank * 10})
    flags = [world.any(world.rank == 1), world.any(False), world.any(True)]
    questions = [world.ask(lambda flag=flag: flag) for flag in (world.rank == 1, False, True)]
    flags += [answer() for answer in reversed(questions)]
    world.barrier()
    return {"rank": world.rank, "size": world.size, "main": world.is_main, "mean": mean, "flags": flags}


def test_two_processes_agree_on_means_and_flags(tmp_path):
    first, second = two_processes(tmp_path, what_a_world_says)
    assert (first["rank"], first["size"], first["main"]) == (0, 2, True)
    assert (second["rank"], second["size"], second["main"]) == (1, 2, False)
    assert first["mean"] == second["mean"] == {"rank": 0.5, "loss": pytest.approx(5.1, abs=1e-12)}
    assert first["flags"] == second["flags"] == [True, False, True] * 2


def test_without_torchrun_there_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = init_world()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.mean({"loss": 0.1}) == {"loss": 0.1} and not world.any(False) and world.any(True)
