"""training.py: a flag for every setting, runs that end alike whatever happens to them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_runtime import two_processes
from torch import nn

from runtime import UserError, World
from training import (
    MAY_CHANGE,
    Run,
    Settings,
    as_saved,
    checksum,
    load_training_state,
    newest_checkpoint,
    parse,
    peak_memory,
    presets,
    read_training_state,
    require_positive,
)

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------- flags


@dataclass(frozen=True)
class Config:
    name: str = "tiny"  # a name
    kind: Literal["soft", "hard"] = "soft"  # one of two
    steps: int = 10  # a count
    rate: float = 0.5  # a rate
    halve_at: tuple[int, ...] = (5,)  # several counts
    pair: tuple[int, int] = (3, 4)  # two counts
    fast: bool = False  # a switch


PRESETS = presets(Config, {
    "preset":   ("second", "third"),
    "name":     ("large",  None),
    "steps":    (99,       0),
    "halve_at": ((),       None),
    "fast":     (True,     False),
})  # fmt: skip


def parsed(*argv: str) -> Config:
    return parse(PRESETS, "A program.", list(argv))


def test_presets_are_the_columns_of_their_table_and_full_is_the_default():
    assert PRESETS == {
        "full": Config(),
        "second": Config(name="large", steps=99, halve_at=(), fast=True),
        "third": Config(steps=0),
    }


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (["--name", "large"], {"name": "large"}),
        (["--kind", "hard"], {"kind": "hard"}),
        (["--steps", "7"], {"steps": 7}),
        (["--rate", "3e-4"], {"rate": 3e-4}),
        (["--rate", "0"], {"rate": 0.0}),
        (["--halve-at", "1", "2"], {"halve_at": (1, 2)}),
        (["--halve-at"], {"halve_at": ()}),
        (["--pair", "1", "2"], {"pair": (1, 2)}),
        (["--fast"], {"fast": True}),
    ],
)
def test_every_field_has_a_flag_of_its_type(argv, changes):
    config = parsed(*argv)
    assert config == replace(Config(), **changes)
    for name, value in changes.items():
        assert type(getattr(config, name)) is type(value)


def test_flags_override_the_preset_and_a_switch_can_be_turned_off():
    assert parsed("--preset", "second") == PRESETS["second"]
    mixed = parsed("--steps", "7", "--preset", "second", "--no-fast")
    assert mixed == replace(PRESETS["second"], steps=7, fast=False)


@pytest.mark.parametrize(
    "argv",
    [
        ["--unknown", "1"],
        ["--step", "7"],
        ["--preset", "fourth"],
        ["--kind", "other"],
        ["--steps", "many"],
        ["--halve-at", "x"],
        ["--pair", "1"],
        ["7"],
    ],
)
def test_unknown_flags_abbreviations_and_values_of_another_type_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    said = capsys.readouterr()
    assert stop.value.code == 2 and argv[0] in said.err and said.out == ""


def test_a_misspelt_flag_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parsed("--stpes", "7")
    assert "--steps INT" in capsys.readouterr().err


def test_help_says_what_every_field_is_its_default_and_the_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--preset", "second", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0 and "A program." in shown and "full, second, third" in shown
    for sentence in "a name (default: large)", "a count (default: 99)", "two counts (default: 3 4)":
        assert sentence in shown


def test_a_count_below_one_names_its_flag():
    require_positive(Config(), "steps")
    with pytest.raises(UserError, match="^--steps 0: give 1 or more$"):
        require_positive(Config(steps=0), "steps")


# ----------------------------------------------------------------- a run

ALONE = World(0, 1, torch.device("cpu"))
SEEN = {"tensorboard", ".lock"}  # beside what tests look for: curves where they are installed, and the lock


def names(folder: Path) -> list[str]:
    """What is in a folder, but for SEEN."""
    return sorted(p.name for p in folder.iterdir() if p.name not in SEEN)


@dataclass(frozen=True)
class Training(Settings):
    rate: float = 0.5
    halve_at: tuple[int, ...] = (5,)


class Student(nn.Module):
    """Two numbers, saved as networks are."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), start))
        self.register_buffer("fixed", torch.full((2,), start), persistent=False)

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Student":
        student = cls()
        student.load_state_dict(load_file(folder / "model.safetensors"))
        return student


