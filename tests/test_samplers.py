"""Samplers on Gaussian data, where velocity, score and transport are known in closed form; guidance by what it calls.

Data N(m, s^2) make x_t normal with mean alpha m and variance V = alpha^2 s^2 + sigma^2. With E[x | x_t] and
E[eps | x_t] of jointly normal variables, the velocity is alpha' m + (V' / 2V) (x_t - alpha m), so that
(x_t - alpha m) / sqrt(V) is constant along the ODE: noise z at t = 1 arrives at m + s z.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from eval.samplers import IndexedNoise, draw, sample_ode, sample_sde, score_from_velocity

M, S = 0.7, 0.5
LAST = 0.04  # the SDE's last step starts here
of_both_paths = pytest.mark.parametrize("path", ["linear", "cosine"])


def coefficients(t, path):
    """alpha, sigma and their derivatives, for a float."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    half = math.pi / 2
    return math.cos(half * t), math.sin(half * t), -half * math.sin(half * t), half * math.cos(half * t)


def variance(t, path):
    alpha, sigma, _, _ = coefficients(t, path)
    return alpha**2 * S**2 + sigma**2


def exact_velocity(x, t, path):
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    d_variance = 2 * (alpha * d_alpha * S**2 + sigma * d_sigma)
    return d_alpha * M + d_variance / (2 * variance(t, path)) * (x - alpha * M)


def exact_score(x, t, path):
    return -(x - coefficients(t, path)[0] * M) / variance(t, path)


class Gaussian:
    """The exact velocity as a model."""

    def null(self, count):
        return torch.full((count,), 10)

    def __init__(self, path):
        self.path = path

    def __call__(self, x, t, y):
        assert (t == t[0]).all() and t.shape == y.shape == x.shape[:1]
        return exact_velocity(x, float(t[0]), self.path), []


class Recorder:
    """A model of constant velocity, value[y], which keeps what it was called with."""

    def null(self, count):
        return torch.full((count,), 7)

    def __init__(self, value=None):
        self.value = torch.zeros(8, dtype=torch.float64) if value is None else value
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append(SimpleNamespace(x=x, t=t, y=y))
        return self.value[y].view(-1, 1, 1, 1).expand_as(x).to(x.dtype), []

    def times(self):
        return [call.t[0].item() for call in self.calls]


def numbers(count, seed=0, dtype=torch.float64):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count):
    return torch.zeros(count, dtype=torch.long)


SAMPLERS = {
    "euler": lambda *args, **options: sample_ode(*args, solver="euler", **options),
    "heun": lambda *args, **options: sample_ode(*args, solver="heun", **options),
    "sde": lambda model, noise, *args, **options: sample_sde(model, noise, *args, step_noise=lambda: noise, **options),
}
of_all_samplers = pytest.mark.parametrize("sampler", SAMPLERS)

# ---- ODE ----


@of_both_paths
@pytest.mark.parametrize("solver, order, steps, worst", [("euler", 1, 100, 1e-2), ("heun", 2, 50, 1e-4)])
@pytest.mark.parametrize("options", [{}, {"time_shift": 2.5}, {"guide": True, "cfg_scale": 3.0}])
def test_ode_converges_to_the_transport_at_its_order(path, solver, order, steps, worst, options):
    worst *= 5 if "time_shift" in options else 1  # its last steps are the longest
    z, errors = numbers(64), []
    if "guide" in options:  # one that is the model itself: no guidance
        options = options | {"guide": Gaussian(path)}
    for num_steps in (steps, 2 * steps, 4 * steps):
        got = sample_ode(Gaussian(path), z, labels(64), num_steps=num_steps, path=path, solver=solver, **options)
        errors.append((got - (M + S * z)).square().mean().sqrt().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order, order], abs=0.15) and errors[-1] < worst


