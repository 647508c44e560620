"""Frozen text encoders: what a text-to-image model is told about an image.

    encoder = load_text_encoder("openai/clip-vit-large-patch14", tokens=77)
    encoder(["a red boat"])                                     # (1, 77, 769): tokens, and their mask as last channel

Shapes: B captions, L tokens of a caption, W width of a token.
"""

import functools
import hashlib
import os
import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.encoders import reason_of
from runtime import fingerprint

WORD_WIDTH = 32


class TextEncoder(nn.Module):
    """Tokens of captions from a frozen network, cut or padded to a fixed number.

    name, tokens (L): as given. network: maps a list of B captions and L to tokens (B, at most L, W) and their mask.
    The fingerprint changes with any weight, the vocabulary, the kind of network and L.
    Raises ValueError where an empty caption, which guidance needs, has no token: attention over nothing is NaN.
    """

    def __init__(self, name: str, tokens: int, network: nn.Module):
        super().__init__()
        self.name, self.tokens, self.network = name, tokens, network
        self.eval().requires_grad_(False)
        self.fingerprint = fingerprint(self, f"{network.identity} {tokens}")
        empty = self([""])
        self.width = empty.shape[-1] - 1
        if not empty[..., -1].any():
            raise ValueError("its tokenizer gives no token for an empty caption")

    @torch.no_grad()
    def forward(self, captions: list[str]) -> torch.Tensor:
        """-> float32 (B, L, W + 1). The last channel is 1 where there is a token; all channels are 0 where not."""
        tokens, mask = self.network(captions, self.tokens)
        mask = mask.unsqueeze(-1)
        found = torch.cat([tokens.float().masked_fill(mask == 0, 0), mask.float()], dim=-1)
        return F.pad(found, (0, 0, 0, self.tokens - found.shape[1]))