def start(cfg: Training, world: World = ALONE, student: Student | None = None) -> Run:
    student = student or Student()
    return Run(cfg, world, student, torch.optim.Adam(student.parameters(), cfg.rate))


def train(cfg: Training, world: World = ALONE, student: Student | None = None) -> Run:
    """Steps towards random places, one for each batch."""
    training = start(cfg, world, student)
    for step, batch in training.steps(lambda done: range(done, cfg.steps)):
        assert batch == step - 1
        training.optimiser.zero_grad()
        loss = (training.student.weight - torch.randn(2) - batch).square().sum()
        loss.backward()
        world.average_gradients(training.student.parameters())
        training.optimiser.step()
        training.log({"loss": loss.detach(), "a/b": loss.detach() / 2})
    return training


def saved(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_three_and_three_steps_equal_six(tmp_path, capsys):
    cfg = Training(str(tmp_path / "straight"), steps=6, every=2)
    train(cfg)
    resumed = replace(cfg, out=str(tmp_path / "resumed"))
    train(replace(resumed, steps=3))
    torch.rand(7)  # the state that random numbers are in does not matter
    train(resumed)
    one, other = tmp_path / "straight" / "step_000006", tmp_path / "resumed" / "step_000006"
    assert saved(one)["model.safetensors"] == saved(other)["model.safetensors"]
    a, b = (torch.load(folder / "train.pt") for folder in (one, other))
    assert torch.equal(a["optimiser"]["state"][0]["exp_avg_sq"], b["optimiser"]["state"][0]["exp_avg_sq"])
    assert names(tmp_path / "straight") == ["log.jsonl", "step_000002", "step_000004", "step_000006"]
    assert names(tmp_path / "resumed") == ["log.jsonl", "step_000003", "step_000004", "step_000006"]
    before = saved(other)
    train(resumed)  # nothing is left to do
    assert saved(other) == before and "at step 6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["absent", "raise AttributeError('np.bool8\\nis gone')", "print = len"])
def test_a_missing_or_broken_tensorboard_is_one_line_and_the_run_goes_on(
    package, tmp_path, monkeypatch, capsys
):
    for name in [name for name in sys.modules if "tensorboard" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    if package == "absent":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    else:
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "tensorboard.py").write_text(package)
    train(Training(str(tmp_path / "run"), steps=2, every=2))
    assert names(tmp_path / "run") == ["log.jsonl", "step_000002"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line)
    assert "no TensorBoard curves, log.jsonl has all numbers" in line
    assert package != "absent" or "ModuleNotFoundError" in line
    assert "raise" not in package or "AttributeError: np.bool8 is gone" in line


def test_the_last_checkpoints_are_kept_by_number(tmp_path):
    (tmp_path / "step_notes").mkdir()
    training = start(Training(str(tmp_path)))
    for training.step in (8, 9, 999_998, 999_999, 1_000_000):
        training.save()
    assert names(tmp_path) == ["step_1000000", "step_999998", "step_999999", "step_notes"]


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_leaves_the_earlier_checkpoints_and_no_new_one(tmp_path, error, monkeypatch):
    training = start(Training(str(tmp_path)))
    training.step = 1
    training.save()
    before = saved(tmp_path / "step_000001")
    training.step = 2
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Student, "save_pretrained", lambda self, folder: (_ for _ in ()).throw(error))
        training.save()
    assert names(tmp_path) == ["step_000001"] and saved(tmp_path / "step_000001") == before
    training.save()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000002"


def write_bytes(self, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(100_000))


def write_torch(self, folder: Path) -> None:
    torch.save(torch.arange(10_000.0), folder / "model.pt")


def write_safetensors(self, folder: Path) -> None:
    save_file({"weight": torch.arange(10_000.0)}, folder / "model.safetensors")


