"""Distillation: its losses against Gaussians, whose velocity has a closed form, and distill.py end to end on digits."""

import functools
import json
import math
import signal

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.utils.flop_counter import FlopCounterMode

import config as configuration
import distill
from dataset import prepare
from dataset.prepared import PreparedImages
from distribution_matching import critic_loss, draw_samples, step_times, student_loss, training_sample
from eval import sample as sampling
from eval.online import OnlineEvaluation
from eval.samplers import draw
from models.sit import SIT_MODELS, SiT
from runtime import Ranks, derive_seed
from tests.conftest import ending, forked, killed
from tests.test_trainer import ADAMW, assert_adamw, assert_same_curves, assert_same_run, records
from weights import load_file, load_trained

SHAPE = (1, 2, 2)
STEPS = 12


def denoised(x, t, mean, std):
    """E[x_0 | x_t] for data of this mean and standard deviation, element by element."""
    return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)


class Gaussian(torch.nn.Module):
    """The velocity of data N(mean, std), each (classes + 1); the last class is the null one."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64)) for value in (mean, std))

    def null(self, count):
        return torch.full((count,), len(self.mean) - 1)

    def forward(self, x, t, y, label_draw=None):
        mean, std, t = (value.view(-1, 1, 1, 1) for value in (self.mean[y], self.std[y], t.double()))
        return (x - denoised(x, t, mean, std)) / t, []


class Linear(torch.nn.Module):
    """A student whose prediction in step k is a_k + b_k x. Remembers which of its steps had gradients."""

    def __init__(self, times):
        super().__init__()
        self.times, self.calls = list(times), []
        self.a, self.b = (torch.nn.Parameter(torch.full((len(times),), v, dtype=torch.float64)) for v in (0.0, 0.4))

    def forward(self, x, t, y):
        k = self.times.index(float(t[0]))
        self.calls.append((k, torch.is_grad_enabled()))
        return (x - self.a[k] - self.b[k] * x) / t.view(-1, 1, 1, 1), []

    def moments(self, steps):
        """Mean and standard deviation of the samples after so many steps."""
        mean, std = 0.0, 1.0
        for k in range(steps):
            if k:
                t = self.times[k]
                mean, std = (1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2) ** 0.5
            mean, std = self.a[k] + self.b[k] * mean, self.b[k].abs() * std
        return mean.detach(), std.detach()


def draws_of(count, batch, seed, classes=1):
    made = draw_samples(torch.arange(classes).__getitem__, classes, (batch, *SHAPE), count, seed)
    object.__setattr__(made, "noises", tuple(noise.double() for noise in made.noises))
    return made


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_the_students_gradient_is_the_closed_form(cfg_scale):
    """(x_critic - x_teacher) / mean |x - x_teacher| over the number of elements, in numpy."""
    teacher, critic = Gaussian([1.0, -2.0, 0.5], [0.5, 2.0, 1.5]), Gaussian([0.0, 3.0, 9.0], [1.0, 0.3, 9.0])
    draws = draws_of(1, 6, seed=3, classes=2)
    x = torch.randn(6, *SHAPE, dtype=torch.float64, requires_grad=True)
    student_loss(teacher, critic, x, draws, cfg_scale).backward()

    y, x0, noise = (value.detach().numpy() for value in (draws.labels, x, draws.diffusion.noise))
    assert set(y) == {0, 1}
    t = (0.02 + 0.96 * draws.diffusion.t.numpy().astype(np.float64)).reshape(-1, 1, 1, 1)
    x_t = (1 - t) * x0 + t * noise

    def at(model, label):
        mean, std = (value.detach().numpy()[label].reshape(-1, 1, 1, 1) for value in (model.mean, model.std))
        return denoised(x_t, t, mean, std)

    null = at(teacher, np.full_like(y, 2))
    wanted = null + cfg_scale * (at(teacher, y) - null)
    g = (at(critic, y) - wanted) / np.abs(x0 - wanted).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(x.grad.numpy(), g / g.size, rtol=1e-5)


class Judging(Gaussian):
    """A Gaussian that also gives each sample two logits, linear in x_t, of being real."""

    def __init__(self, mean, std):
        super().__init__(mean, std)
        self.weight = torch.nn.Parameter(torch.randn(2, math.prod(SHAPE), dtype=torch.float64))

    def forward(self, x, t, y, label_draw=None):
        return super().forward(x, t, y)[0], [(x.flatten(1) @ self.weight.T).unsqueeze(-1)]


def test_the_gan_is_the_closed_form():
    """- log P(real) for the student, by its gradient; both cross entropies for the critic, by their value."""
    critic, teacher = Judging([0.0, 9.0], [1.0, 9.0]), Gaussian([1.0, 0.5], [0.5, 1.5])
    x, real = torch.randn(2, 6, *SHAPE, dtype=torch.float64)
    draws = draws_of(1, 6, seed=3)
    t, noise, weight = draws.diffusion.t.numpy(), draws.diffusion.noise.numpy(), critic.weight.detach().numpy()
    t = (0.02 + 0.96 * t.astype(np.float64)).reshape(-1, 1, 1, 1)

    def probability(images):
        return special.expit(((1 - t) * images.numpy() + t * noise).reshape(6, -1) @ weight.T)  # (6, 2)

    gradients = []
    for gan_weight in (0.0, 3.0):
        at = x.clone().requires_grad_()
        student_loss(teacher, critic, at, draws, gan_weight=gan_weight).backward()
        gradients.append(at.grad)
    expected = -3.0 * ((1 - probability(x)) @ weight).reshape(x.shape) * (1 - t) / 12
    np.testing.assert_allclose((gradients[1] - gradients[0]).numpy(), expected, rtol=1e-5, atol=1e-9)
    plain, both = critic_loss(critic, x, draws), critic_loss(critic, x, draws, real, 3.0)
    expected = 3.0 * (-np.log(probability(real)).mean() - np.log(1 - probability(x)).mean())
    assert (both - plain).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_a_linear_student_becomes_the_teacher(count):
    """With a critic that is exact at every step, after one step and after two."""
    times = step_times(count)
    teacher, student = Gaussian([1.5], [0.7]), Linear(times)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for step in range(400):
        draws = draws_of(count, 32, seed=step)
        mean, std = student.moments(len(draws.noises))
        x = training_sample(student, student, times, draws)
        student_loss(teacher, Gaussian([mean], [std]), x, draws).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    for steps in range(1, count + 1):
        mean, std = student.moments(steps)
        assert mean.item() == pytest.approx(1.5, abs=0.03) and std.item() == pytest.approx(0.7, abs=0.03)


def test_the_critics_optimum_is_the_students_velocity():
    """Among the velocities of Gaussians it finds that of the student's samples."""
    times = step_times(1)
    student, critic = Linear(times), Gaussian([1.5], [1.0])
    student.a.data.fill_(-0.5)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for step in range(300):
        draws = draws_of(1, 64, seed=step)
        critic_loss(critic, training_sample(student, student, times, draws), draws).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert student.a.grad is None  # its samples are data to the critic
    assert critic.mean.item() == pytest.approx(-0.5, abs=0.03) and critic.std.item() == pytest.approx(0.4, abs=0.03)


