"""What is kept of single operations, in bytes a token; `block.py` has which of them a block is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_nb.memory.shapes import Linear, Shape

MATH = 4  # bytes of a number: PyTorch's own attention without a fused kernel computes in fp32


@dataclass(frozen=True)
class Way:
    """How the products of a step are written.

    Args:
        element: bytes of an activation; `adapter`: of an adapter's parameter; `copy`: of what an adapter of another type than
            its input keeps of it.
        stream: bytes of a number in the residual stream, which under autocast may be more than a product's.
        summed: with many rows in fp32 the effective weight W + s·BA is formed and kept, one copy of each adapted weight; x Aᵀ,
            dropout, and x in the adapter's type are computed again instead of kept.
        fused: blocks that `fusing.py` knows keep less, in fp32.
        transformers: the models are transformers'; else litgpt's, where q, k and v are one product, keys and values are
            repeated for each query head, GELU is one operation in all its forms, and models have no dropout of their own.
        mask: bytes of an entry of a dropout's mask.
        flash: whether attention with dropout has a fused kernel, too.
        casts: autocast.
    """

    element: int
    adapter: int
    copy: int
    stream: int
    summed: bool = True
    fused: bool = False
    transformers: bool = True
    mask: int = 1
    flash: bool = True
    casts: bool = False

    @property
    def converts(self) -> bool:
        """An adapter computes in another type; unless its products are our own it keeps a copy of its input in it, each its own."""
        return self.adapter != self.element or self.stream != self.element


@dataclass(frozen=True)
class Adapters:
    """What trains in one block: rank by path of the linear layer; bottlenecks as (width of the bottleneck, what it reads) a sublayer.

    Args:
        slow: the adapter calls the layer that it stands beside; `four_bits`: it is one function with that, whose weight has four bits.
    """

    ranks: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.0
    dora: bool = False
    slow: bool = False
    four_bits: bool = False
    bottlenecks: tuple[tuple[str, int, str], ...] = ()
    everything: bool = False

    @property
    def any(self) -> bool:
        return bool(self.ranks or self.bottlenecks or self.everything)


@dataclass
class Kept:
    """Bytes a token by what for and by what they are a multiple of; `fixed`, bytes whatever the tokens."""

    by_label: dict[str, dict[str, float]] = field(default_factory=dict)
    fixed: int = 0

    def add(self, label: str, of: str, count: float) -> None:
        counts = self.by_label.setdefault(label, {})
        counts[of] = counts.get(of, 0) + count

    def count(self, label: str, of: str) -> float:
        return self.by_label.get(label, {}).get(of, 0)

    def per_token(self, sizes: dict[str, int]) -> float:
        return sum(count * sizes[of] for counts in self.by_label.values() for of, count in counts.items())

    def text(self) -> str:
        """For example `norms 8h + attention 4q + 4k + 4a + MLP 6f`."""
        return " + ".join(f"{label} {_sum(counts)}" for label, counts in self.by_label.items() if any(counts.values()))


def _sum(counts: dict[str, float]) -> str:
    return " + ".join(f"{count:g}{of}" for of, count in counts.items() if count)


class Tape:
    """Operations one after the other, and what is kept of them so far; `flows` has the tensors that get a gradient."""

    def __init__(
        self, shape: Shape, way: Way, adapters: Adapters, *, flows: bool, attention: str, sizes: dict[str, int], many: bool
    ) -> None:
        self.shape, self.way, self.adapters, self.attention, self.sizes, self.many = shape, way, adapters, attention, sizes, many
        self.kept, self.seen = Kept(), set[str]()
        self.flows = {"x"} if flows else set[str]()
        self.ranks, self.e = dict(adapters.ranks), way.element
        self.forward_high = self.scores_high = 0.0  # bytes a token: kept so far and what a moment needs beside

    def keep(self, name: str, label: str, of: str, count: float) -> None:
        """Put a tensor down, unless it is there."""
        if name not in self.seen:
            self.seen.add(name)
            self.kept.add(label, of, count)

    def note_high(self, beside: float) -> None:
        """A moment of the forward at which so much is there beside what is kept."""
        self.forward_high = max(self.forward_high, self.kept.per_token(self.sizes) + beside)

    def rename(self, name: str, now: str) -> None:
        """The residual stream is from here on what another operation gave."""
        (self.flows.add if now in self.flows else self.flows.discard)(name)
        self.seen = {f"{name} before {now}" if key == name else key for key in self.seen} | ({name} if now in self.seen else set())

    def join(self, name: str, *more: str) -> None:
        """name ← name + more, a new tensor."""
        if any(m in self.flows for m in more):
            self.flows.add(name)
        self.seen.discard(name)

    def norm(self, x: str, out: str, of: str = "h") -> str:
        """`of` is what its width is a multiple of."""
        kind, trains = self.shape.norm, self.adapters.everything
        if x in self.flows or trains:
            self.flows.add(out)
            stream = self.way.stream if of == "h" else self.e
            converted = stream != 4 and (kind != "layer" or self.way.casts)
            self.keep(f"{x} in fp32 for {out}" if converted else x, "norms", of, 4 if converted else stream)
            if kind == "t5" and converted:
                self.keep(x, "norms", of, stream)
            if trains and kind != "layer":
                self.keep(f"{out} unscaled", "norms", of, 4 if kind == "gemma" else stream)
        return out

    def linear(self, x: str, linear: Linear, out: str, of: str, times: int = 1) -> str:
        """`of` is what the input's width is a multiple of; `times` is how often an adapter keeps its own copy of the input."""
        r = self.ranks.get(linear.path, 0)
        if x in self.flows or r or self.adapters.everything:
            self.flows.add(out)
        if self.adapters.everything:
            self.keep(x, "inputs of linears", of, self.e)
        if r:
            self.adapted(x, linear, of, r, times)
        return out

    def adapted(self, x: str, linear: Linear, of: str, r: int, times: int) -> None:
        """x ↦ W x + s · B A x."""
        way, dropped = self.way, self.adapters.dropout > 0
        size, other = (way.copy if way.converts else self.e), dropped or way.converts
        own = way.summed and not self.adapters.slow and not (self.adapters.dora and other)  # forward and backward of our own
        if (other and not own) or way.stream != self.e:
            self.kept.add("adapters", of, size * times)
        else:
            self.keep(x, "adapters", of, self.e)
        if dropped and not own:
            self.kept.add("adapters", of, times * (way.mask if way.mask == 1 else size))
        if own and not other and self.e == 4 and self.many:
            self.kept.fixed += 4 * linear.inputs * linear.outputs
        if not own or self.adapters.four_bits:
            self.kept.add("adapters", "", size * r)
        if self.adapters.dora:
            self.kept.add("adapters", "", size * linear.outputs)
        if self.adapters.four_bits:  # the output, to which the update is added in place; before that the input with its gaps
            self.note_high(self.e * max(linear.outputs, linear.inputs if dropped else 0))
        elif not own:  # the base's output, the update, and the scaled update
            self.note_high((self.e + 2 * size) * linear.outputs)
        elif way.converts:  # the output, and the update in both types
            self.note_high(2 * self.e * linear.outputs + way.adapter * linear.outputs)

    def bottleneck(self, sublayer: str, x: str) -> str:
        """x ↦ x + s · U f(D h)."""
        for place, m, reads in self.adapters.bottlenecks:
            if place != sublayer:
                continue
            seen = {"output": x, "residual": "x"}.get(reads, f"{x} + x")
            if not self.way.converts:
                self.keep(seen, "adapters", "h", self.e)
            else:
                self.kept.add("adapters", "h", self.way.copy)
            self.kept.add("adapters", "", 2 * self.way.copy * m)
            self.flows.add(x)
        return x

    def dropout(self, x: str) -> None:
        """The model's own, in place of x."""
        if self.shape.dropouts[0] and x in self.flows and self.way.transformers:
            self.kept.add("dropout", "h", self.way.mask)
            self.seen.discard(x)

    def activate(self, x: str) -> str:
        """act(x), of the MLP's width."""
        kind, kept, label, out = self.shape.activation, self.kept, "MLP", "mlp activated"
        if x not in self.flows:
            return out
        self.flows.add(out)
        if kind == "relu":
            self.keep(out, label, "f", self.e)
        else:
            self.keep(x, label, "f", self.e)
        if kind in {"gelu_new", "gelu_fast", "gelu_python"} and self.way.transformers:
            kept.add(label, "f", 3 * self.e)  # ½x, tanh(…) and 1 + tanh(…)
        return out

    def multiply(self, activated: str, up: str, *, fused: bool) -> str:
        """act ⊙ up; where both come out of one product, `up` lies in what the activation keeps already, twice as wide."""
        out = "mlp product"
        if up in self.flows or activated in self.flows:
            self.flows.add(out)
        if activated in self.flows:
            if fused:
                self.kept.add("MLP", "f", self.e)
            else:
                self.keep(up, "MLP", "f", self.e)
        if up in self.flows:
            self.keep(activated, "MLP", "f", self.e)
        return out

    def scores(self, start: str, *, together: bool) -> str:
        """softmax(q kᵀ) v, by a fused kernel, by PyTorch's own operations in fp32, or written out by the model."""
        e, kept, label, out = self.e, self.kept, "attention", f"{start} out"
        dropped = self.shape.dropouts[1] > 0 and self.way.transformers
        if self.attention == "eager":
            kept.add(label, "q", 3 * e)  # q, and k and v repeated
            cast, cap = (e if e != 4 else 0), (e if self.shape.attention_cap else 0)
            mask = (self.way.mask if self.way.mask == 1 else e) + e if dropped else 0
            kept.add(label, "s·a", 4 + cast + cap + mask)
            self._note_scores(8 - cast)
        elif self.attention == "math" or (dropped and not self.way.flash):
            kept.add(label, "q", 3 * MATH)
            kept.add(label, "s·a", (3 if dropped else 1) * MATH)  # probabilities; the dropout's mask, and what it leaves
            self._note_scores(4 if dropped else 8)
            out = f"{out} in order"
        else:
            self._fused_attention(out, together=together)
            if self.shape.rotary == "part" or not self.way.transformers:
                out = f"{out} in order"  # the kernel's output is laid out as q is, and the next product wants heads last
        return out

    def _note_scores(self, beside: float) -> None:
        """When their backward runs, all that was kept after them is gone."""
        self.scores_high = self.kept.per_token(self.sizes) + beside * self.sizes["s·a"]

    def _fused_attention(self, out: str, *, together: bool) -> None:
        e, kept, label = self.e, self.kept, "attention"
        if self.shape.kv_heads != self.shape.heads and (self.shape.repeats or not self.way.transformers):
            kept.add(label, "q", 3 * e)
        else:
            if self.shape.rotary != "no" or not together:
                kept.add(label, "q", e)
                kept.add(label, "k", e if together else 2 * e)
            if together:  # v is a part of the product that gave all three, which is kept whole
                kept.add(label, "q", e)
                kept.add(label, "k", 2 * e)
        self.keep(out, label, "q", e)
        kept.add(label, "a", 4)