@pytest.mark.parametrize("too_large", [write_bytes, write_torch, write_safetensors])
def test_a_disk_without_room_is_one_line_and_the_earlier_checkpoints_are_intact(
    tmp_path, too_large, monkeypatch
):
    resource = pytest.importorskip("resource")
    training = start(Training(str(tmp_path)))
    training.step = 1
    training.save()
    training.step = 2
    monkeypatch.setattr(Student, "save_pretrained", too_large)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the system refuses larger files
    try:
        with pytest.raises(UserError) as error:
            training.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_000002" in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == ["step_000001"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--out .*file/run: cannot be used") as error:
        train(Training(str(tmp_path / "file" / "run"), steps=1))
    assert "\n" not in str(error.value)


def test_a_second_run_in_the_same_folder_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("training.PATIENCE", 0)
    cfg = Training(str(tmp_path), steps=3)
    other = "import runtime, training; training.PATIENCE = 0\nfrom test_training import *\n"
    other += f"runtime.run(lambda: train({cfg!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", other]
    first = start(cfg).steps(lambda done: range(done, 3))
    next(first)
    second = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert second.stderr.startswith(f"error: --out {tmp_path}: cannot be used")
    first.close()
    train(cfg)  # the folder is free again
    assert names(tmp_path) == ["log.jsonl", "step_000003"]


def test_the_newest_checkpoint_is_the_last_complete_one(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None and newest_checkpoint(tmp_path) is None
    for name in ("step_000002", "step_000010", ".partial-0123", "step_last", "step_12.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.pt").touch()
    (tmp_path / "step_000013").mkdir()  # without train.pt
    assert newest_checkpoint(str(tmp_path)) == tmp_path / "step_000010"


@pytest.mark.parametrize("name", [field.name for field in fields(Training)])
def test_only_settings_that_leave_the_result_alone_may_change(tmp_path, name):
    cfg = Training()
    torch.save({"step": 3, "config": as_saved(cfg)}, tmp_path / "train.pt")
    old = getattr(cfg, name)
    new = not old if isinstance(old, bool) else old + {tuple: (9,), str: "2"}.get(type(old), 1)
    if name in MAY_CHANGE:
        assert load_training_state(tmp_path, replace(cfg, **{name: new}))["step"] == 3
    else:
        with pytest.raises(UserError, match=f" {name} was .*, now ") as error:
            load_training_state(tmp_path, replace(cfg, **{name: new}))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert load_training_state(tmp_path, cfg)["step"] == 3


def test_a_setting_that_the_checkpoint_does_not_know_is_refused(tmp_path):
    torch.save({"step": 3, "config": {"seed": 0, "halve_at": [5]}}, tmp_path / "train.pt")
    with pytest.raises(UserError, match="rate was None, now 0.5"):
        load_training_state(tmp_path, Training())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_a_damaged_or_foreign_state_is_one_line(tmp_path, content):
    path = tmp_path / "train.pt"
    path.write_bytes(content) if content is not None else torch.save([1, 2], path)
    for mmap in False, True:
        with pytest.raises(UserError, match="train.pt: damaged, or not of a training run") as error:
            read_training_state(tmp_path, mmap)
        assert "\n" not in str(error.value)


def test_a_line_every_few_steps_holds_the_means_since_the_last(tmp_path, capsys):
    cfg = Training(str(tmp_path), steps=5, every=200, rate=0.25)  # a line every 2 steps
    training, lines = start(cfg), []
    for step, _ in training.steps(lambda done: range(done, cfg.steps)):
        lines.append(training.log({"loss": torch.tensor(float(step)), "a/b": torch.tensor(1.0)}))
    means = {2: 1.5, 4: 3.5, 5: 5.0}
    assert lines == [{"loss": means[n], "a/b": 1.0} if n in means else {} for n in range(1, 6)]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["lr"], line["a/b"]) for line in logged] == [
        (step, mean, 0.25, 1.0) for step, mean in means.items()
    ]
    assert all(line["steps_per_s"] > 0 and 0 <= line["data_wait"] <= 1 < 1 + line["gb"] for line in logged)
    shown = capsys.readouterr().out.splitlines()
    first, *printed = (line for line in shown if "TensorBoard" not in line)  # which may be missing, in a line
    assert first == f"1 x cpu | at step 0 of 5 | {tmp_path} | rate 0.25"
    assert (
        len(printed) == 3 and printed[0].startswith("step 2/5 loss 1.5 lr 0.25") and "a/b" not in printed[0]
    )