def test_only_the_last_step_has_a_gradient():
    times = step_times(4)
    for steps in range(1, 5):
        student = Linear(times)
        seed = next(seed for seed in range(100) if len(draws_of(4, 2, seed).noises) == steps)
        training_sample(student, student, times, draws_of(4, 2, seed)).sum().backward()
        assert student.calls == [(k, k == steps - 1) for k in range(steps)]
        assert (student.b.grad != 0).tolist() == [k == steps - 1 for k in range(4)]


def test_the_last_step_is_uniform():
    """Over the seeds that a run takes: one for each update."""
    labels = torch.zeros(1, dtype=torch.long)
    steps = [
        len(draw_samples(labels.__getitem__, len(labels), (1, 1, 1, 1), 4, derive_seed(0, 3, i)).noises)
        for i in range(2000)
    ]
    assert stats.chisquare(np.bincount(steps, minlength=5)[1:]).pvalue > 1e-3


def test_times_are_equally_spaced_unless_shifted():
    """The shift s multiplies the ratio t / (1 - t) of noise to data."""
    assert step_times(4) == (1.0, 0.75, 0.5, 0.25)
    plain, shifted = np.array(step_times(4))[1:], np.array(step_times(4, 3.0))
    assert shifted[0] == 1
    np.testing.assert_allclose(shifted[1:] / (1 - shifted[1:]), 3 * plain / (1 - plain))


