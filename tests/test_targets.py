"""Which modules a config means: the same as PEFT, which is asked on the spot, and nothing that matches nothing."""

import copy
import time
from collections.abc import Callable

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from lora_nb.attach import adapters, attach
from lora_nb.configs import LoraConfig
from lora_nb.errors import TargetError
from lora_nb.resolution import refuse_idle_settings, resolve
from lora_nb.targets import base_modules, layer_number, pattern_value, short_names
from tests.models import peft_config, peft_layers, tiny_bert, tiny_bert_classifier, tiny_falcon, tiny_gpt2, tiny_llama, under_peft


class Experts(nn.Module):
    """Numbers within numbers, as in a mixture of experts, and a linear layer at the top of the same name."""

    def __init__(self) -> None:
        super().__init__()
        experts = [nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12)}) for _ in range(3)) for _ in range(2)]
        layers = nn.ModuleList(nn.ModuleDict({"experts": e, "gate": nn.Linear(8, 6)}) for e in experts)
        self.model = nn.ModuleDict({"layers": layers})
        self.up = nn.Linear(8, 9)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "falcon": tiny_falcon,
    "bert": tiny_bert,
    "classifier": tiny_bert_classifier,
    "experts": Experts,
}

# Rank 4 and α 12 unless said otherwise.
CASES = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.o_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.down_proj", "k_proj"]}),
    ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[02]\.mlp\.\w+_proj"}),
    ("llama", {"target_modules": "lm_head"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "model.layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.[12]\..*q_proj"}),
    ("llama", {"target_modules": r".*_proj", "exclude_modules": ["mlp.up_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0"}),  # the layer, not what is in it
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["lm_head", "v_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r".*\.layers\.1\..*": 3, "(k|v)_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2, r"model\.layers\.1\..*": 3}}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {"model.layers.2.mlp.up_proj": 7}, "alpha_pattern": {"mlp.up_proj": 3}}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {r"\w_proj": 9}, "alpha_pattern": {r".*1.*q_proj": 20}}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "rank_pattern": {"c_proj": 2}}),
    ("gpt2", {"target_modules": ["c_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h"]}),
    ("gpt2", {"target_modules": ["wte", "wpe", "c_fc"]}),
    ("falcon", {"target_modules": "all-linear"}),
    ("falcon", {"target_modules": ["query_key_value"], "layers_to_transform": 1}),
    ("bert", {"target_modules": "all-linear", "r": 2}),
    ("bert", {"target_modules": ["attention.output.dense", "query"], "layers_to_transform": [2]}),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["cls.predictions.transform.dense"], "use_rslora": True}),
    ("classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("classifier", {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS", "r": 2}),
    ("classifier", {"target_modules": ["query", "classifier"], "task_type": None, "r": 2}),
    ("classifier", {"target_modules": "all-linear", "task_type": None, "rank_pattern": {"classifier": 1}}),
    ("experts", {"target_modules": ["up", "gate"], "layers_to_transform": [1], "exclude_modules": r"up"}),
    ("experts", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "experts"}),
    ("experts", {"target_modules": ["up"]}),
]


def meant(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    targets = resolve(model, config)
    refuse_idle_settings(config, targets)
    return {t.name: (t.r, t.scaling) for t in targets if t.r}


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_modules_ranks_and_scales_are_pefts(kind: str, fields: dict[str, object]) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 12} | fields)
    theirs = peft_layers(under_peft(MODELS[kind](), config))
    assert meant(MODELS[kind](), config) == {n: (m.r["default"], m.scaling["default"]) for n, m in theirs.items()}
    assert theirs


def test_what_all_linear_means_on_a_llama() -> None:
    names = set(meant(tiny_llama(), LoraConfig(r=4)))
    parts = ["self_attn." + n for n in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
        "mlp." + n for n in ("gate_proj", "up_proj", "down_proj")
    ]
    assert names == {f"model.layers.{i}.{part}" for i in range(3) for part in parts}


