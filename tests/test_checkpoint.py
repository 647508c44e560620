"""Models rebuilt from checkpoints: those of tiny runs of the trainer, and files shaped as SiT and REPA release them."""

import argparse
import functools

import pytest
import torch

import train_repa_dar
from models.sit import SIT_MODELS
from tests.conftest import TINY
from weights import load_file, load_trained


@pytest.fixture(scope="module")
def train(small_data, encoder_folder, tmp_path_factory):
    """Two steps of the trainer, once for the same options. Returns the trainer at its end and its checkpoint."""

    @functools.lru_cache
    def run(words=""):
        out = tmp_path_factory.mktemp("run") / "tiny"
        line = (
            f"--data={small_data} --out={out} --encoder={encoder_folder} {TINY} --lr 0.05 --max-steps 2 --eval-every 0"
        )
        trainers, close = [], train_repa_dar.Trainer.__exit__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_repa_dar.Trainer, "__exit__", lambda self, *_: trainers.append(self) or close(self))
            train_repa_dar.main([*line.split(), "--model=SiT-S/2", *words.split()])
        return trainers[0], out / "last.pt"

    return run


def randomized(model):
    """With weights that matter: those that start at zero would hide a wrong one."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def released(**changes):
    """A model with the shape of a released one, but for the input and the classes."""
    return randomized(SIT_MODELS["SiT-S/2"](**{"input_size": 4, "num_classes": 3, "align_dims": (), **changes}))


def inputs(channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, size, size, generator=generator)
    return x, torch.tensor([0.9, 0.4, 0.1]), torch.tensor([1, 0, 3])


# ---- ours ----

ARMS = {
    "residual, aligned": "--alignment repa --align-depth 2 1",
    "timestep, shared": "--routing dar --query timestep --chunk-size 3 --final-aggregator shared",
    "timestep, aligned": "--routing dar --query timestep --alignment repa",
    "dynamic, aligned": "--routing dar --query dynamic --chunk-size 1 --alignment repa --final-aggregator dedicated",
    "convolved": "--alignment repa --align-depth 2 1 --projector conv --routing dar",
    "unet, aligned": "--routing unet --alignment repa",
    "qk norm, four heads": "--qk-norm --num-heads 4",
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_model_of_a_run_computes_what_the_trained_one_did(train, arm):
    """Against the average that the trainer itself held at the end, tokens of the alignment included."""
    trainer, path = train(ARMS[arm])
    model, options = load_trained(path)
    assert options["step"] == 2 and options["average"] == "0.99" and options["depth"] == 2
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    average = trainer.ema.models[0.99]
    assert model.num_classes == average.num_classes == 10
    velocity, projected = model(*inputs())
    expected, expected_tokens = average(*inputs())
    assert velocity.abs().max() > 1e-3  # two steps have left the initial zero
    assert torch.equal(velocity, expected) and len(projected) == len(expected_tokens)
    assert all(torch.equal(a, b) for a, b in zip(projected, expected_tokens))


def test_the_choice_of_an_average(train):
    _, path = train("--ema-decays 0.9 0.5")
    content = load_file(path)
    for average, weights in (
        ("", content["emas"]["0.9"]),
        ("0.9", content["emas"]["0.9"]),
        ("0.5", content["emas"]["0.5"]),
        ("none", content["model"]),
    ):
        model, options = load_trained(path, average)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert options["average"] == (average or "0.9")
    assert not torch.equal(content["model"]["x_embedder.proj.bias"], content["emas"]["0.5"]["x_embedder.proj.bias"])
    with pytest.raises(ValueError, match="no average '0.99'; choose one of none, 0.9, 0.5"):
        load_trained(path, "0.99")


def test_a_wrong_name_for_ours_is_refused(train):
    with pytest.raises(ValueError, match="model = 'SiT-S/4': .* is of SiT-S/2"):
        load_trained(train()[1], name="SiT-S/4")


# ---- released ones ----


def test_repa_with_its_projectors(tmp_path):
    """Their depth is nowhere in the file, and sampling does not need them."""
    whole = released(align_dims=(5, 7), align_depth=(1,), projector_dim=6)
    torch.save(
        {
            "model": {},
            "ema": {f"module.{name}": value for name, value in whole.state_dict().items()},
            "opt": {},
            "args": argparse.Namespace(model="SiT-S/2"),
            "steps": 7,
        },
        tmp_path / "repa.pt",
    )
    model, options = load_trained(tmp_path / "repa.pt", name="SiT-S/2")
    assert options == {} and model.num_classes == 3 and model.in_channels == 4 and model.input_size == 4
    velocity, aligned = model(*inputs(4, 4))
    assert torch.equal(velocity, whole(*inputs(4, 4))[0]) and aligned == []


@pytest.mark.parametrize("key", ["", "ema"])
def test_sit_predicts_a_variance_and_counts_time_from_noise_to_data(tmp_path, key):
    theirs = released()
    weights = theirs.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        both = weights[name].unflatten(0, (4, 1, 4)).expand(4, 2, *([4] + list(weights[name].shape[1:]))).clone()
        both[:, 1] = 17  # (p * p, velocity or variance, C, ...)
        weights[name] = both.flatten(0, 2)
    torch.save({key: weights} if key else weights, tmp_path / "sit.pt")
    model, _ = load_trained(tmp_path / "sit.pt", name="SiT-S/2")
    x, t, y = inputs(4, 4)
    velocity, _ = model(x, t, y)
    torch.testing.assert_close(velocity, -theirs(x, 1 - t, y)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity, -theirs(x, t, y)[0], rtol=1e-2)  # the time matters here


# ---- errors ----


def test_what_cannot_be_loaded_is_named(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match="there is no weights file '.*weights.pt'"):
        load_trained(path, name="SiT-S/2")
    weights = released().state_dict()
    torch.save(weights, path)
    with pytest.raises(ValueError, match="model = '': say which model .*weights.pt is of"):
        load_trained(path)
    for name in ("SiT-S/3", "DiT-S/2"):
        with pytest.raises(ValueError, match=f"model = '{name}' is unknown; choose one of SiT-S/1"):
            load_trained(path, name=name)
    with pytest.raises(ValueError, match="average = '0.9999': .* no choice of averages"):
        load_trained(path, "0.9999", "SiT-S/2")
    for name in ("SiT-S/4", "SiT-B/2"):  # other patches; a width that other heads fit too
        with pytest.raises(ValueError, match=f"weights.pt does not fit {name}: .*, the model's is"):
            load_trained(path, name=name)
    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="weights.pt does not fit SiT-S/2: .*pos_embed"):
        load_trained(path, name="SiT-S/2")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a weights file"):
        load_trained(path, name="SiT-S/2")


def test_a_folder_is_pointed_to_its_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"'{tmp_path}' is a folder without config.json.*{tmp_path}/last.pt"):
        load_trained(tmp_path)