@functools.lru_cache(maxsize=2**16)
def word_vector(word: str) -> torch.Tensor:
    """(W) standard normal numbers that follow from the word alone."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8])
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(WORD_WIDTH, dtype=np.float32))


class Words(nn.Module):
    """A random vector for each word, and one of its own for a caption without words. Needs no download.

    It knows nothing about language: any two words are as far apart as any other two, "cat" and "cats" among them. It
    serves trials with few words, such as those of the digits.
    """

    identity = "words"

    def __init__(self):
        super().__init__()
        self.register_buffer("nothing", word_vector(""))  # the fingerprint thus tells if NumPy draws other numbers

    def forward(self, captions, length):
        words = [re.findall(r"\w+", caption.lower())[:length] for caption in captions]
        found = [torch.stack([word_vector(word) for word in row or [""]]).to(self.nothing.device) for row in words]
        return pad_sequence(found, True), pad_sequence([row.new_ones(len(row)) for row in found], True)


class TextTransformer(nn.Module):
    """The last hidden states of a text encoder of transformers, with its own tokenizer. source: folder or hub name."""

    def __init__(self, source: str):
        import transformers  # takes seconds, and nothing else needs it

        super().__init__()
        kind = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        # Of an image-text pair the text model, of T5 and its like the encoder alone.
        self.clip = kind.model_type.startswith("clip")
        pair = transformers.AutoModelForTextEncoding if kind.is_encoder_decoder else transformers.AutoModel
        self.model = pretrained(transformers.CLIPTextModel if self.clip else pair, source, dtype=torch.float32)
        self.tokenizer, vocabulary = pretrained_tokenizer(source, padding_side="right")
        self.identity = f"{type(self.model).__name__} {vocabulary}"

    def forward(self, captions, length):
        options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        given = self.tokenizer(captions, **options).to(self.model.device)
        mask = given.attention_mask
        if self.clip:
            # U-ViT's features of MS-COCO, on which REPA trains its MM-DiT, and Stable Diffusion take all 77 tokens,
            # without a mask: after the caption CLIP goes on to gather it. Runs stay comparable only like that.
            return self.model(input_ids=given.input_ids).last_hidden_state, torch.ones_like(mask)
        return self.model(input_ids=given.input_ids, attention_mask=mask).last_hidden_state, mask


class QwenImageText(nn.Module):
    """What QwenImagePipeline makes of a prompt, by its own template. source: folder or hub name of the pipeline.

    Of the pipeline only text encoder and tokenizer are read. Raises ValueError where it is of another class.
    """

    def __init__(self, source: str):
        import diffusers
        import transformers

        super().__init__()
        kind = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
        if kind != "QwenImagePipeline":
            raise ValueError(f"it is a {kind}, and of pipelines only QwenImagePipeline is supported")
        # In the precision in which it is published: in float32 it takes 33 GB.
        self.model = pretrained(
            transformers.Qwen2_5_VLForConditionalGeneration, source, subfolder="text_encoder", dtype="auto"
        )
        tokenizer, vocabulary = pretrained_tokenizer(source, subfolder="tokenizer")
        parts = dict(text_encoder=self.model, tokenizer=tokenizer)
        self.pipeline = diffusers.QwenImagePipeline(scheduler=None, vae=None, transformer=None, **parts)
        self.identity = f"QwenImagePipeline {vocabulary}"

    def forward(self, captions, length):
        tokens, mask = self.pipeline.encode_prompt(captions, self.model.device, max_sequence_length=length)
        return tokens, tokens.new_ones(tokens.shape[:2]) if mask is None else mask  # None: nothing is padding


def pretrained(kind, source, **options):
    """A model of transformers. Raises LookupError where weights are missing, which transformers leaves at random."""
    model, found = kind.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **options)
    if missing := sorted(key for key in found["missing_keys"] if "pooler" not in key):  # nothing here reads a pooler
        raise LookupError(f"{len(missing)} tensors are not in it, such as {missing[0]}")
    return model


def pretrained_tokenizer(source, **options):
    """A tokenizer and its sorted vocabulary. Raises LookupError where transformers makes one up for want of files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary.keys() - tokenizer.all_special_tokens) < 2:  # that of T5 then has its mark of a space
        raise LookupError("its tokenizer has no vocabulary; save it there too")
    return tokenizer, sorted(vocabulary.items())


def is_pipeline(source: str) -> bool:
    """Whether a folder, or a repository of the hub, holds a pipeline of diffusers."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if os.path.isdir(source):
        return os.path.isfile(os.path.join(source, "model_index.json"))
    try:
        return bool(hf_hub_download(source, "model_index.json"))
    except EntryNotFoundError:  # also where there is no network
        return False


def load_text_encoder(name: str, tokens: int | None = None) -> TextEncoder:
    """The text encoder that the user names, on the CPU.

    name: "words" (see Words), or a folder or hub name of a QwenImagePipeline of diffusers, or of a text encoder of
        transformers such as CLIP, T5 or BERT with its tokenizer.
    tokens: L; if not given, 8 for "words" and the 77 of CLIP for all others.
    Raises ValueError where there is none, it cannot be had, or it cannot give that many tokens.
    """
    if tokens is None:
        tokens = 8 if name == "words" else 77
    if tokens < 1:
        raise ValueError(f"text_tokens = {tokens}: must be at least 1")
    if name == "words":
        return TextEncoder(name, tokens, Words())
    try:
        network = QwenImageText(name) if is_pipeline(name) else TextTransformer(name)
        return TextEncoder(name, tokens, network)
    except Exception as error:  # transformers, diffusers and the hub raise many kinds
        raise ValueError(
            f"text_encoder = {name!r} cannot be used for {tokens} tokens ({reason_of(error)}); give words, or "
            "OWNER/NAME on the hub or a folder of save_pretrained with text encoder and tokenizer: of transformers, or "
            "a QwenImagePipeline of diffusers; HF_HUB_OFFLINE=1 looks in the hub's cache alone"
        ) from error
