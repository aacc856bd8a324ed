# %% [markdown]
# # LoRA from scratch
#
# {{badges}}
#
# **What you will have at the end:** a LoRA layer of your own in some ten lines, held against this package's and against Hugging Face PEFT's; its gradients derived by hand; and reasons for what looks arbitrary in it: why one matrix starts at
# zero, what α is for, what rsLoRA and DoRA change, and where the time goes.
#
# **Time:** under a minute to run on two processor cores, an hour and a half with the exercises. On a GPU: not measured. **Needs:** nothing but this package; no download. You should know what a matrix product and a derivative are.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# A model to look into, and where it lies; the layers that you build yourself stand beside it.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch
from torch import nn

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id
model, tokenizer = ln.load(BASE, dtype=torch.float32)  # 32 bits on a GPU as well: then what differs is rounding alone
device = next(model.parameters()).device

# %% [markdown]
# ## 1. A thin update
#
# A *linear layer* multiplies its input x by a *weight* matrix W and gives $h = Wx$. Fine-tuning changes each W into $W + \Delta W$, and ΔW is as large as W. LoRA's idea: the change that a new task needs is simple, so let it be a
# product of two thin matrices, $\Delta W = \frac{\alpha}{r} B A$, where A has r rows and B has r columns. The number r is the *rank*. How much thinner is that? The rank at which A and B have as many numbers as W itself is where the lines cross.

# %%
ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for width, style in ((256, "o-"), (1024, "s--"), (4096, "^:")):
    axes.plot(ranks, [100 * r * 2 * width / width**2 for r in ranks], style, label=f"W of {width:,} × {width:,}")
axes.axhline(100, color="black", linewidth=0.8)
axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel="numbers in A and B, % of W")
axes.set_xticks(ranks, [str(r) for r in ranks])
axes.set_title("the wider the layer, the thinner the update", loc="left", fontsize="medium")
axes.legend(frameon=False)
plt.show()

# %%
for width in (256, 1024, 4096):
    print(f"r=8 on {width:,} × {width:,}: {8 * 2 * width:,} numbers, {8 * 2 / width:.2%} of W's; as many as W at r={width // 2:,}")

# %% [markdown]
# ## 2. Your own layer
#
# {{exercise 02.1}}
#
# Write a module that stands in the place of a linear layer. `base` is that layer, already frozen; `self.s` is the factor $\alpha / r$. Make `self.lora_A` of shape (r, inputs), at random, and `self.lora_B` of shape
# (outputs, r), zero, both as `nn.Parameter`; `base.in_features` and `base.out_features` are the sizes. Then `forward`: what the base gives, plus s · B A x. PyTorch keeps *tokens*, the pieces of text that a
# model reads, in rows of numbers, so $BAx$ is `x @ A.T @ B.T`.

