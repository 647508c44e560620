"""Captions: text encoders against transformers and diffusers, and that each image is served with its own caption.

Networks are tiny and random, of the real classes, saved to a folder and loaded as real ones are. Pictures are flat, and
their captions name their level of red.
"""

import functools
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from models.text import load_text_encoder  # before diffusers: see models' docstring

import diffusers
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from dataset import stages
from dataset.prepared import PreparedImages
from models.text import TextEncoder
from tests.conftest import ending, forked, killed
from tests.test_data import content, encoded, flat, refusal, run, stored_images
from tests.test_prepare import Interrupt

CAPTIONS = ["a red boat", "", "boat", "the sea is red and the red boat is on the sea, boat and sea", "Unheard of"]
WORDS = "a red boat the sea is and on of system user assistant describe image by color".split()


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(stages, "IMAGES_PER_FILE", 4)


# ---- text encoders ----


def word_tokenizer(end="</s>", **special):
    """A word for a token, and `end` after each caption."""
    names = ["<pad>", "<unk>", "</s>", *special.get("extra_special_tokens", [])]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+|\n"), "removed", invert=True)
    if end:
        found.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", **special
    )


def clip_tokenizer():
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])


SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def make(kind, seed=0):
    """A network with random weights, the part of it that reads text, and its tokenizer."""
    torch.manual_seed(seed)
    if kind == "clip":
        text = SIZES | dict(vocab_size=190, max_position_embeddings=40, bos_token_id=188, eos_token_id=189)
        vision = SIZES | dict(image_size=8, patch_size=4)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        )
        return model.eval(), model.text_model, clip_tokenizer()
    if kind == "t5":
        config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        model = transformers.T5Model(config).eval()
        return model, model.encoder, word_tokenizer()
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, max_position_embeddings=40, **SIZES)).eval()
    return model, model, word_tokenizer()


def save(folder, kind, **options):
    model, _, tokenizer = make(kind, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check(found, expected, length):
    """found: (B, L, W + 1); expected: for each caption its tokens (n, W), n at most L."""
    assert found.dtype == torch.float32 and found.shape == (len(expected), length, expected[0].shape[1] + 1)
    for row, tokens in zip(found, expected):
        torch.testing.assert_close(row[: len(tokens), :-1], tokens, rtol=1e-4, atol=1e-5)
        assert (row[: len(tokens), -1] == 1).all() and (row[len(tokens) :] == 0).all()


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_tokens_are_those_of_transformers(kind, tmp_path):
    """The reference takes each caption alone, without padding. CLIP alone reads its padding, all of it."""
    length, (_, reader, tokenizer) = 9, make(kind)
    encoder = load_text_encoder(save(tmp_path / "net", kind), length)
    expected = []
    for caption in CAPTIONS:
        given = tokenizer(caption, truncation=True, max_length=length, return_tensors="pt").input_ids
        if kind == "clip":
            given = torch.nn.functional.pad(given, (0, length - given.shape[1]), value=189)
        expected.append(reader(input_ids=given).last_hidden_state[0].detach())
    check(encoder(CAPTIONS), expected, length)
    assert (encoder.tokens, encoder.width) == (9, 16) and torch.equal(encoder(CAPTIONS), encoder(CAPTIONS))
    # What it is known by: weights and length, and not the place.
    (tmp_path / "net").rename(tmp_path / "moved")
    names = [load_text_encoder(str(tmp_path / "moved"), count).fingerprint for count in (length, 10)]
    assert names[0] == encoder.fingerprint != names[1]
    assert load_text_encoder(save(tmp_path / "other", kind, seed=1), length).fingerprint not in names


def make_qwen():
    """Text encoder and tokenizer of a QwenImagePipeline."""
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, depth=1, num_heads=2, out_hidden_size=16)
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    text = SIZES | dict(num_key_value_heads=1, vocab_size=40, rope_parameters=rope)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    tokenizer = word_tokenizer(end="", extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of a pipeline that names a transformer and a VAE which are not there, and the same pipeline."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("qwen"), make_qwen()
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    parts = {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"]}
    parts |= {"tokenizer": ["transformers", "Qwen2Tokenizer"], "vae": ["diffusers", "AutoencoderKLQwenImage"]}
    parts |= {"transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline", **parts}))
    return str(folder), diffusers.QwenImagePipeline(None, None, model, tokenizer, None)