@pytest.mark.parametrize("kind", MODELS)
def test_sizes_are_those_of_the_update(kind: str) -> None:
    model = MODELS[kind]()
    for target in resolve(model, LoraConfig(r=2, lora_alpha=6)):
        weight = target.module.weight
        shape = tuple(weight.shape) if "Conv1D" in type(target.module).__name__ else tuple(weight.shape)[::-1]
        assert target.shape[::-1] == shape, target.name
        assert target.parameters == 2 * sum(shape)
        assert model.get_submodule(target.name) is target.module


def test_targets_come_in_the_models_order() -> None:
    model = tiny_llama()
    order = [name for name, _ in model.named_modules()]
    names = list(meant(model, LoraConfig(r=4, target_modules=["v_proj", "q_proj", "embed_tokens"])))
    assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_an_adapter_that_is_there_changes_nothing_about_what_a_config_means(kind: str) -> None:
    model = MODELS[kind]()
    every = LoraConfig(r=2, lora_alpha=6, task_type="SEQ_CLS")
    embedding = LoraConfig(
        r=3, lora_alpha=6, target_modules=[{"llama": "embed_tokens", "gpt2": "wte", "classifier": "word_embeddings"}[kind]]
    )
    anywhere = LoraConfig(r=3, lora_alpha=6, target_modules=r".*(q_proj|c_attn|query|A|B)")
    before = [meant(model, config) for config in (every, embedding, anywhere)]
    names = [name for name, _ in base_modules(model)]
    attach(model, every, "one")
    attach(model, embedding, "two")
    assert [name for name, _ in base_modules(model)] == names
    assert [meant(model, config) for config in (every, embedding, anywhere)] == before


# ---- at random, against PEFT's own two functions -------------------------------------------------------------------

LLAMA = tiny_llama()
PATHS = [name for name, module in LLAMA.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
ENDS = sorted({".".join(path.split(".")[-k:]) for path in PATHS for k in (1, 2)})
REGEXES = [r".*_proj", r".*\.(q|k)_proj", r"model\.layers\.\d\.mlp\..*_proj", r".*\.1\..*_proj", "lm_head", r".*embed.*", r".*[02].*o_proj"]
some_names = st.lists(st.sampled_from(ENDS + PATHS), min_size=1, max_size=4, unique=True)
some_patterns = st.dictionaries(st.sampled_from(ENDS + REGEXES), st.integers(1, 9), max_size=3)


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    wanted = draw(some_names | st.sampled_from(REGEXES))
    layers = draw(st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)) if isinstance(wanted, list) else None
    return LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=wanted,
        exclude_modules=draw(st.none() | some_names | st.sampled_from(REGEXES)),
        layers_to_transform=layers,
        layers_pattern=draw(st.sampled_from([None, "layers", ["h", "layers"]])) if layers else None,
        rank_pattern=draw(some_patterns),
        alpha_pattern=draw(some_patterns),
        use_rslora=draw(st.booleans()),
    )


def peft_means(config: peft.LoraConfig) -> set[str]:
    return {path for path, _ in LLAMA.named_modules() if path and check_target_module_exists(config, path)}


def peft_value(patterns: dict[str, int], path: str, default: int) -> int:
    return patterns.get(get_pattern_key(patterns, path), default)


def but(config: peft.LoraConfig, **fields: object) -> peft.LoraConfig:
    other = copy.copy(config)
    vars(other).update(fields)
    return other


def idle_parts(theirs: peft.LoraConfig, found: set[str]) -> list[object]:
    """Names, layers and pattern keys without which the config would mean the same to PEFT."""
    names, layers = theirs.target_modules, theirs.layers_to_transform
    idle: list[object] = [] if found else ["everything"]
    if not isinstance(names, str):
        idle += [n for n in names if not peft_means(but(theirs, target_modules={n}))]
        fewer = {layer: [other for other in layers if other != layer] or [99] for layer in layers or ()}
        idle += [n for n, rest in fewer.items() if peft_means(but(theirs, layers_to_transform=rest)) == found]
    return idle + [k for k in (*theirs.rank_pattern, *theirs.alpha_pattern) if not any(get_pattern_key([k], path) == k for path in found)]


