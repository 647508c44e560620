"""Every option of a training run: a dataclass, presets in configs/*.yaml, and the command line on top.

    python train_repa_dar.py --config digits --routing dar --alignment repa --lr 3e-4

A preset is a name in configs/ or a path to a YAML file; a value on the command line wins over it. All that the program
knows of an option stands at its field, and docs/configuration.md is made of that: `python config.py > FILE`.
"""

import dataclasses
import difflib
import functools
import hashlib
import inspect
import os
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
import yaml

PRESETS = Path(__file__).parent / "configs"

# Values of other options that make an option have no effect.
NOT_ROUTED = {"routing": ("residual", "unet")}
NOT_DAR = {"routing": ("residual", "unet", "attnres")}
NOT_ALIGNED = {"alignment": ("none",)}
NOT_EVALUATED = {"eval_every": (0,)}
NOT_SIT = {"model": ("MMDiT-B/1", "MMDiT-B/2", "MMDiT-B/4", "Qwen-Image/2")}


def option(default: Any, least=None, above=None, idle_with=None, free=False, arm=True, model=False):
    """A field of Config or DistillConfig.

    least, above: bounds of a number.
    idle_with: {option: values} that make this one have no effect.
    free: a run may go on with another value, which changes nothing but rounding in its weights.
    arm:  it says how a run learns or is judged, so runs that differ in it are different arms of a comparison.
    model: an argument of SiT.
    """
    facts = {"least": least, "above": above, "idle_with": idle_with or {}, "free": free, "arm": arm, "model": model}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class Arm:
    """What a pretraining run trains, on what. Option by option a part of `Config`."""

    # ---- run ----
    data: str = option("data/digits")
    """Folder made by `python -m dataset.prepare`."""
    autoencoder: str = option("pixels")
    """What the model is trained on: pixels, or the autoencoder (name or folder) whose latents the data folder holds."""
    decoder: str = option("", idle_with=NOT_EVALUATED)
    """Decodes the evaluation's samples; taesd is quick for a preview. Empty: the autoencoder itself."""
    mirror: bool = option(False)
    """Train on the mirrored images too; latents need `dataset.prepare --mirror`."""
    out: str = option("", free=True, arm=False)
    """Run folder. Empty: runs/PRESET/NAME, of routing, alignment, seed and what differs from the preset."""
    held_out: int = option(0, least=0)
    """Images of the data folder, spread evenly, that are not trained on; each evaluation logs their denoising loss."""
    seed: int = option(0, least=0, arm=False)
    """Decides initial weights, data order, times, noise and dropped labels, whatever the number of processes."""
    init_from: str = option("")
    """Weights to start from: ours, an exported folder or hub name, SiT's, REPA's (`ema` if there), or diffusers'."""
    new_labels: bool = option(False, idle_with=NOT_SIT | {"init_from": ("",)})
    """Start with a new label table, as other classes need, and take only the null class from `init_from`."""
    retrofit_steps: int = option(0, least=0, idle_with=NOT_ROUTED)
    """Steps in which the model goes over from residual addition to routing; for residual weights in `init_from`."""

    # ---- model ----
    model: str = option("SiT-B/2")
    """SiT-{S,B,L,XL,Plus}/PATCH, or for captions MMDiT-B/PATCH, Qwen-Image/2. --model discards the preset's sizes."""
    text_encoder: str = option("")
    """Whose tokens of the captions a model of captions reads from the data folder: name or ID. Empty: the only ones."""
    depth: int | None = option(None, least=1, model=True)
    """Blocks, instead of the named model's."""
    hidden_size: int | None = option(None, least=4, model=True)
    """Width, instead of the named model's."""
    num_heads: int | None = option(None, least=1, model=True)
    """Attention heads, instead of the named model's."""
    qk_norm: bool = option(False, idle_with=NOT_SIT, model=True)
    """Normalise queries and keys of the self-attention."""
    class_dropout_prob: float = option(0.1, least=0, model=True)
    """How often the label or caption is dropped, for classifier-free guidance. Below 1."""

    # ---- routing ----
    routing: Literal["residual", "dar", "attnres", "unet"] = option("residual", model=True)
    """Joins the sublayers: residual addition, DAR, or the baselines Attention Residuals and U-ViT's long skips."""
    query: Literal["static", "timestep", "dynamic"] = option("timestep", idle_with=NOT_DAR, model=True)
    """DAR query: w, w + e(t), or W v of the newest output."""
    chunk_size: int = option(4, least=1, idle_with=NOT_ROUTED, model=True)
    """Chunk size S of DAR and AttnRes in sublayers (two per block)."""
    chunk_summary: Literal["last", "sum"] = option("last", idle_with=NOT_DAR, model=True)
    """What stands for a chunk of DAR: its last output, as in the paper, or the sum of its outputs, as in AttnRes."""
    final_aggregator: Literal["auto", "dedicated", "shared"] = option("auto", idle_with=NOT_DAR, model=True)
    """DAR's aggregator of the head; auto is shared with alignment and dedicated without."""
    route_backend: Literal["auto", "torch", "triton", "cpu"] = option("auto", idle_with=NOT_ROUTED)
    """Kernels of DAR and AttnRes: fused Triton, fused C for a CPU, plain PyTorch, or auto: the fused one, if any."""

    # ---- alignment ----
    alignment: Literal["none", "repa"] = option("none")
    """repa: pull projected tokens towards those of a frozen encoder."""
    align_depth: tuple[int, ...] = option((4,), idle_with=NOT_ALIGNED, model=True)
    """1-based blocks after which the tokens are aligned."""
    proj_coeff: float = option(0.5, least=0, idle_with=NOT_ALIGNED)
    """Weight of the alignment loss."""
    projector: Literal["mlp", "conv"] = option("mlp", idle_with=NOT_SIT | NOT_ALIGNED, model=True)
    """Maps the model's tokens to the encoder's: REPA's three layers, or iREPA's 3 x 3 convolution."""
    projector_dim: int = option(2048, least=1, idle_with=NOT_ALIGNED | {"projector": ("conv",)}, model=True)
    """Hidden width of the mlp projectors."""
    spatial_norm: float | None = option(None, least=0, idle_with=NOT_ALIGNED)
    """iREPA: normalise each image's encoder tokens, less this share of their mean (0.6 to 0.8 in the paper)."""
    align_steps: int | None = option(None, least=1, idle_with=NOT_ALIGNED)
    """Steps after which the alignment ends, as in HASTE: projectors and encoder tokens then cost nothing."""
    encoder: tuple[str, ...] = option(("dinov2-vit-b",), idle_with=NOT_ALIGNED)
    """Frozen encoders to align with: dinov2-vit-b, timm:NAME, hf:REPO or a folder."""
    encoder_weights: tuple[str, ...] = option((), idle_with=NOT_ALIGNED)
    """Local weights of each encoder, for machines without network. Empty: downloaded."""
    encoder_features: Literal["online", "prepared"] = option("online", idle_with=NOT_ALIGNED)
    """Alignment targets: computed in every step, or read from the data folder."""

    # ---- loss ----
    path: Literal["linear", "cosine"] = option("linear")
    """Interpolant between data and noise."""
    time_sampling: Literal["uniform", "lognormal"] = option("uniform")
    """Distribution of the training times: uniform, or that of log-normal noise levels."""
    time_mean: float = option(0.0, idle_with={"time_sampling": ("uniform",)})
    """Mean of the logarithm of the noise level."""
    time_std: float = option(1.0, above=0, idle_with={"time_sampling": ("uniform",)})
    """Standard deviation of the logarithm of the noise level."""
    time_shift: float = option(1.0, above=0)
    """Moves the training times towards noise, t to s t / (1 + (s - 1) t), as in SD3; 1: none."""


