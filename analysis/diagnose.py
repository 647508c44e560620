"""Looks inside a SiT of any routing: what its states hold, what routes them, and how close they are to an encoder.

    python -m analysis.diagnose runs/digits/dar-repa-seed0/last.pt --out diagnosis/dar
    python -m analysis.diagnose SiT-XL-2-256.pt --model SiT-XL/2 --data data/imagenet256 --autoencoder sd-vae-ft-ema \\
        --encoder dinov2-vit-b --out diagnosis/sit --times 0.1 0.5 1

Writes a PNG and a JSON for each figure:

    states      RMS of the state after each block and of the loss gradient in it; cosine of neighbouring states
    routing     DAR, AttnRes: weights of each aggregator; residual: importance of each earlier output to each read
    time        how well t is read from the state that each sublayer and the head receive: R^2 on held-out images
    alignment   CKNNA with the frozen encoder, and accuracy of a linear probe on held-out images, after each block

The network computes in float32 with plain PyTorch routing. `states` and `routing` use the images' own labels, `time`
and `alignment` the null label. Probes are fitted on three quarters of the images and judged on the others.

Shapes: N images, B batch, C channels, H = W size, T tokens, D width, n sources. There are L sublayers, two in a block;
h_l is what sublayer l receives (long skips: before it takes one up), h_{L+1} what the head does, v_0 the embedded input
and v_l what sublayer l gives (AttnRes: the sum of that over its chunk so far).
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from analysis import figures as drawing
from dataset.prepared import PreparedImages
from eval.samplers import IndexedNoise
from kernels import route
from loss import Draws, Loss
from models.autoencoder import Latents, Pixels, load_autoencoder
from models.encoders import FrozenEncoder
from models.sit import SiT
from models.streams import ResidualStream
from runtime import Ranks, Use, derive_seed, environment, plain_errors, replaced, tf32, write_json
from weights import load_trained

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NEIGHBOURS = 10  # k of CKNNA, as in REPA
FEWEST = 20  # images for a probe, and for k neighbours


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """Checkpoint of train_repa_dar.py, or weights that SiT or REPA has released."""
    out: str
    """Folder to write."""
    data: str = ""
    """Folder made by `python -m dataset.prepare`; the run's own if not given."""
    figures: tuple[Literal["states", "routing", "time", "alignment"], ...] = ()
    """Figures to draw; all that the model has if not given."""
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


