"""Every option of a training run: a dataclass, presets in configs/*.yaml, and the command line on top.

    python train_repa_dar.py --config digits --routing dar --alignment repa --lr 3e-4

A preset is a name in configs/ or a path to a YAML file; a value on the command line wins over it.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
import yaml

PRESETS = Path(__file__).parent / "configs"
# A run may be continued with other values of these: they change nothing but rounding in its weights.
FREE_TO_CHANGE = {
    "out",
    "max_steps",
    "micro_batch_size",
    "num_workers",
    "checkpoint_every",
    "snapshot_every",
    "tensorboard",
    "dry_run",
    "checkpoint_activations",
    "diagnose_every",
    "diagnose_images",
}


def _one_of(*values):
    return lambda value: value in values


def _none_of(*values):
    return lambda value: value not in values


# What is read only where other options have certain values.
_DAR, _ROUTED, _ALIGNED = (
    {"routing": _one_of("dar")},
    {"routing": _one_of("dar", "attnres")},
    {"alignment": _one_of("repa")},
)
_EVALUATED = {"eval_every": _none_of(0)}
READ_ONLY_WITH = {
    "query": _DAR,
    "final_aggregator": _DAR,
    "chunk_size": _ROUTED,
    "route_backend": _ROUTED,
    "align_depth": _ALIGNED,
    "proj_coeff": _ALIGNED,
    "spatial_norm": _ALIGNED,
    "align_steps": _ALIGNED,
    "projector": _ALIGNED,
    "projector_dim": {**_ALIGNED, "projector": _one_of("mlp")},
    "encoder_features": _ALIGNED,
    **dict.fromkeys(
        ("eval_metric", "eval_samples", "eval_batch_size", "sampler", "sample_steps", "cfg_scale"), _EVALUATED
    ),
    "guidance_interval": {**_EVALUATED, "cfg_scale": _none_of(1)},
    **dict.fromkeys(("inception", "fid_reference"), {**_EVALUATED, "eval_metric": _one_of("fid")}),
    "diagnose_images": {"diagnose_every": _none_of(0)},
}


@dataclass(frozen=True)
class Config:
    # ---- run ----
    data: str = "data/digits"
    """Folder made by `python -m dataset.prepare`."""
    autoencoder: str = "pixels"
    """What is trained on: pixels, or the autoencoder whose latents the data folder holds (its name or folder)."""
    decoder: str = ""
    """Decodes the evaluation's samples; taesd is quick for a preview. Empty: the autoencoder itself."""
    mirror: bool = False
    """Train on the mirrored images too; latents need `dataset.prepare --mirror`."""
    out: str = ""
    """Run folder. Empty: runs/{data}/{routing}-{alignment}-seed{seed}. The same command again resumes it."""
    seed: int = 0
    """Decides initial weights, data order, times, noise and dropped labels, whatever the number of processes."""
    init_from: str = ""
    """Weights to start from: ours, SiT's or REPA's (`ema` is taken where the file has it)."""

    # ---- model ----
    model: str = "SiT-B/2"
    """SiT-{S,B,L,XL,Plus}/{2,4,8}: depth, width, heads, patch size. Given by hand it undoes a preset's own sizes."""
    depth: int | None = None
    """Blocks, instead of the named model's."""
    hidden_size: int | None = None
    """Width, instead of the named model's."""
    num_heads: int | None = None
    """Attention heads, instead of the named model's."""
    qk_norm: bool = False
    """Normalise queries and keys of the self-attention."""
    class_dropout_prob: float = 0.1
    """How often the label is dropped, for classifier-free guidance."""

    # ---- routing ----
    routing: Literal["residual", "dar", "attnres", "unet"] = "residual"
    """Joins the sublayers: residual addition, DAR, or as baselines Attention Residuals and U-ViT's long skips."""
    query: Literal["static", "timestep", "dynamic"] = "timestep"
    """DAR query: w, w + e(t), or W v of the newest output."""
    chunk_size: int = 4
    """DAR and AttnRes chunk size S in sublayers (two per block)."""
    final_aggregator: Literal["auto", "dedicated", "shared"] = "auto"
    """DAR state of the head; auto is shared with alignment and dedicated without."""
    route_backend: Literal["auto", "torch", "triton"] = "auto"
    """DAR and AttnRes kernels: fused Triton, plain PyTorch, or auto, which is Triton on a GPU."""

    # ---- alignment ----
    alignment: Literal["none", "repa"] = "none"
    """repa: pull projected tokens towards those of a frozen encoder."""
    align_depth: tuple[int, ...] = (4,)
    """1-based blocks after which the tokens are aligned."""
    proj_coeff: float = 0.5
    """Weight of the alignment loss."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Maps the model's tokens to the encoder's: REPA's three layers, or iREPA's one 3 x 3 convolution."""
    projector_dim: int = 2048
    """Hidden width of the mlp projectors."""
    spatial_norm: float | None = None
    """iREPA: normalise each image's encoder tokens, less this share of their mean (0.6 to 0.8 in the paper)."""
    align_steps: int | None = None
    """Steps after which the alignment ends, as in HASTE: projectors and encoder tokens then cost nothing."""
    encoder: tuple[str, ...] = ("dinov2-vit-b",)
    """Frozen encoders to align with, the first also for evaluation: dinov2-vit-b, timm:NAME, hf:REPO or a folder."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of each encoder, for machines without network. Empty: downloaded."""
    encoder_features: Literal["online", "prepared"] = "online"
    """Alignment targets: computed in every step, or read from the data folder."""

    # ---- loss ----
    path: Literal["linear", "cosine"] = "linear"
    """Interpolant between data and noise."""
    time_sampling: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the training times."""

    # ---- optimisation ----
    batch_size: int = 256
    """Global batch: images per step over all processes and accumulated parts."""
    micro_batch_size: int | None = None
    """Most images that one process takes at a time; values below its share accumulate gradients."""
    max_steps: int = 400_000
    """Steps after which the run is complete."""
    lr: float = 1e-4
    """AdamW learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Exponential moving averages of the weights; the first one is evaluated."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast; auto is bf16 on a GPU and fp32 on a CPU. Routing and alignment are float32 in either."""
    tf32: bool = True
    """TF32 for what stays float32 on a GPU."""
    compile: bool = False
    """torch.compile the model."""
    checkpoint_activations: bool = False
    """Compute the insides of each sublayer again in the backward pass rather than keep them: less memory, more time."""
    num_workers: int = 0
    """Reader processes per training process."""
    max_skipped_steps: int = 20
    """Consecutive non-finite steps that stop the run at its next log line; fewer are skipped and counted."""

    # ---- records ----
    dry_run: bool = False
    """Say what the run would be and what it would take, and write nothing."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl; the host waits for the device only then."""
    checkpoint_every: int = 5_000
    """Steps between two writes of last.pt."""
    snapshot_every: int = 0
    """Steps between checkpoints that are kept under their step; 0: none."""
    tensorboard: bool = True
    """Write TensorBoard files next to metrics.jsonl."""

    # ---- online evaluation ----
    eval_every: int = 10_000
    """Steps between two evaluations (grid, Fréchet distance in the encoder's space); 0: none."""
    eval_metric: Literal["encoder", "fid"] = "encoder"
    """fid: log FID too, of the same samples, and of their first 5 000 and 10 000 where there are more."""
    inception: str = ""
    """Weights file of torch-fidelity's Inception v3, for FID. Empty: downloaded once."""
    fid_reference: str = ""
    """ADM's reference npz for FID (VIRTUAL_imagenet256_labeled.npz). Empty: the training images."""
    eval_samples: int = 5_000
    """Samples per evaluation. The distance depends on it: compare like with like."""
    eval_batch_size: int = 250
    """Samples that one process draws at a time."""
    sampler: Literal["euler", "heun", "sde"] = "euler"
    """ODE by Euler or Heun, or SDE by Euler-Maruyama."""
    sample_steps: int = 50
    """Sampler steps; heun costs two network evaluations in each but the last."""
    cfg_scale: float = 1.0
    """Guidance scale; 1: none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is applied."""

    # ---- diagnosis ----
    diagnose_every: int = 0
    """Steps between two diagnoses of the evaluated average (figures of analysis.diagnose, in diagnosis/); 0: none."""
    diagnose_images: int = 256
    """Training images that a diagnosis looks at."""

    def check(self):
        """Raise a ValueError that names the first value out of range."""
        at_least = {
            "seed": 0,
            "depth": 1,
            "hidden_size": 4,
            "num_heads": 1,
            "chunk_size": 1,
            "projector_dim": 1,
            "align_steps": 1,
            "batch_size": 1,
            "micro_batch_size": 1,
            "max_steps": 1,
            "num_workers": 0,
            "max_skipped_steps": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "snapshot_every": 0,
            "eval_every": 0,
            "eval_samples": 2,
            "eval_batch_size": 1,
            "sample_steps": 2,
            "diagnose_every": 0,
            "diagnose_images": 20,
            "proj_coeff": 0,
            "weight_decay": 0,
            "cfg_scale": 0,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            _require(value is None or low <= value < float("inf"), name, value, f"must be at least {low}, and finite")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), name, value, "must be above 0, and finite")
        _require(0 <= self.class_dropout_prob < 1, "class_dropout_prob", self.class_dropout_prob, "must be in [0, 1)")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must both be in [0, 1)")
        _require(
            self.ema_decays and all(0 <= d < 1 for d in self.ema_decays),
            "ema_decays",
            self.ema_decays,
            "needs at least one number, each in [0, 1)",
        )
        _require(len(set(self.ema_decays)) == len(self.ema_decays), "ema_decays", self.ema_decays, "repeats a decay")
        _require(
            self.cfg_scale == 1 or self.class_dropout_prob > 0,
            "cfg_scale",
            self.cfg_scale,
            "guidance needs a null class that was trained, so class_dropout_prob above 0",
        )
        _require(
            self.spatial_norm is None or 0 <= self.spatial_norm <= 1,
            "spatial_norm",
            self.spatial_norm,
            "must be in [0, 1], or None for tokens as they are",
        )
        low, high = self.guidance_interval
        _require(0 <= low < high <= 1, "guidance_interval", self.guidance_interval, "must be 0 <= low < high <= 1")
        _require(
            len(set(self.align_depth)) == len(self.align_depth) and all(k >= 1 for k in self.align_depth),
            "align_depth",
            self.align_depth,
            "must name different blocks, counted from 1",
        )
        _require(
            self.alignment == "none" or self.align_depth,
            "align_depth",
            self.align_depth,
            "must name a block when alignment = 'repa'",
        )
        _require(
            self.encoder and len(set(self.encoder)) == len(self.encoder),
            "encoder",
            self.encoder,
            "must name at least one encoder, each of them once",
        )
        _require(
            len(self.encoder_weights) in (0, len(self.encoder)),
            "encoder_weights",
            self.encoder_weights,
            f"give one file for each of the {len(self.encoder)} encoders, or none",
        )

    def run_folder(self):
        name = f"{self.routing}-{self.alignment}-seed{self.seed}"
        return Path(self.out) if self.out else Path("runs") / Path(self.data).name / name