@pytest.mark.parametrize("length", [8, 40])
def test_tokens_are_those_of_qwen_images_pipeline(qwen, length):
    folder, pipeline = qwen
    encoder, expected = load_text_encoder(folder, length), []
    for caption in CAPTIONS:
        tokens, mask = pipeline.encode_prompt(caption, device="cpu")
        assert mask is None and tokens.shape[1] > 2  # 34 tokens of the template are gone, its end is there
        expected.append(tokens[0, :length].detach())
    check(encoder(CAPTIONS), expected, length)
    check(encoder(CAPTIONS[:1]), expected[:1], length)  # alone: the pipeline then gives no mask
    if length == 40:
        assert len({len(tokens) for tokens in expected}) > 2 and encoder(CAPTIONS)[..., -1].sum(1).max() < length


def test_words_are_known_by_their_letters_alone():
    encoder = load_text_encoder("words")
    assert (encoder.tokens, encoder.width) == (8, 32)
    found = encoder(["A red, red boat!", "the boat", "", "one two three four five six seven eight nine ten", "..."])
    assert found[..., -1].sum(1).tolist() == [4, 2, 1, 8, 1] and (found[found[..., -1] == 0] == 0).all()
    assert torch.equal(found[0, 1], found[0, 2]) and torch.equal(found[0, 3], found[1, 1])
    assert torch.equal(found[2], found[4])
    vectors = encoder([str(i) for i in range(1000)])[:, 0, :-1]
    assert vectors.mean().abs() < 0.02 and (vectors.var() - 1).abs() < 0.03
    assert torch.cdist(vectors, vectors)[~torch.eye(1000, dtype=bool)].min() > 2  # 8 on average
    assert load_text_encoder("words", 8).fingerprint == encoder.fingerprint != load_text_encoder("words", 9).fingerprint


def spoilt(folder, name):
    """A folder that holds what cannot be used, and what is said of it."""
    if name == "pipeline":
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        return "StableDiffusionPipeline"
    if name == "nothing":
        return "give words, or OWNER/NAME"
    save(folder, "t5" if name == "tokenizer" else "bert")
    if name == "weights":
        path = folder / "model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({key: value for key, value in load_file(path).items() if "layer.1" not in key}, path)
        return "16 tensors are not in it, such as encoder.layer.1"
    if name == "tokenizer":
        for path in folder.glob("token*"):
            path.unlink()
        return "its tokenizer has no vocabulary"
    word_tokenizer(end="").save_pretrained(folder)
    return "gives no token for an empty caption"


@pytest.mark.parametrize("name", ["pipeline", "nothing", "weights", "tokenizer", "end"])
def test_what_is_no_text_encoder(name, tmp_path):
    reason = spoilt(tmp_path, name)
    with pytest.raises(ValueError, match=f"text_encoder = '{tmp_path}' cannot be used for 9 tokens") as raised:
        load_text_encoder(str(tmp_path), 9)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_text_encoders_and_lengths_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="text_tokens = 0"):
        load_text_encoder("words", 0)
    with pytest.raises(ValueError, match="for 77 tokens .*77 and max_position_embeddings: 40"):
        load_text_encoder(save(tmp_path, "clip"))
    with pytest.raises(ValueError, match="text_encoder = 'someone/some-text-encoder' cannot be used.*HF_HUB_OFFLINE"):
        load_text_encoder("someone/some-text-encoder")


# ---- captions of each kind of source ----

SAID = [f"a square of red {10 * (i + 1)}" for i in range(11)]
SAID[7] = ""  # is a caption


