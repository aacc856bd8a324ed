"""A tokenizer of single bytes and a tiny random Llama that reads it: any text goes through both and comes back whole; and texts."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lora_nb as ln
from tests.models import tiny_llama

PAD, BOS, EOS = 0, 1, 2
WORDS = ["to", "and", "from", "under", "beyond", "through", "something", "quite a long prompt", "no", "yes"]
PAIRS = ln.dataset([(word, word[::-1] * (1 + i % 3)) for i, word in enumerate(WORDS)])  # of unlike lengths


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """256 bytes after <pad>, <s> and </s>; as many tokenizers do, it may lack the token that begins a text."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>" if bos else None, "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def byte_llama(*, seed: int = 0, dropout: float = 0.0) -> LlamaForCausalLM:
    """Two layers over 259 tokens and 128 positions; weights large enough that its guesses are sharp."""
    return tiny_llama(seed=seed, vocabulary=259, layers=2, positions=128, initializer_range=0.2, attention_dropout=dropout)


def stored(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
