"""Options: every wrong value is refused by name, and files, command line and records agree."""

import dataclasses
import re
import typing

import pytest
import torch
import yaml

import config
import train_repa_dar
from config import Config
from tests.conftest import ROOT

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


@pytest.fixture
def write(tmp_path):
    def own_yaml(text):
        path = tmp_path / "own.yaml"
        path.write_text(text)
        return path

    return own_yaml


def typed(name, words):
    return [f"--{name.replace('_', '-')}", *(words.split() or [""])]


# ---- wrong values that the parser or Config.check refuses ----

# The last value that is taken, and the first that is not, for each kind of bound. Several words are several values.
LIMITS = """
depth: 1, 0; proj_coeff: 0, -0.5; lr: 1e-12, 0; spatial_norm: 1, 1.1; class_dropout_prob: 0.9, 1; time_mean: -9, inf;
align_depth: 1, 0; betas: 0.9 0.999, 0.9 1; ema_decays: 0 0.5, -0.5; guidance_interval: 0.1 0.2, 0.2 0.2
"""
LIMITS = [tuple(re.split("[:,] ", each.strip())) for each in LIMITS.split(";")]

# What is typed, and how the message shows it.
WRONG = {
    "--seed 1.5": "'1.5'",
    "--tf32 maybe": "'maybe'",
    "--routing DAR": "'DAR'",
    "--align-depth --alignment repa": "align_depth = ()",
    "--ema-decays 0.9 0.9": "ema_decays = (0.9, 0.9)",
    "--betas 0.9": "--betas",
    "--chunksize 3": "unknown option --chunksize; the nearest valid one is 'chunk_size' (--chunk-size)",
    "--conf digits": "--conf",  # which must not pass for --config and silently replace the preset
}

# ---- wrong values that only the trainer can judge, and what the message must contain.
#      {name} stands for a path made by the fixture `paths`. ----

WRONG_FOR_A_RUN = {
    "--data {missing}": "data = '{missing}'",
    "--data {unfinished}": "'{unfinished}' is not finished",
    "--out {file}/run": "{file}",
    "--init-from {missing}": "{missing}",
    "--init-from {other_model}": "{other_model}",
    "--model SiT-Q/2": "model = 'SiT-Q/2'",
    "--chunk-size 3 --routing dar": "chunk_size = 3",  # one block has two sublayers
    "--batch-size 6 --micro-batch-size 4": "batch_size = 6",
    "--autoencoder sd-vae": "'sd-vae'",
    "--decoder vqgan": "'vqgan'",
    "--alignment repa --encoder no_such_vit": "'no_such_vit'",
    "--alignment repa --encoder vit_tiny_patch16_224 --encoder-weights {missing}": "'{missing}'",
    "--encoder-weights a b": "encoder_weights = ('a', 'b')",
    # The features of the fixture are for 16 tokens; this model has 4.
    "--encoder-features prepared --alignment repa --model SiT-S/4": "--encoder-features",
    "--eval-encoder no_such_net": "'no_such_net'",
    "--eval-encoder": "eval_encoder = ()",
    "--eval-encoder {judge} --encoder {judge}": "--eval-aligned",
    "--eval-encoder inception --inception {missing}": "{missing}",
    "--eval-encoder inception --fid-reference {missing}": "{missing}",
    "--diagnose-every 1 --diagnose-images 10000": "diagnose_images = 10000",
}


@pytest.mark.parametrize("name, last, beyond", LIMITS)
def test_limits(capsys, name, last, beyond):
    value = getattr(config.parse(typed(name, last)), name)
    assert (value if isinstance(value, tuple) else (value,)) == tuple(map(float, last.split()))
    single_float = float in (TYPES[name], *typing.get_args(TYPES[name])) and not isinstance(value, tuple)
    for words in (beyond, *["nan", "inf"] * single_float):
        assert f"{name} = " in refused(capsys, typed(name, words)), words


