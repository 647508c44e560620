"""Distillation with a student that is a LoRA: what learns, what is kept in memory and on disk, and how it is loaded."""

import re
import shutil
import signal

import pytest
import torch

import config as configuration
import distill
from eval import export
from runtime import Ranks
from tests import test_distill
from tests.conftest import ending, forked, killed
from tests.test_trainer import assert_same_run
from weights import load_file, load_trained, load_weights

DAR = "--routing dar --chunk-size 3 --query dynamic"
LORA = "--student-rank 3 --critic-rank 2"


distillation = test_distill.command


@pytest.fixture(scope="module")
def command(distillation):
    def build(out, words=f"{DAR} --retrofit-steps 8 {LORA}", of=""):
        return distillation(out, *words.split(), "--eval-every", 0, of=of)

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill.main(command(folder))
    return folder


def distiller(words):
    return distill.Distiller(configuration.parse_distillation(words), Ranks())


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.rand(5, generator=generator), torch.arange(5)


def storage_bytes(networks):
    """Bytes that the networks' weights take, each counted once however many have it."""
    storages = [weight.untyped_storage() for network in networks for weight in network.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def numbers(weights):
    return sum(weight.numel() for weight in weights)


@pytest.mark.parametrize(
    "made_with, words",
    [
        ("", f"{LORA} {DAR} --retrofit-steps 8"),
        ("", f"{LORA} --gan-weight 1"),
        ("", "--student-rank 3 --routing unet"),
        ("--routing dar", LORA),
    ],
)
def test_only_the_lora_and_routers_learn_in_one_backbone(command, teacher, tmp_path, capsys, made_with, words):
    run = distiller(command(tmp_path / "run", words, teacher(made_with)))
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    of_teacher = [weight.clone() for weight in run.teacher.parameters()]
    run.fade_in()
    student, taught = run.model(*inputs())[0], run.teacher(*inputs())[0]
    if "retrofit" in words:  # whose mean is the residual sum to rounding and eps
        torch.testing.assert_close(student, taught, rtol=1e-3, atol=1e-3)
    else:
        assert torch.equal(student, taught)

    learns = {name for name in before if ".lora_" in name or name.startswith(("router.", "skips."))}
    trained = numbers(before[name] for name in learns)
    of_critic, frozen = numbers(run.critic_weights), numbers(of_teacher)
    copies = 0 if "critic-rank" in words else run.critic.pos_embed.numel()  # else the only frozen one, and copied
    networks = [run.teacher, run.critic, run.model, *run.ema.models.values()]
    assert storage_bytes(networks) == 4 * (frozen + copies + 2 * trained + of_critic)
    capsys.readouterr()
    run.describe()
    said = capsys.readouterr().out
    assert f"{trained / 1e6:.2f} M student, {of_critic / 1e6:.2f} M critic, {frozen / 1e6:.2f} M teacher" in said
    # Weights, gradients and two moments of both, one average, and the teacher.
    assert float(re.search(r"memory +(\S+) GiB", said)[1]) == pytest.approx(
        4 * (5 * trained + 4 * of_critic + frozen) / 2**30, rel=0.01
    )

    for step in range(20):
        run.progress["step"] = step
        run.train_step(step)
    changed = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in learns if ".lora_B." in name} <= changed <= learns
    assert {name.partition(".")[0] for name in changed} == {name.partition(".")[0] for name in learns}
    assert all(torch.equal(*pair) for pair in zip(run.teacher.parameters(), of_teacher))
    assert run.model.state_dict().keys() == run.ema.first.state_dict().keys() == learns


def test_killed_in_the_middle_and_restarted_is_the_same_run(command, whole, tmp_path):
    words, updates = command(tmp_path / "killed"), []

    def due(*_):  # between two checkpoints, in the middle of the critic's updates
        updates.append(0)
        return len(updates) == 3 * 8 + 2

    def run():
        distill.Distiller.learn = ending(killed, distill.Distiller, "learn", due)
        distill.main(words)

    assert forked(run) == [-signal.SIGKILL]
    distill.main(words)
    assert_same_run(tmp_path / "killed", whole)
    averages = load_file(whole / "last.pt")["ema"]
    assert all(value.any() for name, value in averages.items() if ".lora_B." in name)  # which starts at zero


def test_the_saved_student_is_the_one_in_memory(command, whole, tmp_path):
    run = distiller(command(whole))
    run.open_folder()
    run.fade_in()
    run.folder.close()
    path = whole / "last.pt"
    for average, network in (("0.5", run.ema.first), ("none", run.model)):
        loaded, _ = load_trained(path, average)
        torch.testing.assert_close(loaded(*inputs())[0], network(*inputs())[0].detach(), rtol=1e-5, atol=1e-6)
    assert (run.ema.first(*inputs())[0] - run.teacher(*inputs())[0]).abs().max() > 1e-3
    loaded = load_trained(path)[0].state_dict()
    export.main([str(path), "--out", str(tmp_path / "exported")])
    for found in (load_weights(path)[0], load_trained(tmp_path / "exported")[0].state_dict()):
        assert found.keys() == loaded.keys() and all(torch.equal(found[name], loaded[name]) for name in found)


def test_a_student_without_its_teacher_is_refused(command, teacher, tmp_path):
    of = tmp_path / "teacher.pt"
    shutil.copy(teacher(), of)
    distill.main([*command(tmp_path / "run", LORA, of), "--max-steps", "1"])
    path = tmp_path / "run" / "last.pt"
    with pytest.raises(SystemExit, match="is a distilled model; give the one that it was distilled from"):
        distill.main(command(tmp_path / "next", of=path))
    content = load_file(of)
    content["emas"]["0.0"]["blocks.0.mlp.fc1.bias"] += 1e-6
    for write, problem in (
        (lambda: torch.save(content, of), "it is not the same model any more"),
        (lambda: shutil.copy(path, of), "this path leads to the student itself"),
        (of.unlink, "there is no weights file"),
    ):
        write()
        for load in (load_trained, load_weights):
            with pytest.raises(
                ValueError, match=f"run/last.pt is a LoRA on teacher = .*{problem}.* Put the teacher back"
            ):
                load(path)