def test_scores_are_shown_and_a_second_run_adds_to_the_log(tmp_path, capsys):
    for cfg in (Training(str(tmp_path), steps=1), Training(str(tmp_path), steps=2)):
        training = start(cfg)
        for _ in training.steps(lambda done: range(done, 2)[:1]):
            assert training.due
            training.note(psnr=21.5)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "psnr": 21.5}\n{"step": 2, "psnr": 21.5}\n'
    assert "step 2: psnr 21.5\n" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_the_next_line_of_the_log(tmp_path, value):
    training, pixel = start(Training(str(tmp_path), every=400)), {2: value}  # a line every 4 steps
    with pytest.raises(UserError, match=f"^step 4: pixel is {value}"):
        for step, _ in training.steps(lambda done: range(9)):
            training.log({"loss": torch.tensor(1.0), "pixel": torch.tensor(pixel.get(step, 1.0))})
    assert not (tmp_path / "log.jsonl").read_text()


def test_a_dry_run_measures_three_steps_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(Training(str(out), steps=200_000, dry_run=True)).step == 3 and names(tmp_path) == []
    (*_, last) = capsys.readouterr().out.splitlines()
    for part in " s a step, ", " GB at most: 200000 steps take ", " days":
        assert part in last


def test_a_machine_that_cannot_tell_its_peak_memory_trains_all_the_same(monkeypatch):
    assert peak_memory() > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() == 0


@pytest.fixture
def signals():
    """Python's own handlers of SIGTERM and Ctrl-C are there again after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_a_ctrl_c_after_it_leaves_at_once(
    signals, tmp_path, capsys, number
):
    steps = start(Training(str(tmp_path), steps=9)).steps(lambda done: range(9))
    next(steps)
    signal.raise_signal(number)
    with pytest.raises(StopIteration):
        next(steps)
    assert names(tmp_path) == ["log.jsonl", "step_000001"]
    assert "asked to stop, after step 1 of 9" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def own_start(world: World, folder: Path) -> dict:
    """A run that each process would begin in its own way; after it, one bit changes in the second."""
    training = train(Training(str(folder / "run"), steps=2), world, Student(float(world.rank)))
    result = {"fixed": training.student.fixed, "weight": training.student.weight.detach().clone()}
    if world.rank == 1:
        training.student.weight.data[1] = torch.nextafter(result["weight"][1], torch.tensor(9.0))
    training.step = 3
    try:
        training.save()
    except UserError as error:
        result["said"] = str(error)
    return result


def test_two_processes_begin_with_the_first_ones_weights_and_stop_when_they_come_apart(tmp_path):
    first, second = two_processes(tmp_path, own_start, tmp_path)
    assert torch.equal(first["weight"], second["weight"])
    for result in first, second:
        assert torch.equal(result["fixed"], torch.zeros(2))
        assert result["said"] == "step 3: the processes' weights have come apart; the last checkpoint is kept"
    assert names(tmp_path / "run") == ["log.jsonl", "step_000002"]


def test_any_bit_changes_the_checksum():
    weights = [torch.arange(6.0).reshape(1, 1, 2, 3), torch.tensor(1.0, dtype=torch.bfloat16)]
    one = checksum(weights)
    assert one == checksum([weights[0].to(memory_format=torch.channels_last), weights[1]]) < 2**63
    weights[0][0, 0, 1, 2] = torch.nextafter(weights[0][0, 0, 1, 2], torch.tensor(9.0))
    assert checksum(weights) != one != checksum([weights[0], -weights[1]])


def own_folder(world: World, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        start(Training(str(folder / f"run{world.rank}")), world)
    return str(error.value)


def test_processes_that_see_different_checkpoints_stop_in_one_line(tmp_path):
    train(Training(str(tmp_path / "run0"), steps=1))
    for said in two_processes(tmp_path, own_folder, tmp_path):
        assert "processes find different checkpoints" in said and "\n" not in said