def captions_of(data):
    """Of the items of a PreparedImages, from the file beside their tokens."""
    captions = json.loads(data.files["text"].with_name("captions.json").read_text())
    return [captions[row % data.count] for row in data.rows]


def pictures_of(captions):
    """Bytes of a picture for each of them, of red 10, 20 and so on; number 3 is damaged."""
    return [b"junk" if i == 3 else encoded(flat((10 * (i + 1), 0, 0), (9, 9 + i))) for i in range(len(captions))]


def write_table(folder, captions, name="text", labels=None, **columns):
    images = pyarrow.array([{"bytes": data, "path": None} for data in pictures_of(captions)])
    columns = {"image": images, name: captions} | ({"label": labels} if labels else {}) | columns
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return folder / "train.parquet"


def write_folder(folder, captions, beside=True, classes=("",), key="text", below=""):
    """Pictures in class folders or in one; captions in text files beside them, or in a metadata.jsonl of a folder."""
    lines = []
    for i, (data, caption) in enumerate(zip(pictures_of(captions), captions)):
        path = folder / classes[i * len(classes) // len(captions)] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if beside and caption is not None:
            path.with_suffix(".txt").write_text(f"{caption}\n")
        lines.append({"file_name": str(path.relative_to(folder / below))} | ({key: caption} if caption else {}))
        lines[-1] |= {key: ""} if caption == "" else {}
    if not beside:
        (folder / below / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


SOURCES = {  # how it is written; extra words; labels that are expected, None for all 0
    "parquet": (write_table, [], None),
    "parquet with labels": (functools.partial(write_table, name="prompt", labels=[0] * 6 + [1] * 5), [], [0, 1]),
    "parquet, named column": (
        functools.partial(write_table, name="blip", text=["x"] * 11), ["--caption-column", "blip"], None
    ),
    "flat folder, text files": (write_folder, [], None),
    "flat folder, metadata": (functools.partial(write_folder, beside=False), [], None),
    "flat folder, other key": (
        functools.partial(write_folder, beside=False, key="blip"), ["--caption-column", "blip"], None
    ),
    "class folders, text files": (functools.partial(write_folder, classes=("x", "y")), [], [0, 1]),
    "class folders, metadata": (functools.partial(write_folder, beside=False, classes=("x", "y")), [], [0, 1]),
    "metadata further down": (functools.partial(write_folder, beside=False, classes=("x",), below="x"), [], None),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, limit", [*((kind, None) for kind in SOURCES), *((kind, 8) for kind in [*SOURCES][:: len(SOURCES) - 1])]
)
def test_each_image_is_served_with_its_caption(kind, limit, tmp_path, capsys):
    write, words, labels = SOURCES[kind]
    captions = [None if i == 5 else caption for i, caption in enumerate(SAID)]
    out, source = tmp_path / "out", tmp_path / "source"
    source.mkdir()
    source = write(source, captions)
    words = [*words, "--resolution", 8, "--text-encoder", "words", "--batch-size", 3]
    run(source, out, *words, *(["--limit", limit] if limit else []))
    printed = capsys.readouterr().out
    assert "left out, without a caption: 1 (" in printed and "none of .bmp" not in printed
    assert "in no class folder" not in printed and "1 damaged and left out" in printed
    encoder = load_text_encoder("words")
    data = PreparedImages(out, text=encoder.fingerprint)
    batch = data.__getitems__(range(len(data)))
    rows = (batch["images"][:, 0, 0, 0] // 10 - 1).tolist()
    kept = [i for i in range(11) if i != 5]  # the limit spreads over those with a caption; number 3 is damaged
    kept = [kept[k * 10 // (limit or 10)] for k in range(limit or 10)]
    assert rows == [i for i in kept if i != 3]
    assert captions_of(data) == [SAID[i] for i in rows]
    assert batch["text"].dtype == torch.float16 and torch.equal(batch["text"], encoder(captions_of(data)).half())
    assert torch.equal(data.null_text, encoder([""])[0].half())
    names = ["image"] if labels is None else labels
    assert data.num_classes == len(names)
    assert batch["labels"].tolist() == [0 if labels is None else int(i > 5) for i in rows]


def test_the_first_of_several_captions_is_taken(tmp_path):
    several = [[caption, "another"] for caption in SAID]
    several[5] = []
    run(write_table(tmp_path, several, name="captions"), tmp_path / "out", "--resolution", 8, "--text-encoder", "words")
    (name,) = os.listdir(tmp_path / "out" / "text")
    assert captions_of(PreparedImages(tmp_path / "out", text=name)) == [SAID[i] for i in range(11) if i not in (3, 5)]


def test_digits_are_captioned_by_their_labels(tmp_path, digits):
    run("digits", tmp_path / "out", "--text-encoder", "words", "--limit", 100)
    encoder, names = load_text_encoder("words"), "zero one two three four five six seven eight nine".split()
    data = PreparedImages(tmp_path / "out", text=encoder.fingerprint)
    assert all(names[label] in caption for label, caption in zip(data.labels, captions_of(data)))
    assert len({caption.replace(names[label], "") for label, caption in zip(data.labels, captions_of(data))}) == 3
    assert encoder(captions_of(data))[..., -1].sum(1).max() <= 6  # none is cut
    assert torch.equal(data.__getitems__([7])["text"][0], encoder([captions_of(data)[7]])[0].half())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "source").mkdir()
    return write_folder(tmp_path / "source", SAID)


ASKED = ["--resolution", 8, "--text-encoder", "words", "--batch-size", 3]


def test_a_mirrored_image_has_the_same_caption(folder, tmp_path):
    run(folder, tmp_path / "out", *ASKED, "--mirror")
    encoder = load_text_encoder("words")
    for part in (True, False):
        data = PreparedImages(tmp_path / "out", text=encoder.fingerprint, mirror=True, held_out=3, training=part)
        half = len(data) // 2
        assert half == (7 if part else 3) and captions_of(data)[:half] == captions_of(data)[half:]
        items = [half + 1, 0, 2 * half - 1]
        expected = encoder([captions_of(data)[i] for i in items]).half()
        assert torch.equal(data.__getitems__(items)["text"], expected) and torch.equal(data.conditions(items), expected)
    plain = PreparedImages(tmp_path / "out", mirror=True)
    assert plain.null_text is None and "text" not in plain.__getitems__([0])
    assert torch.equal(plain.conditions([3, 12]), plain.labels[[3, 12]])
    with pytest.raises(ValueError, match="no finished text 0123456789ab; run .* with --text-encoder added"):
        PreparedImages(tmp_path / "out", text="0123456789ab", mirror=True)


@pytest.mark.parametrize("kind", ["words", "t5"])
def test_killed_or_shared_the_rows_are_the_same(kind, folder, tmp_path, monkeypatch):
    """Files of 4 images in batches of 3: of the six calls of 11 images, one for the empty caption comes first."""
    words = [*ASKED, "--text-encoder", save(tmp_path / kind, kind) if kind != "words" else kind, "--text-tokens", 6]
    run(folder, tmp_path / "whole", *words)
    (stored,) = (tmp_path / "whole" / "text").iterdir()
    encoder = load_text_encoder(str(words[-3]), 6)
    expected = encoder(SAID).half().numpy()
    expected[3] = 0  # the damaged one
    np.testing.assert_allclose(np.load(stored / "tokens.npy"), expected, rtol=2e-3, atol=1e-4)
    assert json.loads((stored / "captions.json").read_text()) == SAID
    outcome = forked(*[functools.partial(run, folder, tmp_path / "shared", *words)] * 2, ranks=True)
    assert outcome == [None, None] and content(tmp_path / "shared") == content(tmp_path / "whole")

    def dies():
        monkeypatch.setattr(stages.Rows, "make", ending(killed, stages.Rows, "make", lambda self, rows: rows.start > 3))
        run(folder, tmp_path / "out", *words)

    assert forked(dies) == [-9]
    with pytest.raises(ValueError, match=f"no finished text {stored.name}; .*--text-encoder"):
        PreparedImages(tmp_path / "out", text=stored.name)
    calls = Interrupt(TextEncoder.forward, None)
    monkeypatch.setattr(TextEncoder, "forward", calls)
    run(folder, tmp_path / "out", *words)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert calls.calls == 1 + 2 + 1 + 2 + 1  # at loading, two to measure the time, the empty caption, and two files


def test_text_can_follow_and_is_checked(folder, tmp_path, capsys):
    run(folder, tmp_path / "both", *ASKED)
    run(folder, tmp_path / "both", *ASKED, "--text-tokens", 5)  # two of them in one folder
    printed = capsys.readouterr().out
    assert "images already there" in printed and len(os.listdir(tmp_path / "both" / "text")) == 2
    run("", tmp_path / "both", "--verify")
    path = next(tmp_path.glob("both/text/*/tokens.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{path} rows 8 to 10" in refusal("", tmp_path / "both", "--verify")
    # Other captions of the same images are no reason to mix them.
    before = content(tmp_path / "both")
    (folder / "00.txt").write_text("something else")
    assert "other settings (captions: " in refusal(folder, tmp_path / "both", *ASKED)
    (folder / "00.txt").unlink()
    assert "other settings (count: 11 -> 10" in refusal(folder, tmp_path / "both", *ASKED)
    assert content(tmp_path / "both") == before


# ---- what is refused ----


def test_sources_without_captions(tmp_path, folder):
    out, bare = tmp_path / "out", tmp_path / "bare" / "cat"
    bare.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(bare / "a.png")
    for words, message in (
        ([], f"source '{bare.parent}' has no captions for the --text-encoder; they may be in a column"),
        (["--text-encoder", ""], None),
        (["--text-encoder", "", "--text-tokens", 5], "text_tokens and caption_column are for captions; give a"),
    ):
        if message is None:
            run(bare.parent, tmp_path / "fine", *ASKED, *words)
        else:
            assert message in refusal(bare.parent, out, *ASKED, *words)
    assert "no subfolder per class" in refusal(folder, out, "--resolution", 8)  # as ever where none are asked for
    assert "text_tokens = 0" in refusal(folder, out, *ASKED, "--text-tokens", 0)
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "x"}\n{"text": "y"}\n')
    assert "metadata.jsonl must have an object with file_name and text" in refusal(folder, out, *ASKED)
    (folder / "metadata.jsonl").unlink()
    (folder / "02.txt").write_bytes(b"caf\xe9")
    assert "02.txt is no text in UTF-8" in refusal(folder, out, *ASKED)
    message = refusal(write_table(tmp_path, SAID, prompt=SAID), out, *ASKED)
    assert "caption column must be named with --caption-column: 'none was found for certain'" in message
    table = write_table(tmp_path, list(range(11)))
    assert "has no captions for the --text-encoder" in refusal(table, out, *ASKED)
    assert not out.exists()


def test_images_without_text_are_as_ever(folder, tmp_path):
    """What a text encoder adds is in text/ alone."""
    both = tmp_path / "both"
    for i in range(11):
        for end in ("png", "txt"):
            os.makedirs(both / "x", exist_ok=True)
            (folder / f"{i:02}.{end}").rename(both / "x" / f"{i:02}.{end}")
    run(both, tmp_path / "plain", "--resolution", 8)
    run(both, tmp_path / "with", *ASKED)
    left = {name: data for name, data in content(tmp_path / "with").items() if not name.startswith("text/")}
    assert left == content(tmp_path / "plain") and len(stored_images(tmp_path / "plain")) == 11
    run(both, tmp_path / "plain", *ASKED)  # added later
    assert content(tmp_path / "plain") == content(tmp_path / "with")
