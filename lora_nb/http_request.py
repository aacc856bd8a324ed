"""What a request for completions says, checked as far as that goes without a model.

A setting of OpenAI's that would be passed over in silence is refused with its reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lora_nb.errors import LoraNbError

MOST_PROMPTS = 16
# Settings of OpenAI's that this server has not got, and the values that ask for nothing.
ABSENT: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "presence_penalty": (0,),
    "stop": ([], ""),
    "suffix": ("",),
    "top_p": (1,),
}
SETTINGS = {"model": str, "prompt": (str, list), "max_tokens": int, "temperature": (int, float), "seed": int, "stream": bool, "user": str}


class RefusedRequestError(LoraNbError):
    """A request that gets no text: its status and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """The body of a request, checked."""

    model: str
    prompts: list[str]
    settings: dict[str, Any]
    stream: bool


def read(body: bytes) -> Wanted:
    """A request's body, checked.

    Raises:
        RefusedRequestError: what is wrong with it.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # no JSON, no text, a number of thousands of digits, nested without end
        raise RefusedRequestError(400, f"The body is not JSON that can be read: {str(error)[:200] or type(error).__name__}.") from error
    if not isinstance(content, dict):
        raise RefusedRequestError(400, f"The body must be a JSON object, not {type(content).__name__}.")
    for key, value in content.items():
        _check_setting(key, value)
    model, prompt = content.get("model"), content.get("prompt")
    if model is None or prompt is None:
        raise RefusedRequestError(400, f"The body needs {'model' if model is None else 'prompt'!r}: the name of an adapter, and a text.")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not 1 <= len(prompts) <= MOST_PROMPTS or not all(isinstance(p, str) for p in prompts):
        raise RefusedRequestError(400, f"'prompt' must be a text, or a list of 1 to {MOST_PROMPTS} texts.")
    if not all(_is_text(t) for t in (model, *prompts)):
        raise RefusedRequestError(400, "'model' and 'prompt' must be whole Unicode: one half of a surrogate pair stands alone.")
    names = {"max_tokens": "max_new_tokens", "temperature": "temperature", "seed": "seed"}
    settings = {ours: content[theirs] for theirs, ours in names.items() if content.get(theirs) is not None}
    return Wanted(model, prompts, {"max_new_tokens": 16, **settings}, bool(content.get("stream")))


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is no number in JSON")


def _check_setting(key: str, value: object) -> None:
    """Known, of its type, and something that this server does."""
    if value is None and key in {*SETTINGS, *ABSENT, "stream_options"}:
        return
    if key in ABSENT:
        if not any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in ABSENT[key]):
            raise RefusedRequestError(400, f"{key!r} is not supported here: leave it out.")
    elif key in SETTINGS:
        kind: Any = SETTINGS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RefusedRequestError(400, f"{key!r} is of the type {type(value).__name__}, which it cannot be.")
    elif key != "stream_options":
        raise RefusedRequestError(400, f"There is no setting {key[:80]!r}. There are: {', '.join(SETTINGS)}.")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
