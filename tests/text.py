"""A tokenizer of single bytes and a tiny random Llama that reads it: any text goes through both and comes back whole."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import tiny_llama

PAD, BOS, EOS = 0, 1, 2


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