def test_few_step_samples_follow_the_definition_whatever_the_batch():
    """Each step in numpy, from the numbers of the sample's own generator."""
    times = step_times(4, 2.0)
    student = Linear(np.float32(times).tolist())
    student.a.data.uniform_(-1, 1)
    y = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        found = draw(student, [5, 6, 7], SHAPE, y, "few-step", times=times)
        alone = draw(student, [6], SHAPE, y[:1], "few-step", times=times)
    assert found.dtype == torch.float64 and torch.equal(found[1:2], alone)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(SHAPE, generator=generator).numpy()
    for k, (a, b) in enumerate(zip(student.a.tolist(), student.b.tolist())):
        clean = a + b * x
        if k < 3:
            x = (1 - times[k + 1]) * clean + times[k + 1] * torch.randn(SHAPE, generator=generator).numpy()
    np.testing.assert_allclose(alone[0].numpy(), clean, rtol=1e-5, atol=1e-6)


# ---- distill.py ----


@pytest.fixture(scope="module")
def command(teacher, judge_folder):
    """Arguments of a run of seconds."""

    def build(out, *extra, of=""):
        judged = f"--eval-encoder={judge_folder} --eval-every 8 --eval-samples 6 --eval-batch-size 4"
        steps = f"--max-steps {STEPS} --log-every 1 --checkpoint-every 5 --batch-size 4 --critic-steps 2"
        words = (
            f"--teacher={of or teacher()} --out={out} --lr 1e-3 --critic-lr 1e-3 --ema-decays 0.5 --tensorboard=False"
        )
        return [*f"{words} {steps} {judged}".split(), *map(str, extra)]

    return build


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run that nothing has interrupted, with all that has a state."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    distill.main(command(folder, *RETROFIT, *GAN))
    return folder


RETROFIT = ("--routing", "dar", "--chunk-size", 3, "--query", "dynamic", "--retrofit-steps", 8)
GAN = ("--critic-rank", 2, "--gan-weight", 0.1)


def test_killed_anywhere_and_restarted_is_the_same_run(command, whole, tmp_path):
    """Before the first checkpoint, between two in the middle of the critic's updates, and in an evaluation."""
    words, updates = command(tmp_path / "killed", *RETROFIT, *GAN), []

    def run(patch):
        setattr(*patch[:2], ending(killed, *patch))
        distill.main(words)

    def in_update(number):
        return distill.Distiller, "learn", lambda *_: updates.append(0) or len(updates) == number

    for patch in (in_update(7), in_update(3 * 8 + 2), (OnlineEvaluation, "sample")):
        assert forked(functools.partial(run, patch)) == [-signal.SIGKILL]
    distill.main(words)
    assert_same_run(tmp_path / "killed", whole)
    assert [line["step"] for line in records(whole) if "frechet_distance" in line] == [8, STEPS]
    saved = load_file(whole / "last.pt")
    assert any(not torch.equal(saved["model"][key], value) for key, value in saved["ema"].items())
    assert all(value.any() for value in saved["critic"].values())  # half of a LoRA starts at zero, as do biases


