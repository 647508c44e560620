"""The trainer end to end, on digits and a tiny encoder: one run, whatever its processes and whatever kills it."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import loss
import runtime
import train_repa_dar
from dataset import inputs, prepare
from eval.online import OnlineEvaluation
from tests.conftest import ROOT, TINY, ending, forked, killed, read_lines
from weights import load_file, load_trained

TIMING = {"seconds", "samples_per_second", "evaluation_seconds"}  # all that may differ between repeats
STEPS = 33
ALIGNED = 12  # steps of those whose alignment ends; between two lines of the log and two checkpoints
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_repa_dar.py"]
QUIET = ("--eval-every", 0)


@pytest.fixture(scope="module")
def command(small_data, encoder_folder, judge_folder):
    """Arguments of a run of seconds: 2 blocks, 70 images, so that 33 steps of 8 cross three epoch ends."""
    steps = f"--lr 1e-3 --max-steps {STEPS} --log-every 5 --checkpoint-every 10"
    aligned = f"--routing dar --chunk-size 3 --alignment repa --encoder={encoder_folder}"
    judged = f"--eval-encoder={judge_folder} --eval-every 15 --eval-samples 6 --eval-batch-size 4 --sample-steps 2"

    def build(out, *extra, data=small_data):
        words = f"--data={data} --out={out} {TINY} {steps} {aligned} {judged}".split()
        return [*words, *map(str, extra)]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(command(folder))
    return folder


def records(folder, without=TIMING):
    return [
        {key: value for key, value in line.items() if key not in without}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def assert_same_run(folder, reference):
    """Weights, averages, optimiser, tally and log, bit for bit."""
    a, b = flat(load_file(folder / "last.pt")), flat(load_file(reference / "last.pt"))
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        elif not key.startswith(("seconds", "logged_seconds", "config.")):
            assert a[key] == b[key], key
    assert records(folder) == records(reference)


def assert_same_curves(folder, reference):
    """The log to float tolerance. Weights are left out: where a gradient is zero but for rounding, as that of the key
    bias is, Adam turns the rounding into steps of full size."""
    ours, theirs = records(folder), records(reference)
    assert len(ours) == len(theirs) > 8
    for line, other in zip(ours, theirs):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return flat(dict(enumerate(tree)), prefix)
    return {prefix[:-1]: tree}


def run(arguments):
    train_repa_dar.main(arguments)


def run_killed(arguments, *patch):
    """A run in a process of its own, which a kill ends where `patch`, arguments of `ending`, says."""

    def call():
        setattr(*patch[1:3], ending(*patch))
        run(arguments)

    assert forked(call) == [-signal.SIGKILL]


def killed_at(step):
    return killed, train_repa_dar.Trainer, "train_step", lambda trainer, batch: trainer.progress["step"] == step


def killed_in_save(checkpoint, file):
    whole = io.BytesIO()
    torch.save.__wrapped__(checkpoint, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    killed()


def killed_in_log(log, record):
    log.file.write('{"step": 25, "ima')
    log.file.flush()
    killed()


def test_killed_anywhere_and_restarted_is_the_same_run(command, tmp_path, whole):
    """Killed before the first checkpoint, between two, in the writing of one, in a log line, in an evaluation."""
    folder = tmp_path / "killed"
    for patch in (
        killed_at(7),
        killed_at(18),
        (killed_in_save, torch, "save", lambda checkpoint, file: checkpoint.get("step") == 20),
        (killed_in_log, runtime.MetricsLog, "write", lambda log, record: record["step"] == 25),
        (killed, OnlineEvaluation, "sample"),
        killed_at(31),  # after that evaluation, which the checkpoint still owes
    ):
        run_killed(command(folder), *patch)
    run(command(folder))
    assert load_file(folder / "last.pt")["step"] == STEPS
    assert_same_run(folder, whole)


@contextlib.contextmanager
def sending(number, after):
    """Within the block, the process gets this signal within this step."""
    trainer, due = train_repa_dar.Trainer, lambda self, batch: self.progress["step"] + 1 == after
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(
            trainer, "train_step", ending(lambda *_: os.kill(os.getpid(), number), trainer, "train_step", due)
        )
        yield
    assert stop.value.code == 128 + number


def test_signal_saves_leaves_and_resumes(command, tmp_path, whole):
    """The step is finished and saved although no checkpoint was due, and the exit status names the signal."""
    stopped = tmp_path / "stopped"
    with sending(signal.SIGTERM, after=13):
        run(command(stopped))
    assert load_file(stopped / "last.pt")["step"] == 13
    run(command(stopped))
    assert_same_run(stopped, whole)


def test_signal_during_an_evaluation_saves_and_makes_up_for_it(command, tmp_path, whole, monkeypatch):
    """Evaluations can take minutes: one is cut short, and made first thing when the run goes on."""
    stopped = tmp_path / "stopped"
    for step in (15, 30, STEPS):
        with monkeypatch.context() as patch:
            stop = ending(lambda *_: os.kill(os.getpid(), signal.SIGTERM), OnlineEvaluation, "sample")
            patch.setattr(OnlineEvaluation, "sample", stop)
            with pytest.raises(SystemExit) as stop:
                run(command(stopped))
        assert stop.value.code == 128 + signal.SIGTERM and load_file(stopped / "last.pt")["step"] == step
        assert records(stopped)[-1]["step"] == step and "frechet_distance" not in records(stopped)[-1]
        run(command(stopped, "--max-steps", step))
    assert_same_run(stopped, whole)


def test_signal_to_the_whole_process_group_saves_too(command, tmp_path):
    """As a job scheduler sends it: readers get SIGTERM too, and must not die before the trainer has saved."""
    endless = ("--max-steps", 100_000, "--checkpoint-every", 100_000, "--num-workers", 2, *QUIET)
    words = command(tmp_path / "run", *endless)
    process = multiprocessing.get_context("fork").Process(target=lambda: (os.setsid(), run(words)))
    process.start()
    try:
        wait_for(lambda: records(tmp_path / "run"))
        os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 128 + signal.SIGTERM
    assert load_file(tmp_path / "run" / "last.pt")["step"] >= 5


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.05)


def test_snapshot_survives_a_kill_before_the_checkpoint(command, tmp_path, monkeypatch):
    """The snapshot of a step is there whenever the run goes on from that step."""
    original = torch.save

    def save(checkpoint, file):
        original(checkpoint, file)
        if "last.pt" in file.name:
            raise KeyboardInterrupt  # instead of a kill: last.pt is not in place yet

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(command(tmp_path / "run", "--snapshot-every", 5, "--eval-every", 0))
    assert [path.name for path in sorted((tmp_path / "run").glob("*.pt"))] == ["step-0000005.pt"]


@pytest.mark.parametrize("content", [{"ema": {}}, [1], {"config": {}, "step": 5, "log_lines": 2}])
def test_checkpoint_of_another_program_or_version_is_refused(command, tmp_path, content):
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(SystemExit, match="last.pt is no checkpoint of this version of the trainer.*--init-from"):
        run(command(tmp_path / "run"))


def test_processes_and_accumulation_do_not_change_the_run(command, tmp_path):
    """Two processes, and one that takes the batch in parts, follow one process that takes it whole.

    Also over the end of the alignment: none waits for gradients that no longer come.
    """
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    settings = ("--align-steps", ALIGNED, "--log-every", 3)
    run(command(one, *settings))
    words = [*TORCHRUN, *command(two, *settings, "--micro-batch-size", 2)]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "8 global = 2 processes x 4 local, in 2 accumulated parts of 2" in finished.stdout
    run(command(parts, *settings, "--micro-batch-size", 2, "--num-workers", 1))
    assert_same_curves(two, one)
    assert_same_curves(parts, one)
    moments = load_file(two / "last.pt")["optimizer"]["state"]
    assert sorted({int(state["step"]) for state in moments.values()}) == [ALIGNED, STEPS]


def test_each_image_meets_the_same_noise_whatever_the_processes(command, tmp_path, monkeypatch):
    """What the loss is given at every step: put together from two ranks, it equals what one process is given."""
    config = train_repa_dar.configuration.parse(command(tmp_path / "run", *QUIET, "--max-steps", 20))

    def given(rank, world):
        seen = {}

        def take(self, model, x, labels, draws, tokens):
            values = {"x": x, "labels": labels, "tokens": tokens[0], **vars(draws)}
            for key, value in values.items():
                seen.setdefault(key, []).append(value.clone())
            total = model.x_embedder.proj.weight.sum()
            return total, {"denoising_loss": total, "alignment_loss": total}

        monkeypatch.setattr(loss.Loss, "__call__", take)
        with runtime.Ranks() as ranks:
            trainer = train_repa_dar.Trainer(config, ranks)
            ranks.rank, ranks.world = rank, world
            batches = list(trainer.batches())
            ranks.world = 1  # there is nobody to exchange gradients with
            trainer.share = trainer.micro = config.batch_size // world
            for step, batch in enumerate(batches):
                trainer.progress["step"] = step
                trainer.train_step(batch)
        return {key: torch.stack(values) for key, values in seen.items()}

    one, first, second = given(0, 1), given(0, 2), given(1, 2)
    assert one.keys() == {"x", "labels", "tokens", "noise", "t", "label"}
    for key, value in one.items():
        assert torch.equal(value, torch.cat([first[key], second[key]], dim=1)), key
    assert len(one["noise"].unique()) > 0.99 * one["noise"].numel()  # new in each step and for each image


def spoiling(monkeypatch, spoil):
    """Let `spoil(total, step, model)` change the loss of every step. Returns the list of trainers so made."""
    original, trainers = loss.Loss.__call__, []
    build = train_repa_dar.Trainer.open_folder

    def open_folder(self):
        trainers.append(self)
        build(self)

    def call(self, model, *arguments):
        total, parts = original(self, model, *arguments)
        return spoil(total, trainers[-1].progress["step"], model), parts

    monkeypatch.setattr(train_repa_dar.Trainer, "open_folder", open_folder)
    monkeypatch.setattr(loss.Loss, "__call__", call)
    return trainers


def test_non_finite_steps_are_skipped_and_counted(command, tmp_path, monkeypatch):
    """A step with a NaN loss, and one with an infinite gradient, leave weights and moments as they were."""
    states = {}

    def spoil(total, step, model):
        optimizer = trainers[-1].optimizer.state_dict()["state"]
        now = flat({"model": model.state_dict(), "optimizer": optimizer})
        states[step] = {key: value.clone() for key, value in now.items()}
        if step == 4:
            total = total * float("nan")
        if step == 6:
            total = total + (model.x_embedder.proj.weight.sum() * 0).sqrt()  # finite, its gradient is not
        return total

    trainers = spoiling(monkeypatch, spoil)
    run(command(tmp_path / "run", "--max-steps", 10, *QUIET))
    for step, taken in ((3, True), (4, False), (5, True), (6, False), (7, True)):
        same = [torch.equal(states[step][key], states[step + 1][key]) for key in states[step]]
        assert (not all(same)) if taken else all(same), step
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [1, 2]
    assert all(json.dumps(line, allow_nan=False) for line in records(tmp_path / "run"))


def test_persistent_non_finite_steps_stop_the_run(command, tmp_path, monkeypatch):
    spoiling(monkeypatch, lambda total, step, model: total * (float("nan") if step >= 12 else 1))
    with pytest.raises(SystemExit, match=r"8 steps in a row .* 8 of 20 in all.*--lr"):
        run(command(tmp_path / "run", "--max-skipped-steps", 4, *QUIET))
    good = load_file(tmp_path / "run" / "last.pt")
    assert good["step"] == 10 and all(value.isfinite().all() for value in good["model"].values())


def test_a_finished_run_is_left_alone_and_another_configuration_refused(command, tmp_path):
    """Nothing changes, above all not what the convergence table says it was made with."""
    folder, words = tmp_path / "run", command(tmp_path / "run", "--max-steps", 5, *QUIET)
    run(words)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    run(words)
    assert before == {path: path.read_bytes() for path in before}
    for killed_early in (False, True):
        if killed_early:  # as if it had been killed before it wrote a checkpoint
            (folder / "last.pt").unlink()
            del before[folder / "last.pt"]
        with pytest.raises(SystemExit, match=r"(?s)lr: 0.001 -> 0.002.*routing: 'dar' -> 'residual'"):
            run([*words, "--lr", "2e-3", "--routing", "residual"])
        assert before == {path: path.read_bytes() for path in before}


def test_changed_images_are_refused(command, tmp_path, digits):
    moved, out = tmp_path / "data", tmp_path / "run"
    moved.symlink_to(digits)  # the same option, other images behind it
    settings = ("--max-steps", 2, "--encoder-features", "online", *QUIET)
    run(command(out, *settings, data=moved))
    moved.unlink()
    prepare.main(["digits", "--out", str(moved), "--limit", "50"])
    with pytest.raises(SystemExit, match="content of data"):
        run(command(out, *settings, data=moved))


def test_a_longer_run_goes_on_where_a_shorter_ended(command, tmp_path, whole):
    """max_steps is free to change: 10 steps and then 23 more are 33 steps."""
    grown = tmp_path / "grown"
    run(command(grown, "--max-steps", 10, "--snapshot-every", 5))
    run(command(grown))
    assert sorted(path.name for path in grown.glob("*.pt")) == ["last.pt", "step-0000005.pt", "step-0000010.pt"]
    ours = [line for line in records(grown) if "frechet_distance" not in line]
    assert ours == [line for line in records(whole) if "frechet_distance" not in line]
    a, b = load_file(grown / "last.pt"), load_file(whole / "last.pt")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])


def test_two_runs_cannot_share_a_folder(command, tmp_path):
    lock = runtime.lock_folder(tmp_path / "run")
    with lock, pytest.raises(SystemExit, match="in use by another run"):
        run(command(tmp_path / "run"))


def test_records_and_grids_of_a_run(command, tmp_path):
    """What a user finds in the folder, and that init_from starts from another run's averaged weights."""
    folder = tmp_path / "run"
    run(command(folder, "--tensorboard", True, "--ema-decays", 0.5, 0.9, "--sampler", "sde", "--cfg-scale", 2))
    log = records(folder, without=())
    assert [line["step"] for line in log if "loss" in line] == [5, 10, 15, 20, 25, 30, 33]
    assert [line["step"] for line in log if "frechet_distance" in line] == [15, 30, 33]
    for line in log:
        assert line["images"] == 8 * line["step"] and line["epoch"] == pytest.approx(line["images"] / 70, abs=1e-4)
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["denoising_loss"] + 0.5 * line["alignment_loss"], rel=1e-5)
            assert {"grad_norm", "samples_per_second", "skipped_steps", "seconds"} <= line.keys()
    assert list((folder / "tensorboard").iterdir())
    with Image.open(folder / "samples" / "0000033.png") as grid:
        assert len(grid.getcolors(10_000)) > 5
    environment = json.loads((folder / "environment.jsonl").read_text())
    assert environment["torch"] == torch.__version__ and environment["processes"] == 1

    saved = load_file(folder / "last.pt")
    assert saved["emas"].keys() == {"0.5", "0.9"}
    config = train_repa_dar.configuration.parse(command(tmp_path / "next", "--init-from", folder / "last.pt"))
    with runtime.Ranks() as ranks:
        model = train_repa_dar.Trainer(config, ranks).model
    assert all(torch.equal(value, saved["emas"]["0.5"][key]) for key, value in model.state_dict().items())