@pytest.mark.parametrize(
    "sampler, num_steps, times",
    [
        ("euler", 5, [1, 0.8, 0.6, 0.4, 0.2]),
        ("heun", 5, [1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]),  # two a step, but one in the last
        *(("sde", steps, [1 - 0.96 * k / (steps - 1) for k in range(steps)]) for steps in (2, 3, 9)),
    ],
)
@pytest.mark.parametrize("shift", [1, 3, 0.5])
def test_times_of_the_evaluations(sampler, num_steps, times, shift):
    """A shift by s multiplies the noise level t / (1 - t) by s; the SDE's last step starts where it did."""
    model = Recorder()
    SAMPLERS[sampler](model, numbers(2), labels(2), num_steps=num_steps, time_shift=shift)
    if shift == 1:
        assert model.times() == pytest.approx(times)
        return

    def level(t):
        return t / (1 - t)

    found = model.times()
    assert len(found) == len(times) and found[0] == 1 and (sampler != "sde" or found[-1] == pytest.approx(LAST))
    inside = [(a, b) for a, b in zip(found, times) if b < 1 and sampler != "sde"]
    assert [level(a) for a, _ in inside] == pytest.approx([shift * level(b) for _, b in inside])
    if sampler == "sde":  # equal steps before they are shifted
        even = [level(t) / (shift + level(t)) if t < 1 else 1 for t in found]
        assert [a - b for a, b in zip(even, even[1:])] == pytest.approx(
            [(1 - even[-1]) / (num_steps - 1)] * (num_steps - 1)
        )


# ---- score and SDE ----


@of_both_paths
@pytest.mark.parametrize("t", [0.04, 0.3, 0.77, 1.0])
def test_score_from_velocity(path, t):
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    got = score_from_velocity(x, exact_velocity(x, t, path), t, path)
    torch.testing.assert_close(got, exact_score(x, t, path), rtol=1e-9, atol=1e-9)


@of_both_paths
def test_two_steps_of_the_sde(path):
    """Euler-Maruyama by hand: from 1 to 0.04 with noise, then to 0 without."""
    z, w = numbers(16, seed=1), numbers(16, seed=2)

    def drift(x, t):
        return exact_velocity(x, t, path) - 0.5 * (2 * t) * exact_score(x, t, path)

    middle = z - 0.96 * drift(z, 1.0) + math.sqrt(2 * 1.0 * 0.96) * w
    noises = iter([w])
    got = sample_sde(Gaussian(path), z, labels(16), num_steps=2, path=path, step_noise=lambda: next(noises))
    torch.testing.assert_close(got, middle - 0.04 * drift(middle, 0.04), rtol=1e-9, atol=1e-9)


def moments_of_sde(num_steps, path, **changes):
    """Exact mean and standard deviation of what the sampler makes.

    The result is a linear function of the num_steps independent normal numbers that go in. Row k of the batch gets a
    one for the k-th of them and zeros else, the last row only zeros: that gives every coefficient.
    """
    rows = torch.eye(num_steps + 1, num_steps, dtype=torch.float64)[:, :, None, None, None]
    noises = iter(rows[:, 1:].unbind(1))
    options = dict(num_steps=num_steps, path=path, step_noise=lambda: next(noises), **changes)
    out = sample_sde(Gaussian(path), rows[:, 0], labels(num_steps + 1), **options).flatten()
    assert next(noises, None) is None
    return out[-1].item(), (out[:-1] - out[-1]).norm().item()


@of_both_paths
@pytest.mark.parametrize("options", [{}, {"time_shift": 2.0}, {"guide": True, "cfg_scale": 3.0}])
def test_sde_approaches_the_target(path, options):
    if "guide" in options:  # one that is the model itself: no guidance
        options = options | {"guide": Gaussian(path)}
    # With infinitely many steps the state at 0.04 is exact, and only the last step is not: an affine map of it.
    alpha, _, _, _ = coefficients(LAST, path)

    def last_step(x):
        return x - LAST * (exact_velocity(x, LAST, path) - LAST * exact_score(x, LAST, path))

    mean = last_step(alpha * M)
    deviation = (last_step(alpha * M + 1) - mean) * math.sqrt(variance(LAST, path))
    assert (mean, deviation) == pytest.approx((M, S), abs=0.01)  # which is close to the data
    found = [moments_of_sde(num_steps, path, **options) for num_steps in (100, 200, 400)]
    errors = [[abs(got - limit) for got, limit in zip(moments, (mean, deviation))] for moments in found]
    for coarse, fine in zip(errors, errors[1:]):
        for a, b in zip(coarse, fine):
            # Euler-Maruyama's weak order is 1. The mean of the linear path moves on a straight line, without error.
            assert a < 1e-12 > b or math.log2(a / b) == pytest.approx(1, abs=0.2)
    assert max(errors[-1]) < 0.004