@dataclass(frozen=True)
class Common:
    """The options of every training entry."""

    # ---- optimisation ----
    batch_size: int = option(256, least=1)
    """Global batch: images per step over all processes and accumulated parts."""
    micro_batch_size: int | None = option(None, least=1, free=True, arm=False)
    """Most images that one process takes at a time; values below its share accumulate gradients."""
    max_steps: int = option(400_000, least=1, free=True, arm=False)
    """Steps after which the run is complete."""
    lr: float = option(1e-4, above=0)
    """AdamW learning rate, constant."""
    betas: tuple[float, float] = option((0.9, 0.999))
    """AdamW betas."""
    weight_decay: float = option(0.0, least=0)
    """AdamW weight decay."""
    grad_clip: float = option(1.0, above=0)
    """Largest gradient norm."""
    ema_decays: tuple[float, ...] = option((0.9999,))
    """Exponential moving averages of the weights; the first one is evaluated."""
    precision: Literal["auto", "bf16", "fp32"] = option("auto")
    """Autocast; auto is bf16 on a GPU and fp32 on a CPU. Softmax over depth and alignment loss compute in float32."""
    tf32: bool = option(True)
    """TF32 for what stays float32 on a GPU."""
    compile: bool = option(False)
    """torch.compile the model."""
    checkpoint_activations: bool = option(False, free=True, arm=False)
    """Compute the insides of each sublayer again in the backward pass rather than keep them: less memory, more time."""
    shard: bool = option(False, free=True, arm=False)
    """Share out weights, gradients, moments and averages among torchrun's processes (FSDP2): for large models."""
    max_skipped_steps: int = option(20, least=1)
    """Consecutive non-finite steps that stop the run at its next log line; fewer are skipped and counted."""

    # ---- records ----
    dry_run: bool = option(False, free=True, arm=False)
    """Say what the run is and what it takes, and write nothing."""
    log_every: int = option(100, least=1, arm=False)
    """Steps between two lines of metrics.jsonl; the host waits for the device only then."""
    checkpoint_every: int = option(5_000, least=1, free=True, arm=False)
    """Steps between two writes of last.pt."""
    snapshot_every: int = option(0, least=0, free=True, arm=False)
    """Steps between checkpoints that are kept under their step; 0: none."""
    tensorboard: bool = option(True, free=True, arm=False)
    """Write TensorBoard files next to metrics.jsonl."""

    # ---- online evaluation ----
    eval_every: int = option(10_000, least=0)
    """Steps between two evaluations (grid of samples, distance to the training images); 0: none."""
    eval_encoder: tuple[str, ...] = option(("inception",), idle_with=NOT_EVALUATED)
    """Judges of the samples: inception (logs FID), or networks that no arm is aligned to (timm:NAME or a folder)."""
    eval_aligned: bool = option(False, idle_with=NOT_EVALUATED)
    """Allow a judge that runs are aligned to. Its distance is called frechet_distance_aligned, and ranks nothing."""
    inception: str = option("", idle_with=NOT_EVALUATED, arm=False)
    """Weights file of torch-fidelity's Inception v3. Empty: downloaded once."""
    fid_reference: str = option("", idle_with=NOT_EVALUATED)
    """ADM's reference npz for FID (VIRTUAL_imagenet256_labeled.npz). Empty: the training images."""
    eval_samples: int = option(5_000, least=2, idle_with=NOT_EVALUATED)
    """Samples per evaluation. The distance depends on it: compare like with like."""
    eval_batch_size: int = option(250, least=1, idle_with=NOT_EVALUATED)
    """Samples that one process draws at a time."""
    # ---- diagnosis ----
    diagnose_every: int = option(0, least=0, free=True, arm=False)
    """Steps between two diagnoses of the evaluated average (figures of analysis.diagnose, in diagnosis/); 0: none."""
    diagnose_images: int = option(256, least=20, idle_with={"diagnose_every": (0,)}, free=True, arm=False)
    """Training images that a diagnosis looks at."""

    def check(self):
        """Raise a ValueError that names the first value out of range."""
        for spec in dataclasses.fields(self):
            value, least, above = getattr(self, spec.name), spec.metadata["least"], spec.metadata["above"]
            if value is not None and least is not None:
                _require(least <= value < float("inf"), spec.name, value, f"must be at least {least}, and finite")
            if above is not None:
                _require(above < value < float("inf"), spec.name, value, f"must be above {above}, and finite")
        for fine, name, rule in (
            (all(0 <= b < 1 for b in self.betas), "betas", "must both be in [0, 1)"),
            (self.ema_decays and all(0 <= d < 1 for d in self.ema_decays), "ema_decays", "needs numbers in [0, 1)"),
            (len(set(self.ema_decays)) == len(self.ema_decays), "ema_decays", "repeats a decay"),
            (
                not (self.retrofit_steps and self.compile),
                "compile",
                "waits for the end of retrofit_steps; leave it out",
            ),
            (self.eval_encoder, "eval_encoder", "needs a judge; --eval-every 0 switches the evaluation off"),
            (
                not (self.shard and self.diagnose_every),
                "diagnose_every",
                "with shard no process has the whole model; leave it out, and give last.pt to analysis.diagnose",
            ),
        ):
            _require(fine, name, getattr(self, name), rule)


