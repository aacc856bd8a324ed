"""The form's settings: configs, counts, and the code that does the same."""

import pytest
import torch

import lora_nb as ln
from lora_nb.configs import BottleneckConfig
from lora_nb.errors import ConfigError, TargetError
from lora_nb.jupyter.settings import METHODS, QUANTS, Settings, linear_groups, numbers


@pytest.mark.parametrize(
    ("text", "found"), [("", []), ("3", [3]), ("0-3, 5", [0, 1, 2, 3, 5]), ("5,1 - 2 ,1", [1, 2, 5]), ("7-7,", [7])], ids=repr
)
def test_layers_are_numbers_and_ranges(text: str, found: list[int]) -> None:
    assert numbers(text) == found


@pytest.mark.parametrize("text", ["a", "3-1", "1..2", "-1", "1-2-3", "99999"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Layers"):
        numbers(text)


@pytest.mark.parametrize("method", METHODS.values())
def test_each_method_trains_as_many_parameters_as_it_says(method: str) -> None:
    model, _ = ln.load("tiny")
    settings = Settings(method=method, r=4, lora_alpha=12, reduction_factor=8)
    said = settings.trainable(model)
    config = settings.adapter()
    if config is None:
        assert said == sum(p.numel() for p in model.parameters())
        return
    assert said == ln.attach(model, config).trainable
    assert settings.trainable(model) == said, "what is attached already is not counted"


def test_a_choice_of_modules_and_layers_reaches_the_config() -> None:
    config = Settings(target_modules=("q_proj",), layers="0-1", lora_dropout=0.1, method="dora").adapter()
    assert config == ln.LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj"], layers_to_transform=[0, 1], lora_dropout=0.1, use_dora=True
    )
    assert Settings(method="parallel", reduction_factor=4).adapter() == BottleneckConfig.parallel(reduction_factor=4)
    with pytest.raises(ConfigError, match="select these, too"):
        Settings(layers="1").adapter()
    with pytest.raises(TargetError, match="layer 9"):
        Settings(target_modules=("q_proj",), layers="9").trainable(ln.load("tiny")[0])


def test_quantization_is_one_config_for_each_choice() -> None:
    found = [Settings(quant=name).quantization() for name in QUANTS]
    assert found[0] is None
    assert {(q.quant_type, q.double_quant) for q in found[1:]} == set(filter(None, QUANTS.values()))


@pytest.mark.parametrize("method", ["lora", "pfeiffer"])
def test_the_code_makes_the_same_adapter(method: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd 'name'.jsonl").write_text("\n".join(f'{{"prompt": "number {i}", "completion": "{i} it is"}}' for i in range(30)))
    settings = Settings(method=method, r=2, lora_alpha=6, data="odd 'name'.jsonl", max_steps=2, batch_size=2)
    made: dict[str, object] = {}
    exec(settings.code(), made)  # noqa: S102 - that is what it is for
    model, tokenizer = ln.load("tiny")
    torch.manual_seed(0)
    ln.attach(model, settings.adapter())
    ln.train(model, tokenizer, ln.dataset(settings.data, "train"), settings.training())
    theirs = ln.parameters(made["model"])
    assert all(torch.equal(p, theirs[name]) for name, p in ln.parameters(model).items())


def test_text_from_outside_stays_text_in_the_code() -> None:
    nasty = "\"; rm -rf '\n"
    code = Settings(base=nasty, data=nasty).code()
    assert repr(nasty) in code
    compile(code, "cell", "exec")


def test_linear_layers_are_grouped_and_counted_without_the_head() -> None:
    model, _ = ln.load("tiny")
    groups = linear_groups(model)
    assert groups["q_proj"] == (6, "256 × 256")
    assert groups["down_proj"] == (6, "256 × 576")
    assert "lm_head" not in groups
    ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6))
    assert linear_groups(model) == groups