def test_two_processes_in_parts_are_the_same_run(command, whole, tmp_path):
    """To rounding: each sample meets the same label, noise, times and number of steps."""
    words = command(tmp_path / "two", *RETROFIT, *GAN, "--micro-batch-size", 1)
    assert forked(*2 * [functools.partial(distill.main, words)], ranks=True) == [None, None]
    assert_same_curves(tmp_path / "two", whole)


def test_a_non_finite_update_leaves_its_network_alone(command, tmp_path, monkeypatch):
    """Here of the critic in step 2 and of the student in step 4: the other one learns all the same."""
    states = []

    def spoil(name, step):
        original = getattr(distill, name)

        def spoiled(*arguments):
            return original(*arguments) * (float("nan") if len(states) == step else 1)

        monkeypatch.setattr(distill, name, spoiled)

    def remember(self, *arguments):
        states.append(
            {name: [value.clone() for value in self.parts[name].parameters()] for name in ("model", "critic")}
        )

    spoil("critic_loss", 2)
    spoil("student_loss", 4)
    monkeypatch.setattr(distill.Distiller, "train_step", ending(remember, distill.Distiller, "train_step"))
    distill.main(command(tmp_path / "run", "--max-steps", 6, "--eval-every", 0))
    moved = {
        name: [any(not torch.equal(*pair) for pair in zip(a[name], b[name])) for a, b in zip(states, states[1:])]
        for name in ("model", "critic")
    }
    assert moved == {"critic": [True, False, True, True, True], "model": [True, True, True, False, True]}
    assert records(tmp_path / "run")[-1]["skipped_steps"] == 2


@pytest.mark.parametrize(
    "made_with, words, routing",
    [
        ("", "", "residual"),
        ("", "--routing attnres --chunk-size 2 --precision bf16", "attnres"),
        ("--routing dar --query static", "--cfg-scale 2 --chunk-summary sum", "dar"),
        ("--routing dar --query static --final-aggregator dedicated", "--chunk-size 1", "dar"),
    ],
)
def test_students_of_every_teacher_are_drawn_by_their_own_steps(command, teacher, tmp_path, made_with, words, routing):
    """The checkpoint says how: images from eval.sample are those of the sampler with the averaged weights."""
    settings = ("--student-steps", 2, "--time-shift", 2, "--max-steps", 2, "--eval-every", 0)
    distill.main(command(tmp_path / "run", *settings, *words.split(), of=teacher(made_with)))
    path = tmp_path / "run" / "last.pt"
    model, trained = load_trained(path)
    assert model.routing == routing and model.step_times == (1.0, 2 / 3) and not model.projectors
    sampling.main([str(path), "--out", str(tmp_path / "drawn"), "--num-samples", "5"])
    images = np.load(tmp_path / "drawn" / "drawn.npz")
    seeds = [derive_seed(0, 4, i) for i in range(5)]
    x = draw(model, seeds, (3, 8, 8), torch.from_numpy(images["arr_1"]), "few-step", times=(1.0, 2 / 3))
    expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(images["arr_0"] - expected).max() <= 1
    said = json.loads((tmp_path / "drawn" / "settings.json").read_text())
    assert said["settings"]["sampler"] == "few-step" and said["function_evaluations"] == 2
    with pytest.raises(
        SystemExit, match="steps cannot be chosen: .*last.pt is a distilled model, drawn in the 2 steps"
    ):
        sampling.main([str(path), "--out", str(tmp_path / "other"), "--steps", "4"])


def test_updates_of_both_networks_are_adamw(command, tmp_path, updates):
    words = ("--critic-steps", 1, "--lr", 2e-3, "--critic-lr", 5e-3, "--max-steps", 4, "--eval-every", 0)
    words = command(tmp_path / "run", *words, *ADAMW)
    updates.clear()  # those of the teacher
    distill.main(words)
    log = records(tmp_path / "run")
    assert_adamw(updates[0::2], 5e-3, [line["critic_grad_norm"] for line in log])
    assert_adamw(updates[1::2], 2e-3, [line["grad_norm"] for line in log])