def test_sde_draws_its_own_noise():
    def samples(count=20_000):
        torch.manual_seed(0)
        return sample_sde(Gaussian("linear"), torch.randn(count, 1, 1, 1), labels(count), num_steps=60).flatten()

    drawn, (mean, deviation) = samples(), moments_of_sde(60, "linear")
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * S / math.sqrt(len(drawn)))
    assert drawn.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(drawn)))
    assert torch.equal(samples(), drawn)


# ---- guidance ----


@of_all_samplers
def test_guidance_sees_each_sample_with_and_without_its_label(sampler):
    model, y, sample = Recorder(torch.randn(8, dtype=torch.float64)), torch.tensor([3, 0, 6]), SAMPLERS[sampler]
    plain = sample(model, numbers(3), y, num_steps=4)
    assert torch.equal(sample(model, numbers(3), y, num_steps=4, cfg_scale=1.0), plain)
    assert all(call.y.tolist() == [3, 0, 6] and len(call.x) == 3 for call in model.calls)  # no row is wasted
    model.calls.clear()
    sample(model, numbers(3), y, num_steps=4, cfg_scale=1.5)
    for call in model.calls:
        assert call.y.tolist() == [3, 0, 6, 7, 7, 7]  # 7 is the null label
        assert torch.equal(call.x[:3], call.x[3:])
        assert call.t.shape == (6,) and (call.t == call.t[0]).all()


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guidance_extrapolates_from_the_null_label(solver, scale):
    value = torch.tensor([0.1, 0.5, -2.0, 0, 0, 0, 0, 0.3], dtype=torch.float64)
    y, z = torch.tensor([0, 1, 2]), numbers(3)
    got = sample_ode(Recorder(value), z, y, num_steps=4, cfg_scale=scale, solver=solver)
    expected = 0.3 + scale * (value[:3] - 0.3)  # constant velocity over the time from 1 to 0
    torch.testing.assert_close(got, z - expected.view(-1, 1, 1, 1))


@of_all_samplers
def test_autoguidance_extrapolates_from_the_guide(sampler):
    """v_guide + w (v - v_guide), both with the labels, within the interval."""
    value, weak = torch.randn(2, 8, dtype=torch.float64)
    model, guide, mixed = Recorder(value), Recorder(weak), Recorder(weak + 2.5 * (value - weak))
    y, options = torch.tensor([3, 0, 6]), dict(num_steps=4, cfg_scale=2.5, guide=guide)
    got = SAMPLERS[sampler](model, numbers(3), y, **options)
    torch.testing.assert_close(got, SAMPLERS[sampler](mixed, numbers(3), y, num_steps=4))
    assert len(model.calls) == len(guide.calls) and all(call.y.tolist() == [3, 0, 6] for call in guide.calls)
    guide.calls.clear()
    SAMPLERS[sampler](model, numbers(3), y, **options, guidance_interval=(0.9, 1.0))
    assert guide.times() == [1.0]
    same = SAMPLERS[sampler](model, numbers(3), y, num_steps=4, cfg_scale=2.5, guide=model)
    torch.testing.assert_close(same, SAMPLERS[sampler](model, numbers(3), y, num_steps=4))


def test_guidance_in_the_sde_enters_the_score_as_well():
    """Guided velocity v: one drift v - t s(v) to 0.04 and one to 0, with s from the velocity on the linear path."""
    value = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.25], dtype=torch.float64)
    z, v = numbers(4), 0.25 + 2.0 * (1.0 - 0.25)

    def drift(x, t):
        return v + t * ((1 - t) * v + x) / t  # eps = x + (1 - t) v, s = - eps / t

    middle = z - 0.96 * drift(z, 1.0)
    got = sample_sde(Recorder(value), z, labels(4), num_steps=2, cfg_scale=2.0, step_noise=lambda: torch.zeros_like(z))
    torch.testing.assert_close(got, middle - 0.04 * drift(middle, 0.04))