# %%
class LoraLinear(nn.Module):
    """x ↦ W x + s · B A x."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base, self.s = base.requires_grad_(False), alpha / r
        ### BEGIN SOLUTION
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.s
        ### END SOLUTION

# %%
ln.check("02.1", LoraLinear)

# %% [markdown]
# The check gives your layer a base, compares the start, then fills A and B at random and compares output and gradients with the package's own layer. And that one? Here is what runs in this package; the lines in the middle are short cuts for the usual cases, the
# last two are the formula.

# %%
ln.show("LoraWeights.forward")

# %%
ln.show("LoraWeights.update")

# %% [markdown]
# `attach` puts such a pair beside every linear layer of the model. Take the first one that it reports, fill its A and B, and compute the formula by hand beside it. The difference is rounding.

# %%
torch.manual_seed(0)
report = ln.attach(model, ln.LoraConfig(r=4, lora_alpha=10))
path, found = next(iter(report.matched.items()))
layer = model.get_submodule(path)
A, B = (ln.parameters(model)[f"{path}.adapters.default.lora_{m}"] for m in "AB")
with torch.no_grad():
    B.normal_(std=0.1)
    x = torch.randn(2, 5, found.shape[1], device=device)
    by_hand = layer.base(x) + x @ A.T @ B.T * (10 / 4)
    print(f"A {tuple(A.shape)}, B {tuple(B.shape)}, scale {found.scale}")
    print("the package gives the same to 1e-5:", torch.allclose(layer(x), by_hand, atol=1e-5))

# %% [markdown]
# Two products with thin matrices, never the product B A itself: for one token that is r · (inputs + outputs) multiplications instead of inputs · outputs. Written out once, the update is a matrix of rank r, whatever its size. Its *singular
# values*, which say how strongly a matrix acts in each of its independent directions, show it: all but r are zero.

# %%
with torch.no_grad():
    strengths = torch.linalg.svdvals(layer.adapters["default"].delta())
print("singular values of s · B A that are not zero:", int((strengths > 1e-4 * strengths[0]).sum()), "of", min(found.shape))

# %% [markdown]
# ## 3. How it starts, and what learns first
#
# Training makes a *loss* L small, a number that says how wrong the model is. Let g be its *gradient* with respect to the layer's output: by how much L grows with each of the outputs. The chain rule gives, for one token,
#
# $$\frac{\partial L}{\partial B} = s\; g\,(Ax)^\top, \qquad \frac{\partial L}{\partial A} = s\; B^\top g\; x^\top .$$
#
# B starts at zero so that the model starts as it was. Then the second formula has a zero in it: **in the first step A has no gradient, and only B moves**. Both at zero would mean no gradient for either, for ever. Watch five steps from three starts.

# %%
def norms(start, steps=5):
    """Norms of the gradients of A and of B, step by step, for one layer that learns a random target."""
    torch.manual_seed(0)
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    W, A, B = torch.randn(32, 32) / 6, torch.randn(4, 32) / 6 * start["A"], torch.randn(32, 4) / 2 * start["B"]
    A, B, found = A.requires_grad_(), B.requires_grad_(), []
    optimizer = torch.optim.SGD([A, B], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ W.T + x @ A.T @ B.T - target).square().mean().backward()
        found.append((A.grad.norm().item(), B.grad.norm().item()))
        optimizer.step()
    return found

# %% [markdown]
# Five steps each, for LoRA's own start, the other way round, and both at zero. Look at step 1, and at whether anything moves later.

# %%
starts = {"A random, B zero (LoRA)": {"A": 1, "B": 0}, "A zero, B random": {"A": 0, "B": 1}, "both zero": {"A": 0, "B": 0}}
for name, start in starts.items():
    print(name)
    for step, (a, b) in enumerate(norms(start), 1):
        print(f"    step {step}: ‖∂L/∂A‖ = {a:.4f}, ‖∂L/∂B‖ = {b:.4f}")

# %% [markdown]
# Either matrix may be the one at zero: the other then waits for one step. Both at zero never start. Is it so in the whole model, with a real loss? One step of training, where the reports of gradients come from every layer:

# %%
ln.detach(model)
torch.manual_seed(0)
ln.attach(model, ln.LoraConfig(r=4, lora_alpha=10))
ids = tokenizer("Could you please open the window for me?", return_tensors="pt").input_ids.to(device)
model(input_ids=ids, labels=ids).loss.backward()
gradients = {name: p.grad.abs().max().item() for name, p in ln.parameters(model).items()}
print("every gradient of A is zero:    ", all(g == 0 for name, g in gradients.items() if name.endswith("lora_A")))
print("every gradient of B is not zero:", all(g > 0 for name, g in gradients.items() if name.endswith("lora_B")))

# %% [markdown]
# {{exercise 02.2}}
#
# Write both gradients for n tokens at once. `x` is (n, inputs), one token in a row; `g` is (n, outputs), ∂L/∂h for each; A, B and s as above. Give back (∂L/∂A, ∂L/∂B), shaped as A and B; each is a sum over the tokens. Without autograd, the part of PyTorch that finds gradients by itself.

# %%
def gradients_of(x, g, A, B, s):
    """(∂L/∂A, ∂L/∂B) of h = W x + s · B A x."""
    ### BEGIN SOLUTION
    return s * (g @ B).T @ x, s * g.T @ (x @ A.T)
    ### END SOLUTION

# %%
ln.check("02.2", gradients_of)

# %% [markdown]
# ## 4. The scale, and why there is one
#
# Why α/r and not 1? Each of r rows of A adds its part to the output, so a larger rank would make larger steps; dividing by r lets one keep the *learning rate*, the length of a step, while trying ranks. But does it divide by too much? Take the gradient of B in the first step, at three ranks,
# for the usual scale α/r and for α/√r, which is called *rank-stabilised* LoRA (rsLoRA).

# %%
def first_gradient(r, use_rslora):
    """Norm of the first gradient of all B together."""
    ln.detach(model)
    torch.manual_seed(0)
    ln.attach(model, ln.LoraConfig(r=r, lora_alpha=16, use_rslora=use_rslora))
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad for name, p in ln.parameters(model).items() if name.endswith("lora_B")]
    return torch.cat([g.flatten() for g in found]).norm().item()

largest = min(min(m.shape) for m in report.matched.values())
ranks = [largest // 16, largest // 4, largest]
first = {rs: [first_gradient(r, rs) for r in ranks] for rs in (False, True)}

# %% [markdown]
# Both columns over their first entry, so that only the rank speaks:

# %%
print("ranks", ranks)
for rs, name in ((False, "α/r "), (True, "α/√r")):
    shares = [g / first[rs][0] for g in first[rs]]
    print(f"{name}: the gradient over that at the lowest rank: " + ", ".join(f"{share:.2f}" for share in shares))

# %% [markdown]
# With α/r it halves each time the rank is four times as large: every part is divided by r, but only √r of them add up, since they point in different directions. So high ranks learn slowly, and may look no better than low ones for that reason alone. With α/√r the first
# gradient is the same at every rank (Kalajdzievski, arXiv:2312.03732). `use_rslora=True` is all it takes.
#
# {{exercise 02.3}}
#
# An adapter was trained well with r = 4, α = 12 and the usual scale. You want to try r = 36 with rsLoRA and the *same factor* in front of B A. Which α?

# %%
alpha_for_rank_36 = 12 / 4 * 36**0.5  ### SOLUTION

# %%
ln.check("02.3", alpha_for_rank_36)

# %% [markdown]
# ## 5. DoRA: length and direction apart
#
# Each row of W makes one output; it has a length and a direction. *DoRA* (weight-decomposed LoRA) lets BA turn the direction and learns the length m by itself:
#
# $$h = \frac{m}{\lVert W + sBA \rVert} \odot (W + sBA)\,x ,$$
#
# with the norm taken row by row. m starts as the norm of W's rows, so the model again starts as it was. In the package's code `gain` is m over the norm; see how the norm is found some rows at a time:

# %%
ln.show("layers.dora.row_norms")

# %%
ln.detach(model)
torch.manual_seed(0)
ln.attach(model, ln.LoraConfig(r=4, lora_alpha=10, use_dora=True))
layer = model.get_submodule(path)
dora = layer.adapters["default"]
with torch.no_grad():
    print("starts as the base:", torch.allclose(layer(x), layer.base(x), atol=1e-5))
print(f"numbers that train in this layer: {found.parameters:,} with LoRA, {len(dora.magnitude)} more with DoRA")

# %% [markdown]
# Now let the update be something else than zero, and double the length of the first row. How long is each row of the adapted matrix?

# %%
from lora_nb.layers.matrix import matrix

with torch.no_grad():
    dora.lora_B.normal_(std=0.1)
    dora.magnitude[0] *= 2
    adapted = dora.gain(layer)[:, None] * (matrix(layer) + dora.delta())
    print("each row is as long as m says, to 1e-5:", torch.allclose(adapted.norm(dim=1), dora.magnitude, rtol=1e-5))
    print("the layer's output is that matrix':    ", torch.allclose(layer(x) - layer(0 * x), x @ adapted.T, atol=1e-4))

# %% [markdown]
# The length of every row is m, whatever BA does. LoRA cannot turn a row without changing its length as well; DoRA has the two apart, at the price of the norm.
#
# {{exercise 02.4}}
#
# Write DoRA's output for `x` (n, inputs): W is (outputs, inputs), A and B as before, m is (outputs,). Form the adapted matrix, divide each row by its length, multiply it by m.

# %%
def dora_output(x, W, A, B, m, s):
    """(m / ‖W + s·BA‖) ⊙ (W + s·BA) x, for tokens in rows."""
    ### BEGIN SOLUTION
    V = W + s * B @ A
    return x @ V.T * (m / V.norm(dim=1))
    ### END SOLUTION

# %%
ln.check("02.4", dora_output)

# %% [markdown]
# ## 6. Where the time goes, and a backward pass of one's own
#
# A frozen linear layer multiplies once on the way forward, and once on the way back for its input's gradient. LoRA adds two thin products on the way forward and four on the way back. That is little arithmetic; but written plainly, autograd also makes,
# scales and adds matrices as large as the output, and moving those costs more time than the products. What does it *keep* for the way back? A frozen layer nothing (notebook 01); the plain formula more than it must.

# %%
def kept(function, x, *weights):
    """Numbers that autograd keeps of `function(x)`, weights left out, over the numbers of x."""
    known, found = {w.untyped_storage().data_ptr() for w in weights}, {}

    def note(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = function(x)  # noqa: F841
    return sum(size for place, size in found.items() if place not in known) / x.nbytes

# %% [markdown]
# Take an input in 16 bits, as on a GPU, and A and B in 32, since small steps vanish in 16: then the plain formula keeps a copy of x in 32 bits as well. Two ways, the same numbers:

# %%
from lora_nb.layers.lora_linear import lora_linear

torch.manual_seed(0)
W, A, B = torch.randn(512, 512, dtype=torch.bfloat16) / 23, torch.randn(8, 512).div(23).requires_grad_(), torch.randn(512, 8, requires_grad=True)
x = torch.randn(600, 512, dtype=torch.bfloat16, requires_grad=True)
plain = lambda x: x @ W.T + (x.float() @ A.T @ B.T * 2.0).bfloat16()
own = lambda x: lora_linear(x, W, None, (A, B, 2.0))
for name, function in {"frozen layer alone": lambda x: x @ W.T, "plain formula": plain, "package": own}.items():
    print(f"{name:20} keeps {kept(function, x, W, A, B):.2f} × x")

# %% [markdown]
# The package's layer has a backward pass of its own. It keeps x, which the gradient of A needs, and nothing else: A x is so cheap that it is computed again. Compare its lines with the two formulas of section 3, and with your exercise: `update.add` has both.

# %%
ln.show("LoraProduct.backward")

# %%
ln.show("Update.add")

# %% [markdown]
# A backward pass written by hand can be wrong without anyone noticing, so it is held against autograd's, number by number, here in 64 bits.

# %%
W64, A64, B64 = (t.detach().double() for t in (W, A, B))
x64, g = x.detach().double().requires_grad_(), torch.randn(600, 512, dtype=torch.float64)
A64.requires_grad_(), B64.requires_grad_()
expected = torch.autograd.grad(x64 @ W64.T + x64 @ A64.T @ B64.T * 2.0, (x64, A64, B64), g)
given = torch.autograd.grad(lora_linear(x64, W64, None, (A64, B64, 2.0)), (x64, A64, B64), g)
for name, theirs, ours in zip(("x", "A", "B"), expected, given, strict=True):
    print(f"gradient of {name} equal to 1e-10: {torch.allclose(theirs, ours, rtol=1e-10, atol=1e-10)}")

# %% [markdown]
# And the time? Forward and backward of one layer in 32 bits, the variants in turn, medians over the frozen layer's time. On a busy machine the figures move; look at the order.

# %% tags=["nbval-ignore-output"]
from lora_nb.timing import interleaved

W32, x32, g32 = W64.float(), torch.randn(2048, 512, requires_grad=True), torch.randn(2048, 512)
A32, B32 = A64.detach().float().requires_grad_(), B64.detach().float().requires_grad_()
ways = {
    "frozen layer": lambda: (x32 @ W32.T).backward(g32),
    "plain LoRA": lambda: (x32 @ W32.T + x32 @ A32.T @ B32.T * 2.0).backward(g32),
    "package's LoRA": lambda: lora_linear(x32, W32, None, (A32, B32, 2.0)).backward(g32),
}
times = interleaved(ways, rounds=15)
for name in ways:
    print(f"{name:15} {times.ratio(name, 'frozen layer'):.2f} × the frozen layer's time")

# %% [markdown]
# ## 7. Does somebody else agree?
#
# Hugging Face PEFT is the library that most adapters are made with. If it is installed here, give its LoRA layer the same W, A and B, and compare outputs and gradients with the package's.

# %%
def under_peft(use_rslora):
    """PEFT's LoRA layer with W, A and B from above."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=use_rslora, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(512, 512, bias=False)), config).base_model.model[0]
    layer.base_layer.weight.data, layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = W32, A32.data, B32.data
    return layer