def main(argv: list[str] | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m analysis.diagnose", description=__doc__)
    with plain_errors(ValueError, OSError), Ranks() as ranks:
        diagnose_checkpoint(options, ranks)


def diagnose_checkpoint(options: Options, ranks: Ranks):
    for name, fine, remedy in (
        ("times", options.times and all(0 <= t <= 1 for t in options.times), "give times in [0, 1]"),
        ("num_images", options.num_images >= 1, "must be at least 1"),
        ("batch_size", options.batch_size >= 1, "must be at least 1"),
        ("seed", options.seed >= 0, "must be at least 0"),
    ):
        if not fine:
            raise ValueError(f"{name} = {getattr(options, name)}: {remedy}")
    model, run = load_trained(options.checkpoint, options.average, options.model, route_backend="torch")

    def setting(name, otherwise=None):
        value = getattr(options, name) or run.get(name, otherwise)
        if not value:
            raise ValueError(f"{name}: {options.checkpoint} does not say it; give --{name}")
        return value[0] if isinstance(value, (list, tuple)) else value

    autoencoder, encoder = load_autoencoder(setting("autoencoder")), None
    data = PreparedImages(setting("data"), latents=autoencoder.content, text=run.get("content of text", ""))
    if not options.figures or "alignment" in options.figures:
        of_run = () if options.encoder else run.get("encoder_weights", ())  # they do not fit another encoder
        weights = options.encoder_weights or "".join(of_run[:1])
        encoder = FrozenEncoder(setting("encoder"), model.input_size // model.patch_size, weights).to(ranks.device)
    provenance = {"checkpoint": options.checkpoint, "average": run.get("average"), "step": run.get("step")}
    provenance |= environment(ranks)
    given = {name: getattr(options, name) for name in ("figures", "times", "num_images", "batch_size", "seed")}
    given |= {"path": setting("path", "linear"), "provenance": provenance}
    done = diagnose(model.to(ranks.device), data, autoencoder, encoder, options.out, **given)
    print("written: " + ", ".join(f"{Path(options.out) / name}.png, .json" for name in done))


def diagnose(
    model: SiT,
    data: PreparedImages,
    autoencoder: Pixels | Latents,
    encoder: FrozenEncoder | None,
    out: str | Path,
    figures: tuple = (),
    times: tuple = TIMES,
    num_images: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
    path: str = "linear",
    provenance: dict | None = None,
) -> dict:
    """Write NAME.png and NAME.json for each figure into the folder `out`. Leaves the model as it was found.

    model: SiT, also one in training. data: PreparedImages with images, and with latents if the autoencoder makes any.
    figures: of FIGURES; () is all that can be drawn: "alignment" needs an encoder and two classes, "routing" a model
    without long skips. provenance: what the JSON shall say beside the settings, such as {"step": ...}.
    Returns {name: data of the figure}. Raises ValueError where a figure cannot be drawn or data do not fit the model.
    """
    sample = Sample(model, data, autoencoder, num_images, batch_size, seed, path)
    count, missing = len(sample.x), {}
    if model.routing == "unet":
        missing["routing"] = "with long skips no state is a weighted sum of outputs"
    if encoder is None:
        missing["alignment"] = "needs an encoder"
    elif len(sample.labels[: count * 3 // 4].unique()) < 2:
        missing["alignment"] = "needs images of two classes for its probe"
    possible = [name for name in FIGURES if name not in missing]
    for name in figures or possible:
        if name in ("time", "alignment") and count < FEWEST:
            raise ValueError(f"num_images: figure {name!r} needs at least {FEWEST} images, not {count}")
        if name in missing:
            raise ValueError(f"figure {name!r}: {missing[name]}; choose from {', '.join(possible)}")
    settings = {"num_images": count, "batch_size": batch_size, "seed": seed, "path": path, "data": str(data.folder)}
    settings |= {"content of data": data.content, "autoencoder": autoencoder.name}
    settings |= {"encoder": encoder and encoder.name, "routing": model.routing}
    out, results = Path(out), {}
    out.mkdir(parents=True, exist_ok=True)
    look = Look(model)
    with tf32(False):
        for name in figures or possible:
            text = json.dumps(FIGURES[name](look, sample, times, encoder))
            results[name] = json.loads(text, parse_constant=lambda nan: None)  # which JSON has no word for
            content = {"figure": name, "settings": settings, **(provenance or {}), "data": results[name]}
            write_json(out / f"{name}.json", content)
            figure, step = getattr(drawing, name)(results[name]), content.get("step")
            figure.suptitle(f"{model.routing}, {data.folder.name}" + ("" if step is None else f", step {step}"))
            with replaced(out / f"{name}.png") as file:
                figure.savefig(file, format="png", dpi=110)
    return results


# ---- looking ----


class Sample:
    """The images of all figures, with their noise. Both follow from the seed alone, whatever the batches.

    Attributes: x and noise (N, C, H, W), labels (N), times (N) uniform in [0, 1), one for each image; loss.
    Raises ValueError where the images do not fit the model.
    """

    def __init__(self, model, data, autoencoder, num_images, batch_size, seed, path):
        describe = "{} channels of size {:g} and {} classes".format
        classes = getattr(model, "num_classes", data.num_classes)  # a model of captions has none
        found = describe(autoencoder.channels, data.resolution / autoencoder.downsampling, data.num_classes)
        needed = describe(model.in_channels, model.input_size, classes)
        if found != needed:
            raise ValueError(f"{data.folder} with autoencoder {autoencoder.name!r} has {found}, the model {needed}")
        rng = np.random.default_rng(derive_seed(seed, Use.DIAGNOSIS))
        self.items = torch.from_numpy(rng.permutation(len(data))[:num_images])
        self.times = torch.from_numpy(rng.random(len(self.items)))
        self.data, self.labels, self.loss = data, data.labels[self.items], Loss(path)
        self.batch_size, self.like = batch_size, next(model.parameters())
        self.y, self.null = data.conditions(self.items), model.null(len(self.items)).cpu()
        x, noise, shape = [], [], (model.in_channels, model.input_size, model.input_size)
        for items in self.items.split(batch_size):
            draw = IndexedNoise([derive_seed(seed, Use.DIAGNOSIS, int(item)) for item in items], shape, "cpu")
            noise.append(draw())
            batch = data.__getitems__(items)
            latents = "moments" in batch
            x.append(autoencoder.sample(batch["moments"], draw()) if latents else autoencoder.encode(batch["images"]))
        self.x, self.noise = torch.cat(x), torch.cat(noise)

    def batches(self, t: float | torch.Tensor, null_label: bool = False) -> Iterator:
        """What `Loss` takes after the model, for all images in their order. t: one number, or (N)."""
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(self.x))
        y = self.null if null_label else self.y
        for parts in zip(*(part.split(self.batch_size) for part in (self.x, self.noise, times, y))):
            x, noise, t = (part.to(self.like) for part in parts[:3])
            yield x, parts[3].to(x.device), Draws(t, noise)

    @torch.no_grad()
    def mean(self, t: float, measure: Callable) -> tuple:
        """Means over all images of the vectors that measure(x, labels, draws) returns as means over its batch."""
        total = 0
        for batch in self.batches(t):
            vectors = measure(*batch)
            total = total + len(batch[0]) / len(self.x) * torch.cat(vectors).double().cpu()
        return total.split([len(vector) for vector in vectors])

    @torch.no_grad()
    def encoded(self, encoder: FrozenEncoder) -> np.ndarray:
        """Mean-pooled tokens of the frozen encoder, (N, dim)."""
        images = (self.data.__getitems__(items)["images"] for items in self.items.split(self.batch_size))
        return torch.cat([encoder(part.to(encoder.mean.device)).mean(1).double().cpu() for part in images]).numpy()


class Look:
    """A model for `Loss`: the forward pass of a SiT, bit for bit, of which it keeps the latest one's

        states    h_1 .. h_{L+1}, each (B, T, D)
        reads     with residual routing the same values, but only sublayer l depends on the l-th: the stream goes past
        outputs   v_0 .. v_L, each (B, T, D)
        weights   with DAR and AttnRes, those of each aggregator, (n, B, T)

    It has its own copy of the model: not compiled, in eval mode, frozen, and routed by PyTorch.
    """

    def __init__(self, model: SiT):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if model.router:
            self.model.router.backend = "torch"

    def __call__(self, x, t, y, label_draw=None):
        """The velocity, and no projections, so that the loss is the denoising loss alone."""
        with torch.autocast(x.device.type, enabled=False):
            velocity, _ = self.model(x, t, y, label_draw, self.begin)
        return velocity, []

    def begin(self, tokens, e):
        """Itself as the stream of a forward pass, around the model's own."""
        self.stream, self.e = self.model.stream(tokens, e), e
        self.states, self.reads, self.outputs = [], [], [tokens]
        return self

    def read(self, shift, scale):
        residual, stream = self.model.routing == "residual", self.stream
        if residual:
            stream = ResidualStream(stream.h.view_as(stream.h))  # a node of the graph that only this read uses
        x, read = stream.read(shift, scale)
        self.reads.append(read)
        self.states.append(self.stream.h if residual else read)
        return x, self.states[-1]

    def write(self, output):
        self.stream.write(output)
        self.outputs.append(self.stream.v[-1] if self.model.router else output)

    @property
    def weights(self) -> list:
        v = self.outputs
        reads = (self.model.router.aggregation(v[:reader], self.e) for reader in range(1, len(v) + 1))
        return [route([v[i] for i in read], *by, backend="torch", return_weights=True)[1] for read, *by in reads]

    def gradients(self, loss: Loss, x: torch.Tensor, labels: torch.Tensor, draws: Draws, of: str) -> tuple:
        """Make a forward pass. Returns the gradient of each image's own loss in each of its "states" or "reads"."""
        with torch.enable_grad():
            total, _ = loss(self, x.requires_grad_(), labels, draws)  # the parameters are frozen: the graph begins at x
            return torch.autograd.grad(total * len(x), getattr(self, of))


# ---- (a) states ----


def states(look: Look, sample: Sample, times: tuple, encoder=None) -> dict:
    """After every block k = 0 .. depth (0: the embedded input), and at every time:

    rms:           of the state: the residual stream, or with a router z_k, the aggregate that block k + 1 receives.
    gradient_rms:  of the gradient of an image's own loss with respect to that state. (An aggregate is read once;
                   the residual stream's gradient is that of all that follows.)
    cosine:        of the states after block k and k + 1, mean over tokens, k = 0 .. depth - 1.
    """

    def measure(*batch):
        gradients = look.gradients(sample.loss, *batch, of="states")[::2]
        h = [state.double() for state in look.states[::2]]
        squares = (torch.stack([x.double().square().mean() for x in part]) for part in (h, gradients))
        return *squares, torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(h, h[1:])])

    blocks = list(range(len(look.model.blocks) + 1))
    data = {"times": list(times), "blocks": blocks, "rms": [], "gradient_rms": [], "cosine": []}
    for t in times:
        rms, gradient, cosine = sample.mean(t, measure)
        for name, row in (("rms", rms.sqrt()), ("gradient_rms", gradient.sqrt()), ("cosine", cosine)):
            data[name].append(row.tolist())
    return data


# ---- (b) routing ----


def routing(look: Look, sample: Sample, times: tuple, encoder=None) -> dict:
    """By time and by reader l = 1 .. L+1, the last of which is the head; `sources` lists the i of each reader:

    weights:     DAR, AttnRes: the softmax over sources, mean over images and tokens. Residual: shares of importance.
    importance:  residual only. With gates g_{l,i} in h_l = sum_{i<l} g_{l,i} v_i, all of them 1, it is the mean over
                 images of |d loss / d g_{l,i}|, loss being the image's own. As g_{l,i} scales v_i for this one read,
                 that derivative is the sum over tokens of <d loss / d h_l, v_i>, the former through the read alone.
                 LayerNorm undoes a common factor, so the derivatives of one image and reader sum to almost zero:
                 importance compares the sources of a reader, not readers, and no share is much above a half.
    entropy:     in nats. entropy_share: of log n, None for a single source. largest: the largest weight.
                 With a router, of each token's own softmax, mean over images and tokens; else of the weights above.
    """

    router = look.model.router
    sources = router.plan if router else [range(reader) for reader in range(1, 2 * len(look.model.blocks) + 2)]

    def softmaxes(*batch):
        sample.loss(look, *batch)
        weights = look.weights
        return *(alpha.mean((1, 2)) for alpha in weights), *entropy_and_largest(weights)

    def importance(*batch):
        gradients, v = look.gradients(sample.loss, *batch, of="reads"), look.outputs
        return [
            torch.stack([(gradient * v[i]).sum((1, 2)).abs().mean() for i in read])
            for gradient, read in zip(gradients, sources)
        ]

    data = {"sources": [list(read) for read in sources], "times": list(times)}
    for t in times:
        rows = {} if router else {"importance": sample.mean(t, importance)}
        if router:
            *weights, entropy, largest = sample.mean(t, softmaxes)
        else:
            weights = [row / row.sum() for row in rows["importance"]]
            entropy, largest = entropy_and_largest(weights)
        rows |= {"weights": weights, "entropy": entropy, "largest": largest}
        for name, row in rows.items():
            data.setdefault(name, []).append([value.tolist() for value in row])
    most = [math.log(len(read)) for read in sources]
    data["entropy_share"] = [[value / top if top else None for value, top in zip(row, most)] for row in data["entropy"]]
    return data


def entropy_and_largest(weights: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each reader's weights (n, ...), which sum to 1 over the sources; both are means over what follows."""
    entropy = torch.stack([torch.special.entr(row).sum(0).mean() for row in weights])
    return entropy, torch.stack([row.amax(0).mean() for row in weights])


# ---- (c), (d) probes ----


@torch.no_grad()
def pooled_states(look: Look, sample: Sample, t: float | torch.Tensor) -> np.ndarray:
    """Mean over tokens of h_1 .. h_{L+1} under the null label, (L+1, N, D); t: one number, or (N)."""
    parts = []
    for batch in sample.batches(t, null_label=True):
        sample.loss(look, *batch)
        parts.append(torch.stack([h.mean(1) for h in look.states]).double().cpu())
    return torch.cat(parts, dim=1).numpy()


def held_out_score(probe, features: np.ndarray, targets: np.ndarray) -> float:
    """Score (R^2 or accuracy) on the last quarter of the images, fitted on the others.

    Features are standardised by mean and deviation of the latter, as a BatchNorm without weights in front of the
    linear layer does.
    """
    split = len(features) * 3 // 4
    probe = make_pipeline(StandardScaler(), probe).fit(features[:split], targets[:split])
    return float(probe.score(features[split:], targets[split:]))


def time(look: Look, sample: Sample, times=None, encoder=None) -> dict:
    """R^2 of a ridge regression from pooled h_l to t, every image at its own; the penalty by cross-validation."""
    pooled, t = pooled_states(look, sample, sample.times), sample.times.numpy()
    scores = [held_out_score(RidgeCV(np.logspace(-3, 5, 9)), features, t) for features in pooled]
    return {"readers": list(range(1, len(scores) + 1)), "r2": scores}


def alignment(look: Look, sample: Sample, times: tuple, encoder: FrozenEncoder) -> dict:
    """By time and by block 0 .. depth: CKNNA of pooled states with pooled encoder tokens, and the accuracy of a
    logistic regression from pooled states to labels; encoder_accuracy is that of the encoder's own tokens."""
    labels, target = sample.labels.numpy(), sample.encoded(encoder)

    def accuracy(features):
        return held_out_score(LogisticRegression(max_iter=500), features, labels)

    data = {"times": list(times), "blocks": list(range(len(look.model.blocks) + 1)), "cknna": [], "accuracy": []}
    data |= {"neighbours": NEIGHBOURS, "encoder_accuracy": accuracy(target)}
    for t in times:
        pooled = pooled_states(look, sample, t)[::2]
        data["cknna"].append([cknna(features, target) for features in pooled])
        data["accuracy"].append([accuracy(features) for features in pooled])
    return data


# Huh et al. 2024 (arXiv 2405.07987), after the authors' code (github.com/minyoungg/platonic-rep)
def cknna(a: np.ndarray, b: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Centred kernel nearest-neighbour alignment of two representations of the same images, (N, D) and (N, D').

    Rows are normalised to length 1; K and L are their inner products. With m the pairs i != j where j is among the k
    nearest neighbours of i in both, and HSIC the unbiased estimator (Song et al. 2012, Eq. 5),

        CKNNA = S(K, L) / sqrt(S(K, K) S(L, L)),   S(K, L) = HSIC(m K, m L)

    nan where a denominator is not positive, as between images that are all alike.
    """
    count, kernels, near = len(a), [], []
    for features in (a, b):
        unit = F.normalize(torch.from_numpy(features), dim=1)
        kernel = (unit @ unit.T).fill_diagonal_(-math.inf)  # none is its own neighbour
        near.append(torch.zeros_like(kernel).scatter_(1, kernel.topk(k).indices, 1))
        kernels.append(kernel.fill_diagonal_(0))

    def similarity(i, j):  # but for a factor, which cancels
        mask = near[i] * near[j]  # (N, N); not symmetric, as neighbourhood is not
        left, right = kernels[i] * mask, kernels[j] * mask
        sums = left.sum() * right.sum() / ((count - 1) * (count - 2))
        return ((left * right.T).sum() + sums - 2 * left.sum(0) @ right.sum(1) / (count - 2)).item()

    own = similarity(0, 0), similarity(1, 1)
    return similarity(0, 1) / math.sqrt(own[0] * own[1]) if min(own) > 0 else math.nan


# Each is drawn by the function of the same name in analysis/figures.py.
FIGURES = {"states": states, "routing": routing, "time": time, "alignment": alignment}

if __name__ == "__main__":
    main()
