"""runtime.py: errors in one line, a flag for every setting, checkpoints that are whole or not there."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

import runtime
from runtime import (
    Log,
    Meter,
    StopSignal,
    UserError,
    World,
    count_flops,
    init_world,
    load_training_state,
    newest_checkpoint,
    parse_config,
    read_training_state,
    require_positive,
    save_checkpoint,
    setting,
)

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
            runtime.run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


# ----------------------------------------------------------------- flags


@dataclass(frozen=True)
class Config:
    name: str = setting("tiny", "a name")
    place: str | None = setting(None, "a place, or none")
    steps: int = setting(10, "a count")
    rate: float = setting(0.5, "a rate")
    halve_at: tuple[int, ...] = setting((5,), "several counts")
    fast: bool = setting(False, "a switch")


PRESETS = {"first": Config(), "second": Config(name="full", steps=99, halve_at=(), fast=True)}


def parse(*argv: str) -> Config:
    return parse_config(PRESETS, "A program.", list(argv))


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (["--name", "full"], {"name": "full"}),
        (["--place", "3"], {"place": "3"}),
        (["--steps", "7"], {"steps": 7}),
        (["--rate", "3e-4"], {"rate": 3e-4}),
        (["--rate", "0"], {"rate": 0.0}),
        (["--halve-at", "1", "2"], {"halve_at": (1, 2)}),
        (["--halve-at"], {"halve_at": ()}),
        (["--fast"], {"fast": True}),
    ],
)
def test_every_field_has_a_flag_of_its_type(argv, changes):
    config = parse(*argv)
    assert config == replace(Config(), **changes)
    for name, value in changes.items():
        assert type(getattr(config, name)) is type(value)


def test_flags_override_the_preset_and_a_switch_can_be_turned_off():
    assert parse("--preset", "second") == PRESETS["second"]
    assert parse("--steps", "7", "--preset", "second", "--no-fast") == replace(
        PRESETS["second"], steps=7, fast=False
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--unknown", "1"],
        ["--step", "7"],
        ["--preset", "third"],
        ["--steps", "many"],
        ["--halve-at", "x"],
        ["7"],
    ],
)
def test_unknown_flags_abbreviations_and_values_of_another_type_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2 and argv[0] in capsys.readouterr().err


def test_help_says_what_every_field_is_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in fields(Config):
        assert f"{field.metadata['help']} ({field.default})" in shown


# ----------------------------------------------------------------- checkpoints


def write(folder: Path) -> None:
    """A checkpoint of two files."""
    save_file({"weight": torch.arange(10_000.0)}, folder / "model.safetensors")
    torch.save({"step": 1, "optimiser": torch.arange(10_000.0)}, folder / "train.pt")


def names(folder: Path) -> list[str]:
    """What is in a folder; TensorBoard's curves are there only where it is installed."""
    return sorted(p.name for p in folder.iterdir() if p.name != "tensorboard")


def test_a_checkpoint_is_whole_and_nothing_else_is_left(tmp_path):
    folder = save_checkpoint(tmp_path / "runs" / "new", 12, write, keep=3)
    assert folder == tmp_path / "runs" / "new" / "step_000012" == newest_checkpoint(tmp_path / "runs" / "new")
    assert names(folder.parent) == ["step_000012"] and names(folder) == ["model.safetensors", "train.pt"]


def test_the_last_checkpoints_are_kept_by_number(tmp_path):
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "log.jsonl").touch()
    for step in (8, 9, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, write, keep=2)
    assert names(tmp_path) == ["log.jsonl", "step_1000000", "step_999999", "step_notes"]


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_leaves_the_earlier_checkpoints_and_no_new_one(tmp_path, error):
    def breaks_off(folder: Path) -> None:
        write(folder)
        raise error

    first = save_checkpoint(tmp_path, 1, write, keep=1)
    before = (first / "train.pt").read_bytes()
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, breaks_off, keep=1)
    assert not (tmp_path / "step_000002").exists() and newest_checkpoint(tmp_path) == first
    assert (first / "train.pt").read_bytes() == before
    save_checkpoint(tmp_path, 2, write, keep=1)  # whatever was left there is no obstacle
    assert names(tmp_path) == ["step_000002"]


def write_text(folder: Path) -> None:
    (folder / "train.pt").write_bytes(bytes(100_000))


def write_torch(folder: Path) -> None:
    torch.save({"optimiser": torch.arange(10_000.0)}, folder / "train.pt")


def write_safetensors(folder: Path) -> None:
    save_file({"weight": torch.arange(10_000.0)}, folder / "model.safetensors")