def test_ema_is_the_geometric_average(command, tmp_path, monkeypatch):
    """After the run, each average equals the sum that its definition gives from the weights of every step."""
    history = []
    original = train_repa_dar.Trainer.train_step

    def step(self, batch):
        if not history:
            history.append({key: value.double().clone() for key, value in self.model.state_dict().items()})
        original(self, batch)
        history.append({key: value.double().clone() for key, value in self.model.state_dict().items()})

    monkeypatch.setattr(train_repa_dar.Trainer, "train_step", step)
    run(command(tmp_path / "run", "--max-steps", 12, "--eval-every", 0, "--ema-decays", 0.5, 0.9))
    for decay, average in load_file(tmp_path / "run" / "last.pt")["emas"].items():
        d = float(decay)
        for key, value in average.items():
            expected = d**12 * history[0][key]
            expected = expected + sum((1 - d) * d ** (12 - i) * history[i][key] for i in range(1, 13))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


ADAMW = ("--betas", 0.8, 0.9, "--weight-decay", 0.1, "--grad-clip", 0.01, "--log-every", 1)


def assert_adamw(updates, lr, norms):
    """By these options, written out, all but the last, whose outcome is not in `updates`. norms: what the log says."""
    expected = [torch.stack([gradient.norm() for _, gradient in update]).norm().item() for update in updates]
    assert norms == pytest.approx(expected, rel=1e-4) and min(norms) > 0.01
    for i, (weight, _) in enumerate(updates[0]):
        m = v = 0
        for step, (update, norm) in enumerate(zip(updates[:-1], norms), 1):
            g = update[i][1] * 0.01 / norm
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            weight = weight * (1 - 0.1 * lr) - lr * m / (1 - 0.8**step) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(updates[-1][i][0], weight, rtol=1e-5, atol=1e-6)


