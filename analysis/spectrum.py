"""Compares how much fine detail images have: their power per octave of spatial frequency, over that of others.

    python -m analysis.spectrum data/digits samples/a.npz samples/folder --reference data/digits --out spectrum
    python -m analysis.spectrum residual.npz dar.npz --reference data/digits teacher.npz --out students

A source is a folder of dataset.prepare, an npz of `eval.sample`, or a folder of png: a checkpoint is sampled first.
Writes OUT.png, OUT.md and OUT.json. A ratio below 1 in the top octave says that detail is lost. The figures:

    values      each of the three channels by itself, in [0, 1], minus its mean over the pixels of the image
    power       P(k, l) = square of the orthonormal type-II DCT at k < H and l < W, mean over channels; the mean of P
                over (k, l) is the variance of the pixels, and white noise has P = its variance
    frequency   f = sqrt((k / 2H)^2 + (l / 2W)^2) in cycles per pixel, the same for odd and even sizes
    octave      1/4 <= f < 1/2 is the top one, 1/8 <= f < 1/4 the next, and so on down to 1 / (2 max(H, W)); f >= 1/2,
                which only diagonal waves have, is the corner, and no octave. A band's power is the mean of its P
    ratio       of a band's power, mean over images, to the reference's. Its standard error is that of the two means
                over images, taken as independent (first order)

The DCT continues an image by its mirror image. The usual Fourier transform repeats it; the jumps at its borders have
high frequencies, which blur leaves alone, and so hide a loss. (Of pictures with P ~ 1 / f^2, blurred to 0.114 of their
top octave and cut to 16 x 16 pixels, it finds 0.256, with a Hann window 0.151; the DCT finds 0.120.) All is float64.
Rounding to uint8 adds 1.3e-6 to every P. JPEG removes detail: use png.

Shapes: N images, B batch, H, W pixels, J octaves. Bands are the corner, then the octaves from the top one down.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.fft
import tyro
from tqdm import tqdm

from analysis.convergence import written
from eval.images import open_images
from runtime import plain_errors, table

BATCH = 64  # images in memory at a time


@dataclass(frozen=True)
class Options:
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images to measure: folders of dataset.prepare, npz, or folders of png."""
    reference: tuple[Path, ...] = ()
    """Images that the others are compared with, such as real ones and a teacher's; the first source if not given."""
    num_images: int = 10_000
    """Images of each source, spread evenly over it; all if there are fewer."""
    out: Path = Path("spectrum")
    """Path of the three files, without suffix."""


