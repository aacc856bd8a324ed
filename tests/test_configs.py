"""Settings: what is refused and in which words, and the way to PEFT's `adapter_config.json` and back."""

import copy
import dataclasses
import json
import math
import pickle
import warnings

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_nb.configs import PEFT_UNUSED, LoraConfig, TrainConfig, from_peft, to_peft
from lora_nb.errors import ConfigError

COUNT = "a whole number of at least 1"
RANK = f"{COUNT} and at most 1048576"
INITS = "True or one of 'gaussian', 'orthogonal', 'pissa', 'olora', 'pissa_niter_4'"
TOKENS = "token numbers from 0, each once"
NAMES = "a string or a list of module names, not empty"

BAD_LORA = [
    ("r", 0, RANK),
    ("r", -3, RANK),
    ("r", 4.0, RANK),
    ("r", "8", RANK),
    ("r", True, RANK),
    ("r", 10**400, RANK),
    ("lora_alpha", 0, "a number above 0"),
    ("lora_alpha", -16, "a number above 0"),
    ("lora_alpha", math.nan, "a number above 0"),
    ("lora_alpha", math.inf, "a number above 0"),
    ("lora_alpha", "16", "a number above 0"),
    ("lora_dropout", -0.1, "in [0, 1)"),
    ("lora_dropout", 1, "in [0, 1)"),
    ("lora_dropout", None, "in [0, 1)"),
    ("target_modules", "", NAMES),
    ("target_modules", (), NAMES),
    ("target_modules", [], NAMES),
    ("target_modules", ["q_proj", ""], NAMES),
    ("target_modules", ["q_proj", 3], NAMES),
    ("target_modules", {"q_proj": 8}, NAMES),
    ("target_modules", b"q_proj", NAMES),
    ("target_modules", 5, NAMES),
    ("exclude_modules", [], NAMES),
    ("exclude_modules", 5, NAMES),
    ("layers_to_transform", -1, "layer numbers from 0"),
    ("layers_to_transform", 1.5, "layer numbers from 0"),
    ("layers_to_transform", [], "layer numbers from 0"),
    ("layers_to_transform", [0, 1.0], "layer numbers from 0"),
    ("rank_pattern", ["q_proj"], "a dict of module name to value"),
    ("alpha_pattern", "q_proj", "a dict of module name to value"),
    ("use_rslora", 1, "True or False"),
    ("use_rslora", "yes", "True or False"),
    ("init_lora_weights", False, INITS),
    ("init_lora_weights", 1, INITS),  # PEFT cannot read a file with 1
    ("init_lora_weights", "pissa_niter_", INITS),
    ("init_lora_weights", "corda", INITS),
    ("init_lora_weights", None, INITS),
    *[(name, value, "True or False") for name in ("use_dora", "lora_bias", "ensure_weight_tying") for value in (1, "yes", None)],
    ("modules_to_save", "lm_head", "a list of names"),
    ("modules_to_save", [""], "a list of names"),
    ("modules_to_save", [3], "a list of names"),
    ("target_parameters", "experts.up", "a list of names"),
    ("target_parameters", [None], "a list of names"),
    ("trainable_token_indices", [], TOKENS),
    ("trainable_token_indices", [3, 3], TOKENS),
    ("trainable_token_indices", [-1], TOKENS),
    ("trainable_token_indices", [1.0], TOKENS),
    ("trainable_token_indices", [True], TOKENS),
    ("trainable_token_indices", "abc", TOKENS),
    ("trainable_token_indices", 3, TOKENS),
    ("trainable_token_indices", {"embed_tokens": []}, TOKENS),
    ("trainable_token_indices", {"embed_tokens": [0], "lm_head": [-1]}, TOKENS),
]

