"""`show`: the source that runs."""

import inspect

import pytest

import lora_nb as ln
from lora_nb.errors import ConfigError
from lora_nb.layers.lora import LoraWeights


@pytest.mark.parametrize(
    ("name", "thing"),
    [
        ("LoraWeights", LoraWeights),
        ("LoraWeights.delta", LoraWeights.delta),
        ("layers.lora.LoraWeights.delta", LoraWeights.delta),
        ("lora_nb.layers.lora.LoraWeights.delta", LoraWeights.delta),
        ("merge.merge", ln.merge),
        ("attach.attach", ln.attach),
    ],
)
def test_a_name_finds_what_the_object_shows(name: str, thing: object) -> None:
    assert ln.show(name) == ln.show(thing)
    assert ln.show(name).text.strip() in inspect.cleandoc("\n" + inspect.getsource(thing)) + inspect.getsource(thing)


def test_it_says_where_the_lines_stand_and_shows_markup_as_text() -> None:
    def small() -> str:
        return "<img src=x>"

    source = ln.show(small)
    assert source.text.startswith("def small")
    assert "test_showing.py, line " in repr(source)
    assert "<img" not in source._repr_html_()
    assert "&lt;img" in source._repr_html_()


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ("LoraWeihgts", "Did you mean 'LoraWeights'"),
        ("LoraWeights.detla", "Did you mean 'delta'"),
        (len, "no Python source"),
        (3, "no Python source"),
    ],
)
def test_what_cannot_be_shown_is_refused(thing: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        ln.show(thing)