@given(configs())
@settings(max_examples=80, deadline=None)
def test_a_config_means_what_peft_says_or_is_refused_for_an_idle_part(config: LoraConfig) -> None:
    theirs = peft_config(config)
    found = peft_means(theirs)
    idle = idle_parts(theirs, found)
    try:
        ours = meant(LLAMA, config)
    except TargetError:
        assert idle
        return
    assert [part for part in idle if not isinstance(part, int)] == []
    ranks = {path: peft_value(config.rank_pattern, path, 4) for path in found}
    alphas = {path: peft_value(config.alpha_pattern, path, 12) for path in found}
    assert ours == {path: (r, alphas[path] / (r**0.5 if config.use_rslora else r)) for path, r in ranks.items()}


@given(st.sets(st.sampled_from(PATHS), min_size=1))
@settings(max_examples=50, deadline=None)
def test_short_names_mean_exactly_the_modules_they_are_made_from(paths: set[str]) -> None:
    names = short_names(LLAMA, sorted(paths))
    assert peft_means(peft.LoraConfig(target_modules=names)) == paths


def test_short_names_are_ends_where_these_suffice() -> None:
    every = [path for path in PATHS if path.endswith(("q_proj", "down_proj"))]
    assert short_names(LLAMA, every) == ["down_proj", "q_proj"]
    assert short_names(LLAMA, every[1:]) == sorted(every[1:])


# ---- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "patterns", "number"),
    [
        ("model.layers.12.self_attn.q_proj", None, 12),
        ("model.layers.1.experts.7.up", None, 1),
        ("model.layers.1.experts.7.up", ["experts"], 7),
        ("model.layers.1.experts.7.up", ["h", "layers"], 1),
        ("model.layers.1.experts.7.up", ["h"], None),
        ("layers.3.up", ["layers"], 3),
        ("layers.3.up", None, None),  # PEFT asks for something before the list's name
        ("model.layers.3", None, None),  # the layer itself
        ("model.layers.1.block.layers.5.up", ["layers"], 1),
        ("model.sublayers.4.layers.2.up", ["layers"], 2),
        ("model.sublayers.4.up", ["layers"], None),
        ("model.h.1.up", ["h|layers"], None),  # PEFT puts no brackets around it
        ("model.lm_head", None, None),
        ("model.block1.conv", None, None),
    ],
)
def test_layer_number(path: str, patterns: list[str] | None, number: int | None) -> None:
    assert layer_number(path, patterns) == number
    end = path.rsplit(".", 1)[-1]
    to_peft = (peft.LoraConfig(target_modules=[end], layers_to_transform=[i], layers_pattern=patterns) for i in range(20))
    assert [i for i, config in enumerate(to_peft) if check_target_module_exists(config, path)] == ([] if number is None else [number])


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("v_proj", True),
        ("self_attn.v_proj", True),
        ("model.layers.0.self_attn.v_proj", True),
        (r".*\.0\..*", True),
        ("[qv]_proj", True),
        ("proj", False),  # the end of a name is not the end of a path
        ("_proj", False),
        ("self_attn", False),
        ("v_proj.weight", False),
    ],
)
def test_a_pattern_matches_whole_parts_of_the_path(key: str, matches) -> None:
    assert pattern_value({key: 2}, "model.layers.0.self_attn.v_proj", 8) == (2 if matches else 8)