def test_routing_fades_in(command, tmp_path, monkeypatch):
    seen, original = [], distill.Distiller.learn
    monkeypatch.setattr(
        distill.Distiller, "learn", lambda self, *rest: seen.append(self.model.gamma) or original(self, *rest)
    )
    distill.main(command(tmp_path / "run", *RETROFIT[:-1], 4, "--max-steps", 6, "--eval-every", 0, "--critic-steps", 1))
    assert seen[::2] == seen[1::2] == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("words", [(), ("--student-rank", 2)])
def test_autocast_keeps_the_gradients_of_the_last_step(command, tmp_path, words):
    """Weights that were cast for an earlier step, without gradient, must not be reused in the last one."""
    gradients = []
    for precision in ("fp32", "bf16"):
        settings = ("--precision", precision, "--eval-every", 0, "--student-steps", 2, *words)
        line = command(tmp_path / "run", *settings)
        run = distill.Distiller(configuration.parse_distillation(line), Ranks())
        torch.manual_seed(0)
        for weight in (*run.ema.weights, *run.critic.parameters()):
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
        seed = next(seed for seed in range(100) if len(draws_of(2, 2, seed).noises) == 2)
        [loss] = run.student_losses(draw_samples(run.labels.__getitem__, len(run.labels), (64, 3, 8, 8), 2, seed))
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in run.ema.weights]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("words", [(), ("--gan-weight", 1)])
def test_lora_leaves_the_teacher_alone(command, teacher, tmp_path, words):
    """To the bit, while the critic in the same weights learns; the checkpoint holds what it has learned, alone."""
    words = command(tmp_path / "run", "--critic-rank", 2, "--max-steps", 3, "--eval-every", 0, *words)
    run = distill.Distiller(configuration.parse_distillation(words), Ranks())
    inputs = torch.randn(5, 3, 8, 8), torch.rand(5), torch.arange(5)
    expected, _ = load_trained(teacher())[0](*inputs)
    assert torch.equal(run.critic(*inputs)[0], expected)
    for step in range(3):
        run.train_step(step)
    found, _ = run.critic(*inputs)
    assert torch.equal(run.teacher(*inputs)[0], expected) and torch.equal(run.critic(*inputs)[0], found)
    assert (found - expected).abs().max() > 1e-6
    trained = {name for name, weight in run.critic.named_parameters() if weight.requires_grad}
    assert len(trained) == len(run.critic_weights) and all("lora_" in name or "projectors" in name for name in trained)
    assert all(weight.grad is None for name, weight in run.critic.named_parameters() if name not in trained)


def test_real_images_have_the_samples_labels(command, tmp_path):
    words = command(tmp_path / "run", "--gan-weight", 1, "--eval-every", 0)
    run = distill.Distiller(configuration.parse_distillation(words), Ranks())
    draws, data = run.draw(0, 0), PreparedImages(run.config.data)
    images = data.__getitems__(range(len(data)))["images"]
    pixels = ((run.real_images(draws) + 1) * 127.5).round()
    found = [int((images == x).flatten(1).all(1).nonzero()[0, 0]) for x in pixels]
    assert data.labels[found].tolist() == draws.labels.tolist() and len(set(found)) > 1


@pytest.mark.parametrize(
    "scale, words",
    [
        (1.0, ()),
        (2.0, ("--routing", "dar")),
        (1.0, ("--gan-weight", 1)),
        (1.0, ("--gan-weight", 1, "--critic-rank", 1)),
        (1.0, ("--student-rank", 1)),
    ],
)
def test_the_dry_run_says_what_a_step_takes(command, tmp_path, capsys, scale, words):
    """The compute, to the 10 % that the first layers of so small a model save in backward; and nothing is written."""
    words = command(tmp_path / "run", "--student-steps", 1, "--cfg-scale", scale, "--eval-every", 0, *words)
    distill.main([*words, "--dry-run"])
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    run = distill.Distiller(configuration.parse_distillation(words), Ranks())
    with FlopCounterMode(display=False) as counter:
        run.train_step(0)
    assert run.flops == pytest.approx(counter.get_total_flops() / 4, rel=0.1)
    assert f"{run.flops / 1e9:.4g} GFLOP" in said and "each of 2 critic updates" in said