# %% [markdown]
# Twice, with the usual scale and with the rank-stabilised one:

# %%
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would speak of an optional part
if importlib.util.find_spec("peft"):
    for use_rslora, scale in ((False, 16 / 8), (True, 16 / 8**0.5)):
        theirs, ours = under_peft(use_rslora)(x32), lora_linear(x32, W32, None, (A32, B32, scale))
        gradients = [torch.autograd.grad(y, x32, g32)[0] for y in (theirs, ours)]
        print(f"PEFT, rsLoRA {use_rslora}: same output {torch.allclose(theirs, ours, atol=1e-3)}, same gradient {torch.allclose(*gradients, atol=1e-3)}")
else:
    print("PEFT is not installed here; `pip install peft` and run this cell again.")

# %% [markdown]
# ## Three things to remember
#
# 1. $W + \frac{\alpha}{r} BA$: two thin products beside a frozen one. One of A and B starts at zero, so the model starts as it was, and the other moves first.
# 2. The scale is part of the learning rate. With α/r a higher rank learns more slowly; with α/√r it does not.
# 3. What training keeps and moves in memory costs more than the arithmetic; a backward pass written for the purpose keeps x and nothing else.
#
# **To read on:** Hu et al., *LoRA*, arXiv:2106.09685, section 4.1. Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv:2312.03732. Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353,
# section 4. Cherniuk et al., *Run LoRA Run*, arXiv:2312.03415, for the order of the products. In the code: `ln.show("layers.lora_init")` has further starts, PiSSA and OLoRA among them.
