"""Parameters counted from a config's numbers, against transformers' own models and against what is published."""

import pytest
import torch
import transformers
from torch import nn

from lora_nb.errors import ConfigError
from lora_nb.memory.estimate import known_shapes, shape_of
from lora_nb.memory.families import read

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
MODELS = {"bert": "AutoModelForMaskedLM", "roberta": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def real(config: dict) -> nn.Module:
    """transformers' model, without memory for its weights."""
    kind = config["model_type"]
    made = transformers.CONFIG_MAPPING[kind](**config, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        return getattr(transformers, MODELS.get(kind, "AutoModelForCausalLM")).from_config(made)


@pytest.mark.parametrize("name", known_shapes())
def test_built_in_shapes_have_the_parameters_and_the_linear_layers_of_the_real_model(name: str) -> None:
    config = {key: 2 if key in LAYERS else value for key, value in known_shapes()[name].items()}
    model, shape = real(config), read(config, name)
    head = model.get_output_embeddings()
    linear = {path for path, m in model.named_modules() if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and m is not head}
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert set(shape.linears()) == linear


@pytest.mark.parametrize(
    ("name", "parameters"),  # as their cards or papers have them
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("google/gemma-2-9b", 9_241_705_984),
        ("openai-community/gpt2", 124_439_808),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_whole_models_have_as_many_parameters_as_published(name: str, parameters: int) -> None:
    assert shape_of(name).parameters == parameters


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mamba"}, "trace_memory"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 5}, "must divide"),
        ({"num_attention_heads": 31, "num_key_value_heads": 31}, "do not divide"),
    ],
)
def test_a_config_that_no_model_has_is_refused_in_words(changed: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read({**known_shapes()["meta-llama/Llama-2-7b-hf"], **changed})