# Path of the only module that is to be found, what is asked, and whether that is it: from the first number on, PEFT's rules at a glance.
PATHS_AND_NAMES = [
    ("up", {"target_modules": ["up"]}, True),
    ("up", {"target_modules": ["down"]}, False),
    ("up", {"target_modules": ["down", "up"]}, None),  # it is, but `down` means nothing
    ("up", {"target_modules": "up"}, True),
    ("up", {"target_modules": "u.*"}, True),
    ("up", {"target_modules": ".*p"}, True),
    ("up", {"target_modules": ".*own.*"}, False),
    ("block.up", {"target_modules": "up"}, False),
    ("block.up", {"target_modules": ["up"]}, True),
    ("block.startup", {"target_modules": ["up"]}, False),
    ("block.up.inner", {"target_modules": ["up"]}, False),
    ("block.up.inner", {"target_modules": ["up.inner"]}, True),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, True),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["part"]}, False),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": ["part"]}, False),
    ("net.part.10.up", {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["part"]}, False),
    ("net.part.10.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, False),
    ("net.part.10.up", {"target_modules": ["up"], "layers_to_transform": [10], "layers_pattern": ["part"]}, True),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [0, 1, 2], "layers_pattern": ["part"]}, None),
    ("net.part.1.up", {"target_modules": ["up", "down"], "layers_to_transform": [1], "layers_pattern": ["part"]}, None),
    ("net.any.1.up", {"target_modules": ["up"], "layers_to_transform": [1]}, True),
    ("net.any.1.up", {"target_modules": ["up"], "layers_to_transform": [0]}, False),
    ("net.any.1.up", {"target_modules": ["up"], "layers_to_transform": 1}, True),
    ("h.1.attn.deep.q", {"target_modules": ["q"]}, True),
    ("h.1.attn.deep.drop", {"target_modules": ["q"]}, False),
    ("tower.h.1.attn.deep.q", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h"]}, True),
    ("tower.h.1.attn.deep.q", {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["h"]}, False),
    ("net.part.q", {"target_modules": ["q"], "layers_to_transform": [1]}, False),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["net"]}, False),
    ("net.part.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["up"]}, False),
    ("part.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, True),
    ("part.1.up", {"target_modules": ["up"], "layers_to_transform": [1]}, False),
    ("net.part.001.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, True),
    ("net.part.1.inner.2.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, True),
    ("net.part.2.inner.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["part"]}, False),
    ("net.part.2.inner.1.up", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["inner"]}, True),
    ("net.part.1.up", {"target_modules": ["net.part.1.up"], "layers_to_transform": [5]}, None),  # a whole path asks no number
    ("net.part.1.up", {"target_modules": ["up"], "exclude_modules": ["part.1.up"]}, False),
    ("net.part.1.up", {"target_modules": ["up"], "exclude_modules": r".*\.1\..*"}, False),
    ("net.part.1.up", {"target_modules": ["up"], "exclude_modules": r"net\.part"}, True),
    ("net.part.1.up", {"target_modules": ["up"], "modules_to_save": ["part"]}, False),
    ("net.part.1.up", {"target_modules": r".*\.up", "modules_to_save": ["net.part"]}, False),
]


def lone(path: str) -> nn.Module:
    """A linear layer under that path and nothing else."""
    module: nn.Module = nn.Linear(8, 12)
    for name in reversed(path.split(".")):
        module = nn.ModuleDict({name: module})
    return module


@pytest.mark.parametrize(("path", "fields", "found"), PATHS_AND_NAMES, ids=str)
def test_whether_a_path_is_meant_is_what_peft_says(path: str, fields: dict[str, object], found: bool | None) -> None:
    """And where it is not, or where part of what is asked means nothing (None), it is refused here, not passed over."""
    theirs = bool(check_target_module_exists(peft.LoraConfig(**fields), path))
    assert theirs == (found is not False)
    if found:
        assert list(meant(lone(path), LoraConfig(r=4, lora_alpha=12, **fields))) == [path]
    else:
        with pytest.raises(TargetError):
            meant(lone(path), LoraConfig(r=4, lora_alpha=12, **fields))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_a_pattern_that_takes_for_ever_is_given_up_within_seconds(field: str) -> None:
    endless = "(.*?)" * 16 + r"\1l(?<=j)"
    fields: dict[str, object] = {"target_modules": ["q_proj"], field: {endless: 2} if field == "rank_pattern" else endless}
    if field == "layers_pattern":
        fields["layers_to_transform"] = [0]
    start = time.perf_counter()
    with pytest.raises(TargetError, match=r"takes longer than 1 s on '.*': write it without nested repeats"):
        attach(tiny_llama(), LoraConfig(r=4, lora_alpha=12, **fields))
    assert time.perf_counter() - start < 5


# ---- misuse --------------------------------------------------------------------------------------------------------

MISUSE = {
    "one of two misspelt": ({"target_modules": ["q_proj", "v_prj"]}, ["'v_prj'", "Did you mean 'v_proj'?"]),
    "nothing close": ({"target_modules": ["c_attn_xyz"]}, ["'c_attn_xyz'", "There are:", "q_proj"]),
    "end of a name": ({"target_modules": ["proj"]}, ["'proj'", "matches no module"]),
    "a plain string": ({"target_modules": "q_proj"}, ["whole path", "Use a list for names: target_modules=['q_proj']"]),
    "a pattern without a match": ({"target_modules": r".*\.c_attn"}, ["matches no module", "regular expression", "model.embed_tokens"]),
    "the beginning of a path": ({"target_modules": r".*self_attn\.q"}, ["matches no module", "whole path"]),
    "a layer too many": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 3]}, ["layer 3", "layers 0 to 2"]),
    "a wrong list of layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        ["layer 0", "no numbered layers"],
    ),
    "a name outside the layers": (
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
        ["'embed_tokens'", "layers_to_transform=(0,)", "whole path"],
    ),
    "an idle rank": ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, ["rank_pattern", "'v_proj'", "q_proj"]),
    "a misspelt rank": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_prj": 2}}, ["rank_pattern", "Did you mean 'q_proj'?"]),
    "part of a name as rank": ({"rank_pattern": {"proj": 2}}, ["rank_pattern", "'proj'", "21 targeted modules"]),
    "an idle alpha": ({"target_modules": ["q_proj"], "alpha_pattern": {"lm_head": 2}}, ["alpha_pattern", "'lm_head'"]),
    "a rank above the layer's": ({"r": 17}, ["rank 17", "k_proj'", "32 × 16", "above 16", "Lower r", "rank_pattern={'k_proj': …}"]),
    "a rank of its own above the layer's": ({"rank_pattern": {"v_proj": 17}}, ["rank 17", "v_proj'", "above 16"]),
    "a container": ({"target_modules": ["self_attn"]}, ["'model.layers.0.self_attn'", "LlamaAttention", "name the layers inside it"]),
    "a pattern with a container": ({"target_modules": r".*\.mlp.*"}, ["layers.0.mlp'", "LlamaMLP", "exclude_modules"]),
    "a norm": ({"target_modules": ["q_proj", "norm"]}, ["'model.norm'", "LlamaRMSNorm"]),
    "a misspelt exclusion": ({"exclude_modules": ["k_prj"]}, ["exclude_modules names 'k_prj'", "Did you mean 'k_proj'?"]),
    "excluded altogether": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        ["'q_proj'", "exclude_modules=('q_proj',)", "drop it"],
    ),
    "one of two excluded": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*q_proj"},
        ["'q_proj'", "exclude_modules='.*q_proj'"],
    ),
    "a pattern excluded": ({"target_modules": r".*\.q_proj", "exclude_modules": ["self_attn.q_proj"]}, ["exclude_modules", "drop it"]),
    "all-linear excluded": (
        {"exclude_modules": r"model\..*"},
        ["target_modules='all-linear'", r"exclude_modules='model\\..*'", "exclude less"],
    ),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_with_the_remedy_and_leaves_the_model_alone(misuse: str) -> None:
    fields, says = MISUSE[misuse]
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(requires_grad=False)
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(TargetError) as refusal:
        attach(model, LoraConfig(**{"r": 4, "lora_alpha": 12} | fields))
    assert [part for part in says if part not in str(refusal.value)] == []
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not adapters(model).reports


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(TargetError, match=r"target_modules='all-linear'.*no module of this model"):
        resolve(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), LoraConfig(r=2))


def test_a_bare_layer_is_refused_as_it_has_no_place_to_be_put_in() -> None:
    with pytest.raises(TargetError, match="no module"):
        resolve(nn.Linear(8, 8), LoraConfig(r=2))