def main(argv: list[str] | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m analysis.spectrum", description=__doc__)
    with plain_errors(ValueError, OSError):
        result = compare(options.sources, options.reference, options.num_images)
        plot(result, options.out)
    print(markdown(result))
    print(f"written: {options.out}.png, {options.out}.md, {options.out}.json")


def power(images: np.ndarray) -> np.ndarray:
    """P (B, H, W) of images (B, 3, H, W) with values in [0, 255]."""
    values = images.astype(np.float64)
    values -= values.mean((2, 3), keepdims=True)  # before the division: an even grey has exactly no power
    return np.square(scipy.fft.dctn(values / 255, axes=(2, 3), norm="ortho")).mean(1)


def bands(height: int, width: int) -> np.ndarray:
    """The band of each (k, l), (H, W): 0 the corner, 1 .. J the octaves, J + 1 the mean at (0, 0)."""
    square = np.add.outer((np.arange(height) * width) ** 2, (np.arange(width) * height) ** 2)  # (2 H W f)^2, exactly
    octaves = (max(height, width) - 1).bit_length()
    return np.digitize(square, (height * width) ** 2 / 4.0 ** np.arange(octaves + 1))


def rings(image: np.ndarray) -> tuple[list, list]:
    """Mean frequency, and mean of P = image (H, W), over rings one step of the longer axis wide, without (0, 0)."""
    frequency = np.hypot.outer(*(np.arange(size) / (2 * size) for size in image.shape))
    ring = np.rint(frequency * 2 * max(image.shape)).astype(int).ravel()
    return tuple((np.bincount(ring, x.ravel()) / np.bincount(ring))[1:].tolist() for x in (frequency, image))


def measure(name: str, source, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Power of each image in each band, (N, 1 + J), and the mean P of all images, (H, W); source: of `open_images`."""
    count, (height, width) = min(len(source), num_images), source.size
    if count < 2:
        raise ValueError(f"{name!r}: {count} of {len(source)} images; at least 2 are needed for a standard error")
    if min(height, width) < 4:
        raise ValueError(f"{name!r}: {height} x {width} pixels; at least 4 x 4 are needed, to have a corner")
    band, rows, total = bands(height, width), [], np.zeros((height, width))
    items = np.arange(count) * len(source) // count
    for part in tqdm(np.split(items, range(BATCH, count, BATCH)), desc=name, leave=False):
        found = power(source.__getitems__(part).numpy())
        rows.append(np.stack([found[:, band == j].mean(1) for j in range(band.max())], 1))
        total += found.sum(0)
    return np.concatenate(rows), total / count


def compare(sources, references=(), num_images: int = 10_000) -> dict:
    """All that table and picture show, as plain values. Takes paths; the first source is the default reference.

    Raises ValueError where a source cannot be measured, sizes differ, or a reference has a band without power.
    """
    references = list(dict.fromkeys(map(str, references or sources[:1])))
    if not references:
        raise ValueError("no sources were given; name images to measure")
    entries, means, size = {}, {}, None
    for name in dict.fromkeys([*references, *map(str, sources)]):
        source = open_images(name)
        size = size or source.size
        if source.size != size:
            own, other = ("{} x {}".format(*each) for each in (source.size, size))
            raise ValueError(f"{name!r} is {own} pixels, {references[0]!r} {other}; sample or prepare both at one size")
        rows, image = measure(name, source, num_images)
        mean, error = means[name] = rows.mean(0), rows.std(0, ddof=1) / len(rows) ** 0.5
        if name in references and not mean.all():
            raise ValueError(f"{name!r} has a band without power, so nothing compares with it; give other pictures")
        frequency, curve = rings(image)
        entries[name] = {"images": len(rows), "settings": source.settings, "warnings": source.warnings, "ratios": {}}
        entries[name] |= {"power": mean.tolist(), "standard_error": error.tolist(), "curve": curve}
    for name, (a, da) in means.items():
        for reference, (b, db) in ((each, means[each]) for each in references if each != name):
            error = np.hypot(da / b, a * db / b**2)
            entries[name]["ratios"][reference] = {"ratio": (a / b).tolist(), "standard_error": error.tolist()}
    names = ["1/2 and above (corner)", *(f"1/{2 ** (j + 1)} to 1/{2**j}" for j in range(1, len(mean)))]
    return {"references": references, "size": list(size), "bands": names, "frequency": frequency, "sources": entries}


def markdown(result: dict) -> str:
    sources, text = result["sources"], ""
    for reference in result["references"]:
        rows, base = [], sources[reference]["power"]
        for j in [*range(1, len(base)), 0]:
            found = [entry["ratios"].get(reference) for entry in sources.values()]
            cells = [f"{r['ratio'][j]:.4g} ± {r['standard_error'][j]:.1g}" if r else "reference" for r in found]
            rows.append([result["bands"][j], f"{base[j]:.3g}", *cells])
        text += f"Power over that of `{reference}`, ± standard error; frequencies in cycles per pixel:\n\n"
        text += table(["frequency", "its power", *(f"`{name}`" for name in sources)], rows) + "\n"
    text += "Images of {} x {} pixels: ".format(*result["size"])
    text += ", ".join(f"{entry['images']} of `{name}`" for name, entry in sources.items()) + ".\n"
    return text + "".join(f"\nWarning: `{name}`: {w}.\n" for name in sources for w in sources[name]["warnings"])


def plot(result: dict, out: Path):
    references, edges = result["references"], 0.5 ** np.arange(1, len(result["bands"]) + 1)
    layout = dict(figsize=(4.6 * (1 + len(references)), 4.2), sharex=True, layout="constrained")
    with written(out, result, markdown(result), 1, 1 + len(references), **layout) as (figure, (panels,)):
        for i, (name, entry) in enumerate(result["sources"].items()):
            panels[0].loglog(result["frequency"], entry["curve"], color=f"C{i}", label=name)
            for panel, reference in zip(panels[1:], references):
                if found := entry["ratios"].get(reference):
                    y, error = (found[key][1:] for key in ("ratio", "standard_error"))
                    panel.errorbar(edges[:-1] / 2**0.5, y, error, color=f"C{i}", marker="o", markersize=3, capsize=2)
        for panel, title in zip(panels, ["power", *(f"power over {name}'s, by octave" for name in references)]):
            panel.set_title(title, fontsize="small")
            panel.set_xlabel("cycles per pixel")
            panel.set_xticks(edges, [f"1/{1 / edge:.0f}" for edge in edges])
            panel.set_xticks([], minor=True)
            panel.axvspan(0.25, 0.5, color="grey", alpha=0.15, linewidth=0)  # the top octave
        for panel in panels[1:]:
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", fontsize="small")


if __name__ == "__main__":
    main()