@pytest.mark.parametrize("too_large", [write_text, write_torch, write_safetensors])
def test_a_disk_without_room_is_one_line_and_the_earlier_checkpoints_are_intact(tmp_path, too_large):
    first = save_checkpoint(tmp_path, 1, write, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the system refuses larger files
    try:
        with pytest.raises(UserError) as error:
            save_checkpoint(tmp_path, 2, too_large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_000002" in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == ["step_000001"] and newest_checkpoint(tmp_path) == first


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/step_000001: cannot save"):
        save_checkpoint(tmp_path / "file", 1, write, keep=1)


def test_the_newest_checkpoint_is_the_last_complete_one(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None and newest_checkpoint(tmp_path) is None
    for name in ("step_000002", "step_000010", ".step_000011.partial", "step_last", "step_12.old"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    (tmp_path / "step_000013").mkdir()
    write_safetensors(tmp_path / "step_000013")  # without train.pt
    assert newest_checkpoint(str(tmp_path)) == tmp_path / "step_000010"


def saved_with(folder: Path, config: Config) -> Path:
    """A checkpoint folder as the train scripts write it: the settings as JSON values."""
    saved = {f.name: getattr(config, f.name) for f in fields(config)}
    saved["halve_at"] = list(config.halve_at)
    torch.save({"step": 3, "config": saved}, folder / "train.pt")
    return folder


def test_the_same_settings_and_those_that_may_change_are_accepted(tmp_path):
    folder = saved_with(tmp_path, Config(halve_at=(1, 2)))
    assert load_training_state(folder, Config(halve_at=(1, 2)), frozenset())["step"] == 3
    longer = Config(halve_at=(1, 2), steps=99, fast=True)
    assert load_training_state(folder, longer, frozenset({"steps", "fast"}))["step"] == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_a_damaged_or_foreign_state_is_one_line(tmp_path, content):
    path = tmp_path / "train.pt"
    path.write_bytes(content) if content is not None else torch.save([1, 2], path)
    for mmap in False, True:
        with pytest.raises(UserError, match="train.pt: damaged, or not of a training run") as error:
            read_training_state(tmp_path, mmap)
        assert "\n" not in str(error.value)


def test_a_count_below_one_names_its_flag():
    require_positive(Config(), "steps")
    with pytest.raises(UserError, match="^--steps 0: give 1 or more$"):
        require_positive(Config(steps=0), "steps")


def test_changed_settings_are_refused_by_name_with_both_values(tmp_path):
    folder = saved_with(tmp_path, Config())
    with pytest.raises(UserError) as error:
        load_training_state(folder, Config(rate=0.25, halve_at=(5, 6), steps=99), frozenset({"steps"}))
    line = str(error.value)
    assert "rate was 0.5, now 0.25" in line and "halve_at was [5], now [5, 6]" in line
    assert "steps" not in line and "name" not in line and "\n" not in line and str(folder) in line


def test_a_setting_that_the_checkpoint_does_not_know_is_refused(tmp_path):
    torch.save({"step": 3, "config": {"name": "tiny"}}, tmp_path / "train.pt")
    with pytest.raises(UserError, match="rate was None, now 0.5"):
        load_training_state(tmp_path, Config(), frozenset())


# ----------------------------------------------------------------- processes


def join(rank: int, port: int, folder: Path, function, args: tuple) -> None:
    """One of two processes, started as torchrun would: function(world, *args) is saved as folder/rank.pt."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(function(init_world(), *args), folder / f"{rank}.pt")
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
    world.barrier()
    return {"rank": world.rank, "size": world.size, "main": world.is_main, "mean": mean, "flags": flags}


def test_two_processes_agree_on_means_and_flags(tmp_path):
    first, second = two_processes(tmp_path, what_a_world_says)
    assert (first["rank"], first["size"], first["main"]) == (0, 2, True)
    assert (second["rank"], second["size"], second["main"]) == (1, 2, False)
    assert first["mean"] == second["mean"] == {"rank": 0.5, "loss": pytest.approx(5.1, abs=1e-12)}
    assert first["flags"] == second["flags"] == [True, False, True]


def test_without_torchrun_there_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = init_world()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.mean({"loss": 0.1}) == {"loss": 0.1} and not world.any(False) and world.any(True)


@pytest.fixture
def signals():
    """Python's own handlers of SIGTERM and Ctrl-C are there again after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_a_ctrl_c_after_it_leaves_at_once(signals, number):
    stop = StopSignal()
    assert not stop.set
    signal.raise_signal(number)
    assert stop.set
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ----------------------------------------------------------------- log


def test_the_log_gains_a_line_of_json_for_each_call_and_is_never_overwritten(tmp_path):
    for step in (1, 2):
        Log(tmp_path / "runs", enabled=True).write(step, loss=0.5)
        Log(tmp_path / "runs", enabled=False).write(99)
    lines = (tmp_path / "runs" / "log.jsonl").read_text()
    assert lines == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


def test_a_process_that_does_not_log_makes_no_file(tmp_path):
    Log(tmp_path / "run", enabled=False).write(1)
    assert names(tmp_path) == []


def test_a_line_every_few_steps_holds_the_means_since_the_last(tmp_path, capsys):
    meter = Meter(World(0, 1, torch.device("cpu")), Log(tmp_path, enabled=True), every=2, steps=5)
    for step, batch in enumerate(meter.timed("abcde"), start=1):
        means = meter.step(step, {"loss": torch.tensor(float(step)), "a/b": 1.0}, lr=0.1)
        assert means == ({"loss": {2: 1.5, 4: 3.5, 5: 5.0}[step], "a/b": 1.0} if step in (2, 4, 5) else {})
        assert batch == "abcde"[step - 1]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["lr"], line["a/b"]) for line in logged] == [
        (2, 1.5, 0.1, 1.0), (4, 3.5, 0.1, 1.0), (5, 5.0, 0.1, 1.0),
    ]  # fmt: skip
    assert all(line["steps_per_s"] > 0 and 0 <= line["data_wait"] <= 1 < 1 + line["gb"] for line in logged)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[0].startswith("step 2/5 loss 1.5 lr 0.1") and "a/b" not in printed[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(tmp_path, value):
    meter = Meter(World(0, 1, torch.device("cpu")), Log(tmp_path, enabled=False), every=9, steps=9)
    with pytest.raises(UserError, match=f"^step 3: pixel is {value}"):
        meter.step(3, {"loss": torch.tensor(1.0), "pixel": torch.tensor(value)})


def test_operations_are_counted_on_shapes_alone():
    a, b = torch.empty(10, 20, device="meta"), torch.empty(20, 30, device="meta")
    assert count_flops(lambda: a @ b) == 2 * 10 * 20 * 30 / 1e12
