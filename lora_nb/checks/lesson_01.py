"""Exercises of `01_memory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_nb.checks.exercises import Mistake, exercise, value_of
from lora_nb.configs import LoraConfig
from lora_nb.memory.estimate import estimate, shape_of

LLAMAS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0")  # with a head of their own
CARDS = ("RTX 3060", "RTX 4090")
LLAMA_3 = "meta-llama/Llama-3.1-8B"


def _is_number(answer: Any) -> bool:
    return isinstance(answer, int | float) and not isinstance(answer, bool)


@exercise(
    "01.1",
    "Count a Llama",
    difficulty=2,
    minutes=12,
    hints=(
        "One block first: two matrices of h × h, two of keys × h, three of f × h, and 2h for its norms.",
        "Then layers × block, one norm of h at the end, and twice vocabulary × h: the embedding and the head.",
    ),
)
def parameters_of(answer: Callable[..., Any]) -> str:
    """2Vh + L(2h² + 2kh + 3fh + 2h) + h."""
    for name in LLAMAS:
        shape = shape_of(name)
        v, h, f, layers, k = shape.vocabulary, shape.width, shape.inner, shape.layers, shape.keys
        off = shape.parameters - value_of(answer, v, h, f, layers, k)
        if off == 0:
            continue
        likely = {
            v * h: "one matrix of vocabulary × h is missing: embedding and output head are two",
            layers * f * h: "the MLP has three matrices: gate, up and down",
            (2 * layers + 1) * h: "the norms are missing: two in each block and one at the end",
            h: "the norm at the end is missing",
            -2 * layers * (h - k) * h: "keys and values are narrower than queries where heads share them: keys × h each",
            layers * (2 * h * h - 2 * k * h): "queries and the output projection are h × h, whatever the keys",
        }
        raise Mistake(f"{name} has {shape.parameters:,}, you {shape.parameters - off:,}" + (f": {likely[off]}." if off in likely else "."))
    return f"exact for {len(LLAMAS)} models, one of them with {shape_of(LLAMA_3).parameters:,} parameters."


@exercise(
    "01.2",
    "Before the first text",
    difficulty=1,
    minutes=4,
    hints=(
        "Four things of the parameter's own size: itself, its gradient, and two moments.",
        "7e9 parameters × 16 bytes, divided by 2**30.",
    ),
)
def before_any_text(answer: Any) -> str:
    """16 bytes for each of 7 billion."""
    if not _is_number(answer):
        raise Mistake(f"the answer is a number of GiB here, and {type(answer).__name__} is none.")
    right = 7e9 * 16 / 2**30
    likely = {
        7e9 * 16 / 1e9: "these are GB of 10⁹ bytes; a GiB is 2³⁰ bytes",
        7e9 * 16: "these are bytes; a GiB is 2³⁰ of them",
        7e9 * 12 / 2**30: "three things of 4 bytes; there are four: weight, gradient, and two moments",
        7e9 * 8 / 2**30: "that is two things of 4 bytes, or all four in 16 bits",
        7e9 * 4 / 2**30: "that is the weights alone",
    }
    for value, said in likely.items():
        if abs(answer / value - 1) < 0.005:
            raise Mistake(said + ".")
    if abs(answer / right - 1) > 0.005:
        raise Mistake(f"not {answer:,.1f}: multiply the parameters by the bytes that each has, then divide by 2**30.")
    return f"{right:.1f} GiB: more than the largest card of most people, with nothing read yet."


@exercise(
    "01.3",
    "The logits of one text",
    difficulty=1,
    minutes=3,
    hints=("One number for each token of the text and each token of the vocabulary.", "tokens × vocabulary × 4 bytes."),
)
def logits(answer: Any) -> str:
    """4,096 × 128,256 × 4."""
    numbers = 4096 * 128_256
    if not _is_number(answer):
        raise Mistake(f"the answer is a number of bytes here, and {type(answer).__name__} is none.")
    likely = {
        numbers: "that is how many numbers they are; in 32 bits each has four bytes",
        2 * numbers: "that is in 16 bits; the loss needs 32",
        3 * 4 * numbers: "that is the three copies; one was asked for",
        4 * 128_256: "that is one token's",
    }
    if answer in likely:
        raise Mistake(likely[int(answer)] + ".")
    if answer != 4 * numbers:
        raise Mistake(f"not {answer:,}: multiply tokens, vocabulary and the bytes of one number.")
    return f"{4 * numbers:,} bytes, close to 2 GiB, and the plain loss holds that three times over."


@exercise(
    "01.4",
    "The longest text",
    difficulty=3,
    minutes=15,
    hints=(
        "Begin with tokens = 0; while tokens + 256 fits, add 256.",
        "estimate(name, LoraConfig(r=16), seq_len=…, quant='nf4', gradient_checkpointing=True).fits(card) is True or False.",
    ),
)
def longest(answer: Callable[..., Any]) -> str:
    """The last multiple of 256 that fits."""
    found = {}
    for card in CARDS:
        given, right = value_of(answer, card), _longest(card)
        likely = {
            right + 256: "that is the first that does not fit",
            _longest(card, gradient_checkpointing=False): "that is without checkpointing",
            _longest(card, quant=None): "that is with the weights in 16 bits: quant='nf4' is missing",
        }
        if given != right:
            raise Mistake(
                f"on the {card} {given} tokens" + (f": {likely[given]}." if given in likely else f" are not the most; {right} are.")
            )
        found[card] = right
    return "; ".join(f"{card} {tokens:,} tokens" for card, tokens in found.items()) + ", for the same model."


def _longest(card: str, quant: str | None = "nf4", *, gradient_checkpointing: bool = True) -> int:
    def fits(tokens: int) -> bool:
        found = estimate(LLAMA_3, LoraConfig(r=16), seq_len=tokens, quant=quant, gradient_checkpointing=gradient_checkpointing)
        return found.fits(card)

    tokens = 0
    while fits(tokens + 256):
        tokens += 256
    return tokens