BAD_TRAIN = [
    *[(name, value, COUNT) for name in ("batch_size", "gradient_accumulation_steps") for value in (0, -1, 2.0, "3", True)],
    ("batch_size", None, COUNT),
    *[("max_steps", value, "None or " + COUNT) for value in (0, -1, 2.0, "3", True)],
    ("seq_len", 1, "a whole number of at least 2"),
    ("seq_len", 2.5, "a whole number of at least 2"),
    ("warmup_steps", -1, "a whole number of at least 0"),
    ("warmup_steps", 0.1, "a whole number of at least 0"),
    ("seed", -1, "a whole number of at least 0"),
    ("seed", None, "a whole number of at least 0"),
    ("eval_every", 0, "None or a whole number of at least 1"),
    ("learning_rate", 0, "a number above 0"),
    ("learning_rate", math.nan, "a number above 0"),
    ("learning_rate", "1e-3", "a number above 0"),
    ("weight_decay", -0.1, "a number of at least 0"),
    ("weight_decay", None, "a number of at least 0"),
    ("num_train_epochs", 0, "None or a number above 0"),
    ("max_grad_norm", -1.0, "None or a number above 0"),
    ("max_grad_norm", math.inf, "None or a number above 0"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "allowed"), [(LoraConfig, *row) for row in BAD_LORA] + [(TrainConfig, *row) for row in BAD_TRAIN]
)
def test_a_bad_value_is_refused_with_what_was_given_and_what_is_allowed(kind, name: str, value: object, allowed: str) -> None:
    others = {"target_modules": ["q_proj"]} if kind is LoraConfig and name != "target_modules" else {}
    with pytest.raises(ConfigError) as refusal:
        kind(**others, **{name: value})
    assert str(refusal.value) == f"{kind.__name__}({name}={value!r}): {name} must be {allowed}."


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": "*q_proj"}, ["target_modules", "'*q_proj'", "not usable as a regular expression", "nothing to repeat"]),
        ({"exclude_modules": "(lm_head"}, ["exclude_modules", "'(lm_head'", "not usable as a regular expression"]),
        ({"rank_pattern": {"(": 2}}, ["rank_pattern", "'('", "not usable as a regular expression"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern={'q_proj': 0}", "a whole number of at least 1"]),
        ({"rank_pattern": {5: 2}}, ["rank_pattern", "5", "a module's name"]),
        ({"alpha_pattern": {"q_proj": -1}}, ["alpha_pattern={'q_proj': -1}", "a number above 0"]),
        ({"layers_pattern": "layers"}, ["layers_pattern='layers'", "unless layers_to_transform is given"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": 5}, ["layers_pattern", "5", "a module's name"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", ""]},
            ["layers_pattern", "''", "a module's name"],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["("]},
            ["layers_pattern", "not usable as a regular expression"],
        ),
        ({"layers_to_transform": [0]}, ["layers_to_transform=[0]", "left out when target_modules is a pattern, not a list"]),
        ({"target_modules": "((a{1000}){1000}){1000}"}, ["target_modules", "too long a regular expression, or repeats too often"]),
        ({"rank_pattern": {"x" * 200_000: 2}}, ["rank_pattern", "too long a regular expression"]),
        ({"rank_pattern": {"q_proj": 10**9}}, ["rank_pattern", "at most 1048576"]),
        ({"bias": "lora"}, ["bias='lora'", "Did you mean 'lora_only'?"]),
        ({"r": 3, "init_lora_weights": "orthogonal"}, ["another than 'orthogonal' with an odd rank ([3])"]),
        ({"r": 4, "rank_pattern": {"q_proj": 5}, "init_lora_weights": "orthogonal"}, ["with an odd rank ([5])"]),
        ({"target_parameters": ["up"], "lora_dropout": 0.1}, ["lora_dropout must be left out with target_parameters"]),
        ({"target_parameters": ["up"], "use_dora": True}, ["use_dora must be left out with target_parameters"]),
        ({"target_parameters": ["up"], "lora_bias": True}, ["lora_bias must be left out with target_parameters"]),
        ({"target_parameters": ["up"], "init_lora_weights": "pissa"}, ["True or 'gaussian' with target_parameters"]),
        ({"target_parameters": ["up"], "init_lora_weights": "olora"}, ["True or 'gaussian' with target_parameters"]),
        ({"task_type": "CAUSAL"}, ["task_type='CAUSAL'", "Did you mean 'CAUSAL_LM'?"]),
        ({"task_type": 5}, ["task_type=5", "SEQ_CLS"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(fields: dict[str, object], says: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        LoraConfig(**fields)
    assert [part for part in says if part not in str(refusal.value)] == []


def test_an_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_type='cosin'.*Did you mean 'cosine'"):
        TrainConfig(lr_scheduler_type="cosin")


@pytest.mark.parametrize(
    ("kind", "field", "meant"),
    [
        (LoraConfig, "target_module", "target_modules"),
        (LoraConfig, "alpha", "lora_alpha"),
        (LoraConfig, "rslora", "use_rslora"),
        (TrainConfig, "learningrate", "learning_rate"),
        (TrainConfig, "warmup", "warmup_steps"),
    ],
)
def test_an_unknown_field_names_the_nearest(kind, field: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no field '{field}'. Did you mean '{meant}'?"):
        kind(**{field: 4})


@pytest.mark.parametrize("kind", [LoraConfig, TrainConfig])
def test_settings_are_given_by_name(kind) -> None:
    with pytest.raises(ConfigError, match="by name, as in"):
        kind(8)


@pytest.mark.parametrize("kind", [LoraConfig, TrainConfig])
def test_a_config_cannot_be_changed(kind) -> None:
    config = kind()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_a_config_does_not_follow_the_dict_that_it_was_made_from() -> None:
    ranks, alphas, names = {"q_proj": 4}, {"q_proj": 8}, ["q_proj"]
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=alphas, target_modules=names)
    ranks["q_proj"], alphas["k_proj"] = -1, 3
    names.append("k_proj")
    assert (config.rank_pattern, config.alpha_pattern, config.target_modules) == ({"q_proj": 4}, {"q_proj": 8}, ("q_proj",))


def test_replace_copy_and_pickle_keep_a_config_whole() -> None:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, layers_to_transform=1)
    assert dataclasses.replace(config, r=2).r == 2
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config  # noqa: S301 - our own
    with pytest.raises(ConfigError, match="r must be"):
        dataclasses.replace(config, r=0)


def test_names_may_come_in_any_collection_and_lose_repeats() -> None:
    assert LoraConfig(target_modules=("v_proj", "q_proj", "v_proj")).target_modules == ("v_proj", "q_proj")
    assert LoraConfig(target_modules={"v_proj", "q_proj"}).target_modules == ("q_proj", "v_proj")
    assert LoraConfig(target_modules=["q"], layers_to_transform=range(2)).layers_to_transform == (0, 1)
    assert LoraConfig(target_modules=["q"], layers_to_transform=3, layers_pattern="h").layers_pattern == ("h",)


def test_without_target_modules_every_linear_layer_is_meant_or_nothing_beside_parameters() -> None:
    assert LoraConfig().target_modules == LoraConfig(target_modules=None).target_modules == "all-linear"
    assert LoraConfig(target_parameters=["experts.up"]).target_modules == ()
    assert LoraConfig(target_parameters=["experts.up"], target_modules=()).target_modules == ()
    assert LoraConfig(target_parameters=["experts.up"], target_modules=["q_proj"]).target_modules == ("q_proj",)


def test_lists_become_tuples_that_nobody_changes() -> None:
    tokens, ends = [5, 3], {"embed": [1]}
    config = LoraConfig(modules_to_save=["a", "b", "a"], target_parameters=["p"], target_modules=["q"], trainable_token_indices=tokens)
    tokens.append(7)
    assert (config.modules_to_save, config.target_parameters, config.trainable_token_indices) == (("a", "b"), ("p",), (5, 3))
    config = LoraConfig(trainable_token_indices=ends)
    ends["embed"].append(2)
    assert config.trainable_token_indices == {"embed": (1,)}
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - our own
    assert LoraConfig(modules_to_save=None, target_parameters=None) == LoraConfig()


@pytest.mark.parametrize(("rslora", "factor"), [(False, 24 / 16), (True, 24 / 4)])
def test_scaling(rslora, factor: float) -> None:
    assert LoraConfig(use_rslora=rslora).scaling(16, 24) == factor


# ---- to and from PEFT ----------------------------------------------------------------------------------------------


def as_file(config: peft.LoraConfig) -> dict[str, object]:
    """What PEFT writes for a config: through JSON, sets as lists."""
    return json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}))


configs = st.builds(
    LoraConfig,
    r=st.integers(1, 64),
    lora_alpha=st.integers(65, 999) | st.floats(0.01, 0.99),
    lora_dropout=st.floats(0, 0.9),
    target_modules=st.lists(st.sampled_from(["k_proj", "o_proj", "q_proj", "v_proj"]), min_size=1).map(sorted) | st.just(r".*\.[qv]_proj"),
    rank_pattern=st.dictionaries(st.sampled_from(["q_proj", r".*\.1\..*"]), st.integers(1, 8)),
    alpha_pattern=st.dictionaries(st.sampled_from(["q_proj", r".*\.1\..*"]), st.integers(9, 32)),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    lora_bias=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    modules_to_save=st.lists(st.sampled_from(["lm_head", "norm"]), unique=True),
    trainable_token_indices=st.none()
    | st.lists(st.integers(0, 9), min_size=1, unique=True)
    | st.dictionaries(st.sampled_from(["embed_tokens", "wte"]), st.lists(st.integers(0, 9), min_size=1, unique=True), min_size=1),
    ensure_weight_tying=st.booleans(),
    task_type=st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]),
)