@pytest.mark.parametrize(
    "sampler, steps, interval, guided",
    [
        ("euler", 8, (0.0, 1.0), [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("euler", 8, (0.25, 0.75), [0.75, 0.625, 0.5, 0.375, 0.25]),  # both ends included
        ("euler", 8, (0.3, 0.7), [0.625, 0.5, 0.375]),
        ("euler", 8, (0.9, 0.95), []),
        ("heun", 8, (0.3, 0.7), [0.625, 0.625, 0.5, 0.5, 0.375, 0.375]),
        ("sde", 8, (0.3, 0.6), [0.58857, 0.45143, 0.31429]),  # 1 - 0.96 k / 7
        # Rounded times must not leave out an end: multiples of 1 / steps, counted by hand, without the 0.
        ("euler", 10, (0.0, 0.3), 3),
        ("euler", 20, (0.15, 0.35), 5),
        ("euler", 50, (0.56, 0.68), 7),
        ("euler", 250, (0.56, 0.68), 31),
    ],
)
def test_guidance_keeps_to_its_interval(sampler, steps, interval, guided):
    model, y = Recorder(), torch.tensor([3, 0])
    SAMPLERS[sampler](model, numbers(2), y, num_steps=steps, cfg_scale=2.0, guidance_interval=interval)
    seen = [call.t[0].item() for call in model.calls if len(call.y) == 4]
    assert len(seen) == guided if isinstance(guided, int) else seen == pytest.approx(guided, abs=1e-5)
    assert all(call.y.tolist() == [3, 0] for call in model.calls if len(call.y) != 4)
    assert len(model.calls) == (2 * steps - 1 if sampler == "heun" else steps)


# ---- precision, errors ----


@of_all_samplers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_model_computes_in_the_dtype_of_the_noise(sampler, dtype, scale):
    model = Recorder()
    out = SAMPLERS[sampler](model, numbers(2, dtype=dtype), labels(2), num_steps=3, cfg_scale=scale)
    assert {call.x.dtype for call in model.calls} == {call.t.dtype for call in model.calls} == {dtype}
    assert out.dtype == torch.float64 and not out.requires_grad


def test_the_state_is_float64():
    # A thousand steps of 2^-12 / 1000 each: a bfloat16 state of about 1 would not move at all.
    model = Recorder(torch.full((8,), 2.0**-12, dtype=torch.float64))
    out = sample_ode(model, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), labels(1), num_steps=1000)
    assert out.item() == pytest.approx(1 - 2.0**-12, abs=1e-9)


def test_samplers_reject_what_they_do_not_know():
    arguments = Recorder(), numbers(1), labels(1)
    with pytest.raises(ValueError, match="solver 'rk4'.*euler, heun"):
        sample_ode(*arguments, solver="rk4")
    for sample, fewest in ((sample_ode, 1), (sample_sde, 2)):
        with pytest.raises(ValueError, match="path 'vp'.*linear, cosine"):
            sample(*arguments, path="vp")
        for num_steps in (fewest - 1, -3):
            with pytest.raises(ValueError, match=f"num_steps = {num_steps}"):
                sample(*arguments, num_steps=num_steps)


# ---- noise by seed ----


def test_noise_is_standard_normal_fresh_and_of_its_seed_alone():
    seeds, shape = range(11, 111), (20, 5, 5)
    noise, rest = IndexedNoise(seeds, shape, "cpu"), IndexedNoise(seeds[60:], shape, "cpu")
    state = torch.get_rng_state()
    first, second = noise(), noise()
    assert torch.equal(torch.get_rng_state(), state)  # it leaves the global generator alone
    assert torch.equal(rest(), first[60:]) and torch.equal(rest(), second[60:])
    for each in (first, second):
        assert each.mean().item() == pytest.approx(0, abs=5 / math.sqrt(each.numel()))
        assert each.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * each.numel()))
    for a, b in [(first, second), (first[:50], first[50:])]:  # draws of a sample, samples of a draw
        assert (a * b).mean().item() == pytest.approx(0, abs=5 / math.sqrt(a.numel()))


@of_all_samplers
def test_draw_takes_the_noise_of_each_seed(sampler):
    seeds, shape, y = [5, 6, 7], (1, 2, 2), torch.tensor([0, 3, 6])
    options = dict(num_steps=5, cfg_scale=2.0, guidance_interval=(0.3, 0.8), path="cosine")
    model, noise = Recorder(torch.linspace(-1, 1, 8, dtype=torch.float64)), IndexedNoise(seeds, shape, "cpu")
    if sampler == "sde":
        expected = sample_sde(model, noise(), y, step_noise=noise, **options)
    else:
        expected = sample_ode(model, noise(), y, solver=sampler, **options)
    got = draw(model, seeds, shape, y, sampler, **options)
    assert torch.equal(got, expected) and model.calls[-1].x.dtype == torch.float32
    torch.testing.assert_close(draw(model, [6], shape, y[1:2], sampler, **options), got[1:2], rtol=1e-6, atol=1e-6)