def test_updates_are_adamw_of_clipped_gradients(command, tmp_path, updates):
    """Of the whole batch's, also where it is taken in parts."""
    for parts in (1, 4):
        words = ("--max-steps", 4, "--lr", 1e-2, "--micro-batch-size", 8 // parts, *ADAMW, *QUIET)
        run(command(tmp_path / str(parts), *words))
        assert_adamw(updates[-4:], 1e-2, [line["grad_norm"] for line in records(tmp_path / str(parts))])
    assert len(updates) == 8
    for (_, whole), (_, summed) in zip(updates[0], updates[4]):
        torch.testing.assert_close(whole, summed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        ("--precision", "bf16"),
        ("--routing", "residual", "--alignment", "none", "--path", "cosine"),
        ("--projector", "conv", "--spatial-norm", 0.6, "--precision", "bf16"),
    ],
)
def test_variants_learn(command, tmp_path, extra):
    """Sixty steps of each bring the denoising loss well below that of the first five."""
    run(command(tmp_path / "run", "--eval-every", 0, "--max-steps", 60, "--lr", 5e-3, *extra))
    losses = [line["denoising_loss"] for line in records(tmp_path / "run")]
    assert min(losses) < 0.8 * losses[0]


def test_a_compiled_run_follows_one_that_is_not(command, tmp_path, monkeypatch):
    compiled, of_torch = [], torch.nn.Module.compile

    def quickly(module):
        compiled.append(module)
        of_torch(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    logs = []
    for words in ((), ("--compile",)):
        out = tmp_path / f"run{len(words)}"
        plain = ("--routing", "residual", "--alignment", "none", "--depth", 1)  # others are in tests/test_streams.py
        run(command(out, *plain, "--max-steps", 2, "--log-every", 1, *QUIET, *words))
        logs.append(records(out))
    assert len(compiled) == 1 and len(logs[0]) == 2
    for line, other in zip(*logs):
        assert line == pytest.approx(other, rel=1e-4)


def test_stored_and_computed_tokens_train_alike(command, tmp_path):
    """Features read from the data folder differ from online ones by float16 rounding only."""
    for features in ("prepared", "online"):
        run(command(tmp_path / features, "--encoder-features", features, "--eval-every", 0, "--max-steps", 5))
    stored, computed = (records(tmp_path / features)[-1] for features in ("prepared", "online"))
    assert stored["alignment_loss"] == pytest.approx(computed["alignment_loss"], rel=1e-3)


@pytest.mark.parametrize("features", ["prepared", "online"])
def test_tokens_are_normalised_wherever_they_come_from(command, tmp_path, monkeypatch, features):
    """In float32, whatever they are stored or computed in: less their whole mean, they have mean 0 and spread 1."""
    seen, original = [], loss.alignment_loss
    monkeypatch.setattr(
        loss, "alignment_loss", lambda aligned, tokens: seen.extend(tokens) or original(aligned, tokens)
    )
    settings = ("--encoder-features", features, "--precision", "bf16", "--max-steps", 1, *QUIET)
    for norm in (1, None):
        run(command(tmp_path / str(norm), *settings, "--spatial-norm", norm))
    normalised, plain = (tokens.double() for tokens in seen)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(normalised.mean(1), torch.zeros(8, 24).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.var(1), torch.ones(8, 24).double(), rtol=1e-3, atol=0)
    assert plain.mean(1).abs().max() > 0.1 and (plain.var(1) - 1).abs().max() > 0.1


# ---- the end of the alignment ----


@pytest.mark.parametrize("features, routing", [("prepared", "dar"), ("online", "residual")])
def test_alignment_ends(command, tmp_path, monkeypatch, capsys, features, routing):
    """Bit for bit the run that just drops the term from its loss; without reading, computing or projecting for it."""
    step_of, encode = train_repa_dar.Trainer.train_step, inputs.FrozenEncoder.forward
    settings = ("--encoder-features", features, "--routing", routing, "--weight-decay", 0.1, "--ema-decays", 0.5)
    read, encoded, projections, projecting, weights = [], [], [], [], []

    def drop(total, step, model):
        return total if step < ALIGNED else dropped[-1]

    def step(self, batch):
        if not projections:
            self.model.projectors[0].register_forward_hook(lambda *_: projections.append(len(read) - 1))
            projections.append("hooked")
        read.append(set(batch))
        step_of(self, batch)
        weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        projecting.append([bool(model.align_depth) for model in (self.model, *self.ema.models.values())])

    def encoder(self, images):
        encoded.append(len(read))
        return encode(self, images)

    dropped, denoise = [], loss.denoising_loss
    with monkeypatch.context() as patch:
        patch.setattr(loss, "denoising_loss", lambda *arguments: dropped.append(denoise(*arguments)) or dropped[-1])
        spoiling(patch, drop)
        run(command(tmp_path / "dropped", *settings, *QUIET))
    run(command(tmp_path / "whole", *settings, *QUIET, "--align-steps", STEPS + 7))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train_repa_dar.Trainer, "train_step", step)
        patch.setattr(inputs.FrozenEncoder, "forward", encoder)
        run(command(tmp_path / "ended", *settings, *QUIET, "--align-steps", ALIGNED))
    assert f"alignment  repa for {ALIGNED} steps, " in capsys.readouterr().out

    target = {"tokens_0"} if features == "prepared" else set()
    assert read == [{"images", "labels"} | target] * ALIGNED + [{"images", "labels"}] * (STEPS - ALIGNED)
    assert encoded == ([] if features == "prepared" else list(range(1, ALIGNED + 1)))
    assert projections == ["hooked", *range(ALIGNED)]
    assert projecting == [[True, True]] * ALIGNED + [[False, False]] * (STEPS - ALIGNED)  # samples neither
    for i, (before, after) in enumerate(zip(weights, weights[1:]), 1):  # after: taken by step i, from 0
        moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert ("projectors" in moved) == (i < ALIGNED), i
        assert "blocks" in moved

    states = (load_file(tmp_path / name / "last.pt") for name in ("ended", "dropped"))
    ended, expected = (flat({key: state[key] for key in ("model", "emas", "optimizer")}) for state in states)
    assert ended.keys() == expected.keys()
    for key, value in ended.items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key

    lines, others = records(tmp_path / "ended"), records(tmp_path / "whole")
    assert [line["step"] for line in lines] == [5, 10, 12, 15, 20, 25, 30, 33]
    assert [line["step"] for line in others] == [5, 10, 15, 20, 25, 30, 33]
    assert all("alignment_loss" in line for line in others) and lines[:2] == others[:2]
    for line in lines:
        aligned = line["step"] <= ALIGNED
        assert ("alignment_loss" in line) == aligned
        total = line["denoising_loss"] + (0.5 * line["alignment_loss"] if aligned else 0)
        assert line["loss"] == pytest.approx(total, rel=1e-6)


