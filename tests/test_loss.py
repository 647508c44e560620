"""The interpolant, the training times and the losses (loss.py) against calculus and numpy in float64.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import math
import re

import numpy as np
import pytest
import torch

from loss import PATHS, Draws, Loss, interpolant, path_coefficients, sample_times
from loss import alignment_loss, denoising_loss, spatial_normalisation

DEFINITIONS = {  # alpha(t), sigma(t) of x_t = alpha x + sigma eps
    "linear": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: math.cos(math.pi * t / 2), lambda t: math.sin(math.pi * t / 2)),
}
each_path = pytest.mark.parametrize("path", DEFINITIONS)


def pair(seed=0, shape=(3, 2, 5, 5)):
    torch.manual_seed(seed)
    return torch.randn(2, *shape, dtype=torch.float64)


# ---- the path ----


@each_path
def test_the_path_and_its_derivative(path):
    assert set(PATHS) == set(DEFINITIONS)
    (x, noise), (alpha, sigma), step = pair(), DEFINITIONS[path], 1e-5
    t = torch.tensor([0.1, 0.5, 0.85], dtype=torch.float64)
    x_t, velocity = interpolant(x, noise, t, path)
    for i, time in enumerate(t):  # every image has its own time
        torch.testing.assert_close(x_t[i], alpha(time) * x[i] + sigma(time) * noise[i])
        by_autograd = torch.autograd.functional.jacobian(
            lambda s, i=i: interpolant(x[i, None], noise[i, None], s[None], path)[0][0], time
        )
        torch.testing.assert_close(velocity[i], by_autograd)
    by_difference = (interpolant(x, noise, t + step, path)[0] - interpolant(x, noise, t - step, path)[0]) / (2 * step)
    torch.testing.assert_close(velocity, by_difference, atol=1e-8, rtol=1e-8)
    if path == "linear":
        torch.testing.assert_close(velocity, noise - x)
    torch.testing.assert_close(interpolant(x, noise, torch.zeros_like(t), path)[0], x)  # from data
    torch.testing.assert_close(interpolant(x, noise, torch.ones_like(t), path)[0], noise)  # to noise
    t = torch.rand(2, 3)
    assert all(value.shape == t.shape and value.dtype == t.dtype for value in path_coefficients(t, path))


# ---- training times ----


@each_path
def test_lognormal_times_have_a_lognormal_noise_level(path):
    """sigma / alpha at the returned time is exp(N(0, 1)) itself."""
    normal = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    uniform, (alpha, sigma) = torch.rand(5, dtype=torch.float64), DEFINITIONS[path]
    t = sample_times(uniform, normal, "lognormal", path)
    assert ((0 < t) & (t < 1)).all() and (t.diff() > 0).all()
    levels = torch.tensor([sigma(time) / alpha(time) for time in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(levels, normal.exp())
    assert t[2].item() == pytest.approx(0.5)
    assert torch.equal(sample_times(uniform, normal, "uniform", path), uniform)


@pytest.mark.parametrize(
    "call, bad",
    [
        (lambda: path_coefficients(torch.rand(2), "vp"), "'vp'"),
        (lambda: interpolant(*pair(), torch.rand(3), "Linear"), "'Linear'"),
        (lambda: interpolant(*pair(), torch.rand(3), ""), "''"),
        (lambda: sample_times(torch.rand(2), torch.randn(2), "logit"), "'logit'"),
        (lambda: sample_times(torch.rand(2), torch.randn(2), "lognormal", "vp"), "'vp'"),
    ],
)
def test_unknown_names_are_refused(call, bad):
    with pytest.raises(ValueError, match=bad):
        call()


# ---- the whole loss ----


def closed_form(aligned, features):
    """- mean cosine of float64 arrays, depth by depth and encoder by encoder."""
    cosines = []
    for i, z in enumerate(aligned):
        z, y = z.detach().double().numpy(), features[i % len(features)].double().numpy()
        cosines.append((z * y).sum(-1) / (np.sqrt((z**2).sum(-1)) * np.sqrt((y**2).sum(-1))))
    return -np.mean([cosine.mean() for cosine in cosines])


@each_path
def test_log_normal_times_have_a_mean_a_deviation_and_a_shift(path):
    """On the linear path a shift by s multiplies the noise level by s."""
    shape, (alpha, sigma) = (4000, 1, 1, 1), DEFINITIONS[path]

    def log_levels(**options):
        t = Loss(path, "lognormal", **options).draw(shape, torch.Generator().manual_seed(0)).t.double()
        return t, torch.tensor([math.log(sigma(time) / alpha(time)) for time in t.tolist()])

    (t, usual), (_, moved) = log_levels(), log_levels(time_mean=-0.7, time_std=0.6)
    torch.testing.assert_close(moved, -0.7 + 0.6 * usual, atol=1e-4, rtol=1e-4)
    shifted, levels = log_levels(time_shift=3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * t / (1 - t), atol=0, rtol=1e-3)
    if path == "linear":
        torch.testing.assert_close(levels, usual + math.log(3), atol=1e-4, rtol=1e-4)
    draws = (Loss(path, time_shift=shift).draw(shape, torch.Generator().manual_seed(0)) for shift in (2.0, 1.0))
    uniform, even = (each.t for each in draws)
    torch.testing.assert_close(uniform, 2 * even / (1 + even))


@each_path
@pytest.mark.parametrize("sampling", ["uniform", "lognormal"])
def test_draws_follow_from_the_generator(path, sampling):
    """The log of the noise level is normal; noise is normal and label draws are uniform, and all are independent."""
    loss, B = Loss(path, sampling), 8000
    before = torch.get_rng_state()
    draws, again, other = (loss.draw((B, 1, 2, 2), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for name in ("t", "noise", "label"):
        value = getattr(draws, name)
        assert torch.equal(value, getattr(again, name)) and not torch.equal(value, getattr(other, name))
        assert torch.equal(getattr(draws[2:5], name), value[2:5])
    assert Draws(draws.t, draws.noise)[2:5].label is None
    t, label, noise = draws.t.double(), draws.label.double(), draws.noise.double()
    if sampling == "lognormal":
        level = (torch.tan(t * math.pi / 2) if path == "cosine" else t / (1 - t)).log()
        assert abs(level.mean()) < 0.05 and level.std().item() == pytest.approx(1, abs=0.05)
    uniforms = [label] if sampling == "lognormal" else [label, t]
    for uniform in uniforms:
        counts = torch.histc(uniform, 8, 0, 1)
        assert counts.sum() == B and (counts - B / 8).abs().max() < 5 * math.sqrt(B / 8)
    assert noise.shape == (B, 1, 2, 2) and abs(noise.mean()) < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)
    correlations = torch.corrcoef(torch.stack([t, label, *noise.flatten(1).T])) - torch.eye(6)
    assert correlations.abs().max() < 0.06


@each_path
@pytest.mark.parametrize("gamma", [None, 0.0, 0.6])
@pytest.mark.parametrize("depths", [0, 1, 2], ids="{}-aligned".format)
def test_the_loss_is_the_sum_of_its_parts(path, gamma, depths):
    """By hand in float64, for a model whose outputs depend on all that it is given; so for parts of a batch."""
    loss, B, seeded = Loss(path, proj_coeff=0.3, spatial_norm=gamma), 4, torch.Generator().manual_seed(0)
    x, labels = torch.randn(B, 2, 3, 3, generator=seeded), torch.arange(B)
    tokens = [torch.randn(B, 5, dim, generator=seeded) for dim in (4, 6)]
    guesses = [0.5 * y + torch.randn(y.shape, generator=seeded) for y in tokens * depths]
    draws = loss.draw(x.shape, seeded)

    def model(x_t, t, y, label_draw):
        return x_t.cos() + (t + y + 2 * label_draw)[:, None, None, None], [guess[y] for guess in guesses]

    total, parts = loss(model, x, labels, draws, tokens if depths else None)

    t, label, x_, noise = (value.double().numpy() for value in (draws.t, draws.label, x, draws.noise))
    (alpha, sigma), step = DEFINITIONS[path], 1e-6
    error = 0
    for i in range(B):
        d_alpha, d_sigma = ((f(t[i] + step) - f(t[i] - step)) / (2 * step) for f in (alpha, sigma))
        velocity = np.cos(alpha(t[i]) * x_[i] + sigma(t[i]) * noise[i]) + t[i] + i + 2 * label[i]
        error += np.mean((velocity - (d_alpha * x_[i] + d_sigma * noise[i])) ** 2) / B
    y = [encoded.double() for encoded in tokens]
    if gamma is not None:
        y = [(v - gamma * v.mean(1, keepdim=True)) / (v.var(1, keepdim=True).sqrt() + 1e-6) for v in y]
    alignment = closed_form(guesses, y) if depths else 0.0
    assert parts.keys() == {"denoising_loss", "alignment_loss"} and total.shape == ()
    assert parts["denoising_loss"].item() == pytest.approx(error, rel=1e-5)
    assert parts["alignment_loss"].item() == pytest.approx(alignment, abs=1e-6) and (alignment < -0.1 or not depths)
    assert total.item() == pytest.approx(error + 0.3 * alignment, rel=1e-5)

    def part(rows):
        return loss(model, x[rows], labels[rows], draws[rows], [value[rows] for value in tokens])[0].item()

    assert (part(slice(0, 2)) + part(slice(2, 4))) / 2 == pytest.approx(total.item(), rel=1e-5)


# ---- the losses ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_denoising_loss_is_float32(dtype):
    """300^2 overflows float16, and bf16 keeps two or three digits of it."""
    velocity, target = torch.full((2, 1, 2, 2), 300.0, dtype=dtype), torch.zeros(2, 1, 2, 2)
    velocity[0] = 1
    loss = denoising_loss(velocity, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1 + 300.0**2) / 2, rel=1e-6)


@pytest.mark.parametrize("depths, dims", [(1, (8,)), (1, (8, 5)), (3, (8,)), (2, (8, 5, 3)), (2, (6, 6))])
def test_alignment_loss_equals_the_closed_form(depths, dims):
    torch.manual_seed(0)
    features = [torch.randn(3, 7, dim) for dim in dims]
    # Ordered by depth, then encoder. Each is correlated with its own target, to a different degree.
    aligned = [(0.3 * i * y + torch.randn(3, 7, y.shape[-1])).requires_grad_() for i, y in enumerate(features * depths)]
    loss = alignment_loss(aligned, features)
    assert loss.shape == () and -1 <= loss.item() <= 1
    assert loss.item() == pytest.approx(closed_form(aligned, features), abs=1e-6)

    loss.backward()
    count = len(aligned) * 3 * 7
    for i, z in enumerate(aligned):  # d cos / dz = (y/|y| - cos z/|z|) / |z|
        size = z.detach().double().norm(dim=-1, keepdim=True)
        unit_z, y = z.detach().double() / size, features[i % len(dims)].double()
        unit_y = y / y.norm(dim=-1, keepdim=True)
        expected = -(unit_y - (unit_z * unit_y).sum(-1, keepdim=True) * unit_z) / size / count
        torch.testing.assert_close(z.grad.double(), expected, atol=1e-7, rtol=1e-4)
    for scale in (7, -0.1):
        scaled = [scale * y for y in features * depths]
        assert alignment_loss(scaled, features).item() == pytest.approx(-math.copysign(1, scale), abs=1e-6)


HALF = [(torch.float16, 5e4), (torch.float16, 1e-4), (torch.bfloat16, 1e15), (torch.bfloat16, 1e-6)]


@pytest.mark.parametrize("dtype, size", [*HALF, (torch.float32, 1e15)], ids=str)
def test_half_precision_is_normalised_in_float32(dtype, size):
    """Their squares overflow or vanish in half precision, a known source of NaN late in training."""
    torch.manual_seed(0)
    aligned = [(size * (2 * torch.rand(2, 3, 64) - 1)).to(dtype).requires_grad_()]
    features = [(size * (aligned[0].detach().float() / size + torch.rand(2, 3, 64)) / 2).to(dtype)]
    loss = alignment_loss(aligned, features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(closed_form(aligned, features), abs=1e-6)
    assert aligned[0].grad.isfinite().all()


def test_zero_tokens_stay_finite():
    """What a projector with zero weights gives."""
    z = torch.zeros(2, 3, 4, requires_grad=True)
    loss = alignment_loss([z], [torch.randn(2, 3, 4)])
    loss.backward()
    assert loss.item() == 0 and z.grad.isfinite().all()


@pytest.mark.parametrize("target", [(2, 64, 8), (2, 16, 5), (1, 16, 8)])
def test_tokens_that_do_not_match_are_both_named(target):
    with pytest.raises(ValueError, match=rf"\(2, 16, 8\).*{re.escape(str(target))}"):
        alignment_loss([torch.randn(2, 16, 8)], [torch.randn(target)])
    for projections, encoders in ((3, 2), (1, 2), (1, 0)):
        with pytest.raises(ValueError, match=f"{projections} projections .* {encoders} encoders"):
            alignment_loss([torch.randn(1, 2, 3)] * projections, [torch.randn(1, 2, 3)] * encoders)


# ---- iREPA's normalisation of the encoder's tokens ----


@pytest.mark.parametrize("gamma", [0.6, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 2, 3)], ids=str)
def test_spatial_normalisation_equals_the_definition(shape, dtype, gamma):
    """Per image and channel, in float32: rounding that of half precision would be a hundred times the tolerance."""
    torch.manual_seed(0)
    spreads, means = 0.1 + torch.rand(shape[0], 1, shape[2]), 3 * torch.randn(1, 1, shape[2])
    tokens = (means + spreads * torch.randn(shape)).to(dtype)
    x = tokens.double().numpy()
    expected = np.empty_like(x)
    for image in range(shape[0]):
        for channel in range(shape[2]):
            values = x[image, :, channel]
            mean = values.sum() / len(values)
            spread = math.sqrt(((values - mean) ** 2).sum() / (len(values) - 1))
            expected[image, :, channel] = (values - gamma * mean) / (spread + 1e-6)
    actual = spatial_normalisation(tokens, gamma)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0, 0.6, 1])
def test_tokens_without_spread_stay_finite(gamma):
    """A channel that is the same everywhere is divided by eps alone, also in what the loss makes of it."""
    tokens = torch.randn(2, 8, 3)
    tokens[..., 1] = 0.5  # a mean of eight of them is exact
    normalised = spatial_normalisation(tokens, gamma)
    torch.testing.assert_close(normalised[..., 1], torch.full((2, 8), (1 - gamma) * 0.5e6), rtol=1e-5, atol=0)
    for same in (torch.full((2, 7, 3), 0.1), torch.zeros(2, 7, 3)):
        z = torch.randn(2, 7, 3, requires_grad=True)
        loss = alignment_loss([z], [spatial_normalisation(same, gamma)])
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()
    with pytest.raises(ValueError, match=rf"spatial_norm = {gamma}: .*\(2, 1, 5\).*at least two"):
        spatial_normalisation(torch.randn(2, 1, 5), gamma)