@given(configs)
@settings(deadline=None, max_examples=50)
def test_a_config_comes_back_from_the_file_that_it_went_to(config: LoraConfig) -> None:
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    content = json.loads(json.dumps(to_peft(config, names, "some/base", fan_in_fan_out=False)))
    assert from_peft(content) == dataclasses.replace(config, target_modules=sorted(names))


@given(configs)
@settings(deadline=None, max_examples=50)
def test_peft_reads_what_we_write_and_we_read_what_peft_writes(config: LoraConfig) -> None:
    content = to_peft(config, ["q_proj", "v_proj"], "some/base", fan_in_fan_out=False)
    if config.use_dora and config.lora_bias:
        with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
            peft.LoraConfig(**content)
        return
    theirs = peft.LoraConfig(**content)
    for key, value in content.items():
        read = getattr(theirs, key)
        assert (sorted(read) if isinstance(read, set) else read) == value, key
    assert from_peft(as_file(theirs)) == from_peft(theirs.to_dict()) == dataclasses.replace(config, target_modules=["q_proj", "v_proj"])


def listed(value: object) -> list[object]:
    return [] if value is None else [value] if isinstance(value, str | int) else sorted(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj", "exclude_modules": r".*\.0\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "task_type": "SEQ_CLS"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": []},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "inference_mode": True, "revision": "main"},
        {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
)
def test_what_peft_writes_is_read_with_its_meaning(fields: dict[str, object]) -> None:
    theirs = peft.LoraConfig(**fields)
    ours = from_peft(as_file(theirs))
    for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "task_type"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        assert listed(getattr(ours, name)) == listed(getattr(theirs, name)), name


def test_the_smallest_file_has_pefts_defaults() -> None:
    content = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    ours, theirs = from_peft(content), peft.LoraConfig(target_modules=["q_proj"])
    assert (
        (ours.r, ours.lora_alpha, ours.lora_dropout, ours.task_type)
        == (theirs.r, theirs.lora_alpha, theirs.lora_dropout, None)
        == (8, 8, 0, None)
    )


@pytest.mark.parametrize(
    "option",
    [
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        {"use_qalora": True},
        {"megatron_config": {"tensor_parallel": 2}},
    ],
    ids=str,
)
def test_an_option_of_peft_that_would_change_the_meaning_is_refused(option: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = as_file(peft.LoraConfig(target_modules=["q_proj"], **option))
    with pytest.raises(ConfigError, match=f"adapter_config.json has ({'|'.join(option)})=.*does not support"):
        from_peft(content)


@pytest.mark.parametrize("key", PEFT_UNUSED)
def test_each_unused_option_is_let_pass_unused_and_refused_used(key: str) -> None:
    content = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    for unused in PEFT_UNUSED[key]:
        from_peft(content | {key: unused})
    with pytest.raises(ConfigError, match=f"{key}='something'"):
        from_peft(content | {key: "something"})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_belongs_to_a_changed_base_is_refused(init: str) -> None:
    """PEFT changes the base's weights with these, on loading too; on the base as it is, A and B would do harm."""
    with pytest.raises(ConfigError) as refusal:
        from_peft({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": init})
    says = (f"init_lora_weights='{init}'", "a base that PEFT changed", "path_initial_model_for_weight_conversion")
    assert [part for part in says if part not in str(refusal.value)] == []


def test_every_field_that_peft_writes_is_accounted_for() -> None:
    """A new PEFT with a new option fails here, so that somebody decides what it means."""
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    without_meaning = {
        "auto_mapping",  # the class of the base
        "eva_config",  # how A was found, which is over; the ranks that it chose are in rank_pattern
        "base_model_name_or_path",  # read by checkpoint.py
        "fan_in_fan_out",  # how the base stores W: seen on the model
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",  # only with use_qalora
        "revision",
    }
    assert peft.LoraConfig().to_dict().keys() - ours - PEFT_UNUSED.keys() - without_meaning == set()


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", None])
def test_another_method_is_refused(kind: str | None) -> None:
    with pytest.raises(ConfigError, match=f"peft_type {kind!r}; lora_nb reads 'LORA'"):
        from_peft({"peft_type": kind, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"target_parameters": ["experts.up"]},
        {"target_parameters": ["experts.up"], "target_modules": None},
        {"trainable_token_indices": [3]},
        {"trainable_token_indices": {"embed_tokens": [3]}},
        {"ensure_weight_tying": True},
    ],
    ids=str,
)
def test_an_option_of_peft_means_the_same_here(option: dict[str, object]) -> None:
    content = as_file(peft.LoraConfig(**{"target_modules": ["q_proj"]} | option))
    ours = from_peft(content)
    for name, value in option.items():
        assert as_listed(getattr(ours, name)) == as_listed(value), name


def as_listed(value: object) -> object:
    if isinstance(value, dict):
        return {key: as_listed(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple | list) else value or []


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [True, False])
def test_a_start_from_the_weights_is_written_as_twice_the_rank_at_the_same_scale(init: str, rslora) -> None:
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}}
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=init, use_rslora=rslora, **patterns)
    content = to_peft(config, ["q_proj", "v_proj"], None, fan_in_fan_out=False)
    assert (content["r"], content["rank_pattern"], content["init_lora_weights"]) == (8, {"q_proj": 6}, True)
    plain = from_peft(content)
    assert plain.scaling(plain.r, plain.lora_alpha) == pytest.approx(config.scaling(4, 12))
    assert plain.scaling(plain.r, plain.alpha_pattern["v_proj"]) == pytest.approx(config.scaling(4, 7))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_peft_reads_every_start_beside_a_bias_though_it_does_not_have_them(init: str) -> None:
    with pytest.raises(ValueError, match="only supported with init_lora_weights=True or False"):
        peft.LoraConfig(lora_bias=True, init_lora_weights=init)
    content = to_peft(LoraConfig(lora_bias=True, init_lora_weights=init), ["q_proj"], None, fan_in_fan_out=False)
    assert peft.LoraConfig(**content).lora_bias


def test_a_file_without_target_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match="no target_modules, so nothing says where"):
        from_peft({"peft_type": "LORA", "r": 4, "target_modules": None})


@pytest.mark.parametrize(
    "broken", [{"r": 0}, {"r": "8"}, {"lora_alpha": "x"}, {"lora_dropout": 2}, {"target_modules": []}, {"rank_pattern": [1]}]
)
def test_a_file_with_a_bad_value_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(broken))):
        from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]} | broken)


def test_steps_default_to_200_unless_epochs_are_asked_for() -> None:
    assert TrainConfig().max_steps == 200
    assert TrainConfig(num_train_epochs=3).max_steps is None
