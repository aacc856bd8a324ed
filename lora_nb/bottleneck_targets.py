"""Where bottleneck adapters go: the blocks of the models that lora_nb knows, and of those that a user describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lora_nb.configs import Block, BottleneckConfig, Sublayer
from lora_nb.errors import TargetError
from lora_nb.layers.bottleneck import Bottleneck, Tap
from lora_nb.targets import Target, base_modules

EXAMPLE = "blocks=Block(layers='blocks', attention=Sublayer(output='attn', reads='norm1'), mlp=Sublayer(output='ffn', reads='norm2'))"
# Where AdapterHub's files keep the adapter of a sublayer, inside the block.
KEYS = {"mh_adapter": "attention_adapters", "cross_adapter": "cross_attention_adapters", "output_adapter": "output_adapters"}

PRE_NORM = Block(
    layers="layers",
    attention=Sublayer(output="self_attn.o_proj", reads="input_layernorm"),
    mlp=Sublayer(output="mlp", reads="post_attention_layernorm"),
)
GPT2 = Block(
    layers="h",
    attention=Sublayer(output="attn.resid_dropout", reads="ln_1"),
    mlp=Sublayer(output="mlp", reads="ln_2"),
)
POST_NORM = Block(
    layers="encoder.layer",
    attention=Sublayer(output="attention.output.dropout", reads="attention", norm="attention.output.LayerNorm", key="attention.output"),
    mlp=Sublayer(output="output.dropout", reads="intermediate", norm="output.LayerNorm", key="output"),
)
T5 = (
    Block(
        layers="encoder.block",
        attention=Sublayer(output="layer.0.dropout", reads="layer.0.layer_norm", key="layer.0"),
        mlp=Sublayer(output="layer.1.dropout", reads="layer.1.layer_norm", key="layer.1"),
    ),
    Block(
        layers="decoder.block",
        attention=Sublayer(output="layer.0.dropout", reads="layer.0.layer_norm", key="layer.0"),
        cross_attention=Sublayer(output="layer.1.dropout", reads="layer.1.layer_norm", key="layer.1"),
        mlp=Sublayer(output="layer.2.dropout", reads="layer.2.layer_norm", key="layer.2"),
    ),
)
# By `config.model_type`: blocks of other models have the same names but add their sublayers' outputs in another way.
KNOWN: dict[str, tuple[Block, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe"), (PRE_NORM,)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), (POST_NORM,)),
    **dict.fromkeys(("t5", "mt5"), T5),
    "gpt2": (GPT2,),
}


@dataclass(frozen=True)
class Site:
    """One place for an adapter: number of the layer, path of the block, its sublayer, and which setting asks for it."""

    number: int
    path: str
    sublayer: Sublayer
    setting: str
    width: int

    def inside(self, name: str) -> str:
        """The whole path of a module of the block."""
        return f"{self.path}.{name}"

    @property
    def key(self) -> str:
        """What AdapterHub's keys have before `.adapters.<name>`."""
        return self.inside(self.sublayer.key or KEYS[self.setting])


def resolve_bottleneck(model: nn.Module, config: BottleneckConfig) -> list[Target]:
    """The modules that get a part, in the model's order: adapters, and taps where they look at the residual stream.

    Raises:
        TargetError: a model that is not known, or modules, layers or settings that it lacks.
    """
    modules = dict(base_modules(model))
    places = sites(model, config)
    taps = _taps(config, places)
    targets = {name: Target(name, _module(name, modules), "tap", (0, 0), 0, 1.0, _same(tap)) for name, tap in taps.items()}
    for place in places:
        name = _output(config, place)
        if name in targets:
            raise TargetError(f"{name!r} would carry two parts of one adapter: name another module in one of the Sublayers.")
        targets[name] = _adapter(config, place, taps.get(_tapped(config, place)), modules)
    return [targets[name] for name in modules if name in targets]


def sites(model: nn.Module, config: BottleneckConfig) -> list[Site]:
    """Where `config` puts adapters, block by block.

    Raises:
        TargetError: a model that is not known, or layers or settings that it lacks.
    """
    modules = dict(base_modules(model))
    found, number = [], 0
    for block in _blocks(model, config):
        path = _list_of_blocks(block, modules, optional=not config.blocks)
        for child in () if path is None else modules[path].named_children():
            found += [
                Site(number, f"{path}.{child[0]}", sublayer, setting, _width(model, block))
                for setting, sublayer in block.sublayers().items()
                if sublayer is not None
            ]
            number += 1
    return _wanted(config, found, number)


def key_places(model: nn.Module, config: BottleneckConfig) -> dict[str, str]:
    """Path of each module that carries an adapter → what AdapterHub's keys have before `.adapters.<name>`."""
    return {_output(config, site): site.key for site in sites(model, config)}


def _blocks(model: nn.Module, config: BottleneckConfig) -> Sequence[Block]:
    if config.blocks:
        return config.blocks  # type: ignore[return-value] # a tuple since it was made
    settings = getattr(model, "config", None)
    kind = getattr(settings, "model_type", None)
    blocks = (_falcon(model),) if kind == "falcon" else KNOWN.get(str(kind), ())
    if not blocks or getattr(settings, "add_cross_attention", False):
        why = "with cross-attention added" if blocks else "not known"
        raise TargetError(
            f"Blocks of the kind {kind or type(model).__name__!r} are {why}: adapters are placed by themselves in "
            f"{', '.join([*KNOWN, 'falcon'])}. Say where they go in yours, by paths inside the block: {EXAMPLE}."
        )
    return blocks