@dataclass(frozen=True)
class Config(Common, Arm):  # fields of the last base come first
    """Pretraining, by train_repa_dar.py."""

    # ---- reading and sampling ----
    num_workers: int = option(0, least=0, free=True, arm=False)
    """Reader processes per training process."""
    sampler: Literal["euler", "heun", "sde"] = option("euler", idle_with=NOT_EVALUATED)
    """ODE by Euler or Heun, or SDE by Euler-Maruyama."""
    sample_steps: int = option(50, least=2, idle_with=NOT_EVALUATED)
    """Sampler steps; heun evaluates the network twice in each but the last."""
    sample_shift: float = option(1.0, above=0, idle_with=NOT_EVALUATED)
    """The same as time_shift, for the sampler's times."""
    cfg_scale: float = option(1.0, least=0, idle_with=NOT_EVALUATED)
    """Guidance scale; 1: no guidance."""
    guidance_interval: tuple[float, float] = option((0.0, 1.0), idle_with=NOT_EVALUATED | {"cfg_scale": (1,)})
    """Times between which guidance is applied."""

    def check(self):
        super().check()
        low, high = self.guidance_interval
        for fine, name, rule in (
            (abs(self.time_mean) < float("inf"), "time_mean", "must be finite"),
            (self.class_dropout_prob < 1, "class_dropout_prob", "must be below 1"),
            (self.cfg_scale == 1 or self.class_dropout_prob > 0, "cfg_scale", "needs class_dropout_prob above 0"),
            ((self.spatial_norm or 0) <= 1, "spatial_norm", "must be in [0, 1], or None for tokens as they are"),
            (0 <= low < high <= 1, "guidance_interval", "must be 0 <= low < high <= 1"),
            (all(k >= 1 for k in self.align_depth), "align_depth", "counts blocks from 1"),
            (len(set(self.align_depth)) == len(self.align_depth), "align_depth", "names a block twice"),
            (self.alignment == "none" or self.align_depth, "align_depth", "must name a block with alignment = repa"),
            (self.encoder and len(set(self.encoder)) == len(self.encoder), "encoder", "needs different encoders"),
            (
                len(self.encoder_weights) in (0, len(self.encoder)),
                "encoder_weights",
                f"give one file for each of the {len(self.encoder)} encoders, or none",
            ),
        ):
            _require(fine, name, getattr(self, name), rule)

    def model_arguments(self) -> dict:
        """The arguments of the model that are options, without those left to the named one."""
        unread = idle(asdict(self))
        values = {name: getattr(self, name) for name in MODEL_ARGUMENTS if name not in unread}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DistillConfig(Common):
    """Distillation, by distill.py."""

    # ---- distillation ----
    teacher: str = option("")
    """To distil: our checkpoint (its first average), an exported folder or hub name, SiT's, REPA's, or diffusers'."""
    model: str = option("")
    """Name of a released teacher (SiT-XL/2). Empty: the one of our checkpoint."""
    autoencoder: str = option("")
    """What a released teacher was trained on: an autoencoder, or pixels. Empty: what our checkpoint says."""
    data: str = option("")
    """Prepared folder with labels or captions, and images for the evaluation. Empty: the teacher's own."""
    text_encoder: str = option("")
    """Whose tokens of the captions a released teacher reads, as in training."""
    out: str = option("", free=True, arm=False)
    """Run folder; must be given."""
    seed: int = option(0, least=0, arm=False)
    """Decides labels, times, noise and step counts, whatever the number of processes."""
    student_steps: Literal[1, 2, 4] = option(4)
    """Network evaluations K that the student makes for an image."""
    time_shift: float = option(1.0, above=0)
    """Moves the student's equally spaced times towards noise, t to s t / (1 + (s - 1) t); 1: none."""
    routing: Literal["", "residual", "dar", "attnres", "unet"] = option("")
    """Of the student, as are the next four. Empty: the teacher's."""
    query: Literal["", "static", "timestep", "dynamic"] = option("")
    """DAR query. Empty: the teacher's."""
    chunk_size: int | None = option(None, least=1)
    """Chunk size of DAR and AttnRes. None: the teacher's."""
    chunk_summary: Literal["", "last", "sum"] = option("")
    """What stands for a chunk of DAR. Empty: as in the teacher."""
    route_backend: Literal["auto", "torch", "triton", "cpu"] = option("auto")
    """Kernels of DAR and AttnRes, as in training."""
    retrofit_steps: int = option(0, least=0)
    """Steps in which routing fades into the weights of a residual teacher."""
    cfg_scale: float = option(1.0, least=0)
    """Guidance scale of the teacher, whose guided samples the student then imitates; 1: no guidance."""
    critic_steps: int = option(5, least=1)
    """Updates of the critic before each one of the student."""
    critic_rank: int | None = option(None, least=1)
    """Train the critic as a LoRA of this rank on the teacher's blocks. None: as a copy of the teacher, whole."""
    student_rank: int | None = option(None, least=1)
    """The same for the student, with routers or skips. Its checkpoint holds no more, and needs the teacher's."""
    gan_weight: float = option(0.0, least=0)
    """Weight of a GAN between student and critic, which reads the images of `data`; 0: none."""
    critic_lr: float = option(1e-5, above=0)
    """AdamW learning rate of the critic, constant."""
    lr: float = option(1e-5, above=0)
    """AdamW learning rate of the student, constant."""
    betas: tuple[float, float] = option((0.0, 0.999))
    """AdamW betas of both."""

    def check(self):
        super().check()
        _require(self.teacher, "teacher", self.teacher, "give the checkpoint to distil")
        _require(self.out, "out", self.out, "give a folder for the run")


