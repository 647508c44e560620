"""Text to image end to end: trained on captions, drawn from prompts, taken from and given to diffusers, distilled."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch

import config as configuration
import distill
import train_repa_dar
from dataset import prepare
from eval import export
from eval import sample as sampling
from models.mmdit import RoutedQwenImage
from models.sit import SIT_MODELS
from models.text import load_text_encoder
from runtime import Ranks, Use, derive_seed
from tests.conftest import TINY, forked
from tests.test_mmdit import random_weights
from tests.test_sample import npz
from tests.test_text import make_qwen
from tests.test_trainer import assert_same_curves, records
from weights import load_file, load_trained

import diffusers  # after models: see its docstring

PROMPTS = ["a handwritten three", "the digit seven", "zero"]
STEPS = 15
ARMS = {"residual": "", "dar": "--routing dar --chunk-size 3 --alignment repa --align-steps 6"}


# ---- training ----


@pytest.fixture(scope="module")
def data(tmp_path_factory, encoder_folder):
    """70 digits with captions by `words`, in 8 and in 5 tokens."""
    folder = tmp_path_factory.mktemp("data") / "captioned"
    for tokens in (8, 5):
        prepare.main(f"digits --out {folder} --limit 70 --text-encoder words --text-tokens {tokens}".split())
    return folder


@pytest.fixture(scope="module")
def command(data, encoder_folder, judge_folder):
    """Arguments of a run of seconds, on mirrored images, of which five are held out, and which is evaluated."""
    judged = f"--eval-encoder={judge_folder} --eval-every 8 --eval-samples 5 --eval-batch-size 2 --sample-steps 2"
    steps = f"--max-steps {STEPS} --log-every 1 --checkpoint-every 4 --ema-decays 0.5 --mirror --held-out 5"
    aligned = f"--encoder={encoder_folder} --encoder-features online"
    told = f"--text-encoder={load_text_encoder('words').fingerprint}"

    def build(out, *extra):
        line = (
            f"--config digits_text --data={data} --out={out} {TINY} {steps} {aligned} {told} {judged} {' '.join(extra)}"
        )
        return line.split()

    return build


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """The folders of runs that nothing has interrupted, by their arm."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.cache
    def made(arm):
        train_repa_dar.main(command(folder / arm, ARMS[arm]))
        return folder / arm

    return made


def both(main, words):
    """Two processes do it."""
    assert forked(*2 * [functools.partial(main, words)], ranks=True) == [None, None]


def test_a_run_learns_and_is_the_same_in_two_processes(command, trained, tmp_path):
    whole = trained("dar")
    losses = [line["denoising_loss"] for line in records(whole) if "denoising_loss" in line]
    held_out = [line["held_out_loss"] for line in records(whole) if "held_out_loss" in line]
    assert losses[-1] < 0.8 * losses[0] and held_out[-1] < held_out[0] and len(held_out) == 2
    both(train_repa_dar.main, command(tmp_path / "two", ARMS["dar"]))
    assert_same_curves(tmp_path / "two", whole)


def test_an_exported_run_draws_the_same(trained, tmp_path):
    export.main([str(trained("dar") / "last.pt"), "--out", str(tmp_path / "exported")])
    a, b = (draw(path, tmp_path / f"of-{path.stem}") for path in (trained("dar") / "last.pt", tmp_path / "exported"))
    assert np.array_equal(a["arr_0"], b["arr_0"])


# ---- prompts ----


def draw(checkpoint, folder, *extra, prompts=PROMPTS, count=7, how="--sampler euler --steps 3"):
    sampling.main(drawing(checkpoint, folder, *extra, prompts=prompts, count=count, how=how))
    return npz(folder)


def drawing(checkpoint, folder, *extra, prompts=PROMPTS, count=7, how="--sampler euler --steps 3"):
    words = [str(checkpoint), f"--out={folder}", *how.split(), f"--num-samples={count}", *map(str, extra)]
    return words + (["--prompts", *prompts] if prompts else [])


def test_prompts_are_what_is_drawn(trained, tmp_path):
    last = trained("dar") / "last.pt"
    drawn = draw(last, tmp_path / "texts")
    assert (tmp_path / "texts" / "prompts.txt").read_text().splitlines() == PROMPTS
    made = json.loads((tmp_path / "texts" / "settings.json").read_text())
    assert made["settings"]["prompts"] == PROMPTS and made["settings"]["classes"] == []
    assert made["settings"]["weights"] == sampling.content_of(*load_trained(last))  # as eval.export --metrics expects
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    of_file = draw(last, tmp_path / "file", prompts=[str(tmp_path / "prompts.txt")])
    assert all(np.array_equal(of_file[name], drawn[name]) for name in drawn)
    changed = draw(last, tmp_path / "changed", prompts=[*PROMPTS[:2], "nine"])
    assert json.loads((tmp_path / "changed" / "settings.json").read_text())["hash"] != made["hash"]
    same = [np.array_equal(*pair) for pair in zip(drawn["arr_0"], changed["arr_0"])]
    assert same == (drawn["arr_1"] != 2).tolist() and 0 < sum(same) < 7
    turned = draw(last, tmp_path / "turned", prompts=PROMPTS[::-1], count=7)
    same = [np.array_equal(*pair) for pair in zip(drawn["arr_0"], turned["arr_0"])]
    assert same == (drawn["arr_1"] == 1).tolist()
    draw(last, tmp_path / "long", prompts=[" ".join(100 * PROMPTS)], count=1)  # longer than the name of a file can be


