"""Looks inside a SiT of any routing: what its states hold, what routes them, and how close they are to an encoder.

    python -m analysis.diagnose runs/digits/dar-repa-seed0/last.pt --out diagnosis/dar
    python -m analysis.diagnose SiT-XL-2-256.pt --model SiT-XL/2 --data data/imagenet256 --autoencoder sd-vae-ft-ema \\
        --encoder dinov2-vit-b --out diagnosis/sit --times 0.1 0.5 1

Writes a PNG and a JSON for each figure:

    states      RMS of the state after each block and of the loss gradient in it, and the cosine of neighbouring states
    routing     DAR, AttnRes: the weights of each aggregator; residual: the importance of each earlier output to each
                read; not for U-ViT's long skips
    time        how well t can be read from the state that each sublayer and the head receive: R^2 on held-out images
    alignment   CKNNA with the frozen encoder, and accuracy of a linear probe on held-out images, after each block

The network computes in float32 with plain PyTorch routing. `states` and `routing` take the images' own labels, `time`
and `alignment` the null label. Probes are fitted on three quarters of the images and judged on the others.

Shapes: N images, B batch, C channels, H = W size, T tokens, D width, n sources. There are L sublayers, two in a block;
h_l is what sublayer l receives (long skips: before it takes one up), h_{L+1} what the head does, v_0 the embedded input
and v_l what sublayer l gives (AttnRes: the sum of that over its chunk so far).
"""

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from config import Config
from dataset.prepared import PreparedImages
from checkpoint import load_trained
from eval.samplers import IndexedNoise
from loss import interpolant
from models import sit
from models.autoencoder import load_autoencoder
from models.encoders import FrozenEncoder
from runtime import EVALUATION, Ranks, derive_seed, environment

FIGURES = ("states", "routing", "time", "alignment")
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NEIGHBOURS = 10  # k of CKNNA, as in REPA
FEWEST = 20  # images for a probe, and for k neighbours
CURVES = 6  # sources drawn against t, those with the largest weights


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint of train_repa_dar.py, or weights that SiT or REPA has released."""
    out: str
    """Folder to write."""
    data: str = ""
    """Folder made by `python -m dataset.prepare`; the run's own if not given."""
    figures: tuple[str, ...] = ()
    """Any of states, routing, time and alignment; all that the model has if not given."""
    times: tuple[float, ...] = TIMES
    """Times in [0, 1] at which to look, 1 being noise; the figure `time` draws its own."""
    num_images: int = 1024
    """Look at so many images, or at all if there are fewer."""
    batch_size: int = 16
    """Images that the network takes at a time."""
    seed: int = 0
    """Decides images, noise and the times of the figure `time`."""
    average: str = ""
    """Moving average to look at, by its decay; the first if not given, `none` for the weights themselves."""
    model: str = ""
    """Name of the model (SiT-XL/2) for released weights, which do not say it."""
    autoencoder: str = ""
    """What the model was trained on; the run's own if not given."""
    encoder: str = ""
    """Frozen encoder to compare with, named as for training; the run's first if not given."""
    encoder_weights: str = ""
    """Local weights of the encoder."""
    path: Literal["", "linear", "cosine"] = ""
    """Interpolant; the run's own if not given, linear for released weights."""


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="python -m analysis.diagnose", description=__doc__)
    with Ranks() as ranks:
        try:
            diagnose_checkpoint(options, ranks)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from None