FIELDS = {spec.name: spec for spec in dataclasses.fields(Config)}
DEFAULTS = asdict(Config())
NOT_THE_ARM = {name for name, spec in FIELDS.items() if not spec.metadata["arm"]}
MODEL_ARGUMENTS = [name for name, spec in FIELDS.items() if spec.metadata["model"]]


def _require(condition, name, value, rule):
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


# ---- reading ----


def parse(argv: list[str] | None = None) -> Config:
    """The configuration of a command line (default: the process's own). Exits on a bad option."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, name = resolve(argv), split_preset(argv)[0]
        usual = read_preset(name).batch_size
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from None
    unread = sorted(given(argv) & idle(asdict(config)))
    if os.environ.get("RANK", "0") == "0":
        if config.batch_size != usual:
            print(
                f"note: batch_size = {config.batch_size}, where {name} has {usual}, for which its learning rate and "
                "steps were chosen",
                file=sys.stderr,
            )
        for key in unread:
            idle_with = FIELDS[key].metadata["idle_with"].items()
            causes = [f"{switch} = {value}" for switch, off in idle_with if (value := getattr(config, switch)) in off]
            print(f"note: {key} has no effect with {', '.join(causes)}", file=sys.stderr)
    return config


def parse_distillation(argv: list[str] | None = None) -> DistillConfig:
    """The same for distill.py, which has no preset unless one is given."""
    name, words = split_preset(sys.argv[1:] if argv is None else argv, "")
    try:
        preset = read_preset(name, DistillConfig) if name else DistillConfig()
        return read_words(words, preset, "distill.py")
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from None


def resolve(argv: list[str]) -> Config:
    """The configuration of a command line, with the run folder derived where none is given.

    Raises ValueError on an unknown option and on a value out of range; tyro itself exits on what it cannot read.
    """
    name, words = split_preset(argv)
    preset = read_preset(name)
    sizes = {"depth": None, "hidden_size": None, "num_heads": None} if "model" in given(words) else {}
    config = read_words(words, dataclasses.replace(preset, **sizes), "train_repa_dar.py")
    if config.out:
        return config
    unsaid = NOT_THE_ARM | idle(asdict(config)) | {"routing", "alignment"}
    changed = {key: value for key, value in asdict(config).items() if value != getattr(preset, key)}
    changed = {key: value for key, value in changed.items() if key not in unsaid}
    folder = folder_name({"": f"{config.routing}-{config.alignment}", **changed})
    return dataclasses.replace(config, out=str(Path("runs") / Path(name).stem / f"{folder}-seed{config.seed}"))


def read_words(words: list[str], default: Common, prog: str) -> Common:
    """The checked configuration of a command line, of the class of its defaults."""
    for word in words:
        if word.startswith("--") and not word.startswith(("--help", "--tyro")):
            _check_key(word[2:].partition("=")[0].replace("-", "_"), type(default), f"unknown option {word}")
    config = _parse(_switched_on(words, default), default, prog)
    config.check()
    return config


def given(words: list[str]) -> set:
    """The options that a command line names."""
    return {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def split_preset(argv: list[str], name: str = "digits") -> tuple[str, list[str]]:
    """The value of --config, or else `name`, and the other words."""
    words, rest = [], iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--config":
            name = value if equals else next(rest, "")
        else:
            words.append(word)
    return name, words


@functools.cache  # a sweep reads one for each of its runs
def read_preset(name: str, kind: type = Config) -> Common:
    """The options of a preset, or of a YAML file. They become words for the parser, which thus judges both."""
    folder = PRESETS / "distill" if kind is DistillConfig else PRESETS
    path = folder / f"{name}.yaml" if (folder / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(f"--config {name!r} is neither a preset ({', '.join(known)}) nor a YAML file")
    words = []
    for key, value in load_saved(path).items():
        _check_key(str(key), kind, f"{path}: unknown key {key!r}")
        usual = getattr(kind, key)
        several = isinstance(usual, tuple)
        if isinstance(value, dict) or isinstance(value, list) and not several:
            raise ValueError(f"{path}: {key} = {value!r}: must be {'a list' if several else 'one value'}")
        if isinstance(usual, str) and not isinstance(value, str):
            raise ValueError(f"{path}: {key} = {value!r}: must be text in quotes, '' for none")
        option = f"--{key.replace('_', '-')}"
        words += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return _parse(words, kind(), str(path))


def _switched_on(words, default):
    """A switch without a value, such as --dry-run, as `--dry-run=True`."""

    def bare(word, after):
        switch = isinstance(getattr(default, word[2:].replace("-", "_"), None), bool)
        return word.startswith("--") and switch and after[:2] in ("", "--")

    return [f"{word}=True" if bare(word, after) else word for word, after in zip(words, [*words[1:], ""])]


def _parse(words, default, prog):
    preset = "configs/NAME.yaml (default: digits)" if isinstance(default, Config) else "configs/distill/NAME.yaml"
    description = f"--config NAME takes the preset {preset}, or a YAML file by its path."
    return tyro.cli(
        type(default),
        args=words,
        default=default,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )


def _check_key(key, kind, problem):
    known = [spec.name for spec in dataclasses.fields(kind)]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
        raise ValueError(f"{problem}; the nearest valid one is {near!r} (--{near.replace('_', '-')})")


# ---- comparing and saving ----


def idle(settings: dict) -> set:
    """The options that nothing reads with these settings."""
    settings = DEFAULTS | settings

    def unread(name):
        switches = FIELDS[name].metadata["idle_with"].items()
        return any(settings[switch] in values and not unread(switch) for switch, values in switches)

    return {name for name in FIELDS if unread(name)}


def retrofit_gamma(settings: dict, step: int) -> float:
    """How far routing has faded in after so many steps of a run with these options: 0 to 1 (`SiT.gamma`)."""
    steps = settings.get("retrofit_steps", 0)
    return min(1.0, step / steps) if steps else 1.0


def differences(wanted: dict, saved: dict, kind: type = Config) -> list[str]:
    """Lines 'key: saved -> wanted': the changed options that forbid resuming a run with settings `saved`."""
    known = {spec.name: spec.default for spec in dataclasses.fields(kind)}  # an option added since the run
    free = {spec.name for spec in dataclasses.fields(kind) if spec.metadata["free"]}
    saved = {key: known[key] for key in wanted.keys() & known.keys()} | saved
    new, old = plain(wanted), plain(saved)
    return [
        f"{key}: {saved.get(key)!r} -> {wanted.get(key)!r}"
        for key in sorted(new.keys() | old.keys())
        if key not in free and new.get(key) != old.get(key)
    ]


def folder_name(settings: dict) -> str:
    """A folder name "key=value,key=value", unique to these settings.

    A hash is added where the name is too long, ambiguous, or has characters that a folder name cannot hold.
    """
    words = {key: value if isinstance(value, tuple | list) else [value] for key, value in settings.items()}
    name = ",".join(f"{key}={'+'.join(map(str, each))}".removeprefix("=") for key, each in words.items())
    held = re.sub(r"[^\w.,=+-]", "-", name, flags=re.ASCII)
    ambiguous = any(mark in str(word) for each in words.values() for word in each for mark in "+,")
    if held == name and len(name) <= 160 and not ambiguous:
        return name
    return f"{held[:140]}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"


def plain(settings: dict) -> dict:
    """Options as YAML and JSON hold them, with lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def save(config: Common, path: Path):
    """Write the resolved configuration as YAML that `--config` accepts."""
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(yaml.safe_dump(plain(asdict(config)), sort_keys=False))
    os.replace(unfinished, path)