def test_a_run_stopped_at_the_end_of_its_alignment_goes_on_as_if_it_had_not_been(command, tmp_path):
    """One step before it, exactly there, one step after; with readers that look ahead, and without."""
    complete, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = ("--align-steps", ALIGNED, "--projector", "conv", "--spatial-norm", 0.7, *QUIET)
    run(command(complete, *settings))
    for last in (ALIGNED - 1, ALIGNED, ALIGNED + 1):
        with sending(signal.SIGTERM, after=last):
            run(command(stopped, *settings, "--num-workers", last % 2))
        assert load_file(stopped / "last.pt")["step"] == last
    run(command(stopped, *settings, "--num-workers", 2))
    assert_same_run(stopped, complete)


# ---- starting from weights ----


def test_a_residual_checkpoint_starts_a_dar_run_for_other_classes(command, tmp_path, capsys, encoder_folder):
    """Everything but the routers and, on request, the label table, which is said; without the request it is refused."""
    few = tmp_path / "few"
    prepare.main(["digits", "--out", str(few), "--limit", "40", "--encoder", str(encoder_folder)])
    meta = json.loads((few / "meta.json").read_text())
    (few / "meta.json").write_text(json.dumps(meta | {"class_names": [*meta["class_names"], "eleventh"]}))
    run(command(tmp_path / "residual", *QUIET, "--max-steps", 2, "--routing", "residual"))
    capsys.readouterr()
    settings = (*QUIET, "--max-steps", 1, "--lr", 1e-12, "--init-from", tmp_path / "residual" / "last.pt")
    with pytest.raises(SystemExit, match=r"init_from = .*embedding_table.* is \(11, 32\).*\(12, 32\).*--new-labels"):
        run(command(tmp_path / "dar", *settings, data=few))
    run(command(tmp_path / "dar", *settings, "--new-labels", data=few))
    printed = capsys.readouterr().out
    assert "not in it: router.aggregators.0.norm_weight, " in printed and " more; not used: none" in printed
    assert "label table reinitialised" in printed
    before, after = (load_file(tmp_path / arm / "last.pt") for arm in ("residual", "dar"))
    for name, rows in (
        ("blocks.0.mlp.fc1.weight", slice(None)),
        ("y_embedder.embedding_table.weight", slice(-1, None)),
    ):
        torch.testing.assert_close(after["model"][name][rows], before["ema"][name][rows])
    table = "y_embedder.embedding_table.weight"
    assert not torch.allclose(after["model"][table][:10], before["ema"][table][:10], atol=1e-3)


