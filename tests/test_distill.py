"""Distillation: its losses against Gaussians, whose velocity has a closed form, and distill.py end to end on digits."""

import numpy as np
import pytest
import torch
from scipy import stats

from distribution_matching import critic_loss, draw_samples, step_times, student_loss, training_sample
from eval.samplers import draw
from runtime import derive_seed

SHAPE = (1, 2, 2)


def denoised(x, t, mean, std):
    """E[x_0 | x_t] for data of this mean and standard deviation, element by element."""
    return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)


class Gaussian(torch.nn.Module):
    """The velocity of data N(mean, std), each (classes + 1); the last class is the null one."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64)) for value in (mean, std))
        self.num_classes = len(self.mean) - 1

    def forward(self, x, t, y, label_draw=None):
        mean, std, t = (value.view(-1, 1, 1, 1) for value in (self.mean[y], self.std[y], t.double()))
        return (x - denoised(x, t, mean, std)) / t, []


class Linear(torch.nn.Module):
    """A student whose prediction in step k is a_k + b_k x. Remembers which of its steps had gradients."""

    num_classes = 0

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
    made = draw_samples(torch.arange(classes), (batch, *SHAPE), count, seed)
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


@pytest.mark.parametrize("count", [1, 2])
def test_a_linear_student_becomes_the_teacher(count):
    """With a critic that is exact at every step, after one step and after two."""
    times = step_times(count)
    teacher, student = Gaussian([1.5], [0.7]), Linear(times)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 700)
    for step in range(700):
        draws = draws_of(count, 64, seed=step)
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
        draws = draws_of(1, 256, seed=step)
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
    steps = [len(draw_samples(labels, (1, 1, 1, 1), 4, derive_seed(0, 3, i)).noises) for i in range(2000)]
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
