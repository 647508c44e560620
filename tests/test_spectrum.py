"""Power per octave against closed forms and numpy's Fourier transform; the command on images of every kind."""

import json

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from analysis import spectrum
from analysis.spectrum import bands, compare, power, rings

SIZES = [(8, 8), (9, 9), (7, 12), (16, 5), (4, 4), (20, 20)]


def noise(count, height, width, seed=0):
    """uint8 (count, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save(path, images):
    np.savez(path, arr_0=images)
    return path


def in_bands(images):
    """Mean of P in each band, (bands), of images (B, H, W) that are the same in all channels."""
    found, band = power(np.stack([images] * 3, 1)).mean(0), bands(*images.shape[1:])
    return np.array([found[band == j].mean() for j in range(band.max())])


# ---- the definition ----


@pytest.mark.parametrize("size", SIZES)
def test_power_is_numpys_fourier_transform_of_the_mirrored_image(size):
    """And by Parseval its mean is the variance over the pixels, mean over channels, in units of [0, 1]."""
    images = noise(3, *size).transpose(0, 3, 1, 2)
    values = images / 255 - (images / 255).mean((2, 3), keepdims=True)
    mirrored = np.concatenate([values, values[:, :, ::-1]], 2)
    mirrored = np.concatenate([mirrored, mirrored[..., ::-1]], 3)
    transform = np.abs(np.fft.fft2(mirrored))[:, :, : size[0], : size[1]] ** 2 / (16 * size[0] * size[1])
    twice = [np.where(np.arange(n) > 0, 2, 1) for n in size]  # k and -k; there is one zero
    np.testing.assert_allclose(power(images), (transform * np.outer(*twice)).mean(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(power(images).mean((1, 2)), values.var((2, 3)).mean(1), rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_bands_follow_from_the_frequency(size):
    """As squares of whole numbers: 3, 4, 5 makes f = 1/4 on a diagonal of 20 x 20, where a float may fall short."""
    found, (height, width) = bands(*size), size
    lowest = (max(size) - 1).bit_length()
    for k in range(height):
        for l in range(width):  # noqa: E741
            square = (k * width) ** 2 + (l * height) ** 2  # f^2 times (2 H W)^2
            below = [j for j in range(lowest + 1) if square * 4**j >= (height * width) ** 2]  # f >= 2^-(j + 1)
            assert found[k, l] == (below[0] if below else lowest + 1)
    assert (found == lowest + 1).sum() == 1 and found[0, 0] == lowest + 1
    assert set(found.ravel()) == set(range(lowest + 2))


def test_diagonal_on_the_edge_of_an_octave():
    assert bands(20, 20)[6, 8] == bands(20, 20)[8, 6] == bands(20, 20)[10, 0] == 1 and bands(20, 20)[9, 0] == 2


@pytest.mark.parametrize("size", SIZES)
def test_cosine_has_power_in_its_own_octave_alone(size):
    y, x = ((np.arange(n) + 0.5) / n for n in size)
    for k, l in [(1, 0), (0, 1), (2, 1), (3, 3), (size[0] - 1, 0), (0, size[1] - 1)]:  # noqa: E741
        found = power(np.tile(100 + 51 * np.outer(np.cos(np.pi * k * y), np.cos(np.pi * l * x)), (1, 3, 1, 1)))[0]
        expected = 0.2**2 * (1 if k == 0 else 0.5) * (1 if l == 0 else 0.5) * size[0] * size[1]
        assert found[k, l] == pytest.approx(expected, rel=1e-12)
        assert np.delete(found.ravel(), k * size[1] + l).max() < 1e-25


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_white_noise_is_flat_and_its_spread_as_said(tmp_path, size):
    """Each P is the variance times a squared normal, which has variance 2; the error is that of so many averaged."""
    count, normal = 600, np.random.default_rng(0).normal(128, 25, size=(600, *size, 3))
    result = compare([save(tmp_path / "noise.npz", normal.round().astype(np.uint8))])
    (entry,) = result["sources"].values()
    variance, band = (25**2 + 1 / 12) / 255**2, bands(*size)  # rounding adds 1/12
    for j, (found, error) in enumerate(zip(entry["power"], entry["standard_error"])):
        assert error == pytest.approx(variance * np.sqrt(2 / (3 * count * (band == j).sum())), rel=0.15)
        assert abs(found - variance) < 4 * error
    frequency, curve = result["frequency"], entry["curve"]
    assert frequency == sorted(frequency) and len(curve) == len(frequency)
    np.testing.assert_allclose(curve, variance, rtol=0.15)


def test_rings_are_means_over_a_step():
    """Every (k, l) but (0, 0) is in the ring of its rounded distance; on 5 x 5 worked out here one by one."""
    image, members = np.random.default_rng(0).random((5, 5)), {}
    for k, l in np.ndindex(5, 5):  # noqa: E741
        members.setdefault(round(np.hypot(k, l)), []).append((np.hypot(k, l) / 10, image[k, l]))
    frequency, curve = rings(image)
    expected = [np.mean(members[ring], axis=0) for ring in sorted(members) if ring]
    np.testing.assert_allclose(np.transpose([frequency, curve]), expected, rtol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (12, 17)])
def test_gaussian_blur_changes_each_power_by_its_transfer_function(size):
    """A blur that mirrors at the borders multiplies each P by H(k)^2 H(l)^2, exactly."""
    images, sigma, radius = noise(2, *size)[..., 0].astype(float), 0.7, 4
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    blurred = scipy.ndimage.gaussian_filter(images, (0, sigma, sigma), mode="reflect", radius=(0, radius, radius))
    transfer = [(kernel / kernel.sum()) @ np.cos(np.pi * np.outer(offsets, np.arange(n)) / n) for n in size]
    sharp, soft = (power(np.stack([each] * 3, 1)) for each in (images, blurred))
    np.testing.assert_allclose(soft, sharp * np.outer(*transfer) ** 2, rtol=1e-9, atol=1e-20)


def test_borders_do_not_hide_a_loss():
    """Pictures with P ~ 1 / f^2, cut from larger ones: the top octave shrinks as blurring shrank that of the large."""
    size, count, sigma = 64, 400, 0.7
    frequency = np.hypot.outer(np.fft.fftfreq(size), np.fft.fftfreq(size))
    amplitude = np.divide(1, frequency, out=np.zeros_like(frequency), where=frequency > 0)
    transfer = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    waves = np.fft.fft2(np.random.default_rng(0).normal(size=(count, size, size))) * amplitude
    sharp, soft = (np.fft.ifft2(each).real[:, :16, :16] for each in (waves, waves * transfer))
    top = (frequency >= 0.25) & (frequency < 0.5)
    expected = ((amplitude * transfer)[top] ** 2).sum() / (amplitude[top] ** 2).sum()
    assert in_bands(soft)[1] / in_bands(sharp)[1] == pytest.approx(expected, rel=0.1)

    def usual(images):
        cut = np.hypot.outer(np.fft.fftfreq(16), np.fft.fftfreq(16))
        return (np.abs(np.fft.fft2(images)) ** 2).mean(0)[(cut >= 0.25) & (cut < 0.5)].mean()

    assert usual(soft) / usual(sharp) > 2 * expected  # what the docstring says against it


# ---- the command ----


def test_ratio_and_its_error(tmp_path):
    """Against numpy, for two references at once. The spread of the ratio over fresh draws is what its error says."""
    gain, count, ratios, errors = 0.5, 60, [], []
    for draw in range(30):
        a, b = noise(count, 8, 8, 2 * draw), noise(count, 8, 8, 2 * draw + 1)
        paths = [save(tmp_path / "a.npz", (a * gain).round().astype(np.uint8)), save(tmp_path / "b.npz", b)]
        result = compare(paths, paths[1:])
        found = result["sources"][str(paths[0])]["ratios"][str(paths[1])]
        ratios.append(found["ratio"])
        errors.append(found["standard_error"])
    assert result["sources"][str(paths[1])]["ratios"] == {}
    mean, spread, said = np.mean(ratios, 0), np.std(ratios, 0, ddof=1), np.mean(errors, 0)
    np.testing.assert_allclose(mean, gain**2, atol=4 * said.max() / 30**0.5)
    np.testing.assert_allclose(spread, said, rtol=0.5)
    both = compare(paths, paths)["sources"]
    forth, back = both[str(paths[0])]["ratios"][str(paths[1])], both[str(paths[1])]["ratios"][str(paths[0])]
    np.testing.assert_allclose(np.array(forth["ratio"]) * back["ratio"], 1, rtol=1e-12)


def test_command_on_every_kind_of_source(small_data, tmp_path, capsys):
    """A prepared folder, its images as npz with eval.sample's settings beside, and blurred as a folder of png."""
    images = spectrum.open_images(small_data).__getitems__(range(70)).permute(0, 2, 3, 1).numpy()
    (tmp_path / "made").mkdir()
    same = save(tmp_path / "made" / "same.npz", images)
    (tmp_path / "made" / "settings.json").write_text(json.dumps({"uint8": "rounded", "settings": {"steps": 4}}))
    blurred = tmp_path / "blurred"
    blurred.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(scipy.ndimage.gaussian_filter(image, (1, 1, 0))).save(blurred / f"{i}.png")
    (blurred / "notes.txt").write_text("")
    out = tmp_path / "plots" / "of.digits"
    spectrum.main([str(small_data), str(same), str(blurred), "--reference", str(small_data), "--out", str(out)])
    result = json.loads((tmp_path / "plots" / "of.digits.json").read_text(), parse_constant=pytest.fail)
    text = (tmp_path / "plots" / "of.digits.md").read_text()
    assert text in capsys.readouterr().out and "1 files" in text  # which are not judged
    with Image.open(tmp_path / "plots" / "of.digits.png") as picture:
        picture.verify()
    sources, size = result["sources"], images.shape[1]
    assert result["size"] == [size, size] and result["bands"][:2] == ["1/2 and above (corner)", "1/4 to 1/2"]
    assert list(sources) == [str(small_data), str(same), str(blurred)]
    assert [entry["images"] for entry in sources.values()] == [70] * 3
    assert sources[str(same)]["settings"] == {"steps": 4}
    np.testing.assert_allclose(sources[str(same)]["ratios"][str(small_data)]["ratio"], 1, rtol=1e-12)
    ratio = sources[str(blurred)]["ratios"][str(small_data)]
    assert ratio["ratio"][1] < ratio["ratio"][2] < ratio["ratio"][-1] < 1
    (row,) = [line for line in text.splitlines() if line.startswith("| 1/4 to 1/2 |")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2] == "reference" and cells[3].startswith("1 ± ")
    assert float(cells[4].split(" ± ")[0]) == pytest.approx(ratio["ratio"][1], rel=1e-3)


