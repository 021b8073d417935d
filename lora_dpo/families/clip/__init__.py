"""CLIP's text side where a checkpoint is one file: the tokenizer, and OpenCLIP's weights under transformers' names.

`merges.txt.gz` is OpenAI's list of byte-pair merges (its licence lies beside it); the vocabulary follows from it.
"""

from __future__ import annotations

import gzip
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

MERGES = Path(__file__).with_name("merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77

_OPEN_CLIP = (
    (re.compile(r"^token_embedding\."), "embeddings.token_embedding."),
    (re.compile(r"^positional_embedding$"), "embeddings.position_embedding.weight"),
    (re.compile(r"^ln_final\."), "final_layer_norm."),
    (re.compile(r"^text_projection$"), "text_projection.weight"),
    (re.compile(r"^transformer\.resblocks\.(\d+)\.ln_([12])\."), r"encoder.layers.\1.layer_norm\2."),
    (re.compile(r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\."), r"encoder.layers.\1.mlp.fc1."),
    (re.compile(r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\."), r"encoder.layers.\1.mlp.fc2."),
    (re.compile(r"^transformer\.resblocks\.(\d+)\.attn\."), r"encoder.layers.\1.self_attn."),
)


def tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's 49408 tokens, 77 to a text; OpenAI's encoder pads with "<|endoftext|>", OpenCLIP's with "!"."""
    vocabulary, merges = _vocabulary()
    pairs: Any = merges  # CLIPTokenizer's own signature says strings; the tokenizers library takes pairs
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad_token, model_max_length=MAX_TOKENS)


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, bytes that end a word, what the merges make, start and end: ids in this order, as CLIP was trained."""
    merges = []
    for line in gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines():
        left, right = line.split()
        merges.append((left, right))
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges), START, END]
    return {name: index for index, name in enumerate(names)}, merges


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text tower under the names that transformers gives the same tensors; others are left out."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in _OPEN_CLIP:
            new, found = pattern.subn(replacement, name)
            if found:
                break
        else:
            continue
        if ".in_proj_" in new:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            # OpenCLIP multiplies by the projection from the right.
            renamed[new] = tensor.T.contiguous() if name == "text_projection" else tensor
    return renamed