def diagnose_checkpoint(options, ranks):
    check(options.figures, options.times, options.num_images, options.batch_size, options.seed)
    model, run = load_trained(options.checkpoint, options.average, options.model, route_backend="torch")
    run = run and {**asdict(Config()), **run}  # an option younger than the run had, in effect, its default

    def setting(name, otherwise=None):
        value = getattr(options, name) or run.get(name, otherwise)
        if not value:
            raise ValueError(f"{name}: {options.checkpoint} does not say it; give --{name}")
        return value[0] if isinstance(value, (list, tuple)) else value

    autoencoder = load_autoencoder(setting("autoencoder"))
    latents = "" if autoencoder.name == "pixels" else autoencoder.fingerprint
    data, encoder = PreparedImages(setting("data"), latents=latents), None
    if not options.figures or "alignment" in options.figures:
        # Weights of the run's encoder are not those of another one.
        weights = options.encoder_weights or next(iter(() if options.encoder else run.get("encoder_weights", ())), "")
        encoder = FrozenEncoder(setting("encoder"), model.input_size // model.patch_size, weights).to(ranks.device)
    provenance = {
        "checkpoint": options.checkpoint,
        "average": run.get("average"),
        "step": run.get("step"),
        **environment(ranks),
    }
    done = diagnose(
        model.to(ranks.device),
        data,
        autoencoder,
        encoder,
        options.out,
        options.figures,
        options.times,
        options.num_images,
        options.batch_size,
        options.seed,
        setting("path", "linear"),
        provenance,
    )
    print("written: " + ", ".join(f"{Path(options.out) / name}.png, .json" for name in done))


def diagnose(
    model,
    data,
    autoencoder,
    encoder,
    out,
    figures=(),
    times=TIMES,
    num_images=1024,
    batch_size=16,
    seed=0,
    path="linear",
    provenance=None,
):
    """Write NAME.png and NAME.json for each figure into the folder `out`. Leaves the model as it was found.

    model: SiT, also one in training. data: PreparedImages with images, and with latents if the autoencoder makes any.
    encoder: FrozenEncoder, or None without the figure "alignment". figures: of FIGURES; () is all that can be drawn,
    without "alignment" if there is no encoder or one class alone, and without "routing" for long skips. provenance:
    what the JSON shall say beside the settings, such as {"step": ..., **environment(ranks)}.
    Returns {name: data of the figure}. Raises ValueError on values out of range and on data that do not fit the model.
    """
    check(figures, times, num_images, batch_size, seed)
    figures = figures or [
        name
        for name in FIGURES
        if not (
            name == "alignment"
            and (encoder is None or data.num_classes < 2)
            or name == "routing"
            and model.routing == "unet"
        )
    ]
    if "alignment" in figures and encoder is None:
        raise ValueError("figure 'alignment' needs an encoder")
    if "routing" in figures and model.routing == "unet":
        raise ValueError(
            "figure 'routing': with long skips no state is a weighted sum of outputs; choose from "
            + ", ".join(name for name in FIGURES if name != "routing")
        )
    sample = Sample(model, data, autoencoder, num_images, batch_size, seed, path)
    for name in figures:
        if name in ("time", "alignment") and len(sample.x) < FEWEST:
            raise ValueError(f"num_images: figure {name!r} needs at least {FEWEST} images, not {len(sample.x)}")
    settings = {
        "num_images": len(sample.x),
        "batch_size": batch_size,
        "seed": seed,
        "path": path,
        "data": str(data.folder),
        "content of data": data.content,
        "autoencoder": autoencoder.name,
        "encoder": encoder and encoder.name,
        "routing": model.routing,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    results = {}
    for name in figures:
        compute, plot = {
            "states": (states, plot_states),
            "routing": (routing, plot_routing),
            "time": (time, plot_time),
            "alignment": (alignment, plot_alignment),
        }[name]
        with observed(model, weights=name == "routing") as look:
            results[name] = finite(compute(look, model, sample, times, encoder))
        content = {"figure": name, "settings": settings, **(provenance or {}), "data": results[name]}
        (Path(out) / f"{name}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        figure, step = plot(results[name]), content.get("step")
        figure.suptitle(f"{settings['routing']}, {data.folder.name}" + ("" if step is None else f", step {step}"))
        figure.savefig(Path(out) / f"{name}.png", dpi=110)
    return results


def check(figures, times, num_images, batch_size, seed):
    unknown = [name for name in figures if name not in FIGURES]
    if unknown:
        raise ValueError(f"figures = {tuple(unknown)}: choose from {', '.join(FIGURES)}")
    if not times or not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times = {tuple(times)}: give times in [0, 1]")
    for name, value, low in (("num_images", num_images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < low:
            raise ValueError(f"{name} = {value}: must be at least {low}")


# ---- looking ----


class Sample:
    """The images of all figures, with their noise. Both follow from the seed alone, whatever the batches.

    Attributes: x and noise (N, C, H, W), labels (N), times (N) uniform in [0, 1), one for each image.
    """

    def __init__(self, model, data, autoencoder, num_images, batch_size, seed, path):
        of_data = (autoencoder.channels, data.resolution / autoencoder.downsampling, data.num_classes)
        of_model = (model.in_channels, model.input_size, model.num_classes)
        if of_data != of_model:
            raise ValueError(
                f"{data.folder} with autoencoder {autoencoder.name!r} has %g channels of size %g and %g "
                "classes, " % of_data + "the model %g of size %g and %g" % of_model
            )
        rng = np.random.default_rng([seed, EVALUATION])
        self.items = rng.permutation(len(data))[:num_images]
        self.times = torch.from_numpy(rng.random(len(self.items)))
        self.data, self.labels, self.path = data, data.labels[self.items], path
        self.batch_size, self.num_classes, self.like = batch_size, model.num_classes, model.pos_embed
        x, noise = [], []
        for items in self._split(self.items):
            batch = data.__getitems__(items)
            draw = IndexedNoise(
                [derive_seed(seed, EVALUATION, int(item)) for item in items],
                (model.in_channels, model.input_size, model.input_size),
                "cpu",
            )
            noise.append(draw())
            x.append(
                autoencoder.sample(batch["moments"], draw())
                if "moments" in batch
                else autoencoder.encode(batch["images"])
            )
        self.x, self.noise = torch.cat(x), torch.cat(noise)

    def _split(self, values):
        return [values[i : i + self.batch_size] for i in range(0, len(values), self.batch_size)]

    def batches(self, t, null_label=False):
        """(x_t, t, target, y) of all images in their order, on the model's device; t: one number, or (N)."""
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(self.x))
        labels = torch.full_like(self.labels, self.num_classes) if null_label else self.labels
        for x, noise, t, y in zip(*map(self._split, (self.x, self.noise, times, labels))):
            x, noise, t = (value.to(self.like) for value in (x, noise, t))
            x_t, target = interpolant(x, noise, t, self.path)
            yield x_t, t, target, y.to(self.like.device)

    @torch.no_grad()
    def encoded(self, encoder):
        """Mean-pooled tokens of the frozen encoder, (N, dim)."""
        images = (self.data.__getitems__(items)["images"] for items in self._split(self.items))
        return torch.cat([encoder(part.to(encoder.mean.device)).mean(1).double().cpu() for part in images]).numpy()


@contextlib.contextmanager
def observed(model, weights=False):
    """Gives a function look(x_t, t, y), the model's forward pass, bit for bit, that returns what happened in it:

        velocity  (B, C, H, W)
        states    h_1 .. h_{L+1}, each (B, T, D)
        reads     the same values, but only sublayer l depends on the l-th: the residual stream goes past it
        outputs   v_0 .. v_L, each (B, T, D)
        weights   with `weights`, those of the aggregators of a DAR or AttnRes model, each (n, B, T)

    Long skips leave `reads` and `outputs` empty.

    Within the block the model is in eval mode, frozen, and routes with PyTorch; afterwards it is as it was found.
    """
    trace = None

    class Residual(sit.ResidualStream):
        def __init__(self, tokens):
            super().__init__(tokens)
            trace.outputs.append(tokens)

        def read(self, shift, scale):
            state = self.h
            self.h = state.view_as(state)  # a node of the graph that only this read uses
            x, read = super().read(shift, scale)
            self.h = state
            trace.states.append(state)
            trace.reads.append(read)
            return x, state

        def write(self, output):
            super().write(output)
            trace.outputs.append(output)

    class Skipping(sit.SkipStream):
        def read(self, shift, scale):
            x, state = super().read(shift, scale)
            trace.states.append(state)
            return x, state

    class Routed(sit.RoutedStream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trace.outputs = self.v  # which it goes on to fill

        def read(self, shift, scale):
            if weights:
                trace.weights.append(self.router(self.v, self.t_embedding, return_weights=True)[1])
            x, state = super().read(shift, scale)
            trace.states.append(state)
            trace.reads.append(state)
            return x, state

    def look(x_t, t, y):
        nonlocal trace
        trace = SimpleNamespace(states=[], reads=[], outputs=[], weights=[])
        with torch.autocast(x_t.device.type, enabled=False):
            trace.velocity, _ = model.forward(x_t, t, y)  # not model(), which may be compiled with other streams
        return trace

    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    streams = sit.ResidualStream, sit.SkipStream, sit.RoutedStream
    backend = model.router and model.router.backend
    try:
        sit.ResidualStream, sit.SkipStream, sit.RoutedStream = Residual, Skipping, Routed
        model.eval().requires_grad_(False)
        if model.router:
            model.router.backend = "torch"
        yield look
    finally:
        sit.ResidualStream, sit.SkipStream, sit.RoutedStream = streams
        for module, training in modes.items():
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
        if model.router:
            model.router.backend = backend


def loss_gradients(look, x_t, t, target, y, of):
    """A forward pass, and the gradients of each image's own loss, its mean square error, with respect to trace.`of`."""
    with torch.enable_grad():
        trace = look(x_t.requires_grad_(), t, y)  # the parameters are frozen: the graph begins at x_t
        losses = (trace.velocity - target).square().mean((1, 2, 3))
        return trace, torch.autograd.grad(losses.sum(), getattr(trace, of))


# ---- (a) states ----


def states(look, model, sample, times, encoder=None):
    """After every block k = 0 .. depth (0: the embedded input), and at every time:

    rms:           of the state: the residual stream, or with a router z_k, the aggregate that block k + 1 receives.
    gradient_rms:  of the gradient of an image's own loss with respect to that state. (An aggregate is read once;
                   the residual stream's gradient is that of all that follows.)
    cosine:        of the states after block k and k + 1, mean over tokens, k = 0 .. depth - 1.
    """
    rows = {"rms": [], "gradient_rms": [], "cosine": []}
    for t in times:
        sums = 0
        for x_t, t, target, y in sample.batches(t):
            trace, gradients = loss_gradients(look, x_t, t, target, y, "states")
            blocks = [h.detach().double() for h in trace.states[::2]]
            values = (
                [h.square().mean() for h in blocks],
                [g.double().square().mean() for g in gradients[::2]],
                [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(blocks, blocks[1:])],
            )
            sums = sums + len(x_t) / len(sample.x) * torch.stack([value for part in values for value in part]).cpu()
        rms, gradient, cosine = sums.split([len(part) for part in values])
        for name, row in (("rms", rms.sqrt()), ("gradient_rms", gradient.sqrt()), ("cosine", cosine)):
            rows[name].append(row.tolist())
    return {"times": list(times), "blocks": list(range(len(blocks))), **rows}


# ---- (b) routing ----


def routing(look, model, sample, times, encoder=None):
    """By time and by reader l = 1 .. L+1, the last of which is the head; `sources` lists the i of each reader:

    weights:       DAR, AttnRes: the softmax over sources, mean over images and tokens. Residual: the importance as a
                   share, so that the weights of a reader sum to 1 as well.
    importance:    residual only. With gates g_{l,i} in h_l = sum_{i<l} g_{l,i} v_i, all of them 1, it is the mean over
                   images of |d loss / d g_{l,i}|, loss being the image's own. As g_{l,i} scales v_i for this one read,
                   that derivative is the sum over tokens of <d loss / d h_l, v_i>, the former through the read alone.
                   (LayerNorm undoes a common factor, so over the sources of a reader the derivatives of one image sum
                   to almost zero: importance tells sources of a reader apart, not what the reader is worth, and no
                   share of a reader with several sources is much above a half.)
    entropy:       in nats, and entropy_share: of log n, None for a single source. largest: the largest weight.
                   With a router of each token's own softmax, mean over images and tokens; else of the weights above.
    """
    data = {
        "sources": [list(read) for read in model.router.plan]
        if model.router
        else [list(range(reader)) for reader in range(1, 2 * len(model.blocks) + 2)],
        "times": list(times),
    }
    of_time = routing_weights if model.router else importance
    for t in times:
        for name, row in of_time(look, sample, t).items():
            data.setdefault(name, []).append(row)
    data["entropy_share"] = [
        [entropy / math.log(len(read)) if len(read) > 1 else None for entropy, read in zip(row, data["sources"])]
        for row in data["entropy"]
    ]
    return data


def entropy_and_largest(weights):
    """weights: (n, ...), summing to 1 over sources. Both as means over what follows."""
    return torch.special.entr(weights).sum(0).mean(), weights.amax(0).mean()


@torch.no_grad()
def routing_weights(look, sample, t):
    sums = None
    for x_t, t, _, y in sample.batches(t):
        share = len(x_t) / len(sample.x)
        rows = [
            share * torch.cat([alpha.mean((1, 2)), torch.stack(entropy_and_largest(alpha))]).double().cpu()
            for alpha in look(x_t, t, y).weights
        ]
        sums = rows if sums is None else [a + b for a, b in zip(sums, rows)]
    return {
        "weights": [row[:-2].tolist() for row in sums],
        "entropy": [row[-2].item() for row in sums],
        "largest": [row[-1].item() for row in sums],
    }


def importance(look, sample, t):
    sums = None
    for x_t, t, target, y in sample.batches(t):
        trace, gradients = loss_gradients(look, x_t, t, target, y, "reads")
        outputs = [v.detach() for v in trace.outputs]
        rows = [
            torch.stack([(gradient * v).sum((1, 2)).abs().sum() for v in outputs[:reader]]).double().cpu()
            for reader, gradient in enumerate(gradients, start=1)
        ]
        sums = rows if sums is None else [a + b for a, b in zip(sums, rows)]
    means = [row / len(sample.x) for row in sums]
    weights = [row / row.sum() for row in means]
    entropy, largest = zip(*(entropy_and_largest(row) for row in weights))
    return {
        "importance": [row.tolist() for row in means],
        "weights": [row.tolist() for row in weights],
        "entropy": [value.item() for value in entropy],
        "largest": [value.item() for value in largest],
    }


# ---- (c), (d) probes ----


@torch.no_grad()
def pooled_states(look, sample, t):
    """Mean over tokens of h_1 .. h_{L+1} under the null label, (L+1, N, D); t: one number, or (N)."""
    parts = [
        torch.stack([h.mean(1) for h in look(x_t, t, y).states]).cpu()
        for x_t, t, _, y in sample.batches(t, null_label=True)
    ]
    return torch.cat(parts, dim=1).double().numpy()


def held_out_score(probe, features, targets):
    """Score (R^2 or accuracy) on the last quarter of the images, fitted on the others.

    Features are standardised by mean and deviation of the latter, as a BatchNorm without weights in front of the
    linear layer does.
    """
    fitted = len(features) * 3 // 4
    probe = make_pipeline(StandardScaler(), probe).fit(features[:fitted], targets[:fitted])
    return float(probe.score(features[fitted:], targets[fitted:]))


def time(look, model, sample, times=None, encoder=None):
    """R^2 of a ridge regression from pooled h_l to t, every image at its own; the penalty by cross-validation."""
    t = sample.times.numpy()
    return {
        "readers": list(range(1, 2 * len(model.blocks) + 2)),
        "r2": [
            held_out_score(RidgeCV(np.logspace(-3, 5, 9)), features, t)
            for features in pooled_states(look, sample, sample.times)
        ],
    }


def alignment(look, model, sample, times, encoder):
    """By time and by block 0 .. depth: CKNNA of pooled states with pooled encoder tokens, and the accuracy of a
    logistic regression from pooled states to labels; encoder_accuracy is that of the encoder's own tokens."""
    labels, target = sample.labels.numpy(), sample.encoded(encoder)
    if len(set(labels[: len(labels) * 3 // 4])) < 2:
        raise ValueError("figure 'alignment' needs images of two classes for its probe, there is one")

    def accuracy(features):
        return held_out_score(LogisticRegression(max_iter=500), features, labels)

    data = {
        "times": list(times),
        "blocks": list(range(len(model.blocks) + 1)),
        "cknna": [],
        "accuracy": [],
        "neighbours": NEIGHBOURS,
        "encoder_accuracy": accuracy(target),
    }
    for t in times:
        pooled = pooled_states(look, sample, t)[::2]
        data["cknna"].append([cknna(features, target) for features in pooled])
        data["accuracy"].append([accuracy(features) for features in pooled])
    return data


# Huh et al. 2024 (arXiv 2405.07987), after the authors' code (github.com/minyoungg/platonic-rep)
def cknna(a, b, k=NEIGHBOURS):
    """Centred kernel nearest-neighbour alignment of two representations of the same images, (N, D) and (N, D').

    Rows are normalised to length 1; K and L are their inner products. With m the pairs i != j where j is among the k
    nearest neighbours of i in both, and HSIC the unbiased estimator (Song et al. 2012, Eq. 5),

        CKNNA = S(K, L) / sqrt(S(K, K) S(L, L)),   S(K, L) = HSIC(m K, m L)

    nan where a denominator is not positive, as between images that are all alike.
    """
    count = len(a)
    kernels, near = [], []
    for features in (a, b):
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        kernel = unit @ unit.T
        np.fill_diagonal(kernel, -np.inf)  # none is its own neighbour
        mask = np.zeros(kernel.shape, dtype=bool)
        np.put_along_axis(mask, np.argpartition(-kernel, k - 1, axis=1)[:, :k], True, axis=1)
        np.fill_diagonal(kernel, 0)
        kernels.append(kernel)
        near.append(mask)

    def similarity(i, j):
        mask = near[i] & near[j]  # (N, N); not symmetric, as neighbourhood is not
        left, right = kernels[i] * mask, kernels[j] * mask
        return (
            (left * right.T).sum()
            + left.sum() * right.sum() / ((count - 1) * (count - 2))
            - 2 * left.sum(0) @ right.sum(1) / (count - 2)
        ) / (count * (count - 3))

    own = similarity(0, 0), similarity(1, 1)
    return float(similarity(0, 1) / math.sqrt(own[0] * own[1])) if min(own) > 0 else math.nan


def finite(tree):
    """With None for every number that JSON has no word for."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


# ---- plots ----


def canvas(width, height):
    # Not by pyplot, which would touch the global state of whoever calls.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves(panel, x, rows, times, title, xlabel):
    """One line for each time, dark (data) to light (noise); None leaves a gap."""
    from matplotlib import colormaps

    for t, row in zip(times, np.array(rows, dtype=float)):
        panel.plot(x, row, marker="o", markersize=2.5, color=colormaps["viridis"](0.9 * t), label=f"t = {t:g}")
    panel.set(title=title, xlabel=xlabel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def plot_states(data):
    figure = canvas(13, 4)
    panels = figure.subplots(1, 3)
    for panel, name, title in zip(
        panels,
        ("rms", "gradient_rms", "cosine"),
        ("RMS of the state", "RMS of the loss gradient", "cosine with the next state"),
    ):
        curves(panel, data["blocks"][: len(data[name][0])], data[name], data["times"], title, "after block")
        if name != "cosine" and np.max(data[name]) > 0:
            panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_routing(data):
    times, count = data["times"], len(data["sources"])
    figure = canvas(max(15, 3.2 * len(times)), 8)
    above, below = figure.subfigures(2, 1)
    name = "share of importance" if "importance" in data else "weight"
    panels = above.subplots(1, len(times), squeeze=False, sharey=True)[0]
    for panel, t, rows in zip(panels, times, data["weights"]):
        image = np.full((count, count), np.nan)
        for row, read, values in zip(image, data["sources"], rows):
            row[read] = np.array(values, dtype=float)
        drawn = panel.imshow(image, vmin=0, vmax=1, aspect="auto", extent=(-0.5, count - 0.5, count + 0.5, 0.5))
        panel.set(title=f"t = {t:g}", xlabel="source")
    panels[0].set_ylabel("reader (last: head)")
    above.colorbar(drawn, ax=panels, label=name)

    panels = below.subplots(1, 5)
    for panel, reader in zip(panels, (count // 3, 2 * count // 3, count)):
        weights = np.array([rows[reader - 1] for rows in data["weights"]], dtype=float)  # (times, n)
        for i in np.sort(np.argsort(-weights.mean(0), kind="stable")[:CURVES]):
            panel.plot(times, weights[:, i], marker="o", markersize=2.5, label=f"v{data['sources'][reader - 1][i]}")
        panel.set(title=f"reader {reader}", xlabel="t", ylabel=name)
        panel.legend(fontsize="small")
    readers = range(1, count + 1)
    curves(panels[3], readers, data["entropy_share"], times, "entropy / log n", "reader")
    curves(panels[4], readers, data["largest"], times, "largest weight", "reader")
    panels[4].legend(fontsize="small")
    return figure


def plot_time(data):
    figure = canvas(6, 4)
    panel = figure.subplots()
    panel.plot(data["readers"], data["r2"], marker="o", markersize=3)
    panel.set(xlabel="reader (last: head)", ylabel="R² of t on held-out images")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    return figure


def plot_alignment(data):
    figure = canvas(10, 4)
    panels = figure.subplots(1, 2)
    curves(panels[0], data["blocks"], data["cknna"], data["times"], f"CKNNA, k = {data['neighbours']}", "after block")
    curves(panels[1], data["blocks"], data["accuracy"], data["times"], "accuracy of a linear probe", "after block")
    panels[1].axhline(data["encoder_accuracy"], color="black", linestyle="--", label="encoder")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    return figure


if __name__ == "__main__":
    main()