@pytest.mark.parametrize("words, shown", WRONG.items())
def test_wrong_words_are_refused_by_name(capsys, words, shown):
    message = refused(capsys, words.split())
    assert shown in message and re.match("-*([a-z0-9-]+)", words)[1] in message.replace("_", "-")


def test_align_depth_may_be_empty_without_alignment():
    assert config.parse(["--align-depth"]).align_depth == ()


@pytest.fixture(scope="module")
def paths(tmp_path_factory, judge_folder):
    """Paths that are wrong in different ways, by the names that WRONG_FOR_A_RUN uses, and that of a judge."""
    folder = tmp_path_factory.mktemp("wrong")
    made = {name: folder / name for name in ("missing", "file", "unfinished", "other_model")} | {"judge": judge_folder}
    made["file"].write_text("not what you think")
    made["unfinished"].mkdir()
    (made["unfinished"] / "settings.json").write_text("{}")
    torch.save({"ema": {"blocks.0.weight": torch.zeros(3)}}, made["other_model"])
    return made


@pytest.fixture
def tiny(small_data, encoder_folder, judge_folder, tmp_path):
    """The command line of a run that would take one small step, should a wrong value get through."""
    sizes = "--depth 1 --hidden-size 8 --num-heads 2 --align-depth 1 --projector-dim 4 --chunk-size 1"
    rest = "--encoder-features online --batch-size 4 --max-steps 1 --tensorboard False"
    evaluation = "--eval-every 1 --eval-samples 4 --eval-batch-size 4 --sample-steps 2"
    folders = f"--data={small_data} --encoder={encoder_folder} --eval-encoder={judge_folder} --out={tmp_path / 'run'}"
    return f"{folders} {sizes} {rest} {evaluation}".split()


@pytest.mark.parametrize("words, shown", WRONG_FOR_A_RUN.items())
def test_value_that_only_the_trainer_can_judge_is_refused(capsys, tiny, paths, words, shown):
    message = refused(capsys, [*tiny, *(word.format(**paths) for word in words.split())], train_repa_dar.main)
    assert "error" in message
    assert shown.format(**paths) in message


# ---- YAML files ----


WRONG_IN_A_FILE = {
    "chunk_sise: 1": "unknown key 'chunk_sise'; the nearest valid one is 'chunk_size'",
    "lr: fast": "'fast'",
    "seed: true": "'True'",
    "routing: off": "routing = False",
    "depth: 0": "depth = 0",
    "lr: {a: 1}": "lr = {'a': 1}: must be one value",
    "ema_decays: {a: 1}": "must be a list",
    # str() of anything is text: a run must not end up in a folder called None or True.
    "out: yes": "out = True",
    "just text": "key: value",
    "align_depth: [1, 2": "is not YAML",
}


@pytest.mark.parametrize("text, shown", WRONG_IN_A_FILE.items())
def test_wrong_files_are_refused_by_name(capsys, write, text, shown):
    path = write(text)
    message = refused(capsys, ["--config", path])
    assert shown in message and (str(path) in message or text == "depth: 0")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("# nothing\n", {}),
        ("lr: 1e-4", {"lr": 1e-4}),  # text for PyYAML, which wants 1.0e-4
        ("weight_decay: 0", {"weight_decay": 0.0}),
        ("depth: null\nmicro_batch_size: ~", {"depth": None, "micro_batch_size": None}),
        ("align_depth: [2, 1]\nbetas: [0.5, 0.6]", {"align_depth": (2, 1), "betas": (0.5, 0.6)}),
        ("align_depth: 3\nema_decays: 0.5", {"align_depth": (3,), "ema_decays": (0.5,)}),
        ("compile: true\ntf32: false", {"compile": True, "tf32": False}),
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


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_parses(preset):
    path = ROOT / "configs" / f"{preset}.yaml"
    parsed = config.parse(["--config", preset])
    parsed.check()
    for key, value in yaml.safe_load(path.read_text()).items():
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(parsed, key) == value and isinstance(getattr(parsed, key), type(value)), key
    assert config.parse(["--config", str(path)]) == parsed


