"""The trainer end to end, on digits and a tiny random encoder: one run, whatever its processes and whatever kills it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
import train_repa_dar
from runtime import load_file
from tests.conftest import read_lines

ROOT = train_repa_dar.__file__.rpartition("/")[0]
TIMING = {"seconds", "samples_per_second", "evaluation_seconds"}  # all that may differ between repeats
STEPS = 33


@pytest.fixture
def command(digits, encoder_folder, small_data):
    """Arguments of a run of seconds: 2 blocks, 70 images, so that 33 steps of 8 cross three epoch ends."""

    def build(out, *extra, data=small_data):
        values = {
            "data": data,
            "out": out,
            "encoder": encoder_folder,
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "align_depth": 1,
            "projector_dim": 32,
            "lr": 1e-3,
            "batch_size": 8,
            "max_steps": STEPS,
            "log_every": 5,
            "checkpoint_every": 10,
            "eval_every": 15,
            "eval_samples": 6,
            "eval_batch_size": 4,
            "sample_steps": 2,
            "routing": "dar",
            "chunk_size": 3,
            "alignment": "repa",
            "tensorboard": False,
        }
        arguments = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return ["--config", "digits", *arguments, *map(str, extra)]

    return build


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
        elif not key.startswith(("seconds", "logged.seconds", "config.")):
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


def run_patched(arguments, patch):
    """A run in a process of its own, with a piece of code that sabotages it. Returns the exit status."""
    code = f"import os, sys, torch; import train_repa_dar as trainer, runtime\n{patch}\ntrainer.main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True).returncode


KILL_AT_STEP = """
def step(self, batch, original=trainer.Trainer.train_step):
    if self.step == {step}: os.kill(os.getpid(), 9)
    original(self, batch)
trainer.Trainer.train_step = step
"""
KILL_IN_CHECKPOINT = """
def save(checkpoint, file, original=torch.save):
    if checkpoint.get("step") == {step}:
        import io
        whole = io.BytesIO(); original(checkpoint, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2]); file.flush()
        os.kill(os.getpid(), 9)
    original(checkpoint, file)
torch.save = save
"""
KILL_IN_EVALUATION = """
from eval.online import OnlineEvaluation
def sample(self, model, indices):
    os.kill(os.getpid(), 9)
OnlineEvaluation.sample = sample
"""
KILL_IN_LOG = """
def write(self, record, original=runtime.MetricsLog.write):
    if record["step"] == {step}:
        self.file.write('{{"step": {step}, "ima'); self.file.flush()
        os.kill(os.getpid(), 9)
    original(self, record)
