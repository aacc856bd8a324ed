"""What autograd keeps of one transformer block until the backward pass, operation by operation.

PyTorch keeps of an operation what its derivative needs, and only where a gradient flows:

    y = x Wᵀ          x if W or an adapter trains, nothing if W is frozen
    y = a ⊙ b         b if a gets a gradient, a if b does
    silu, gelu        their input;   tanh, softmax, relu: their output
    norms             their input; in fp32 where they compute in fp32, which for 16-bit models is a copy
    flash attention   q, k, v, its output, and one number a head and token;  written out: the probabilities, (heads, seq) a token

A tensor that several operations keep is there once, so each has a name here. Sizes are counted in bytes a token by what
they are a multiple of: h the width, f the MLP's, q and k the queries' and the keys', a the heads, s·a the probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_nb.memory.shapes import Linear, Shape, Stack

FUSED = ("llama", "mistral", "qwen2", "qwen3")  # whose MLPs and norms `fusing.py` knows …
FUSED_ATTENTION = ("llama", "mistral", "qwen2")  # … and whose projections
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
    """What trains in one block: rank by path of the linear layer; bottlenecks as (width of the bottleneck, what it reads) a sublayer."""

    ranks: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.0
    dora: bool = False
    slow: bool = False
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


class Walk:
    """One pass through a block, in the order of its operations; `flows` has the tensors that get a gradient."""

    def __init__(
        self, shape: Shape, stack: Stack, way: Way, adapters: Adapters, *, flows: bool, attention: str, sizes: dict[str, int], many: bool
    ) -> None:
        self.sizes = sizes
        self.shape, self.stack, self.way, self.adapters, self.attention, self.many = shape, stack, way, adapters, attention, many
        self.kept, self.seen = Kept(), set[str]()
        self.flows = {"x"} if flows else set[str]()
        self.ranks, self.e = dict(adapters.ranks), way.element
        self.linears = {linear.path: linear for linear in stack.linears}
        known = way.fused and shape.model_type in FUSED and shape.activation == "silu" and shape.attention == "flash"
        self.fuses = known and self.e == 4 and not (adapters.dropout or adapters.dora or adapters.slow or adapters.everything)
        self.fuses_mlp = self.fuses and all(place != "mlp" for place, *_ in adapters.bottlenecks)  # those stand around the MLP
        self.forward_high = self.scores_high = 0.0  # bytes a token: kept so far and what a moment needs beside

    def run(self) -> bool:
        """Whether a gradient flows out of the block."""
        for step in (self.parallel,) if self.shape.order.startswith("beside") else (self.attend, self.cross, self.feed):
            step()
        return "x" in self.flows

    # The sublayers

    def attend(self) -> None:
        first = self._named("q_proj", "qkv_proj", "c_attn", "query_key_value", "query", "SelfAttention.q")
        self._sublayer("attention", lambda x: self._attention(x, x, first))

    def cross(self) -> None:
        if self.stack.cross:
            self.flows |= {"encoder"} if self.adapters.any or "x" in self.flows else set()
            self._sublayer("cross-attention", lambda x: self._attention(x, "encoder", self._named("EncDecAttention.q")))

    def feed(self) -> None:
        self._sublayer("mlp", self._mlp)

    def parallel(self) -> None:
        """x + attention(norm x) + mlp(norm x), with one norm or two."""
        one = self.norm("x", "normed")
        attended = self._attention(one, one, self._named("q_proj", "query_key_value"))
        two = self.norm("x", "normed too") if self.shape.order == "beside-two" else one
        fed = self._mlp(two)
        for name in (attended, fed):
            self.dropout(name)
        self._sum("x", attended, fed)

    def _sublayer(self, name: str, inner: object) -> None:
        """One sublayer with its norms, its bottleneck and its sum."""
        post, around = self.shape.order == "post", self.shape.order == "around"
        reads = "x" if post else self.norm("x", f"{name} in")
        out = inner(reads)  # type: ignore[operator]
        self.dropout(out)
        if around:
            out = self.norm(out, f"{name} out")
        out = self.bottleneck(name, out)
        self._sum("x", out)
        if post:
            self.norm("x", f"{name} normed")
            self._rename("x", f"{name} normed")

    def _rename(self, name: str, now: str) -> None:
        """The residual stream is from here on what another operation gave."""
        (self.flows.add if now in self.flows else self.flows.discard)(name)
        self.seen = {f"{name} before {now}" if key == name else key for key in self.seen} | ({name} if now in self.seen else set())

    def _sum(self, name: str, *more: str) -> None:
        """name ← name + more, a new tensor."""
        if any(m in self.flows for m in more):
            self.flows.add(name)
        self.seen.discard(name)

    # The operations

    def keep(self, name: str, label: str, of: str, count: float) -> None:
        if name not in self.seen:
            self.seen.add(name)
            self.kept.add(label, of, count)

    def note_high(self, beside: float) -> None:
        self.forward_high = max(self.forward_high, self.kept.per_token(self.sizes) + beside)

    def norm(self, x: str, out: str, of: str = "h") -> str:
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
        if not own:
            self.kept.add("adapters", "", size * r)
        if self.adapters.dora:
            self.kept.add("adapters", "", size * linear.outputs)
        if not own:  # the base's output, the update, and the scaled update
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
        if self.shape.dropouts[0] and x in self.flows and self.way.transformers:
            self.kept.add("dropout", "h", self.way.mask)
            self.seen.discard(x)

    def _named(self, *ends: str) -> str:
        return next(path for end in ends for path in self.linears if path == end or path.endswith("." + end))

    def _attention(self, x: str, memory: str, first: str) -> str:
        """`first` is the path of the projection that gives the queries, or all three."""
        start = first.rsplit(".", 1)[0]
        if self.shape.order == "post":
            start = start.rsplit(".", 1)[0]
        inside = [linear for path, linear in self.linears.items() if path.startswith(start + ".")]
        *into, back = inside
        if self.fuses and self.shape.model_type in FUSED_ATTENTION:
            return self._fused_projections(x, start, into, back)
        names = []
        several = 0
        for linear, name in zip(into, "qkv", strict=False):
            reads = x if name == "q" else memory
            times = 0 if several and not self.way.transformers else 1  # where they are one product, they share their input's copy
            names.append(self.linear(reads, linear, f"{start} {name}", "h", times))
            several += linear.path in self.ranks
        if not self.way.transformers and several and (several < len(into) or self._alone(first)):
            self.kept.add("adapters", "q", self.e)  # litgpt spreads the updates of q and v over all three, and keeps them for that
            self.kept.add("adapters", "k", self.e)
        if len(into) == 1:
            names = [names[0]] * 3
        together = len(into) == 1 or not self.way.transformers
        if any(name in self.flows for name in names):
            if together:
                self.flows |= {f"{start} qkv"}
            out = self._scores(start, names, together=together)
            self.flows.add(out)
        else:
            out = f"{start} out"
        return self.linear(out, back, f"{start} projected", "q")

    def _fused_projections(self, x: str, start: str, into: list[Linear], back: Linear) -> str:
        """`RotatedQkv`: one product with one effective weight; q, k and v lie in its output."""
        low_rank, out = sum(self.ranks.get(linear.path, 0) for linear in into), f"{start} out"
        if x in self.flows or low_rank:
            self.flows.add(out)
            self.keep(x, "attention", "h", 4)
            for of, count in (("q", 4), ("k", 8), ("", 8 * low_rank)):
                self.kept.add("attention", of, count)
            self.kept.fixed += 4 * self.shape.width * (sum(linear.outputs for linear in into) + low_rank)
            self.keep(out, "attention", "q", 4)
            self.kept.add("attention", "a", 4)
        return self.linear(out, back, f"{start} projected", "q")

    def _fused_mlp(self, x: str) -> str:
        """`GatedMlp`: gate and up are kept, what comes of them is computed again."""
        low_rank = sum(r for path, r in self.ranks.items() if self._is_mlp(path))
        if x in self.flows or low_rank:
            self.flows.add("mlp out")
            self.keep(x, "MLP", "h", 4)
            self.kept.add("MLP", "f", 8)
            self.kept.add("MLP", "", 4 * low_rank)
        return "mlp out"

    def _alone(self, fused: str) -> bool:
        """Only that product is adapted: in litgpt, by default, its queries and values."""
        return self.shape.fused != "none" and set(self.ranks) == {fused}

    def _scores(self, start: str, names: list[str], *, together: bool) -> str:
        """softmax(q kᵀ) v, by a fused kernel, by PyTorch's own operations in fp32, or written out by the model."""
        if self.shape.qk_norm:
            self._query_key_norms(names)
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

    def _query_key_norms(self, names: list[str]) -> None:
        for name, of in zip(names[:2], ("q", "k"), strict=True):
            self.norm(name, f"{name} normed", of)

    def _mlp(self, x: str) -> str:
        if self.shape.experts != (1, 1):
            return self._experts(x)
        if self.fuses_mlp:
            return self._fused_mlp(x)
        inside = [linear for path, linear in self.linears.items() if self._is_mlp(path)]
        *into, back = inside
        times = 2 if self.shape.fused == "qkv+gate" and not self.way.transformers else 1  # litgpt has gate and up apart
        names = [self.linear(x, linear, f"mlp {i}", "h", times) for i, linear in enumerate(into)]
        activated = self._activation(names[0])
        if self.shape.gated:
            activated = self._product(activated, names[-1], fused=len(into) == 1)
        return self.linear(activated, back, "mlp out", "f")

    def _is_mlp(self, path: str) -> bool:
        return path.partition(".")[0] in {"mlp", "intermediate"} or "DenseReluDense" in path or path == "output.dense"

    def _activation(self, x: str) -> str:
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

    def _product(self, activated: str, up: str, *, fused: bool) -> str:
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

    def _experts(self, x: str) -> str:
        """Every token through some of the experts, whose weights lie in one parameter."""
        if x in self.flows or self.adapters.everything:
            self.flows.add("mlp out")
            per, e, train = self.shape.experts[1], self.e, self.adapters.everything
            self.kept.add("experts", "f", per * e * (3 + train))  # gate, up, act(gate); their product where weights train
            self.kept.add("experts", "h", per * e * (1 + train))  # what the router weighs; the tokens, sorted
            self.keep(x, "experts", "h", e if train else 0)
        return "mlp out"
