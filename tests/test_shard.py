"""Models in shards (--shard): two processes that each hold half follow one that holds all, and take over its run."""

import signal

import pytest
import re
import torch
from torch.distributed.tensor import DTensor

import distill
import loss
import train_repa_dar
from eval import sample as sampling
from runtime import Ranks
from tests import test_distill
from tests.conftest import TINY, ending, forked
from tests.test_distill import GAN, RETROFIT
from tests.test_trainer import QUIET, assert_same_curves, flat, killed_at, records
from weights import load_file, load_trained

STEPS = 20
distillation = test_distill.command


@pytest.fixture(scope="module")
def command(small_data, encoder_folder, judge_folder):
    """Arguments of a run whose alignment ends. Of its 5 samples, in batches of 2, the second process has one less."""
    steps = f"--lr 1e-3 --max-steps {STEPS} --log-every 3 --checkpoint-every 5 --align-steps 12 --ema-decays 0.9 0.5"
    model = f"--routing dar --chunk-size 3 --query dynamic --alignment repa --encoder={encoder_folder}"
    judged = f"--eval-encoder={judge_folder} --eval-every 9 --eval-samples 5 --eval-batch-size 2 --sample-steps 2"

    def build(out, *extra):
        line = f"--data={small_data} --out={out} --held-out 5 {TINY} {steps} {model} {judged}"
        return [*line.split(), *map(str, extra)]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run of one process that holds all."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_repa_dar.main(command(folder))
    return folder


def in_shards(words, main=train_repa_dar.main, patch=()):
    """What two processes with --shard return. patch: arguments of `ending`."""

    def call():
        if patch:
            setattr(*patch[1:3], ending(*patch))
        return main([*words, "--shard"])

    return forked(call, call, ranks=True)


def assert_same_checkpoint(folder, reference):
    """Names, shapes and kinds; and values to float tolerance, but for biases: see `assert_same_curves`."""
    ours, theirs = (flat(load_file(path / "last.pt")) for path in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(
                    ours[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )


def test_a_killed_run_goes_on_in_shards_and_without(command, whole, tmp_path, capfd):
    """Losses, samples, averages and moments, over the end of the alignment. What is saved can be drawn from."""
    words = command(tmp_path / "run")
    assert in_shards(words, patch=killed_at(6)) == 2 * [-signal.SIGKILL]
    assert load_file(tmp_path / "run" / "last.pt")["config"]["shard"]
    patch = killed_at(11)

    def alone():
        setattr(*patch[1:3], ending(*patch))
        train_repa_dar.main(words)

    assert forked(alone) == [-signal.SIGKILL]
    assert not load_file(tmp_path / "run" / "last.pt")["config"]["shard"]
    assert in_shards([*words, "--micro-batch-size=2", "--checkpoint-activations"]) == [None, None]
    assert_same_curves(tmp_path / "run", whole)
    assert_same_checkpoint(tmp_path / "run", whole)
    memory = re.search(r"memory +(\S+) GiB .*; (\S+) GiB each, if sharded over 2 processes", capfd.readouterr().out)
    assert float(memory[2]) == pytest.approx(float(memory[1]) / 2, rel=0.01)
    sampling.main([str(tmp_path / "run" / "last.pt"), "--out", str(tmp_path / "drawn"), "--num-samples=2", "--steps=2"])
    inputs = torch.randn(5, 3, 8, 8), torch.rand(5), torch.arange(5)
    found, expected = (load_trained(path / "last.pt", "0.5")[0](*inputs)[0] for path in (tmp_path / "run", whole))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_each_holds_half_and_a_step_that_is_not_finite_in_one_is_skipped_by_both(command, tmp_path):
    def local(tensors):
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def main(words):
        states, call = [], loss.Loss.__call__
        with Ranks() as ranks:
            run = train_repa_dar.Trainer(train_repa_dar.configuration.parse(words), ranks)

            def spoiled(*arguments):
                total, parts = call(*arguments)
                return total * (float("nan") if len(states) == 2 and not ranks.main else 1), parts

            loss.Loss.__call__ = spoiled
            for batch in run.batches():
                run.train_step(batch)
                moments = [value for state in run.optimizer.state.values() for value in state.values()]
                parts = {"model": run.model.parameters(), "average": run.ema.first.parameters(), "moments": moments}
                parts = {name: list(tensors) for name, tensors in parts.items()}
                held = {
                    name: sum(map(torch.numel, local(part))) / sum(map(torch.numel, part))
                    for name, part in parts.items()
                }
                states.append([tensor.clone() for tensor in local([*parts["model"], *moments])])
        moved = [any(not torch.equal(*pair) for pair in zip(a, b)) for a, b in zip(states, states[1:])]
        return moved, held, run.tally.read()[1]

    outcomes = in_shards(command(tmp_path / "run", "--max-steps", 4, *QUIET), main)
    for moved, held, skipped in outcomes:
        assert moved == [True, False, True] and skipped == 1
        assert held == pytest.approx(dict.fromkeys(held, 0.5), abs=0.01)  # 1 row cannot be split: that of positions


def test_distillation_in_shards(distillation, tmp_path):
    """Two processes go on in shards where one has stopped. The critic is a LoRA on the teacher, with a GAN's head."""
    words = (*RETROFIT, *GAN, "--critic-steps", 1, "--student-steps", 2, "--eval-samples", 3, "--eval-batch-size", 1)
    for name, legs in (("whole", (2,)), ("run", (1, 2))):
        for last in legs:
            line = distillation(tmp_path / name, *words, "--eval-every", 2, "--max-steps", last)
            if name == "run" and last == 2:
                assert in_shards(line, distill.main) == [None, None]
            else:
                distill.main(line)
    assert_same_checkpoint(tmp_path / "run", tmp_path / "whole")
    ours, theirs = (
        {(name, line["step"]): value for line in records(tmp_path / run) for name, value in line.items()}
        for run in ("run", "whole")
    )
    assert ("frechet_distance", 2) in theirs
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert len(load_trained(tmp_path / "run" / "last.pt")[0].step_times) == 2


def test_what_cannot_be_shared_is_refused(command, tmp_path):
    words = command(tmp_path / "run", "--shard")
    with pytest.raises(SystemExit, match="shard = True: there are no processes .* torchrun"):
        train_repa_dar.main(words)
    with pytest.raises(SystemExit, match="diagnose_every = 5: with shard .* analysis.diagnose"):
        train_repa_dar.main([*words, "--diagnose-every", "5"])
    assert not (tmp_path / "run").exists()