def _require(condition, name, value, rule):
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


def parse(argv=None):
    """The configuration of a command line (default: the process's own). Prints and exits with 2 on a bad option."""
    try:
        config, preset, name = resolve(argv)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from None
    words = sys.argv[1:] if argv is None else argv
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    unread = sorted(given & idle(dataclasses.asdict(config)))
    if os.environ.get("RANK", "0") == "0":
        if config.batch_size != preset.batch_size:
            print(
                f"note: batch_size = {config.batch_size}, where {name} has {preset.batch_size}, for which "
                f"its learning rate and steps were chosen",
                file=sys.stderr,
            )
        if unread:
            switches = dict.fromkeys(switch for option in unread for switch in READ_ONLY_WITH[option])
            print(
                f"note: {', '.join(unread)} {'is' if len(unread) == 1 else 'are'} not read with "
                + ", ".join(f"{switch} = {getattr(config, switch)}" for switch in switches),
                file=sys.stderr,
            )
    return config


def resolve(argv=None):
    """The configuration of a command line, that of its preset alone, and the preset's name.

    Raises ValueError on an unknown option and on a value out of range; tyro itself exits on what it cannot read.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", default="digits")
    chosen, overrides = files.parse_known_args(argv)
    overrides = _switched_on(overrides)
    options = [
        word.partition("=")[0]
        for word in overrides
        if word.startswith("--") and not word.startswith(("--help", "--tyro"))
    ]
    for option in options:
        _check_key(option[2:].replace("-", "_"), f"unknown option {option}")
    preset = _parse(_preset_arguments(chosen.config), Config(), prog=chosen.config)
    if "--model" in options:
        preset = dataclasses.replace(preset, depth=None, hidden_size=None, num_heads=None)
    config = _parse(overrides, preset, prog="train_repa_dar.py")
    config.check()
    return config, preset, chosen.config


def _switched_on(words):
    """A switch without a value, such as --dry-run, as `--dry-run=True`."""
    switches = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config) if field.type is bool}
    return [
        f"{word}=True" if word.replace("_", "-") in switches and following[:2] in ("", "--") else word
        for word, following in zip(words, [*words[1:], ""])
    ]


def _parse(arguments, default, prog):
    description = "--config NAME takes the preset configs/NAME.yaml, or a YAML file by its path (default: digits)."
    return tyro.cli(
        Config,
        args=arguments,
        default=default,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )


def _preset_arguments(name):
    """A YAML file as command-line arguments, so that files and the command line are checked by one parser."""
    path = PRESETS / f"{name}.yaml" if (PRESETS / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        raise ValueError(f"--config {name!r} is neither a preset ({', '.join(known)}) nor a YAML file")
    values = _read_yaml(path)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    arguments = []
    for key, value in values.items():
        _check_key(str(key), f"{path}: unknown key {key!r}")
        several = isinstance(defaults[key], tuple)
        if isinstance(value, dict) or isinstance(value, list) and not several:
            raise ValueError(f"{path}: {key} = {value!r}: must be {'a list' if several else 'one value'}")
        if isinstance(defaults[key], str) and not isinstance(value, str):
            raise ValueError(f"{path}: {key} = {value!r}: must be text in quotes, '' for none")
        option = f"--{key.replace('_', '-')}"
        arguments += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return arguments


def _read_yaml(path):
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of the form `key: value`")
    return values


def _check_key(key, problem):
    names = [field.name for field in dataclasses.fields(Config)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0)[0]
        raise ValueError(f"{problem}; the nearest valid one is {near!r} (--{near.replace('_', '-')})")


def plain(settings):
    """A dict of options as YAML and JSON hold them, with lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def save(config, path):
    """Write the resolved configuration as YAML that `--config` accepts."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False))
    os.replace(unfinished, path)


def load_saved(path):
    """What `save` wrote there, as a dict; {} where there is no such file."""
    return _read_yaml(path) if path.is_file() else {}


def idle(settings):
    """The options that nothing reads with these settings (a dict)."""
    settings = {**dataclasses.asdict(Config()), **settings}
    return {
        option
        for option, needed in READ_ONLY_WITH.items()
        if not all(suits(settings[switch]) for switch, suits in needed.items())
    }


def differences(wanted, saved):
    """Lines 'key: saved -> wanted' for what keeps a run with settings `saved` from going on with `wanted` (dicts).

    An option that is younger than the run had, in effect, its default.
    """
    defaults = dataclasses.asdict(Config())
    saved = {**{key: defaults[key] for key in wanted.keys() & defaults.keys()}, **saved}
    new, old = plain(wanted), plain(saved)
    return [
        f"{key}: {saved.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted(wanted.keys() | saved.keys())
        if key not in FREE_TO_CHANGE and new.get(key) != old.get(key)
    ]