# ---- saving, and telling configurations apart ----

# Text that YAML or a command line could take for something else.
TEXTS = ["", "None", "1e-4", "é–ü", "a: b # c", 'it\'s "quoted" back\\slash']


@pytest.mark.parametrize("text", TEXTS)
def test_saved_configuration_parses_to_itself(tmp_path, text):
    """An option of each kind, set and not; in a small and a large number."""
    kinds = dict(
        data=text, encoder=(text + "a", "b"), routing="unet", compile=True, tf32=False, depth=3, spatial_norm=0.5
    )
    numbers = dict(lr=1.25e-9, max_steps=10**9, ema_decays=(0.5, 0.9999), betas=(0.0, 1e-5), align_depth=(3, 1))
    original = Config(out="x", **kinds, **numbers)
    for settings in (original, dataclasses.replace(original, align_depth=(), encoder_weights=("c", text))):
        config.save(settings, path := tmp_path / f"{len(settings.align_depth)}.yaml")
        parsed = config.parse(["--config", str(path)])
        assert parsed == settings
        assert repr(parsed) == repr(settings), "types too: 1, 1.0 and True are equal"


def test_saved_path_may_begin_with_a_dash(tmp_path):
    original = config.parse(["--data=-digits"])
    assert original.data == "-digits"
    config.save(original, tmp_path / "config.yaml")
    assert config.parse(["--config", str(tmp_path / "config.yaml")]) == original


def test_differences_are_reported_unless_free():
    saved = dataclasses.asdict(Config())
    for name, free in (("max_steps", True), ("shard", True), ("lr", False)):
        expected = [] if free else [f"{name}: {saved[name]!r} -> 'another'"]
        assert config.differences({**saved, name: "another"}, saved) == expected
    assert config.differences(saved, config.plain(saved)) == config.differences(config.plain(saved), saved) == []
    assert config.differences({"align_depth": (4, 5)}, {"align_depth": [5, 4]}) == ["align_depth: [5, 4] -> (4, 5)"]
    assert config.differences({"lr": 1.0, "new": 2}, {"lr": 1.0, "old": 3}) == ["new: None -> 2", "old: 3 -> None"]
    del saved["route_backend"]  # an option younger than the run had its default
    assert config.differences(dataclasses.asdict(Config()), saved) == []
    changed = dataclasses.asdict(Config(route_backend="torch"))
    assert config.differences(changed, saved) == ["route_backend: 'auto' -> 'torch'"]


@pytest.mark.parametrize("words", ["--dry_run", "--dry-run=True"])
def test_a_switch_needs_no_value(words):
    parsed = config.parse([*words.split(), "--seed", "3"])
    assert parsed.dry_run is parsed.tf32 is True and parsed.seed == 3
    assert config.parse(["--dry-run", "False"]).dry_run is False


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
        ("--routing attnres --query static", "query", "routing = attnres"),
        ("--alignment repa --projector conv --projector-dim 8", "projector_dim", "projector = conv"),
        ("--model MMDiT-B/2 --alignment repa --projector conv --projector-dim 8", "projector", "model = MMDiT-B/2"),
        ("--guidance-interval 0 0.5", "guidance_interval", "cfg_scale = 1.0"),
        ("--new-labels --diagnose-images 30", "diagnose_images new_labels", ""),
        ("--routing attnres --chunk-size 2 --route-backend torch", "", ""),
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
        ("--routing dar --alignment repa --seed 3", "digits/dar-repa-seed3"),
        ("--routing dar --chunk-size 2 --align-depth 1 2", "digits/dar-none,chunk_size=2-seed0"),
        ("--alignment repa --align-depth 1 2", "digits/residual-repa,align_depth=1+2-seed0"),
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