def test_a_retrofit_is_resumed_sampled_and_ends_as_plain_routing(command, tmp_path, capsys, monkeypatch):
    """Killed in the middle it goes on to the same bits; its checkpoints belong to their step."""
    run(command(tmp_path / "residual", *QUIET, "--max-steps", 20, "--routing", "residual"))
    capsys.readouterr()
    settings = "--init-from", tmp_path / "residual" / "last.pt", "--retrofit-steps", 20
    gammas = []
    with monkeypatch.context() as patch:
        original = OnlineEvaluation.__call__
        patch.setattr(
            OnlineEvaluation,
            "__call__",
            lambda self, model, **rest: gammas.append(model.gamma) or original(self, model, **rest),
        )
        run(command(tmp_path / "whole", *settings))
    assert gammas == [0.75, 1, 1]
    said = re.search(r"fading in for 20 steps from a velocity (\S+) off", capsys.readouterr().out)
    assert float(said[1]) < 1e-5
    run_killed(command(tmp_path / "killed", *settings), *killed_at(14))
    model, _ = load_trained(tmp_path / "killed" / "last.pt")
    assert model.gamma == 0.5
    run(command(tmp_path / "killed", *settings))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert load_trained(tmp_path / "whole" / "last.pt")[0].gamma == 1


