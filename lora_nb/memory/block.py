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

from collections.abc import Callable

from lora_nb.memory.kept import Adapters, Tape, Way
from lora_nb.memory.shapes import Linear, Shape, Stack

FUSED = ("llama", "mistral", "qwen2", "qwen3")  # whose MLPs and norms `fusing.py` knows …
FUSED_ATTENTION = ("llama", "mistral", "qwen2")  # … and whose projections


class Walk(Tape):
    """One pass through a block, in the order of its operations."""

    def __init__(
        self, shape: Shape, stack: Stack, way: Way, adapters: Adapters, *, flows: bool, attention: str, sizes: dict[str, int], many: bool
    ) -> None:
        super().__init__(shape, way, adapters, flows=flows, attention=attention, sizes=sizes, many=many)
        self.stack, self.linears = stack, {linear.path: linear for linear in stack.linears}
        known = way.fused and shape.model_type in FUSED and shape.activation == "silu" and shape.attention == "flash"
        self.fuses = known and self.e == 4 and not (adapters.dropout or adapters.dora or adapters.slow or adapters.everything)
        self.fuses_mlp = self.fuses and all(place != "mlp" for place, *_ in adapters.bottlenecks)  # those stand around the MLP

    def run(self) -> bool:
        """Whether a gradient flows out of the block."""
        for step in (self.parallel,) if self.shape.order.startswith("beside") else (self.attend, self.cross, self.feed):
            step()
        return "x" in self.flows

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
        self.join("x", attended, fed)

    def _sublayer(self, name: str, inner: Callable[[str], str]) -> None:
        """One sublayer with its norms, its bottleneck and its sum."""
        post, around = self.shape.order == "post", self.shape.order == "around"
        reads = "x" if post else self.norm("x", f"{name} in")
        out = inner(reads)
        self.dropout(out)
        if around:
            out = self.norm(out, f"{name} out")
        out = self.bottleneck(name, out)
        self.join("x", out)
        if post:
            self.norm("x", f"{name} normed")
            self.rename("x", f"{name} normed")

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
            if self.shape.qk_norm:
                for name, of in zip(names[:2], ("q", "k"), strict=True):
                    self.norm(name, f"{name} normed", of)
            out = self.scores(start, together=together)
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

    def _alone(self, fused: str) -> bool:
        """Only that product is adapted: in litgpt, by default, its queries and values."""
        return self.shape.fused != "none" and set(self.ranks) == {fused}

    def _mlp(self, x: str) -> str:
        if self.shape.experts != (1, 1):
            return self._experts(x)
        if self.fuses_mlp:
            return self._fused_mlp(x)
        inside = [linear for path, linear in self.linears.items() if self._is_mlp(path)]
        *into, back = inside
        times = 2 if self.shape.fused == "qkv+gate" and not self.way.transformers else 1  # litgpt has gate and up apart
        names = [self.linear(x, linear, f"mlp {i}", "h", times) for i, linear in enumerate(into)]
        activated = self.activate(names[0])
        if self.shape.gated:
            activated = self.multiply(activated, names[-1], fused=len(into) == 1)
        return self.linear(activated, back, "mlp out", "f")

    def _fused_mlp(self, x: str) -> str:
        """`GatedMlp`: gate and up are kept, what comes of them is computed again."""
        low_rank = sum(r for path, r in self.ranks.items() if self._is_mlp(path))
        if x in self.flows or low_rank:
            self.flows.add("mlp out")
            self.keep(x, "MLP", "h", 4)
            self.kept.add("MLP", "f", 8)
            self.kept.add("MLP", "", 4 * low_rank)
        return "mlp out"

    def _is_mlp(self, path: str) -> bool:
        return path.partition(".")[0] in {"mlp", "intermediate"} or "DenseReluDense" in path or path == "output.dense"

    def _experts(self, x: str) -> str:
        """Every token through some of the experts, whose weights lie in one parameter."""
        if x in self.flows or self.adapters.everything:
            self.flows.add("mlp out")
            per, e, train = self.shape.experts[1], self.e, self.adapters.everything
            self.kept.add("experts", "f", per * e * (3 + train))  # gate, up, act(gate); their product where weights train
            self.kept.add("experts", "h", per * e * (1 + train))  # what the router weighs; the tokens, sorted
            self.keep(x, "experts", "h", e if train else 0)
        return "mlp out"
