"""Processes, signals, seeds, locks, whole files and logs."""

import fcntl
import itertools
import json
import os
import signal
import sys
import types

import pytest
import torch

import runtime
from runtime import MetricsLog, Ranks, Stop, Use, derive_seed, lock_folder, replaced
from training import Tally

# ---- seeds ----


def test_no_two_uses_share_a_seed():
    """Also where numbers are zero or missing, which numpy's SeedSequence cannot tell apart."""
    words = [(), *((i,) for i in range(4)), *itertools.product(range(4), range(4))]
    seeds = {use: {derive_seed(seed, use, *more) for seed in range(3) for more in words} for use in Use}
    for a, b in itertools.combinations(Use, 2):
        assert not seeds[a] & seeds[b], (a, b)
    assert all(0 <= seed < 2**63 for each in seeds.values() for seed in each)
    assert derive_seed(3, Use.STEP, 5) != derive_seed(5, Use.STEP, 3) != derive_seed(3, Use.STEP, 6)


# ---- processes ----


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK, WORLD_SIZE are set without LOCAL_RANK.*srun.*SLURM_LOCALID"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK are set without RANK, WORLD_SIZE"),
        ({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be whole numbers.*'first'"),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, environment, message):
    """A process that took itself for the only one would train alone, N times."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        Ranks()


def test_processes_wait_longer_than_half_an_hour(monkeypatch):
    """Gloo's own limit, which the diagnosis of a large model may well exceed while the others wait."""
    groups, waited = [], []
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(runtime.dist, "new_group", lambda **options: groups.append(options) or "group")
    monkeypatch.setattr(runtime.dist, "barrier", lambda group: waited.append(group))
    Ranks().barrier()
    assert waited == ["group"] and groups[0]["backend"] == "gloo" and groups[0]["timeout"].total_seconds() >= 86400


def test_what_processes_disagree_about_is_named(monkeypatch):
    ranks = Ranks()
    ranks.agree({"a": 1}, "nothing to do for a process alone")
    ranks.world, theirs = 2, {"a": 1, "b": [2]}

    def gather(found, mine, group):
        found[:] = [mine, ("elsewhere", theirs)]

    monkeypatch.setattr(runtime.dist, "all_gather_object", gather)
    ranks.agree({"a": 1, "b": [2]}, "unused")
    for mine, shown in (
        ({"a": 1, "b": [3]}, r"b is \[3\] .* and \[2\] in process 1 on elsewhere"),
        ({"a": 1}, "b is N"),
    ):
        with pytest.raises(ValueError, match=f"the processes disagree: {shown}.*; the way out"):
            ranks.agree(mine, "the way out")


# ---- signals ----


def test_a_stop_is_remembered_and_a_second_leaves_at_once(capfd):
    previous = signal.getsignal(signal.SIGTERM)
    with Stop("saving first") as stop:
        assert stop.agreed() == 0
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.agreed() == number
        assert capfd.readouterr().err == "\nsaving first\n"
        with pytest.raises(SystemExit) as leaves:
            os.kill(os.getpid(), signal.SIGINT)
        assert leaves.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == previous


def test_torchruns_repeated_signal_does_not_cut_the_saving_short(capfd):
    ranks = Ranks()
    ranks.world, ranks.any = 2, lambda flag: flag
    with Stop("saving first", ranks) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
    ranks.main = False
    capfd.readouterr()
    with Stop("saving first", ranks):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not capfd.readouterr().err


# ---- files ----


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), replaced(path) as file:
        file.write(b"half")
        raise KeyError
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"before"
    with replaced(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"after"


@pytest.mark.parametrize(
    "write", [lambda file: file.write(bytes(10**6)), lambda file: torch.save(torch.ones(10**6), file)]
)
def test_a_full_disk_is_named(tmp_path, write):
    """torch.save reports it as a RuntimeError about positions."""
    path = tmp_path / "file"
    (tmp_path / "file.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match="no space left for .*file; make room"), replaced(path) as file:
        write(file)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_locked_once(tmp_path, monkeypatch, capsys):
    with lock_folder(tmp_path / "run"), pytest.raises(ValueError, match="in use by another run"):
        lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out = .*file.* cannot be written to"):
        lock_folder(tmp_path / "file")

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock_folder(tmp_path / "run").close()
    assert "cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().err


def test_the_log_keeps_what_it_is_told_to_and_no_half_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n[]\n{"loss": 1}\n{"step": 3}\n{"step": 2, "a": 1}\n{"st')
    log = MetricsLog(tmp_path, lambda record: record["step"] < 3, 2, False, Ranks())
    log.write({"step": 3, "b": 2})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "a": 1}, {"step": 3, "b": 2}]


# ---- records ----


def test_the_tally_counts_skipped_steps_and_means_over_the_others():
    names, nan = ("a", "b", "c", "d"), float("nan")
    tally = Tally(torch.device("cpu"), names)
    for value, finite in ((1.0, True), (nan, False), (nan, False), (3.0, True), (nan, False)):
        tally.add(torch.full((4,), value), torch.tensor(finite))
    copy = Tally(torch.device("cpu"), names)
    copy.load_state_dict(tally.state_dict())
    for each in (tally, copy):
        assert each.read() == (dict.fromkeys(names, 2.0), 3, 2)
        each.add(torch.full((4,), nan), torch.tensor(False))  # the row goes on over the line of the log
        assert each.read() == ({}, 4, 2)


def test_the_command_is_recorded_without_the_folder_of_the_project(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/project/eval/tool.py", "--out", "a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="eval.tool"))
    assert runtime.command() == "python -m eval.tool --out 'a b'"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    assert runtime.command() == "python tool.py"