# ---- machines, disks and logs that fail ----


def test_machines_without_a_shared_disk_refuse_to_resume(command, tmp_path, monkeypatch):
    """Only the first one has a checkpoint: the other would begin anew, and they would train something between."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    run(command("run", *QUIET, "--max-steps", 4))

    def start(folder):
        os.chdir(folder)
        run(command("run", *QUIET, "--max-steps", 8))

    for outcome in forked(*(functools.partial(start, folder) for folder in folders), ranks=True):
        assert "error: the processes disagree: the step to resume at is 4 in process 0" in outcome
        assert "None in process 1" in outcome and "--out, which must be on a shared disk" in outcome
    assert load_file(folders[0] / "run" / "last.pt")["step"] == 4


def test_a_full_disk_is_named_and_leaves_no_debris(command, tmp_path):
    folder = tmp_path / "run"
    run(command(folder, "--max-steps", 5, *QUIET))
    (folder / "last.pt.unfinished").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="error: no space left for .*last.pt; make room"):
        run(command(folder, "--max-steps", 10, *QUIET))
    assert not os.path.lexists(folder / "last.pt.unfinished") and load_file(folder / "last.pt")["step"] == 5
    run(command(folder, "--max-steps", 10, *QUIET))
    assert load_file(folder / "last.pt")["step"] == 10


def test_a_log_that_lost_lines_repeats_none(command, tmp_path):
    """What is beyond the checkpoint is cut by step: the log was cut to two lines, resumed, and killed again."""
    folder, settings = tmp_path / "run", (*QUIET, "--max-steps", 20)
    run_killed(command(folder, *settings), *killed_at(12))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:1]) + "[]\n" + '{"step": 1')
    run_killed(command(folder, *settings), *killed_at(17))
    run(command(folder, *settings))
    assert [line["step"] for line in records(folder)] == [5, 15, 20]


# ---- diagnosis ----


def test_diagnosis_on_a_schedule(command, tmp_path, monkeypatch):
    """The figures of the steps asked for; the run itself stays as it is without, also if cut short in between."""
    from analysis import diagnose

    settings = ("--max-steps", 12, "--eval-every", 6)
    run(command(tmp_path / "without", *settings))
    calls, original = [], diagnose.diagnose

    def once(*arguments, **options):
        calls.append(options["provenance"]["step"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(diagnose, "diagnose", once)
    monkeypatch.setattr(Figure, "savefig", lambda *arguments, **options: None)  # which takes seconds
    watched = command(tmp_path / "run", *settings, "--diagnose-every", 6, "--diagnose-images", 20)
    with pytest.raises(KeyboardInterrupt):
        train_repa_dar.main(watched)
    train_repa_dar.main(watched)  # the checkpoint of step 12 owes the second one
    assert calls == [6, 12, 12]
    assert_same_run(tmp_path / "run", tmp_path / "without")
    for step in (6, 12):
        folder = tmp_path / "run" / "diagnosis" / f"{step:07d}"
        assert {file.name for file in folder.iterdir()} == {
            f"{name}.{kind}" for name in diagnose.FIGURES for kind in ("png", "json")
        }
        content = json.loads((folder / "routing.json").read_text())
        assert content["step"] == step and content["settings"]["num_images"] == 20 and content["average"] == "0.99"
    # Of different weights, hence of what training had reached.
    first, second = (
        json.loads((tmp_path / "run" / "diagnosis" / step / "states.json").read_text())["data"]["rms"]
        for step in ("0000006", "0000012")
    )
    assert first != second


def test_a_diagnosis_that_fails_can_be_done_without(command, tmp_path, monkeypatch):
    """The checkpoint owes it, yet a run that no longer wants any goes on to its end."""
    from analysis import diagnose

    def fail(*arguments, **options):
        raise RuntimeError("no diagnosis")

    monkeypatch.setattr(diagnose, "diagnose", fail)
    settings = ("--max-steps", 12, "--eval-every", 0, "--checkpoint-every", 6)
    watched = command(tmp_path / "run", *settings, "--diagnose-every", 6, "--diagnose-images", 20)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no diagnosis"):
            train_repa_dar.main(watched)
    assert load_file(tmp_path / "run" / "last.pt")["diagnosis_due"]
    train_repa_dar.main(command(tmp_path / "run", *settings))
    last = load_file(tmp_path / "run" / "last.pt")
    assert last["step"] == 12 and not last["diagnosis_due"]
