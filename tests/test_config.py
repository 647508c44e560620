"""Options: every wrong value is refused by name, every option is read, and files, command line and records agree."""

import dataclasses
import random
import re
import typing

import pytest
import torch
import yaml

import config
import train_repa_dar
from config import Config
from runtime import Ranks
from tests.conftest import ROOT

FIELDS = [field.name for field in dataclasses.fields(Config)]
TYPES = typing.get_type_hints(Config)
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def refused(capsys, arguments, call=config.parse):
    """What the program says when it refuses these arguments, on one line (the parser wraps and frames its messages)."""
    with pytest.raises(SystemExit) as stop:
        call([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert stop.value.code not in (None, 0), "a refused command must not end with success"
    message = str(stop.value.code) + " " + printed.err + printed.out
    return " ".join(message.split())


def names(message, field):
    """Whether a message says which option is wrong: `lr = ...` or `--lr`."""
    return re.search(rf"(?<![\w-])(--{field.replace('_', '-')}(?![\w-])|{field} = )", message)


@pytest.fixture
def write(tmp_path):
    def write_yaml(text, name="own.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_yaml


# ---- wrong values that the parser or Config.check refuses: what is typed -> how the message shows it ----

INTEGER = {"1.5": "'1.5'", "None": "'None'"}
OPTIONAL = {"1.5": "'1.5'", "few": "'few'"}
FLOAT = {"nan": "nan", "inf": "inf", "much": "'much'"}
SWITCH = {"maybe": "'maybe'", "1": "'1'"}

WRONG = {
    "seed": {"-1": "-1"} | INTEGER,
    "depth": {"0": "0", "-3": "-3"} | OPTIONAL,
    "hidden_size": {"0": "0", "3": "3"} | OPTIONAL,
    "num_heads": {"0": "0", "-1": "-1"} | OPTIONAL,
    "qk_norm": SWITCH,
    "mirror": SWITCH,
    "checkpoint_activations": SWITCH,
    "dry_run": SWITCH,
    "class_dropout_prob": {"-0.1": "-0.1", "1": "1.0"} | FLOAT,
    "routing": {"dense": "'dense'", "DAR": "'DAR'", "": "''"},
    "query": {"learned": "'learned'"},
    "chunk_size": {"0": "0", "-4": "-4"} | INTEGER,
    "final_aggregator": {"none": "'none'"},
    "route_backend": {"cuda": "'cuda'"},
    "alignment": {"dinov2": "'dinov2'"},
    "align_depth": {"0": "(0,)", "-1": "(-1,)", "4 4": "(4, 4)", "1.5": "'1.5'", "last": "'last'"},
    "proj_coeff": {"-0.5": "-0.5"} | FLOAT,
    "projector": {"linear": "'linear'"},
    "projector_dim": {"0": "0"} | INTEGER,
    "spatial_norm": {"-0.1": "-0.1", "1.1": "1.1"} | FLOAT,
    "align_steps": {"0": "0", "-1": "-1"} | OPTIONAL,
    "encoder_features": {"cached": "'cached'"},
    "path": {"vp": "'vp'"},
    "time_sampling": {"logit": "'logit'"},
    "batch_size": {"0": "0", "-8": "-8"} | INTEGER,
    "micro_batch_size": {"0": "0", "-8": "-8"} | OPTIONAL,
    "max_steps": {"0": "0", "1e5": "'1e5'"} | INTEGER,
    "lr": {"0": "0.0", "-1e-4": "-0.0001"} | FLOAT,
    "betas": {"0.9 1": "(0.9, 1.0)", "-0.1 0.999": "(-0.1, 0.999)", "nan 0.999": "(nan, 0.999)", "a b": "'a'"},
    "weight_decay": {"-0.01": "-0.01"} | FLOAT,
    "grad_clip": {"0": "0.0", "-1": "-1.0"} | FLOAT,
    "ema_decays": {"1": "(1.0,)", "-0.5": "(-0.5,)", "0.9 0.9": "(0.9, 0.9)", "nan": "(nan,)", "slow": "'slow'"},
    "precision": {"fp16": "'fp16'"},
    "tf32": SWITCH,
    "compile": SWITCH,
    "num_workers": {"-1": "-1"} | INTEGER,
    "max_skipped_steps": {"0": "0"} | INTEGER,
    "log_every": {"0": "0"} | INTEGER,
    "checkpoint_every": {"0": "0"} | INTEGER,
    "snapshot_every": {"-1": "-1"} | INTEGER,
    "tensorboard": SWITCH,
    "eval_every": {"-1": "-1"} | INTEGER,
    "eval_samples": {"1": "1"} | INTEGER,
    "eval_batch_size": {"0": "0"} | INTEGER,
    "sampler": {"ddim": "'ddim'"},
    "sample_steps": {"1": "1"} | INTEGER,
    "cfg_scale": {"-1": "-1.0"} | FLOAT,
    "guidance_interval": {
        "0.5 0.5": "(0.5, 0.5)",
        "0.9 0.1": "(0.9, 0.1)",
        "-0.1 1": "(-0.1, 1.0)",
        "0 1.1": "(0.0, 1.1)",
        "nan 1": "(nan, 1.0)",
        "a b": "'a'",
    },
    "diagnose_every": {"-1": "-1"} | INTEGER,
    "diagnose_images": {"19": "19"} | INTEGER,
    "eval_aligned": SWITCH,
    "new_labels": SWITCH,
}

# The same limits from inside: the last value that must still be taken; commas join several.
ALLOWED = dict(
    word.split("=")
    for word in """
seed=0 depth=1 hidden_size=4 num_heads=1 class_dropout_prob=0 chunk_size=1 align_depth=1,2 proj_coeff=0
projector_dim=1 spatial_norm=0 align_steps=1 batch_size=1 micro_batch_size=1 max_steps=1 lr=1e-12 betas=0,0
weight_decay=0 grad_clip=1e-12 ema_decays=0,0.5 num_workers=0 max_skipped_steps=1 log_every=1
checkpoint_every=1 snapshot_every=0 eval_every=0 eval_samples=2 eval_batch_size=1 sample_steps=2 cfg_scale=0
guidance_interval=0,1 diagnose_every=0 diagnose_images=20
""".split()
)

# ---- wrong values that only the trainer can judge: field -> other settings, and what the message must contain.
#      {name} stands for a path made by the fixture `paths`. ----

WRONG_FOR_A_RUN = {
    "data": {
        "--data {missing}": "data = '{missing}'",
        "--data {file}": "data = '{file}'",
        "--data {empty}": "data = '{empty}'",
        "--data {unfinished}": "'{unfinished}' is not finished",
    },
    "out": {"--out {file}": "{file}", "--out {file}/run": "{file}"},
    "init_from": {
        f"--init-from {{{kind}}}": f"{{{kind}}}" for kind in "missing file empty safetensors tensor other_model".split()
    },
    "model": {
        "--model SiT-Q/2": "model = 'SiT-Q/2'",
        "--model=": "model = ''",
        "--model SiT-B/3 --eval-every 0": "model = 'SiT-B/3'",
    },
    "num_heads": {"--num-heads 3": "num_heads = 3"},
    "hidden_size": {"--hidden-size 6 --num-heads 1": "hidden_size = 6"},
    "align_depth": {"--align-depth 1 9 --alignment repa": "align_depth = (1, 9)"},
    "chunk_size": {"--chunk-size 3 --routing dar": "chunk_size = 3"},  # one block has two sublayers
    "batch_size": {"--batch-size 6 --micro-batch-size 4": "batch_size = 6"},
    "micro_batch_size": {"--micro-batch-size 3": "micro_batch_size = 3"},
    "autoencoder": {"--autoencoder sd-vae": "'sd-vae'", "--autoencoder {empty}": "'{empty}'"},
    "decoder": {"--decoder vqgan": "'vqgan'"},
    "encoder": {
        "--alignment repa --encoder no_such_vit": "'no_such_vit'",
        "--alignment repa --encoder {empty}": "'{empty}'",
        "--alignment repa --encoder resnet18": "'resnet18'",
        "--alignment repa --encoder=": "encoder ''",
        "--alignment repa --encoder {broken_encoder}": "{broken_encoder}",
        "--alignment repa --encoder {unknown_encoder}": "{unknown_encoder}",
        "--alignment repa --encoder {weightless_encoder}": "{weightless_encoder}",
    },
    "encoder_weights": {
        "--alignment repa --encoder vit_tiny_patch16_224 --encoder-weights {missing}": "'{missing}'",
        "--alignment repa --encoder-weights {file}": "'{file}'",
        "--encoder-weights a b": "encoder_weights = ('a', 'b')",
    },
    # The features of the fixture are for 16 tokens; this model has 4.
    "encoder_features": {
        "--encoder-features prepared --alignment repa --model SiT-S/4": "--encoder-features",
    },
    "eval_encoder": {
        "--eval-encoder no_such_net": "'no_such_net'",
        "--eval-encoder {empty}": "'{empty}'",
        "--eval-encoder": "eval_encoder = ()",
        "--eval-encoder {judge} --encoder {judge}": "--eval-aligned",
    },
    "inception": {
        "--eval-encoder inception --inception {missing}": "{missing}",
        "--eval-encoder inception --inception {file}": "{file}",
    },
    "fid_reference": {"--eval-encoder inception --fid-reference {missing}": "{missing}"},
    "diagnose_images": {"--diagnose-every 1 --diagnose-images 10000": "diagnose_images = 10000"},
}


def test_tables_of_wrong_values_cover_every_option():
    assert sorted(WRONG.keys() | WRONG_FOR_A_RUN.keys()) == sorted(FIELDS)


@pytest.mark.parametrize(
    "field, typed, shown", [(field, typed, shown) for field, cases in WRONG.items() for typed, shown in cases.items()]
)
def test_wrong_value_is_refused_by_name(capsys, field, typed, shown):
    message = refused(capsys, [f"--{field.replace('_', '-')}", *(typed.split() or [""])])
    assert names(message, field), message
    assert shown in message


@pytest.mark.parametrize("field, typed", ALLOWED.items())
def test_limit_itself_is_allowed(field, typed):
    parsed = getattr(config.parse([f"--{field.replace('_', '-')}", *typed.split(",")]), field)
    parsed = parsed if isinstance(parsed, tuple) else (parsed,)
    assert parsed == tuple(float(word) for word in typed.split(","))


@pytest.mark.parametrize("field", ["betas", "guidance_interval"])
def test_a_pair_needs_both_numbers(capsys, field):
    assert names(refused(capsys, [f"--{field.replace('_', '-')}", "0.9"]), field)


def test_ema_decays_may_not_be_empty(capsys):
    assert "ema_decays = ()" in refused(capsys, ["--ema-decays"])


def test_align_depth_may_be_empty_only_without_alignment(capsys):
    assert config.parse(["--align-depth"]).align_depth == ()
    assert "align_depth = ()" in refused(capsys, ["--align-depth", "--alignment", "repa"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory, encoder_folder):
    """Paths that are wrong in different ways, by the names that WRONG_FOR_A_RUN uses."""
    folder = tmp_path_factory.mktemp("wrong")
    folders = ("empty", "unfinished", "broken_encoder", "unknown_encoder", "weightless_encoder")
    made = {name: folder / name for name in ("missing", "file", *folders)}
    for name in folders:
        made[name].mkdir()
    made["file"].write_text("not what you think")
    (made["unfinished"] / "settings.json").write_text("{}")
    (made["broken_encoder"] / "config.json").write_text("{")
    (made["unknown_encoder"] / "config.json").write_text('{"architecture": "no_such_vit"}')
    (made["weightless_encoder"] / "config.json").write_text((encoder_folder / "config.json").read_text())
    made |= {
        "safetensors": folder / "junk.safetensors",
        "tensor": folder / "tensor.pt",
        "other_model": folder / "sit.pt",
    }
    made["safetensors"].write_bytes(b"junk" * 10)
    torch.save(torch.zeros(3), made["tensor"])
    torch.save({"ema": {"blocks.0.weight": torch.zeros(3)}}, made["other_model"])
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def tiny(digits, encoder_folder, judge_folder, tmp_path):
    """The command line of a run that would take one small step, should a wrong value get through."""
    sizes = "--depth 1 --hidden-size 8 --num-heads 2 --align-depth 1 --projector-dim 4 --chunk-size 1"
    rest = "--encoder-features online --batch-size 4 --max-steps 1 --tensorboard False"
    evaluation = "--eval-every 1 --eval-samples 4 --eval-batch-size 4 --sample-steps 2"
    folders = f"--data={digits} --encoder={encoder_folder} --eval-encoder={judge_folder} --out={tmp_path / 'run'}"
    return f"{folders} {sizes} {rest} {evaluation}".split()


@pytest.mark.parametrize("typed, shown", [case for cases in WRONG_FOR_A_RUN.values() for case in cases.items()])
def test_value_that_only_the_trainer_can_judge_is_refused(capsys, tiny, paths, judge_folder, typed, shown):
    paths = {**paths, "judge": str(judge_folder)}
    message = refused(capsys, [*tiny, *(word.format(**paths) for word in typed.split())], train_repa_dar.main)
    assert "error" in message
    assert shown.format(**paths) in message


def choices(*fields):
    """Every value of these choices and switches."""
    return [
        (name, value)
        for name in fields
        for value in ((False, True) if TYPES[name] is bool else typing.get_args(TYPES[name]))
    ]


# Those that the model is built from; `compile` costs three seconds and belongs to the trainer's tests.
CHOICES = "routing query final_aggregator qk_norm alignment projector encoder_features checkpoint_activations mirror"


@pytest.mark.parametrize("name, value", choices(*CHOICES.split(), "precision", "tf32"))
def test_every_choice_builds(tiny, name, value):
    settings = config.parse([*tiny, "--routing=dar", "--alignment=repa", f"--{name.replace('_', '-')}={value}"])
    assert getattr(settings, name) == value
    train_repa_dar.Trainer(settings, Ranks())


# ---- YAML files ----


@pytest.mark.parametrize(
    "key, near", [("chunk_sise", "chunk_size"), ("learning_rate", None), ("1", None), ("seeds", "seed")]
)
def test_unknown_key_names_the_nearest_and_the_file(capsys, write, key, near):
    path = write(f"{key}: 1")
    message = refused(capsys, ["--config", path])
    offered = re.search(r"nearest valid one is '(\w+)'", message)
    assert key in message and str(path) in message and offered[1] in FIELDS
    assert near is None or offered[1] == near


@pytest.mark.parametrize(
    "text, field, shown",
    [
        ("lr: fast", "lr", "'fast'"),
        ("seed: 1.5", "seed", "1.5"),
        ("seed: true", "seed", "True"),
        ("compile: 1", "compile", "1"),
        ("routing: dense", "routing", "'dense'"),
        ("routing: off", "routing", "False"),
        ("align_depth: null", "align_depth", "None"),
        ("ema_decays: [0.9, slow]", "ema_decays", "'slow'"),
        ("lr: {a: 1}", "lr", "{'a': 1}"),
        ("lr: [0.1, 0.2]", "lr", "0.2"),
        ("data: [x, y]", "data", "'y'"),
        ("betas: 0.9", "betas", "betas"),
        ("max_steps: 1e5", "max_steps", "'1e5'"),
        # str() of anything is text: a run must not end up in a folder called None or True.
        ("out: ", "out", "None"),
        ("out: yes", "out", "True"),
        ("out: {a: 1}", "out", "{'a': 1}"),
    ],
)
def test_wrong_type_in_a_file_names_the_key_and_the_file(capsys, write, text, field, shown):
    path = write(text)
    message = refused(capsys, ["--config", path])
    assert names(message, field), message
    assert shown in message and str(path) in message


def test_out_of_range_in_a_file_is_refused(capsys, write):
    assert "eval_samples = 1" in refused(capsys, ["--config", write("eval_samples: 1")])


@pytest.mark.parametrize(
    "text, shown",
    [
        ("betas: [0.9, 0.99, 0.999]", "0.999"),
        *((text, "key: value") for text in ("- lr\n- seed", "just text", "3", "[]")),
        *((text, "is not YAML") for text in ("align_depth: [1, 2", "lr: 1: 2", "\tlr: 1")),
    ],
)
def test_a_file_of_another_shape_is_refused(capsys, write, text, shown):
    path = write(text)
    message = refused(capsys, ["--config", path])
    assert str(path) in message and shown in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("# nothing\n", {}),
        ("lr: 1e-4", {"lr": 1e-4}),  # text for PyYAML, which wants 1.0e-4
        ("weight_decay: 0", {"weight_decay": 0.0}),
        ("depth: null\nmicro_batch_size: ~", {"depth": None, "micro_batch_size": None}),
        ("depth: 3", {"depth": 3}),
        ("align_depth: [2, 1]\nbetas: [0.5, 0.6]", {"align_depth": (2, 1), "betas": (0.5, 0.6)}),
        ("align_depth: 3\nema_decays: 0.5", {"align_depth": (3,), "ema_decays": (0.5,)}),
        ("align_depth: []", {"align_depth": ()}),
        ("compile: true\ntf32: false", {"compile": True, "tf32": False}),
        ("data: a b", {"data": "a b"}),
    ],
)
def test_values_of_a_file(write, text, expected):
    parsed = config.parse(["--config", str(write(text)), "--out=x"])
    assert parsed == dataclasses.replace(Config(), **{**expected, "out": "x"})


def test_command_line_beats_the_file(write):
    path = write("lr: 0.5\nalign_depth: [1, 2, 3]\ncompile: true\ndepth: 3\nrouting: dar\nseed: 7")
    words = "--lr 0.25 --align-depth 5 --compile False --depth None --routing residual --out x".split()
    expected = {"lr": 0.25, "align_depth": (5,), "seed": 7, "out": "x"}
    assert config.parse(["--config", str(path), *words]) == dataclasses.replace(Config(), **expected)
    assert config.parse(["--lr", "0.25", f"--config={path}"]).lr == 0.25, "in whatever order"


def test_missing_preset_lists_the_presets(capsys):
    message = refused(capsys, ["--config", "no_such_preset"])
    assert "'no_such_preset'" in message
    assert all(re.search(rf"\b{preset}\b", message) for preset in PRESETS)


def test_there_is_a_default_preset():
    assert "digits" in PRESETS
    assert config.parse([]) == config.parse(["--config", "digits"])


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_parses(preset):
    path = ROOT / "configs" / f"{preset}.yaml"
    parsed = config.parse(["--config", preset])
    parsed.check()
    for key, value in yaml.safe_load(path.read_text()).items():
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(parsed, key) == value and isinstance(getattr(parsed, key), type(value)), key
    assert config.parse(["--config", str(path)]) == parsed


@pytest.mark.parametrize(
    "typed, near", [("--chunksize", "--chunk-size"), ("--max-stepps", "--max-steps"), ("--rooting", "--routing")]
)
def test_unknown_option_suggests_the_nearest(capsys, typed, near):
    message = refused(capsys, [typed, "3"])
    assert re.search(rf"{typed}\b", message) and re.search(rf"{near}\b", message), message


def test_abbreviated_and_stray_arguments_are_refused(capsys):
    # `--conf` must not pass for --config and silently replace the preset.
    assert "--conf" in refused(capsys, ["--conf", "digits"])
    assert "stray" in refused(capsys, ["stray"])


# ---- saving, and telling configurations apart ----

# Text that YAML or a command line could take for something else.
TEXTS = ["", "data/digits", "with space", "None", "null", "~", "true", "1e-4", "007", "é–ü", "a: b # c", "[1, 2]"]
TEXTS += ["{a: 1}", 'it\'s "quoted"', " padded ", "back\\slash", "2024-01-01", "*"]


def random_config(rng):
    def number(kind):
        if kind is str:
            return rng.choice(TEXTS) + rng.choice("abcdefgh")
        if kind is int:
            return rng.randint(4, 10 ** rng.randint(1, 9))
        return rng.choice([rng.random(), 10 ** -rng.uniform(1, 9)])

    values = {}
    for name, kind in TYPES.items():
        arguments = typing.get_args(kind)
        if kind is bool:
            values[name] = rng.random() < 0.5
        elif kind is str:
            values[name] = rng.choice(TEXTS)
        elif kind in (int, float):
            values[name] = number(kind)
        elif typing.get_origin(kind) is typing.Literal:
            values[name] = rng.choice(arguments)
        elif typing.get_origin(kind) is tuple:  # different numbers, and in order for the intervals
            count = rng.randint(1, 4) if Ellipsis in arguments else len(arguments)
            values[name] = tuple(sorted({number(arguments[0]) for _ in range(count)}))
            while len(values[name]) < count:
                values[name] = tuple(sorted({*values[name], number(arguments[0])}))
        else:
            value, absent = arguments
            assert value in (int, float) and absent is type(None), f"a new kind of option, {name}: {kind}"
            values[name] = rng.choice([None, number(value)])
    values["diagnose_images"] += 20
    if values["alignment"] == "none" and rng.random() < 0.5:
        values["align_depth"] = ()
    values["encoder_weights"] = rng.choice([(), values["encoder"]])
    values["out"] = values["out"] or "somewhere"
    return Config(**values)


@pytest.mark.parametrize("seed", range(15))
def test_saved_configuration_parses_to_itself(tmp_path, seed):
    original = random_config(random.Random(seed))
    config.save(original, tmp_path / "config.yaml")
    parsed = config.parse(["--config", str(tmp_path / "config.yaml")])
    assert parsed == original
    assert repr(parsed) == repr(original), "types too: 1, 1.0 and True are equal"


def test_saved_path_may_begin_with_a_dash(tmp_path):
    original = config.parse(["--data=-digits"])
    assert original.data == "-digits"
    config.save(original, tmp_path / "config.yaml")
    assert config.parse(["--config", str(tmp_path / "config.yaml")]) == original


def test_saved_file_holds_every_option(tmp_path):
    config.save(Config(), tmp_path / "config.yaml")
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == FIELDS


# Settings that may change when a run goes on: anything else would change more than rounding.
FREE = "out max_steps micro_batch_size num_workers checkpoint_every snapshot_every tensorboard dry_run".split()
FREE += ["checkpoint_activations", "diagnose_every", "diagnose_images"]


@pytest.mark.parametrize("name", FIELDS)
def test_differences_are_reported_unless_free(name):
    saved = dataclasses.asdict(Config())
    wanted = {**saved, name: "another"}
    expected = [] if name in FREE else [f"{name}: {saved[name]!r} -> 'another'"]
    assert config.differences(wanted, saved) == expected


def test_differences_of_lists_and_tuples():
    saved = {**dataclasses.asdict(Config()), "betas": [0.9, 0.999], "align_depth": [4]}
    assert config.differences(dataclasses.asdict(Config()), saved) == []
    assert config.differences(saved, dataclasses.asdict(Config())) == []
    assert config.differences({"align_depth": (4, 5)}, {"align_depth": [5, 4]}) == ["align_depth: [5, 4] -> (4, 5)"]


def test_differences_of_options_that_one_side_lacks():
    assert config.differences({"lr": 1.0, "new": 2}, {"lr": 1.0, "old": 3}) == ["new: None -> 2", "old: 3 -> None"]


def test_an_option_younger_than_the_run_had_its_default():
    saved = dataclasses.asdict(Config())
    del saved["route_backend"]
    assert config.differences(dataclasses.asdict(Config()), saved) == []
    changed = dataclasses.asdict(dataclasses.replace(Config(), route_backend="torch"))
    assert config.differences(changed, saved) == ["route_backend: 'auto' -> 'torch'"]


@pytest.mark.parametrize(
    "typed, value",
    [
        ("--dry-run", True),
        ("--dry_run", True),
        ("--dry-run True", True),
        ("--dry-run=True", True),
        ("--dry-run --seed 3", True),
        ("--dry-run False --seed 3", False),
        ("--tf32 --dry-run", True),
    ],
)
def test_a_switch_needs_no_value(typed, value):
    parsed = config.parse(typed.split())
    assert parsed.dry_run is value and parsed.tf32 is True and parsed.seed == (3 if "--seed" in typed else 0)


def test_another_batch_than_the_presets_is_pointed_out(capsys, monkeypatch):
    config.parse([])
    assert "note" not in capsys.readouterr().err
    config.parse(["--batch-size", "32"])
    assert "batch_size = 32, where digits has 64" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    config.parse(["--batch-size", "32"])
    assert not capsys.readouterr().err


# ---- what the fields say of each other ----


@pytest.mark.parametrize(
    "words, idle, causes",
    [
        ("--projector conv --spatial-norm=0.6", "projector spatial_norm", "alignment = none"),
        ("--query static", "query", "routing = residual"),
        ("--routing attnres --query static", "query", "routing = attnres"),
        ("--routing unet --chunk_size=2", "chunk_size", "routing = unet"),
        ("--alignment repa --projector conv --projector-dim 8", "projector_dim", "projector = conv"),
        ("--eval-every 0 --sampler sde --cfg-scale 2", "cfg_scale sampler", "eval_every = 0"),
        ("--guidance-interval 0 0.5", "guidance_interval", "cfg_scale = 1.0"),
        ("--new-labels --diagnose-images 30", "diagnose_images new_labels", ""),
        ("--routing dar --query static --chunk-size 2", "", ""),
        ("--routing attnres --chunk-size 2 --route-backend torch", "", ""),
        ("--cfg-scale 2 --guidance-interval 0 0.5 --seed 3", "", ""),
    ],
)
def test_options_without_effect_are_noted(capsys, words, idle, causes):
    config.parse(words.split())
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[1] for note in notes] == idle.split()
    assert all(causes in note for note in notes)


@pytest.mark.parametrize(
    "words, folder",
    [
        ("", "digits/residual-none-seed0"),
        ("--routing dar --alignment repa --seed 3", "digits/dar-repa-seed3"),
        ("--lr 5.0e-3 --max-steps 7 --log-every 3 --query static", "digits/residual-none-seed0"),  # none of them an arm
        ("--routing dar --chunk-size 2 --align-depth 1 2", "digits/dar-none,chunk_size=2-seed0"),
        ("--alignment repa --align-depth 1 2", "digits/residual-repa,align_depth=1+2-seed0"),
        ("--config imagenet256_s", "imagenet256_s/residual-none-seed0"),
        ("--out elsewhere/x", None),
    ],
)
def test_the_default_run_folder_says_the_preset_and_what_differs(words, folder):
    assert config.parse(words.split()).out == (f"runs/{folder}" if folder else "elsewhere/x")


def test_folders_of_different_settings_differ():
    """Also where the difference is something that a file name cannot hold, or is far behind."""
    texts = ["a b", "a-b", "a/b", "a+b", "a,b", "x" * 200, "x" * 201, ("a", "b"), ("a+b",)]
    names = {config.folder_name({"": "dar", "data": text}) for text in texts}
    assert len(names) == len(texts) and all(re.fullmatch(r"[\w.,=+-]{1,160}", name) for name in names)
    sizes = [config.parse(words.split()).out for words in ("--model SiT-S/2", "--model SiT-B/2", "")]
    assert len(set(sizes)) == 3


def test_documentation_lists_every_option_with_its_meaning():
    rows = [line for line in config.document().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == FIELDS and all(len(row.split(" | ")[2]) > 10 for row in rows)
    assert r"| `query` | `'timestep'` | static \| timestep \| dynamic. DAR query: w" in "\n".join(rows)