def test_a_published_teacher(command, small_data, tmp_path, monkeypatch):
    """Bare weights say neither their name nor what they were trained on."""
    small = functools.partial(SiT, patch_size=2, hidden_size=32, depth=2, num_heads=2)
    monkeypatch.setitem(SIT_MODELS, "SiT-S/2", small)
    weights = small(input_size=8, in_channels=3, num_classes=10, align_dims=()).state_dict()
    path = tmp_path / "published.pt"
    torch.save({"ema": weights}, path)
    words = command(tmp_path / "run", "--eval-every", 0, "--max-steps", 1, of=path)
    with pytest.raises(SystemExit, match="say which model .*published.pt is of"):
        distill.main(words)
    with pytest.raises(SystemExit, match="autoencoder = '': .*published.pt is not of this trainer"):
        distill.main([*words, "--model", "SiT-S/2"])
    distill.main([*words, "--model", "SiT-S/2", "--autoencoder", "pixels", "--data", str(small_data)])
    model, trained = load_trained(tmp_path / "run" / "last.pt", "0.5")
    assert trained["model"] == "SiT-S/2" and model.step_times == (1.0, 0.75, 0.5, 0.25)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=2e-3)  # a step away


@pytest.mark.parametrize(
    "made_with, words, message",
    [
        ("--path cosine", "", "cosine path, and only linear is supported"),
        ("--class-dropout-prob 0", "--cfg-scale 2", "without a null class, which cfg_scale = 2.0 needs"),
        ("", "--data {few}", "has 10 classes and .* has 11; give the --data of the teacher"),
        ("--routing dar", "--routing residual", "routing = 'residual': .* has routing = 'dar'.*unknown router"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(command, teacher, small_data, tmp_path, made_with, words, message):
    few = tmp_path / "few"
    if "few" in words:
        prepare.main(["digits", "--out", str(few), "--limit", "40"])
        meta = json.loads((few / "meta.json").read_text())
        (few / "meta.json").write_text(json.dumps(meta | {"class_names": [*meta["class_names"], "eleventh"]}))
    given = command(tmp_path / "run", *words.format(few=few).split(), of=teacher(made_with))
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        distill.main(given)
    assert not (tmp_path / "run").exists()


def test_a_distilled_model_and_other_settings_are_refused(command, whole, tmp_path):
    with pytest.raises(SystemExit, match="is a distilled model; give the one that it was distilled from"):
        distill.main(command(tmp_path / "run", of=whole / "last.pt"))
    before = (whole / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"(?s)another configuration:.*student_steps: 4 -> 2"):
        distill.main(command(whole, *RETROFIT, *GAN, "--student-steps", 2))
    assert (whole / "last.pt").read_bytes() == before
    for words, message in (([], "teacher = '': give"), (["--teacher=x"], "out = '': give"), (["--lrs=1"], "is 'lr'")):
        with pytest.raises(SystemExit, match=f"configuration error: .*{message}"):
            distill.main(words)


@pytest.mark.parametrize("name", sorted(path.stem for path in (configuration.PRESETS / "distill").glob("*.yaml")))
def test_presets_are_read_and_their_runs_can_be_given_again(name, tmp_path):
    config = configuration.parse_distillation(["--config", name, "--teacher=t", "--out=o", "--student-steps", "2"])
    assert config.student_steps == 2 and config.betas == (0.0, 0.999) and config.critic_lr > 1e-6 < config.lr < 1e-3
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.parse_distillation(["--config", str(tmp_path / "config.yaml")]) == config