def test_guidance_by_no_caption_or_a_weaker_run_and_two_processes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 5)  # so that both have something to draw
    last, weak = (trained(arm) / "last.pt" for arm in ("dar", "residual"))
    drawn = draw(last, tmp_path / "one", "--cfg-scale=2", count=9)["arr_0"].astype(int)
    both(sampling.main, drawing(last, tmp_path / "two", "--cfg-scale=2", "--batch-size=2", count=9))
    assert abs(npz(tmp_path / "two")["arr_0"] - drawn).max() <= 1
    plain, guided = (
        draw(last, tmp_path / name, *words)["arr_0"]
        for name, words in (("plain", ()), ("guided", ("--cfg-scale=2", f"--guide={weak}")))
    )
    assert not np.array_equal(plain, drawn[:7]) and not np.array_equal(plain, guided)
    assert not np.array_equal(drawn[:7], guided)


def test_what_cannot_be_drawn_is_said(trained, qwen, small_data, encoder_folder, tmp_path, monkeypatch):
    last = trained("residual") / "last.pt"
    labels = f"--data {small_data} --out {tmp_path / 'labels'} --encoder {encoder_folder} {TINY} --eval-every 0"
    train_repa_dar.main(f"{labels} --max-steps 1".split())
    (tmp_path / "empty.txt").touch()
    content = load_file(last)
    content["config"]["content of text"] = "0" * 12
    torch.save(content, tmp_path / "other.pt")
    released = tmp_path / "released.pt"
    torch.save(SIT_MODELS["SiT-S/8"](input_size=8, in_channels=3).state_dict(), released)
    for words, message in (
        (drawing(last, tmp_path / "x", prompts=()), r"prompts = \(\): needs some"),
        (drawing(last, tmp_path / "x", prompts=[str(tmp_path / "empty.txt")]), r"prompts = .*empty.txt.*: needs some"),
        (drawing(tmp_path / "labels" / "last.pt", tmp_path / "x"), "has no effect on a model of labels.* of SiT-S/2"),
        (drawing(released, tmp_path / "x", "--model=SiT-S/8"), "prompts = .* has no effect on a model of labels"),
        (drawing(tmp_path / "other.pt", tmp_path / "x"), "text encoder 'words' is not what it was"),
        (
            drawing(qwen, tmp_path / "x", "--model=Qwen-Image/2"),
            "is not of this trainer; draw from it by diffusers' pipeline",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            sampling.main(words)
    assert not (tmp_path / "x").exists()


# ---- to and from diffusers ----

SENTENCES = ["a red boat", "the sea by the boat is red", "a boat"]
OF_FOLDER = "--depth 3 --hidden-size 32 --num-heads 2"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A published Qwen-Image, but for its size."""
    text_encoder, tokenizer = make_qwen()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    random_weights(transformer)
    sizes = dict(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    normal = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5])
    folder = tmp_path_factory.mktemp("qwen") / "published"
    diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        diffusers.AutoencoderKLQwenImage(**sizes, **normal),
        text_encoder,
        tokenizer,
        transformer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, qwen):
    """70 digits with latents and captions by that Qwen-Image."""
    folder = tmp_path_factory.mktemp("data") / "latents"
    networks = f"--autoencoder {qwen / 'vae'} --text-encoder {qwen} --text-tokens 12"
    prepare.main(f"digits --out {folder} --limit 70 {networks}".split())
    return folder


@pytest.fixture(scope="module")
def retrofit(qwen, latents, tmp_path_factory):
    """Checkpoint of a run that has begun to route, from the published weights."""
    out = tmp_path_factory.mktemp("retrofit") / "run"
    line = f"--config digits_text --model Qwen-Image/2 {OF_FOLDER} --data {latents} --autoencoder {qwen / 'vae'}"
    line += f" --out {out} --text-encoder {qwen} --init-from {qwen} --routing dar --chunk-size 3 --retrofit-steps 8"
    train_repa_dar.main(f"{line} --max-steps 6 --batch-size 8 --eval-every 0 --ema-decays 0.5 --lr 1e-3".split())
    return out / "last.pt"


def test_a_pipeline_of_diffusers_draws_what_we_draw(qwen, retrofit, tmp_path):
    drawn = draw(retrofit, tmp_path / "ours", prompts=SENTENCES, count=4, how="--sampler euler --steps 4")
    model, _ = load_trained(retrofit)
    assert model.gamma == 0.75
    model.save_added(tmp_path / "dar.safetensors", whole=True)
    transformer = RoutedQwenImage.from_pretrained(qwen, subfolder="transformer")
    transformer.load_added(tmp_path / "dar.safetensors")
    pipeline = diffusers.QwenImagePipeline.from_pretrained(qwen, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    for i, (image, label) in enumerate(zip(drawn["arr_0"], drawn["arr_1"])):
        noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(derive_seed(0, Use.SAMPLE, i)))
        theirs = pipeline(
            prompt=SENTENCES[label], latents=pipeline._pack_latents(noise[None], 1, 4, 4, 4), height=8, width=8,
            num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], true_cfg_scale=1.0, output_type="np",
        ).images[0]  # fmt: skip
        assert abs(255 * theirs - image).max() < 1 and image.std() > 2
    assert not np.array_equal(drawn["arr_0"][0], drawn["arr_0"][1])


def test_published_weights_of_another_size_or_function_are_refused(qwen, latents, tmp_path):
    line = f"--config digits_text --model Qwen-Image/2 --data {latents} --autoencoder {qwen / 'vae'} --eval-every 0"
    line += f" --text-encoder {qwen} --out {tmp_path / 'run'}"
    shutil.copytree(qwen / "transformer", tmp_path / "other")
    known = json.loads((tmp_path / "other" / "config.json").read_text())
    for source, sizes, changed, message in (
        (qwen, OF_FOLDER.replace("3", "2", 1), {}, "these weights do not fit the model: unknown transformer_blocks.2"),
        (qwen, OF_FOLDER.replace("-heads 2", "-heads 1"), {}, "norm_q.weight is .16,., the model's is .32,."),
        (tmp_path / "other", OF_FOLDER, {"zero_cond_t": True}, "zero_cond_t = True: that variant"),
        (
            tmp_path / "other",
            OF_FOLDER,
            {"axes_dims_rope": [8, 4, 4]},
            r"axes_dims_rope = \(8, 4, 4\): only \(4, 6, 6\)",
        ),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps(known | changed))
        with pytest.raises(SystemExit, match=f"init_from = .*{message}"):
            train_repa_dar.main(f"{line} --init-from {source} {sizes}".split())


# ---- distillation ----

DAR = "--routing dar --chunk-size 3 --query dynamic --retrofit-steps 8"
LORA = "--student-rank 3 --critic-rank 2"


@pytest.fixture(scope="module")
def distilling(qwen, latents, trained, judge_folder):
    """Arguments of distill.py, of the published teacher or of our own."""

    def build(teacher, out, *extra):
        of = f"--teacher={trained('residual') / 'last.pt'}"
        if teacher == "published":
            of = f"--teacher={qwen} --model=Qwen-Image/2 --autoencoder={qwen / 'vae'} --data={latents}"
        rates = "--lr 1e-3 --critic-lr 1e-3 --critic-steps 1 --ema-decays 0.5 --batch-size 4 --student-steps 2"
        steps = "--max-steps 8 --log-every 1 --checkpoint-every 6 --tensorboard False"
        judged = f"--eval-encoder={judge_folder} --eval-every 8 --eval-samples 4 --eval-batch-size 2"
        return f"{of} --out={out} {DAR} {LORA} {rates} {steps} {judged} {' '.join(extra)}".split()

    return build


def test_a_student_of_captions(distilling, tmp_path):
    """Trained alone and in two shards, drawn from, and loaded as it was saved. tests/test_student_lora.py has more."""
    words, last = distilling("published", tmp_path / "whole"), tmp_path / "whole" / "last.pt"
    distill.main(words)
    saved = load_file(last)["model"]
    assert {name.partition(".")[0] for name in saved} == {"transformer_blocks", "router", "text_router", "null_text"}
    assert all(value.any() for name, value in saved.items() if ".lora_B." in name)  # which starts at zero
    both(distill.main, distilling("published", tmp_path / "shards", "--shard --max-steps=3 --eval-every=0"))
    found = records(tmp_path / "shards")
    assert len(found) == 3
    for line, other in zip(found, records(tmp_path / "whole")):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    drawn = draw(last, tmp_path / "drawn", prompts=SENTENCES, how="")
    settings = json.loads((tmp_path / "drawn" / "settings.json").read_text())["settings"]
    assert (settings["sampler"], settings["steps"]) == ("few-step", 2) and drawn["arr_0"].std() > 2
    run = distill.Distiller(configuration.parse_distillation(words), Ranks())
    run.open_folder()
    run.fade_in()
    run.folder.close()
    generator, y = torch.Generator().manual_seed(0), run.captions(torch.arange(3))
    x, t = torch.randn(3, *run.inputs.shape, generator=generator), torch.rand(3, generator=generator)
    expected = run.model(x, t, y)[0].detach()
    torch.testing.assert_close(load_trained(last, "none")[0](x, t, y)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_gan_on_captions(distilling, tmp_path):
    distill.main(distilling("ours", tmp_path / "run", "--gan-weight=1 --cfg-scale=2 --max-steps=2 --eval-every=0"))
    assert len(records(tmp_path / "run")) == 2
    weights = load_file(tmp_path / "run" / "last.pt")["critic"].values()
    (bias,) = (weight for weight in weights if weight.shape == (1,))  # of the head, which starts at zero
    assert bias.any()