def _falcon(model: nn.Module) -> Block:
    """Attention and MLP one after the other, or side by side, then with one norm or two."""
    names = {name.rsplit(".", 1)[-1] for name, _ in base_modules(model)}
    before = "ln_attn" if "ln_attn" in names else "input_layernorm"
    between = next((name for name in ("post_attention_layernorm", "ln_mlp") if name in names), "input_layernorm")
    return Block(
        layers="h",
        attention=Sublayer(output="self_attention.dense", reads=before),
        mlp=Sublayer(output="mlp", reads=between),
    )


def _list_of_blocks(block: Block, modules: dict[str, nn.Module], *, optional: bool) -> str | None:
    found = [name for name in modules if name == block.layers or name.endswith("." + block.layers)]
    if len(found) > 1 or not (found or optional):
        lists = ", ".join(name for name, m in modules.items() if isinstance(m, nn.ModuleList)) or "none"
        what = f"several: {', '.join(found)}" if found else "no module"
        raise TargetError(f"Block(layers={block.layers!r}) means {what} of this model. Name one list by its path; lists are: {lists}.")
    return found[0] if found else None


def _width(model: nn.Module, block: Block) -> int:
    width = block.width or getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise TargetError("The model does not say its width (config.hidden_size): give it, as in Block(…, width=256).")
    return width


def _wanted(config: BottleneckConfig, found: list[Site], layers: int) -> list[Site]:
    """Those asked for; whatever is asked for must be there."""
    for setting, argument in (("mh_adapter", "attention"), ("cross_adapter", "cross_attention"), ("output_adapter", "mlp")):
        if getattr(config, setting) and not any(site.setting == setting for site in found):
            raise TargetError(f"{setting}=True, but the blocks of this model have no {argument}. Leave it out, or name it in blocks.")
    factors = config.reduction_factor if isinstance(config.reduction_factor, dict) else {}
    for name, numbers in (("leave_out", config.leave_out), ("reduction_factor", [int(k) for k in factors if k != "default"])):
        if absent := [n for n in numbers if n >= layers]:
            raise TargetError(f"{name} names layer {absent[0]}, but the model has layers 0 to {layers - 1}.")
    wanted = [site for site in found if getattr(config, site.setting) and site.number not in config.leave_out]
    if not wanted:
        raise TargetError(f"leave_out={config.leave_out!r} leaves no layer of {layers} an adapter.")
    if bare := [site.number for site in wanted if config.factor(site.number) is None]:
        raise TargetError(f"reduction_factor says nothing of layer {bare[0]}: add it, or a 'default'.")
    return wanted


def _output(config: BottleneckConfig, site: Site) -> str:
    """Path of the module that the adapter stands at: behind the norm, for those that change what comes out of it."""
    norm = site.sublayer.norm
    return site.inside(norm if norm is not None and config.reading() == "normed" else site.sublayer.output)


def _tapped(config: BottleneckConfig, site: Site) -> str:
    """Path of the module through which the adapter sees R; empty where it does not look."""
    sees_sum = config.reading() == "sum" or (config.reading() == "normed" and site.sublayer.norm is None)
    if not sees_sum and config.reading() != "residual":
        return ""
    if site.sublayer.reads is None:
        raise TargetError(
            f"The adapter at {site.inside(site.sublayer.output)!r} looks at the residual stream: name a module that is called with "
            "it, as in Sublayer(output='ffn', reads='norm2'), or take BottleneckConfig.houlsby(), which does not look."
        )
    return site.inside(site.sublayer.reads)


def _taps(config: BottleneckConfig, places: list[Site]) -> dict[str, Tap]:
    """By the path of the module that is tapped: one each, however many adapters take from it."""
    names = [name for site in places if (name := _tapped(config, site))]
    return {name: Tap(names.count(name)) for name in dict.fromkeys(names)}


def _same(tap: Tap) -> Callable[[], Tap]:
    """Whoever makes it gets this one, as its readers do."""
    return lambda: tap


def _adapter(config: BottleneckConfig, site: Site, seen: Tap | None, modules: dict[str, nn.Module]) -> Target:
    name = _output(config, site)
    module = _module(name, modules)
    norm = _module(site.inside(site.sublayer.norm), modules) if site.sublayer.norm else None
    factor = config.factor(site.number)
    assert factor is not None  # sites() has seen to it
    size = max(1, int(site.width // factor))
    scale = 1.0 if isinstance(config.scaling, str) else float(config.scaling)
    make = partial(_made, config, site.width, size, tap=seen, norm=getattr(norm, "base", norm), device=_device(modules[site.path]))
    return Target(name, module, "bottleneck", (site.width, site.width), size, scale, make)


def _made(
    config: BottleneckConfig, width: int, size: int, *, tap: Tap | None, norm: nn.Module | None, device: torch.device | None
) -> Bottleneck:
    part = Bottleneck(
        width,
        size,
        non_linearity=config.non_linearity,
        scaling=config.scaling,
        dropout=config.dropout,
        ln_before=config.ln_before,
        ln_after=config.ln_after,
    )
    return part.placed(tap, norm, alone=config.is_parallel, device=device)


def _module(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    if name not in modules:
        block = name[: name.rindex(".")]
        while block not in modules:
            block = block.rpartition(".")[0]
        there = ", ".join(child for child, _ in modules[block].named_children()) or "nothing"
        raise TargetError(f"An adapter was to be placed at {name!r}, but {block!r} has {there}. Correct the path in blocks.")
    return modules[name]


def _device(block: nn.Module) -> torch.device | None:
    """Where the block's own parameters are; its adapters go there, too."""
    return next((p.device for p in block.parameters()), None)
