"""Writes a trained model as a folder to share: weights as safetensors, what they are, and a model card.

    python -m eval.export runs/imagenet256_xl/dar-repa-seed0/last.pt --out sit-xl-dar-repa
    hf upload OWNER/NAME sit-xl-dar-repa
    python -m eval.sample OWNER/NAME --preset repa-sde-250

Whatever takes a checkpoint takes such a folder, or its name on the hub; it holds nothing that could be executed. OUT is

    model.safetensors   one average of the weights
    config.json         architecture, step, options of the run; of paths that begin with / . or ~ the last part alone
    README.md           the model card: to be completed, with a licence for one

An autoencoder that is a folder, such as those of `dataset.prepare --statistics`, has to be shared beside it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import tyro
import yaml

from config import Config, DistillConfig, plain
from eval.sample import content_of
from models.registry import takes_text
from runtime import parsed, plain_errors, read_json, replaced, table, write_json
from weights import FORMAT, load_trained

NO_METRICS = {"step", "images", "epoch", "seconds", "evaluation_seconds"}  # in a line of metrics.jsonl
CARD = """---
library_name: pytorch
tags: [diffusion, sit, {routing}]
---

# {name}

{model} with {routing} routing, {told} of `{data}`, step {step}, moving average {average}; made for the
autoencoder `{autoencoder}`. {origin}

    python -m eval.sample OWNER/{name}

## What differs from the default options

```yaml
{settings}```

## Metrics

{metrics}
"""


@dataclass(frozen=True)
class Options:
    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Ours (last.pt)."""
    out: Path
    """Folder to write; must be new, or empty."""
    average: str = ""
    """Which moving average, by its decay, or `none` for the weights themselves; the first if not given."""
    metrics: tuple[Path, ...] = ()
    """Reports of eval.metrics on samples of this average, to put into the card beside the run's own evaluation."""


def main(argv: list | None = None):
    options = tyro.cli(Options, args=argv, prog="python -m eval.export", description=__doc__)
    with plain_errors(ValueError, OSError):
        export(options)
    print(f"written: {options.out}. To share it: hf upload OWNER/{options.out.resolve().name} {options.out}")


def export(options: Options):
    """Write the folder. Raises ValueError where the checkpoint is not ours, or the folder is not empty."""
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out = {str(out)!r} is not an empty folder; give another one")
    model, trained = load_trained(options.checkpoint, options.average)  # refuses what is not ours: it has no name
    content = content_of(model, trained)
    metrics = "".join(reported(path, content) for path in options.metrics)
    if trained["average"] == str(trained["ema_decays"][0]):  # which is evaluated in training
        metrics = while_training(options.checkpoint.parent, trained["step"]) + metrics
    apart, own = ("step", "average", "arguments"), ("out", "decoder")  # which make no difference to another user
    config = {key: shareable(value) for key, value in trained.items() if key not in (*apart, *own)}
    known = {key: trained[key] for key in apart}
    out.mkdir(parents=True, exist_ok=True)
    with replaced(out / "model.safetensors") as file:
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    write_json(out / "config.json", {"format": FORMAT, **known, "config": config})
    defaults = plain(asdict((DistillConfig if "teacher" in config else Config)()))
    changed = {key: config[key] for key, value in defaults.items() if key in config and config[key] != value}
    card = CARD.format(
        name=out.resolve().name,
        model=config["model"],
        routing=model.routing,
        told="captions" if takes_text(config["model"]) else f"{model.num_classes} classes",
        data=config["data"],
        autoencoder=config["autoencoder"],
        step=known["step"],
        average=known["average"],
        origin=origin_of(options.checkpoint.parent),
        settings=yaml.safe_dump(changed, sort_keys=False),
        metrics=metrics or "None.",
    )
    with replaced(out / "README.md") as file:
        file.write(card.encode())


def shareable(value):
    """An option without the folders of this machine."""
    if isinstance(value, list | tuple):
        return [shareable(each) for each in value]
    local = isinstance(value, str) and value.startswith(("/", ".", "~"))
    return Path(value).name if local else value


def records(path: Path, key: str = "step") -> list[dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for line in lines if (record := parsed(line, key))]


def origin_of(folder: Path) -> str:
    """Where the run was last started, as a sentence, if it is known."""
    for last in records(folder / "environment.jsonl", "from_step")[-1:]:
        facts = [f"{key} {last[key]}" for key in ("processes", "gpu", "cpu", "torch", "commit") if last.get(key)]
        return f"Trained on: {', '.join(facts)}."
    return ""


def while_training(folder: Path, step: int) -> str:
    """The run's last evaluation up to a step."""
    lines = [
        line for line in records(folder / "metrics.jsonl") if "evaluation_seconds" in line and line["step"] <= step
    ]
    return "".join(figures(line, f"While training, at step {line['step']}:") for line in lines[-1:])


def reported(path: Path, content: str) -> str:
    """What eval.metrics wrote of samples of this model. Raises ValueError where they are of another one."""
    report = read_json(path)
    settings = (report.get("samples") or {}).get("settings") or {}
    if settings.get("weights") != content:
        raise ValueError(
            f"metrics = {str(path)!r} is not a report of eval.metrics on samples of this checkpoint and average"
        )
    unsaid = ("weights", "autoencoder", "prompts")
    protocol = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in unsaid)
    against = shareable(report["reference"]["path"])
    return figures(report["metrics"], f"Against {against}, with {protocol}:") + "".join(
        f"Warning: {warning}\n" for warning in report["warnings"]
    )


def figures(metrics: dict, heading: str) -> str:
    rows = [[name, f"{value:.5g}"] for name, value in metrics.items() if name not in NO_METRICS]
    return f"{heading}\n\n{table(['metric', 'value'], rows)}\n"


if __name__ == "__main__":
    main()
