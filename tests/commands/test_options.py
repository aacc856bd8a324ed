"""A verb's signature is its parser, its help and its completion."""

from typing import Annotated

import pytest

from lora_nb.commands import NOTEBOOK, TERMINAL, Session
from lora_nb.commands.options import HelpAsked, RefusedError, complete, options, overview, parse


def suggest(session: Session) -> list[str]:
    return ["here", *session.variables]


def bake(
    session: Session,
    what: Annotated[str, "cake or bread", suggest],
    *,
    heat: Annotated[int | None, "degrees"] = None,
    kind: Annotated[str, "of oven", ("gas", "stone")] = "",
    shares: Annotated[list[float], "of each flour"] = (),
    slow: Annotated[bool, "take time"] = False,
) -> None:
    """Bake."""


def parsed(*words: str, **variables: object) -> dict[str, object]:
    return parse(words, (bake,), Session(variables=variables), "x")[1]


def test_words_become_what_the_signature_says() -> None:
    assert parsed("bake", "cake", "--heat", "180", "--shares", "0.5", "1", "--slow") == {
        "what": "cake",
        "heat": 180,
        "kind": "",
        "shares": [0.5, 1.0],
        "slow": True,
    }
    assert parsed("bake", "bread")["shares"] == ()


def test_a_dollar_takes_the_variable_itself_where_text_is_wanted_and_its_value_where_a_number_is() -> None:
    pairs = [("a", "b")]
    found = parsed("bake", "$pairs", "--heat", "$t", pairs=pairs, t="200")
    assert found["what"] is pairs
    assert found["heat"] == 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bke"], "x: there is no verb 'bke'. Did you mean 'bake'?"),
        (["bake"], "the following arguments are required: what"),
        (["bake", "cake", "--hat", "3"], "x bake: there is no option '--hat'. Did you mean '--heat'?"),
        (["bake", "cake", "tea"], "x bake: there is no place for 'tea'"),
        (["bake", "cake", "--heat", "hot"], "argument --heat: invalid int value: 'hot'"),
        (["bake", "cake", "--kind", "gass"], "argument --kind: 'gass': Did you mean 'gas'?"),
        (["bake", "$caek"], "$caek: there is no variable 'caek'. Did you mean 'cake'?"),
        (["bake", "cake", "--he", "3"], "Did you mean '--heat'?"),
    ],
)
def test_a_wrong_word_is_refused_with_the_nearest_right_one(words: list[str], said: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        parsed(*words, cake=1)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_of_all_lists_each_verb(words: list[str]) -> None:
    with pytest.raises(HelpAsked, match="bake  Bake\\."):
        parsed(*words)


def test_help_of_one_says_its_defaults_and_no_empty_ones() -> None:
    with pytest.raises(HelpAsked) as asked:
        parsed("bake", "--help")
    assert "degrees" in str(asked.value)
    assert "default" not in str(asked.value)
    with pytest.raises(HelpAsked, match="300"):
        parse(["train", "--help"], TERMINAL, Session(), "lora-nb")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", ["bake"]),
        ("ba", ["bake"]),
        ("bake ", ["here", "mine", "_1", "--heat", "--kind", "--shares", "--slow"]),
        ("bake cake --heat 3 --", ["--kind", "--shares", "--slow", "--help"]),
        ("bake --kind ", ["gas", "stone"]),
        ("bake --kind g", ["gas", "stone"]),
        ("bake $", ["$mine"]),
        ("eat ", []),
        ('bake "half a ', ["here", "mine", "_1", "--heat", "--kind", "--shares", "--slow"]),
    ],
)
def test_completion_offers_what_may_stand_there(line: str, offered: list[str]) -> None:
    assert complete(line, (bake,), Session(variables={"mine": 1, "_1": 2})) == offered


def test_every_verb_has_a_line_of_help_and_so_has_each_of_its_options() -> None:
    for verb in {*NOTEBOOK, *TERMINAL}:
        assert verb.__doc__
        assert verb.__name__ in overview([verb], "x")
        for option in options(verb):
            assert option.said, (verb, option)
