"""Averaged weights, and the folder of a run: its lock, settings, checkpoints, log and resuming."""

import copy
import functools
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import config as configuration
from runtime import MetricsLog, Ranks, environment, lock_folder, replaced
from weights import FORMAT, is_ours, load_file


class EMA:
    """Exponential moving averages of the weights, one frozen copy of the model per decay; the first is evaluated.

    Frozen weights are shared with the model. Otherwise each average of a LoRA would hold its backbone again.
    """

    def __init__(self, model: nn.Module, decays: tuple):
        self.model, self.trained = model, {name for name, weight in model.named_parameters() if weight.requires_grad}
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self.models = {decay: copy.deepcopy(model, dict(frozen)).eval() for decay in decays}
        self.first = next(iter(self.models.values()))
        for average in self.models.values():
            average.requires_grad_(False)

    # Listed once: walking through the modules takes longer than averaging a small model. And not before the first step:
    # sharding replaces the parameters.
    @functools.cached_property
    def weights(self) -> list:
        return self._trained(self.model)

    @functools.cached_property
    def averages(self) -> dict:
        return {decay: self._trained(average) for decay, average in self.models.items()}

    def _trained(self, model):
        return [weight for name, weight in model.named_parameters() if name in self.trained]

    @torch.no_grad()
    def update(self):
        """One step of every average; after a skipped optimiser step, towards weights that have not changed."""
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, self.weights, 1 - decay)

    def state_dict(self) -> dict:
        return {str(decay): model.state_dict() for decay, model in self.models.items()}

    def load_state_dict(self, state: dict):
        for decay, model in self.models.items():
            model.load_state_dict(state[str(decay)])


# ---- the folder of a run ----


class RunFolder:
    """One run on disk: its lock, its settings, its checkpoints and its log.

    parts:    what has state, by name: {"model": ..., "emas": ..., "optimizer": ..., ...}, each with `state_dict` and
              `load_state_dict`.
    progress: plain numbers that say where the run stands, among them `step`, `seconds` and `evaluation_due`.
    Raises ValueError where the folder is in use, or holds something else than this run.
    """

    def __init__(self, config, ranks: Ranks):
        self.config, self.ranks, self.path = config, ranks, Path(config.out)
        self.last = self.path / "last.pt"
        self.lock = lock_folder(self.path) if ranks.main else None

    def resume(self, contents: dict, parts: dict, progress: dict):
        """Load `parts` and update `progress` where the folder holds a checkpoint; then open the log.

        contents: what else decides the run beside its options, such as the fingerprint of its data.
        All processes must have the same settings, contents and checkpoint; else all raise ValueError.
        """
        self.identity = {**configuration.plain(asdict(self.config)), **contents}
        checkpoint = self._found()
        facts = {"the step to resume at": checkpoint and checkpoint["step"]}
        facts["the checkpoint's seconds of training"] = checkpoint and checkpoint["seconds"]
        facts |= {key: value for key, value in self.identity.items() if key not in ("out", "num_workers")}
        self.ranks.agree(
            facts,
            "give all machines the same command, data and --out, which must be on a shared disk "
            "(or be copied to all) when a run is resumed",
        )
        if checkpoint:
            for name, part in parts.items():
                part.load_state_dict(in_parts(checkpoint[name], part))
            progress.update({key: checkpoint[key] for key in progress})
        self.ranks.barrier()  # nobody writes before all have read

        def kept(record):
            repeated = progress["evaluation_due"] and "evaluation_seconds" in record
            last = progress["step"] - 1 if repeated else progress["step"]
            return checkpoint is not None and record["step"] <= last

        owing = any(value for key, value in progress.items() if key.endswith("_due"))
        if self.ranks.main and (progress["step"] < self.config.max_steps or owing):
            configuration.save(self.config, self.path / "config.yaml")
            with open(self.path / "environment.jsonl", "a") as file:
                file.write(json.dumps({"from_step": progress["step"], **environment(self.ranks)}) + "\n")
        self.log = MetricsLog(self.path, kept, progress["step"], self.config.tensorboard, self.ranks)

    def _found(self):
        """The checkpoint in the folder, or None. Raises ValueError where another run is there."""
        elsewhere = "give another --out, or the settings it was made with"
        if self.last.is_file():
            checkpoint = load_file(self.last, mmap=True)  # XL on 8 processes would be 86 GB of host memory
            if not is_ours(checkpoint):
                raise ValueError(
                    f"{self.last} is no checkpoint of this version of the trainer; give another --out, "
                    f"and --init-from {self.last} to start from its weights"
                )
            changed = configuration.differences(self.identity, checkpoint["config"], type(self.config))
        else:  # perhaps a run that ended before its first checkpoint
            checkpoint, saved = None, configuration.load_saved(self.path / "config.yaml")
            if not saved and (self.path / "metrics.jsonl").exists():
                raise ValueError(
                    f"{self.path} has a metrics.jsonl without config.yaml, so it is not the folder of a "
                    "run; give another --out"
                )
            changed = configuration.differences(asdict(self.config), saved, type(self.config)) if saved else []
        if changed:
            lines = "\n  ".join(changed)
            raise ValueError(f"{self.path} holds a run of another configuration:\n  {lines}\n{elsewhere}")
        return checkpoint

    def save(self, parts: dict, progress: dict, arguments: dict, snapshot: bool = False):
        """Write last.pt, and before it step-STEP.pt with `snapshot`. arguments: of the named model's constructor."""
        states = {name: whole(part.state_dict(), self.ranks.main) for name, part in parts.items()}
        if self.ranks.main:
            content = {"format": FORMAT, "config": self.identity, "arguments": arguments, **progress, **states}
            content["ema"] = next(iter(states["emas"].values()))  # where other programs look; it takes no more space
            names = [f"step-{progress['step']:07d}.pt"] if snapshot else []
            for name in [*names, "last.pt"]:
                with replaced(self.path / name) as file:
                    torch.save(content, file)
        self.ranks.barrier()

    def close(self):
        self.log.close()
        if self.lock:
            self.lock.close()


def whole(state, kept: bool):
    """A state dict with whole tensors in place of shards: all processes gather them, and those of `kept` get them."""
    if isinstance(state, dict):
        return {name: whole(value, kept) for name, value in state.items()}
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if kept else None
    return state


def in_parts(state: dict, part) -> dict:
    """The reverse: what a model, its averages or an optimiser holds of a `whole` state dict in this process."""
    like = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):  # moments, which it may not have yet, are shaped like its weights
        like = {"state": dict(enumerate(weight for group in part.param_groups for weight in group["params"]))}

    def divided(value, like):
        if isinstance(value, dict):
            return {
                name: divided(each, like.get(name) if isinstance(like, dict) else like) for name, each in value.items()
            }
        if isinstance(like, DTensor) and value.shape == like.shape:
            return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return value

    return divided(state, like)