def test_some_images_are_spread_over_the_source(tmp_path):
    """As a prepared folder is sorted by class: here only every fourth image is anything but grey."""
    images = np.full((400, 8, 8, 3), 128, np.uint8)
    images[::4] = noise(100, 8, 8)
    path = save(tmp_path / "some.npz", images)
    assert compare([path], num_images=100)["sources"][str(path)]["images"] == 100
    whole, some = (compare([path], num_images=count)["sources"][str(path)]["power"] for count in (400, 100))
    np.testing.assert_allclose(np.array(whole) * 4, some, rtol=1e-12)


def test_refusals(tmp_path):
    good, small = save(tmp_path / "good.npz", noise(3, 8, 8)), save(tmp_path / "small.npz", noise(3, 8, 6))
    tiny = save(tmp_path / "tiny.npz", noise(3, 3, 8))
    grey = save(tmp_path / "grey.npz", np.full((3, 9, 9, 3), 77, np.uint8))
    for arguments, message in (
        (([],), "no sources were given"),
        (([good, small],), "'.*small.npz' is 8 x 6 pixels, '.*good.npz' 8 x 8; sample or prepare both at one size"),
        (([good], [small]), "'.*good.npz' is 8 x 8 pixels, '.*small.npz' 8 x 6"),
        (([tiny],), "tiny.npz': 3 x 8 pixels; at least 4 x 4"),
        (([good], (), 1), "good.npz': 1 of 3 images; at least 2"),
        (([grey],), "grey.npz' has a band without power.*other pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*arguments)
    with pytest.raises(SystemExit, match="error: there is no"):
        spectrum.main([str(tmp_path / "missing"), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out*"))