runtime.MetricsLog.write = write
"""


def test_killed_anywhere_and_restarted_is_the_same_run(command, tmp_path):
    """Killed before the first checkpoint, between two, in the writing of one, in a log line, in an evaluation."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_patched(command(whole), "") == 0
    for patch in (
        KILL_AT_STEP.format(step=7),
        KILL_AT_STEP.format(step=18),
        KILL_IN_CHECKPOINT.format(step=20),
        KILL_IN_LOG.format(step=25),
        KILL_IN_EVALUATION,
    ):
        assert run_patched(command(killed), patch) == -signal.SIGKILL
    assert run_patched(command(killed), "") == 0
    assert load_file(killed / "last.pt")["step"] == STEPS
    assert_same_run(killed, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_leaves_and_resumes(command, tmp_path, monkeypatch, number):
    """The step is finished and saved although no checkpoint was due, and the exit status names the signal."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(command(whole))
    original = train_repa_dar.Trainer.train_step

    def step(self, batch):
        original(self, batch)
        if self.step == 12:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(train_repa_dar.Trainer, "train_step", step)
        with pytest.raises(SystemExit) as stop:
            run(command(stopped))
    assert stop.value.code == 128 + number
    assert load_file(stopped / "last.pt")["step"] == 13
    run(command(stopped))
    assert_same_run(stopped, whole)


def test_signal_during_an_evaluation_saves_and_makes_up_for_it(command, tmp_path, monkeypatch):
    """Evaluations can take minutes: one is cut short, and made first thing when the run goes on."""
    from eval.online import OnlineEvaluation

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(command(whole))
    original = OnlineEvaluation.sample

    def sample(self, model, indices):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, indices)

    for step in (15, 30, STEPS):
        with monkeypatch.context() as patch:
            patch.setattr(OnlineEvaluation, "sample", sample)
            with pytest.raises(SystemExit) as stop:
                run(command(stopped))
        assert stop.value.code == 128 + signal.SIGTERM and load_file(stopped / "last.pt")["step"] == step
        assert records(stopped)[-1]["step"] == step and "frechet_distance" not in records(stopped)[-1]
        run(command(stopped, "--max-steps", step))
    assert_same_run(stopped, whole)


def test_signal_to_the_whole_process_group_saves_too(command, tmp_path):
    """As a job scheduler sends it: readers get SIGTERM too, and must not die before the trainer has saved."""
    process = subprocess.Popen(
        [
            sys.executable,
            "train_repa_dar.py",
            *command(tmp_path / "run", "--num-workers", 2),
            "--max-steps",
            "100000",
            "--eval-every",
            "0",
            "--checkpoint-every",
            "100000",
        ],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: records(tmp_path / "run"))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert load_file(tmp_path / "run" / "last.pt")["step"] >= 5


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.05)


def test_finished_run_keeps_its_provenance(command, tmp_path):
    """Starting a complete run again changes nothing: above all not what the convergence table says it was made with."""
    run(command(tmp_path / "run", "--max-steps", 2, "--eval-every", 0))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    run(command(tmp_path / "run", "--max-steps", 2, "--eval-every", 0))
    assert before == {path: path.read_bytes() for path in before}


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


@pytest.mark.parametrize("content", [{"ema": {}}, {}, [1]])
def test_foreign_checkpoint_is_refused(command, tmp_path, content):
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(SystemExit, match="last.pt is no checkpoint of this trainer"):
        run(command(tmp_path / "run"))


def test_processes_and_accumulation_do_not_change_the_run(command, tmp_path, small_data):
    """Two processes, and one that takes the batch in parts, follow one process that takes it whole."""
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    run(command(one))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_repa_dar.py"]
    finished = subprocess.run(
        [*launch, *command(two, "--micro-batch-size", 2)], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "8 global = 2 processes x 4 local, in 2 accumulated parts of 2" in finished.stdout
    run(command(parts, "--micro-batch-size", 2, "--num-workers", 1))
    assert_same_curves(two, one)
    assert_same_curves(parts, one)


def test_each_image_meets_the_same_noise_whatever_the_processes(command, tmp_path, monkeypatch):
    """What the model is given at every step: put together from two ranks, it equals what one process is given."""
    arguments = command(tmp_path / "run", "--eval-every", 0, "--max-steps", 20)
    config = train_repa_dar.configuration.parse(arguments)

    def given(rank, world):
        seen = {}

        def losses(self, inputs, draws):
            for key, value in {**inputs, **draws}.items():
                seen.setdefault(key, []).append(value.clone())
            return (self.model.x_embedder.proj.weight.sum(),) * 3

        monkeypatch.setattr(train_repa_dar.Trainer, "losses", losses)
        with train_repa_dar.Ranks() as ranks:
            trainer = train_repa_dar.Trainer(config, ranks)
            ranks.rank, ranks.world = rank, world
            batches = list(trainer.batches())
            ranks.world = 1  # there is nobody to exchange gradients with
            trainer.share = trainer.micro = config.batch_size // world
            for trainer.step, batch in enumerate(batches):
                trainer.train_step(batch)
        return {key: torch.stack(values) for key, values in seen.items()}

    whole, first, second = given(0, 1), given(0, 2), given(1, 2)
    assert whole.keys() == {"images", "labels", "tokens_0", "noise", "time_normal", "time_uniform", "label"}
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([first[key], second[key]], dim=1)), key
    assert len(whole["noise"].unique()) > 0.99 * whole["noise"].numel()  # new in each step and for each image


def test_non_finite_steps_are_skipped_and_counted(command, tmp_path, monkeypatch):
    """A step with a NaN loss, and one with an infinite gradient, leave weights and moments as they were."""
    original = train_repa_dar.Trainer.losses
    states = {}

    def losses(self, inputs, draws):
        states[self.step] = flat({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})
        states[self.step] = {key: value.clone() for key, value in states[self.step].items()}
        total, *rest = original(self, inputs, draws)
        if self.step == 4:
            total = total * float("nan")
        if self.step == 6:
            total = total + (self.model.x_embedder.proj.weight.sum() * 0).sqrt()  # finite, its gradient is not
        return (total, *rest)

    monkeypatch.setattr(train_repa_dar.Trainer, "losses", losses)
    run(command(tmp_path / "run", "--max-steps", 10, "--eval-every", 0))
    for step, taken in ((3, True), (4, False), (5, True), (6, False), (7, True)):
        same = [torch.equal(states[step][key], states[step + 1][key]) for key in states[step]]
        assert (not all(same)) if taken else all(same), step
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [1, 2]
    assert all(json.dumps(line, allow_nan=False) for line in records(tmp_path / "run"))


def test_persistent_non_finite_steps_stop_the_run(command, tmp_path, monkeypatch):
    original = train_repa_dar.Trainer.losses

    def losses(self, inputs, draws):
        total, *rest = original(self, inputs, draws)
        return (total * (float("nan") if self.step >= 12 else 1), *rest)

    monkeypatch.setattr(train_repa_dar.Trainer, "losses", losses)
    arguments = command(tmp_path / "run", "--max-skipped-steps", 4, "--eval-every", 0)
    with pytest.raises(SystemExit, match=r"8 steps in a row .* 8 of 20 in all.*--lr"):
        run(arguments)
    good = load_file(tmp_path / "run" / "last.pt")
    assert good["step"] == 10 and all(value.isfinite().all() for value in good["model"].values())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_another_configuration_is_refused_and_nothing_touched(command, tmp_path, checkpoint):
    folder = tmp_path / "run"
    run(command(folder, "--max-steps", 5, "--eval-every", 0))
    if not checkpoint:  # as if it had been killed before it wrote one
        (folder / "last.pt").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(SystemExit, match=r"(?s)lr: 0.001 -> 0.002.*routing: 'dar' -> 'residual'"):
        run(command(folder, "--max-steps", 5, "--eval-every", 0, "--lr", 2e-3, "--routing", "residual"))
    assert before == {path: path.read_bytes() for path in before}


def test_changed_images_are_refused(command, tmp_path, digits):
    run(command(tmp_path / "run", "--max-steps", 2, "--eval-every", 0))
    moved = tmp_path / "data"
    moved.symlink_to(digits)  # the same option, other images behind it
    first = tmp_path / "other"
    run(command(first, "--max-steps", 2, "--eval-every", 0, data=moved))
    moved.unlink()
    from dataset import prepare

    prepare.main(["digits", "--out", str(moved), "--limit", "50"])
    with pytest.raises(SystemExit, match="content of data"):
        run(command(first, "--max-steps", 2, "--eval-every", 0, "--encoder-features", "online", data=moved))


def test_a_longer_run_goes_on_where_a_shorter_ended(command, tmp_path):
    """max_steps is free to change: 10 steps and then 23 more are 33 steps."""
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    run(command(whole))
    run(command(grown, "--max-steps", 10, "--snapshot-every", 5))
    run(command(grown))
    assert sorted(path.name for path in grown.glob("*.pt")) == ["last.pt", "step-0000005.pt", "step-0000010.pt"]
    ours = [line for line in records(grown) if "frechet_distance" not in line]
    assert ours == [line for line in records(whole) if "frechet_distance" not in line]
    a, b = load_file(grown / "last.pt"), load_file(whole / "last.pt")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])


def test_two_runs_cannot_share_a_folder(command, tmp_path):
    config = train_repa_dar.configuration.parse(command(tmp_path / "run"))
    with train_repa_dar.Ranks() as ranks:
        trainer = train_repa_dar.Trainer(config, ranks)
        trainer.open_folder()
        with pytest.raises(SystemExit, match="in use by another run"):
            run(command(tmp_path / "run"))
        trainer.lock.close()


def test_records_and_grids_of_a_run(command, tmp_path):
    """What a user finds in the folder, and that init_from starts from another run's averaged weights."""
    folder = tmp_path / "run"
    run(command(folder, "--tensorboard", True, "--ema-decays", 0.5, 0.9, "--sampler", "sde", "--cfg-scale", 2))
    log = records(folder, without=())
    assert [line["step"] for line in log if "loss" in line] == [5, 10, 15, 20, 25, 30, 33]
    assert [line["step"] for line in log if "frechet_distance" in line] == [15, 30, 33]
    for line in log:
        assert line["images"] == 8 * line["step"]
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
    with train_repa_dar.Ranks() as ranks:
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


@pytest.mark.parametrize(
    "extra",
    [
        ("--precision", "bf16"),
        ("--encoder-features", "online"),
        ("--query", "dynamic"),
        ("--routing", "residual", "--alignment", "none", "--path", "cosine"),
        ("--projector", "conv", "--spatial-norm", 0.6, "--precision", "bf16"),
    ],
)
def test_variants_learn(command, tmp_path, extra):
    """Sixty steps of each bring the denoising loss well below that of the first five."""
    run(command(tmp_path / "run", "--eval-every", 0, "--max-steps", 60, "--lr", 5e-3, *extra))
    losses = [line["denoising_loss"] for line in records(tmp_path / "run")]
    assert min(losses) < 0.8 * losses[0]


def test_stored_and_computed_tokens_train_alike(command, tmp_path):
    """Features read from the data folder differ from online ones by float16 rounding only."""
    for features in ("prepared", "online"):
        run(command(tmp_path / features, "--encoder-features", features, "--eval-every", 0, "--max-steps", 5))
    stored, computed = (records(tmp_path / features)[-1] for features in ("prepared", "online"))
    assert stored["alignment_loss"] == pytest.approx(computed["alignment_loss"], rel=1e-3)


@pytest.mark.parametrize("features", ["prepared", "online"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_are_normalised_wherever_they_come_from(command, tmp_path, monkeypatch, features, precision):
    """In float32, whatever they are stored or computed in: less their whole mean, they have mean 0 and spread 1."""
    seen = []
    original = train_repa_dar.alignment_loss
    monkeypatch.setattr(
        train_repa_dar, "alignment_loss", lambda aligned, tokens: (seen.extend(tokens), original(aligned, tokens))[1]
    )
    for norm in (1, None):
        run(
            command(
                tmp_path / str(norm),
                "--encoder-features",
                features,
                "--precision",
                precision,
                "--eval-every",
                0,
                "--max-steps",
                1,
                "--spatial-norm",
                norm,
            )
        )
    normalised, plain = (tokens.double() for tokens in seen)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(normalised.mean(1), torch.zeros(8, 24).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.var(1), torch.ones(8, 24).double(), rtol=1e-3, atol=0)
    assert plain.mean(1).abs().max() > 0.1 and (plain.var(1) - 1).abs().max() > 0.1


# ---- the end of the alignment ----

ALIGNED = 12  # steps; falls between two lines of the log and two checkpoints


def state_of(folder):
    """Weights, averages and moments at the end of a run."""
    return flat({key: load_file(folder / "last.pt")[key] for key in ("model", "emas", "optimizer")})


@pytest.mark.parametrize("features, routing", [("prepared", "dar"), ("online", "dar"), ("online", "residual")])
def test_alignment_ends(command, tmp_path, monkeypatch, capsys, features, routing):
    """Bit for bit the run that just drops the term from its loss; without reading, computing or projecting for it."""
    original_losses, original_step = train_repa_dar.Trainer.losses, train_repa_dar.Trainer.train_step
    original_encoder = train_repa_dar.FrozenEncoder.forward
    settings = (
        "--encoder-features",
        features,
        "--routing",
        routing,
        "--eval-every",
        0,
        "--weight-decay",
        0.1,
        "--ema-decays",
        0.5,
    )
    read, encoded, projections, projecting, weights = [], [], [], [], []

    def losses(self, inputs, draws):
        total, denoising, alignment = original_losses(self, inputs, draws)
        return (total, denoising, alignment) if self.step < ALIGNED else (denoising, denoising, 0 * denoising)

    def step(self, batch):
        if not projections:
            self.model.projectors[0].register_forward_hook(lambda *_: projections.append(self.step))
            projections.append("hooked")
        read.append(set(batch))
        original_step(self, batch)
        weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        projecting.append([bool(model.align_depth) for model in (self.model, *self.ema.models.values())])

    def encoder(self, images):
        encoded.append(len(read))
        return original_encoder(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(train_repa_dar.Trainer, "losses", losses)
        run(command(tmp_path / "dropped", *settings))
    run(command(tmp_path / "whole", *settings, "--align-steps", STEPS + 7))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train_repa_dar.Trainer, "train_step", step)
        patch.setattr(train_repa_dar.FrozenEncoder, "forward", encoder)
        run(command(tmp_path / "ended", *settings, "--align-steps", ALIGNED))
    assert f"alignment repa for {ALIGNED} steps\n" in capsys.readouterr().out

    target = {"tokens_0"} if features == "prepared" else set()
    assert read == [{"images", "labels"} | target] * ALIGNED + [{"images", "labels"}] * (STEPS - ALIGNED)
    assert encoded == ([] if features == "prepared" else list(range(1, ALIGNED + 1)))
    assert projections == ["hooked", *range(ALIGNED)]
    assert projecting == [[True, True]] * ALIGNED + [[False, False]] * (STEPS - ALIGNED)  # samples neither
    for i, (before, after) in enumerate(zip(weights, weights[1:]), 1):  # after[i]: taken by step i, from 0
        moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert ("projectors" in moved) == (i < ALIGNED), i
        assert "blocks" in moved

    ended, dropped = state_of(tmp_path / "ended"), state_of(tmp_path / "dropped")
    assert ended.keys() == dropped.keys()
    for key, value in ended.items():
        assert torch.equal(value, dropped[key]) if isinstance(value, torch.Tensor) else value == dropped[key], key

    lines, whole = records(tmp_path / "ended"), records(tmp_path / "whole")
    assert [line["step"] for line in lines] == [5, 10, 12, 15, 20, 25, 30, 33]
    assert [line["step"] for line in whole] == [5, 10, 15, 20, 25, 30, 33]
    assert all("alignment_loss" in line for line in whole) and lines[:2] == whole[:2]
    for line in lines:
        aligned = line["step"] <= ALIGNED
        assert ("alignment_loss" in line) == aligned
        expected = line["denoising_loss"] + (0.5 * line["alignment_loss"] if aligned else 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_run_stopped_at_the_end_of_its_alignment_goes_on_as_if_it_had_not_been(command, tmp_path, monkeypatch):
    """One step before it, exactly there, one step after; with readers that look ahead, and without."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = ("--align-steps", ALIGNED, "--projector", "conv", "--spatial-norm", 0.7)
    run(command(whole, *settings))
    original = train_repa_dar.Trainer.train_step
    for last in (ALIGNED - 1, ALIGNED, ALIGNED + 1):

        def step(self, batch):
            original(self, batch)
            if self.step + 1 == last:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(train_repa_dar.Trainer, "train_step", step)
            with pytest.raises(SystemExit):
                run(command(stopped, *settings, "--num-workers", last % 2))
        assert load_file(stopped / "last.pt")["step"] == last
    run(command(stopped, *settings, "--num-workers", 2))
    assert_same_run(stopped, whole)


def test_alignment_ends_in_all_processes(command, tmp_path):
    """Two processes follow one over the end of the alignment: none waits for gradients that no longer come."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ("--align-steps", ALIGNED, "--eval-every", 0, "--log-every", 3)
    run(command(one, *settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_repa_dar.py"]
    finished = subprocess.run(
        [*launch, *command(two, *settings, "--micro-batch-size", 2)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_curves(two, one)
    moments = load_file(two / "last.pt")["optimizer"]["state"]
    assert sorted({int(state["step"]) for state in moments.values()}) == [ALIGNED, STEPS]


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Some other card", 0),
    ],
)
def test_peak_of_known_gpus(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train_repa_dar.peak_flops(torch.device("cuda")) == tera * 1e12
    assert train_repa_dar.peak_flops(torch.device("cpu")) == 0


def test_a_residual_checkpoint_starts_a_dar_run(command, tmp_path, capsys):
    """Everything but the routers, which is said."""
    train_repa_dar.main(command(tmp_path / "residual", "--eval-every", 0, "--max-steps", 2, "--routing", "residual"))
    capsys.readouterr()
    train_repa_dar.main(
        command(
            tmp_path / "dar",
            "--eval-every",
            0,
            "--max-steps",
            1,
            "--routing",
            "dar",
            "--init-from",
            tmp_path / "residual" / "last.pt",
            "--lr",
            "1e-12",
        )
    )
    printed = capsys.readouterr().out
    assert "not in it: router.aggregators.0.norm_weight, " in printed and " more; not used: none" in printed
    before, after = (load_file(tmp_path / arm / "last.pt") for arm in ("residual", "dar"))
    torch.testing.assert_close(after["model"]["blocks.0.mlp.fc1.weight"], before["ema"]["blocks.0.mlp.fc1.weight"])


class FlatFeatures(torch.nn.Module):
    """In place of Inception: the mean of each channel."""

    dim, fingerprint, sha256, file = 3, "flat", "flat", "flat.pth"

    def __init__(self, weights):
        super().__init__()

    def forward(self, images):
        return {"pool3": images.float().mean((2, 3))}


def test_fid_beside_the_distance(command, tmp_path, monkeypatch):
    """It is logged with the other, which it leaves as it is, and against the training images or the file."""
    from eval import features

    run(command(tmp_path / "without"))
    monkeypatch.chdir(tmp_path)
    np.savez("some.npz", np.zeros(1))
    monkeypatch.setattr(features, "InceptionFeatures", FlatFeatures)
    mean, far = torch.zeros(3, dtype=torch.float64), torch.full((3,), 255.0, dtype=torch.float64)
    for name, center in (("near", mean), ("far", far)):
        monkeypatch.setattr(
            train_repa_dar, "npz_statistics", lambda path: {"pool3": (center, torch.eye(3, dtype=torch.float64))}
        )
        run(command(tmp_path / name, "--eval-metric", "fid", "--fid-reference", "some.npz"))
    run(command(tmp_path / "images", "--eval-metric", "fid"))
    evaluations = {
        name: [line for line in records(tmp_path / name) if "frechet_distance" in line]
        for name in ("without", "near", "far", "images")
    }
    assert len({line.pop("fid") for name in ("near", "far", "images") for line in evaluations[name]}) == 9
    assert all(lines == evaluations["without"] for lines in evaluations.values())
    # A uniform grey of 255 is as far from white as it can be, and the digits' background is black.
    first = {name: [line["fid"] for line in records(tmp_path / name) if "fid" in line] for name in ("images", "far")}
    assert all(a < b for a, b in zip(first["images"], first["far"]))


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--inception", "nowhere.pth"), "nowhere.pth"),
        (("--fid-reference", "nowhere.npz"), "nowhere.npz"),
        (("--fid-reference", "images.npz"), "images.npz.*holds no statistics.*--save-reference"),
    ],
)
def test_fid_without_what_it_needs_is_refused_at_once(command, tmp_path, monkeypatch, extra, message):
    from eval import features

    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", np.zeros((4, 8, 8, 3), np.uint8))
    if "--inception" not in extra:
        monkeypatch.setattr(features, "InceptionFeatures", FlatFeatures)
    with pytest.raises(SystemExit, match=message):
        train_repa_dar.main(command(tmp_path / "run", "--eval-metric", "fid", *extra))
    assert not (tmp_path / "run").exists()


def test_statistics_of_other_inception_weights_are_refused(command, tmp_path, monkeypatch):
    from eval import features

    monkeypatch.setattr(features, "InceptionFeatures", FlatFeatures)
    monkeypatch.setattr(train_repa_dar, "npz_statistics", lambda path: {"pool3": (torch.zeros(3), torch.eye(3))})
    np.savez(tmp_path / "kept.npz", inception_sha256="sharp")
    with pytest.raises(SystemExit, match="kept.npz' was made with the Inception weights sharp, not flat"):
        train_repa_dar.main(command(tmp_path / "run", "--eval-metric", "fid", "--fid-reference", tmp_path / "kept.npz"))
    assert not (tmp_path / "run").exists()


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


def test_processes_wait_longer_than_half_an_hour(monkeypatch):
    """Gloo's own limit, which the diagnosis of a large model may well exceed while the others wait."""
    groups = []
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(runtime.dist, "new_group", lambda **options: groups.append(options) or "group")
    waited = []
    monkeypatch.setattr(runtime.dist, "barrier", lambda group: waited.append(group))
    runtime.Ranks().barrier()
    assert waited == ["group"] and groups[0]["backend"] == "gloo" and groups[0]["timeout"].total_seconds() >= 86400


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


def test_diagnosis_of_too_few_images_is_refused(command, tmp_path):
    with pytest.raises(SystemExit, match="diagnose_images = 256: .* has 70 images"):
        train_repa_dar.main(command(tmp_path / "run", "--diagnose-every", 5))
