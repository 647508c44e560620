"""The interpolant, the training times and the two losses (loss.py) against calculus and numpy in float64.

Shapes: B batch, C channels, H = W size, T tokens.
"""

import math
import re

import numpy as np
import pytest
import torch

from loss import (
    PATHS,
    alignment_loss,
    denoising_loss,
    interpolant,
    path_coefficients,
    sample_times,
    spatial_normalisation,
)

DEFINITIONS = {  # alpha(t), sigma(t) of x_t = alpha x + sigma eps
    "linear": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: math.cos(math.pi * t / 2), lambda t: math.sin(math.pi * t / 2)),
}


def pair(seed=0, shape=(3, 2, 5, 5)):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


# ---- the path ----


def test_every_path_is_tested():
    assert set(PATHS) == set(DEFINITIONS)


@pytest.mark.parametrize("path", DEFINITIONS)
def test_noisy_image_is_the_path_at_t(path):
    x, noise = pair()
    t = torch.tensor([0.1, 0.5, 0.85], dtype=torch.float64)
    x_t, _ = interpolant(x, noise, t, path)
    alpha, sigma = DEFINITIONS[path]
    for i, time in enumerate(t.tolist()):  # every image has its own time
        torch.testing.assert_close(x_t[i], alpha(time) * x[i] + sigma(time) * noise[i])


@pytest.mark.parametrize("path", DEFINITIONS)
def test_velocity_is_the_derivative_of_the_path(path):
    x, noise = pair()
    t = torch.tensor([0.1, 0.5, 0.85], dtype=torch.float64)
    by_autograd = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda time: interpolant(x[i : i + 1], noise[i : i + 1], time.view(1), path)[0][0], t[i]
            )
            for i in range(3)
        ]
    )
    x_t, velocity = interpolant(x, noise, t, path)
    torch.testing.assert_close(velocity, by_autograd)
    step = 1e-5
    by_difference = (interpolant(x, noise, t + step, path)[0] - interpolant(x, noise, t - step, path)[0]) / (2 * step)
    torch.testing.assert_close(velocity, by_difference, atol=1e-8, rtol=1e-8)
    if path == "linear":
        torch.testing.assert_close(velocity, noise - x)


@pytest.mark.parametrize("path", DEFINITIONS)
def test_path_runs_from_data_to_noise(path):
    x, noise = pair()
    torch.testing.assert_close(interpolant(x, noise, torch.zeros(3, dtype=torch.float64), path)[0], x)
    torch.testing.assert_close(interpolant(x, noise, torch.ones(3, dtype=torch.float64), path)[0], noise)


@pytest.mark.parametrize("path", DEFINITIONS)
def test_coefficients_have_the_shape_and_dtype_of_t(path):
    t = torch.rand(2, 3)
    for coefficient in path_coefficients(t, path):
        assert coefficient.shape == t.shape and coefficient.dtype == t.dtype


# ---- training times ----


@pytest.mark.parametrize("path", DEFINITIONS)
def test_uniform_times_are_the_uniform_draws(path):
    uniform, normal = torch.rand(5), torch.randn(5)
    assert torch.equal(sample_times(uniform, normal, "uniform", path), uniform)


@pytest.mark.parametrize("path", DEFINITIONS)
def test_lognormal_times_have_a_lognormal_noise_level(path):
    """sigma / alpha at the returned time is exp(N(0, 1)) itself."""
    normal = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    t = sample_times(torch.rand(5, dtype=torch.float64), normal, "lognormal", path)
    assert ((0 < t) & (t < 1)).all() and (t.diff() > 0).all()
    alpha, sigma = DEFINITIONS[path]
    levels = torch.tensor([sigma(time) / alpha(time) for time in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(levels, normal.exp())
    assert t[2].item() == pytest.approx(0.5)


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


# ---- losses ----


def test_denoising_loss_is_the_mean_square_error():
    velocity, target = pair()
    expected = np.mean((velocity.numpy() - target.numpy()) ** 2)
    assert denoising_loss(velocity, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype, value", [(torch.float16, 300.0), (torch.bfloat16, 300.0)], ids=str)
def test_denoising_loss_is_float32(dtype, value):
    """300^2 overflows float16, and bf16 keeps two or three digits of it."""
    velocity, target = torch.full((2, 1, 2, 2), value, dtype=dtype), torch.zeros(2, 1, 2, 2)
    velocity[0] = 1
    loss = denoising_loss(velocity, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1 + 300.0**2) / 2, rel=1e-6)


def closed_form(aligned, features):
    """- mean cosine of float64 arrays, depth by depth and encoder by encoder."""
    cosines = []
    for i, z in enumerate(aligned):
        z, y = z.detach().double().numpy(), features[i % len(features)].double().numpy()
        cosines.append((z * y).sum(-1) / (np.sqrt((z**2).sum(-1)) * np.sqrt((y**2).sum(-1))))
    return -np.mean([cosine.mean() for cosine in cosines])


@pytest.mark.parametrize("depths, dims", [(1, (8,)), (1, (8, 5)), (3, (8,)), (2, (8, 5, 3))])
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
        unit_z = z.detach().double() / z.detach().double().norm(dim=-1, keepdim=True)
        y = features[i % len(dims)].double()
        unit_y = y / y.norm(dim=-1, keepdim=True)
        cosine = (unit_z * unit_y).sum(-1, keepdim=True)
        expected = -(unit_y - cosine * unit_z) / z.detach().double().norm(dim=-1, keepdim=True) / count
        torch.testing.assert_close(z.grad.double(), expected, atol=1e-7, rtol=1e-4)


def test_two_encoders_of_one_width_are_told_apart_by_order():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert alignment_loss([first, second] * 2, [first, second]).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss([first, second, second, first], [first, second]).item() > -0.95


def test_scale_and_sign():
    y = torch.randn(2, 3, 4)
    assert alignment_loss([7 * y], [y]).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss([-0.1 * y], [y]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "dtype, size",
    [
        (torch.float16, 5e4),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-6),
        (torch.float32, 1e15),
    ],
    ids=str,
)
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


@pytest.mark.parametrize(
    "projected, target", [((2, 16, 8), (2, 64, 8)), ((2, 16, 8), (2, 16, 5)), ((2, 16, 8), (1, 16, 8))]
)
def test_tokens_that_do_not_match_are_both_named(projected, target):
    with pytest.raises(ValueError, match=f"{re.escape(str(projected))}.*{re.escape(str(target))}"):
        alignment_loss([torch.randn(projected)], [torch.randn(target)])


@pytest.mark.parametrize("projections, encoders", [(3, 2), (1, 2), (1, 0)])
def test_projections_that_cannot_be_shared_among_encoders_are_refused(projections, encoders):
    with pytest.raises(ValueError, match=f"{projections} projections .* {encoders} encoders"):
        alignment_loss([torch.randn(1, 2, 3)] * projections, [torch.randn(1, 2, 3)] * encoders)


# ---- iREPA's normalisation of the encoder's tokens ----


@pytest.mark.parametrize("gamma", [0, 0.6, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 2, 3), (2, 49, 11)], ids=str)
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


def test_a_single_token_has_no_spread():
    with pytest.raises(ValueError, match=r"spatial_norm = 0.6: .*\(2, 1, 5\).*at least two"):
        spatial_normalisation(torch.randn(2, 1, 5), 0.6)