def load_saved(path: Path) -> dict:
    """What `save` wrote there; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of the form `key: value`")
    return values


# ---- documenting ----


def document() -> str:
    """docs/configuration.md: the options as tables, one for each part of the classes."""
    lines = ["# Configuration", "", "Made by `python config.py > docs/configuration.md`."]
    for part in "".join(map(inspect.getsource, (Arm, Common, Config, DistillConfig))).split("    # ---- ")[1:]:
        heading = part.partition(" ----")[0].capitalize()
        fields = DistillConfig.__dataclass_fields__ if heading == "Distillation" else FIELDS
        lines += ["", f"## {heading}", "", "| option | default | meaning |", "| --- | --- | --- |"]
        for name, kind, meaning in re.findall(r'^    (\w+): (.+?) = option\(.*\n    """(.+)"""$', part, re.MULTILINE):
            facts = fields[name].metadata
            if kind.startswith("Literal"):
                meaning = " | ".join(str(value) or "''" for value in get_args(fields[name].type)) + f". {meaning}"
            meaning += "" if facts["least"] is None else f" At least {facts['least']}."
            meaning += "" if facts["above"] is None else f" Above {facts['above']}."
            off = [
                f"`{key} = {' or '.join(str(value) or repr(value) for value in values)}`"
                for key, values in facts["idle_with"].items()
            ]
            meaning += f" No effect with {' or '.join(off)}." if off else ""
            meaning = meaning.replace("|", "\\|")
            lines.append(f"| `{name}` | `{fields[name].default!r}` | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(document())
