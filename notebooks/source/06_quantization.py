# %% [markdown]
# # Quantization: a base in four bits
#
# {{badges}}
#
# **What this teaches:** how a weight fits in four bits and what that costs; why the sixteen levels of NF4 are where they are; double quantization; how QLoRA trains an adapter on top of such a base; and what paged optimizers are for.
#
# **What you will have at the end:** the NF4 code book, derived by yourself; the proof that this package's bits are those of bitsandbytes; a base whose linear layers take an eighth of the bytes, and an adapter trained on it.
#
# **Time:** about one minute of computing on two processor cores, and an hour for the reader. On a GPU: not measured. **Needs:** nothing but this package; no download.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import lora_nb as ln
from lora_nb.layers import nf4
from lora_nb.layers.quantized import LEVELS, dynamic_map, nf4_levels

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"

# %% [markdown]
# ## 1. Sixteen levels and a scale
#
# Four bits count from 0 to 15, so a weight can be one of sixteen values. To make the best of them, weights are cut into *blocks*; each block keeps its largest absolute value, the *scale* (`absmax`), and every weight
# becomes the index of the nearest of sixteen fixed *levels* between −1 and 1. Here are eight weights, with levels in even steps.

# %%
block = torch.tensor([0.021, -0.013, 0.048, 0.003, -0.060, 0.017, -0.032, 0.009])
levels = torch.linspace(-1, 1, 16)
scale = block.abs().max()
index = (block[:, None] / scale - levels).abs().argmin(1)
restored = levels[index] * scale
print("indices:  ", index.tolist())
print("restored: ", [round(v, 3) for v in restored.tolist()])
print("error:    ", [round(v, 3) for v in (restored - block).tolist()])

# %% [markdown]
# The largest weight came back exactly. The smallest, 0.003, came back as 0.004, and a weight of zero would have done so, too: an even grid of sixteen has no zero. Which levels are best depends on where weights usually lie, and that is the subject of section 2.

# %% [markdown]
# {{exercise 06.1}}
#
# Put these steps into a function: a block of weights and the levels go in, the restored weights come out.

# %%
def rounded(block, levels):
    ### BEGIN SOLUTION
    scale = block.abs().max()
    index = (block[:, None] / scale - levels).abs().argmin(1)
    return levels[index] * scale
    ### END SOLUTION


# %%
ln.check("06.1", rounded)

# %% [markdown]
# The package's own, which also puts two indices into each byte:

# %%
ln.show(nf4._pack_textbook)

# %% [markdown]
# ## 2. Where weights lie
#
# Levels should be dense where weights are dense. Take every linear layer of the base, divide its weights by their standard deviation, and draw them all. The line is the normal distribution, the bell curve: how well does it fit?

# %%
model, tokenizer = ln.load(BASE)
linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
weights = torch.cat([(m.weight / m.weight.std()).flatten() for m in linears]).detach()
print(f"{len(linears)} layers, {len(weights):,} weights")
print(f"within one deviation: {(weights.abs() < 1).float().mean():.1%}; of a normal distribution {torch.special.erf(torch.tensor(0.5**0.5)):.1%}")

# %% tags=["nbval-ignore-output"]
grid = torch.linspace(-4, 4, 200)
figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
axes.hist(weights.numpy(), bins=160, range=(-4, 4), density=True, color="#56b4e9", label="weights of the base")
axes.plot(grid.numpy(), (torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5).numpy(), color="black", label="normal distribution")
axes.set(xlabel="weight / standard deviation of its layer", ylabel="density", title="Weights are nearly normal")
axes.legend(frameon=False);

# %% [markdown]
# Very well; slightly more of them are close to zero than the bell would have. A *quantile* is the value below which a given share of all numbers lies; the quantile of 1/2 is the middle one. Levels at quantiles of equal
# shares are used equally often, which is the idea of *NormalFloat*, NF4. For the normal distribution quantiles have a formula, `torch.special.ndtri`:

# %%
shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
print("of the normal distribution:", [round(v, 2) + 0.0 for v in torch.special.ndtri(shares).tolist()])
found = torch.quantile(weights[::40], shares)
print("of the weights, the same within 0.2:", bool((found - torch.special.ndtri(shares)).abs().max() < 0.2))

# %% [markdown]
# ## 3. The code book, derived
#
# Two wishes shape NF4's sixteen levels. Zero must be among them, for many weights are zero and should stay so; hence eight levels above and seven below. And the quantile of the share 1 is infinite, so the outermost share
# has to be less: the authors' code takes 0.9677083, the mean of what 15 and 16 bins would have there.

# %%
OUTERMOST = 1 - (1 / 32 + 1 / 30) / 2
print(f"outermost share: {OUTERMOST:.7f}")
print("eight shares above the middle:", [round(s, 3) for s in torch.linspace(OUTERMOST, 0.5, 9)[:-1].tolist()])

# %% [markdown]
# {{exercise 06.2}}
#
# Compute the sixteen levels: the quantiles of those eight shares; with a minus, the quantiles of seven shares that go in equal steps from the outermost to 1/2, this one left out; and zero. Then in order, and scaled so that the largest is 1.

# %%
def code_book():
    ### BEGIN SOLUTION
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:-1])
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return levels / levels.max()
    ### END SOLUTION


# %%
ln.check("06.2", code_book)

# %% [markdown]
# The package derives them as well, when it is imported; no table is typed in anywhere. These are the numbers of the paper's appendix E (Dettmers et al., 2023, arXiv:2305.14314):

# %%
print([round(v, 4) for v in nf4_levels().tolist()])

# %% [markdown]
# Equation 4 of the paper cannot be what they computed: its first term is the quantile of the share 0, which is −∞. The code that came with it is what everybody uses, and what you have just derived. Where do the levels lie?

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
for y, (name, values) in enumerate({"even": torch.linspace(-1, 1, 16), "FP4": LEVELS["fp4"], "NF4": LEVELS["nf4"]}.items()):
    axes.plot(values.tolist(), [y] * 16, "|", markersize=16, color="#0072b2")
axes.set_yticks(range(3), ["even", "FP4", "NF4"])
axes.set(xlabel="level", title="Sixteen levels: in even steps, as a 4-bit float, and at normal quantiles", ylim=(-0.6, 2.6));

# %% [markdown]
# NF4's lie close together in the middle, where weights are many, and far apart outside. FP4, a float with two bits of exponent, has two zeros, and wastes one.
#
# ## 4. Error against bits
#
# A quarter of the bits of 16 must lose something. The measure is the *relative error*: the length of the difference over the length of the weights, $\|\hat{W} - W\| / \|W\|$. First on normal numbers, at the usual block of 64.

# %%
normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def error(restored, weight=normal):
    return ((restored - weight).norm() / weight.norm()).item()


def even(bits, block=64):
    """Rounded to 2 ** bits - 1 levels in even steps, zero among them."""
    most = 2 ** (bits - 1) - 1
    blocks = normal.view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True) / most
    return ((blocks / scale).round() * scale).view_as(normal)

# %% [markdown]
# Even steps at five sizes, and the two code books of four bits. Which of the three that take 4.5 bits is nearest to the weights?

# %%
points = {f"even steps, {b} bits": (b + 32 / 64, error(even(b))) for b in (3, 4, 5, 6, 8)}
for kind in ("fp4", "nf4"):
    q = nf4.quantize(normal, quant_type=kind)
    points[kind.upper()] = (q.bits_per_parameter, error(nf4.dequantize(q)))
for name, (bits, err) in points.items():
    print(f"{name:19} {bits:.2f} bits a weight, relative error {err:.3f}")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
grid = [p for name, p in points.items() if name.startswith("even")]
axes.plot(*zip(*grid, strict=True), marker="o", color="#666666", label="levels in even steps")
for name, marker in {"FP4": "s", "NF4": "D"}.items():
    axes.plot(*points[name], marker, color="#d55e00", label=name)
axes.set_yscale("log")
axes.set(xlabel="bits a weight, scales included", ylabel="relative error", title="A bit less doubles the error; better levels win some back")
axes.legend(frameon=False);

# %% [markdown]
# Each bit more halves the error of even steps, or does better: nearly a straight line on this scale. NF4 lies below the line and FP4 above it, at the same number of bits. And the block? A small block has a scale of its own more often, which fits better and costs more:

# %%
for size in (32, 64, 128, 4096):
    q = nf4.quantize(normal, block_size=size)
    print(f"block {size:4}: {q.bits_per_parameter:.3f} bits a weight, relative error {error(nf4.dequantize(q)):.3f}")

# %% [markdown]
# ## 5. Double quantization
#
# At block 64 the scales take half a bit a weight. They are numbers, too, and can be quantized: less their mean, in 8 bits, 256 of them with one scale of their own. Their levels are no even grid either, but a small float:

# %%
ln.show(dynamic_map)

# %% [markdown]
# {{exercise 06.3}}
#
# How many bits does a weight take, all scales counted? The function gets the block size, and whether the scales are quantized.

# %%
def bits_a_weight(block, double):
    ### BEGIN SOLUTION
    if double:
        return 4 + 8 / block + 32 / (block * 256)
    return 4 + 32 / block
    ### END SOLUTION


# %%
ln.check("06.3", bits_a_weight)

# %% [markdown]
# What does it cost? Compare the last two columns.

# %%
for double in (False, True):
    q = nf4.quantize(normal, double_quant=double)
    print(f"double_quant={double!s:5}  bits a weight {q.bits_per_parameter:.3f}   relative error {error(nf4.dequantize(q)):.4f}")
saved = 65e9 * (4.5 - 4.127) / 8 / 1e9
print(f"for 65 billion weights it saves {saved:.1f} GB")

# %% [markdown]
# Three GB for an error that does not move in the fourth digit. Is NF4 then the best there is? Its name promises levels that are used equally often, yet the largest weight of each block is always exactly ±1 after scaling, so
# blocks are *not* normal numbers. Count how often each level is used:

# %%
used = torch.bincount(torch.stack([nf4.quantize(normal).packed >> 4, nf4.quantize(normal).packed & 15]).flatten(), minlength=16) / normal.numel()
print("share of each level, in %:", [round(100 * u, 1) for u in used.tolist()])
print(f"information in an index: {-(used * used.log2()).sum():.2f} of 4 bits")

# %% [markdown]
# Not equal: the outer ones are rare (Yoshida, 2023, arXiv:2306.06965, who draws the conclusion that NF4 is not optimal). It is good, simple, and what everyone's files contain. With fewer bits the choice of levels matters more:

# %% [markdown]
# {{exercise 06.4}}
#
# Find levels for *three* bits, at most eight of them between −1 and 1, that round normal weights better than eight levels in even steps.

# %%
def three_bit_levels():
    ### BEGIN SOLUTION
    levels = torch.special.ndtri(torch.linspace(1 / 16, 15 / 16, 8))
    return levels / levels.max()
    ### END SOLUTION


# %%
ln.check("06.4", three_bit_levels)

# %% [markdown]
# ## 6. To the bit as bitsandbytes
#
# Nearly all 4-bit checkpoints are made by the library bitsandbytes. Files are only exchangeable if every byte means the same. If it is installed, compare: packed bytes, 8-bit scales, and the restored weights, exactly.

# %%
import logging

if importlib.util.find_spec("bitsandbytes"):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would speak of an optional part
    import bitsandbytes.functional as theirs

    packed, state = theirs.quantize_4bit(normal, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(normal, double_quant=True)
    print("code book:       ", torch.equal(nf4_levels(), state.code.cpu()))
    print("packed bytes:    ", torch.equal(ours.packed, packed))
    print("8-bit scales:    ", torch.equal(ours.absmax, state.absmax))
    print("restored weights:", torch.equal(nf4.dequantize(ours), theirs.dequantize_4bit(packed, state)))
else:
    print("bitsandbytes is not installed here; `pip install bitsandbytes` and run this cell again.")

# %% [markdown]
# ## 7. QLoRA: train on top of it
#
# QLoRA puts the frozen base into four bits and trains a LoRA adapter (a product of two thin matrices, added to each layer's weight) in full precision beside it. `load(quant="nf4")` quantizes layer by layer while it reads. Compare the bytes, and what the rounding does to the model before anything is trained.

# %%
four, _ = ln.load(BASE, quant="nf4")
report = ln.quantize(ln.load(BASE)[0], ln.QuantConfig())
errors = [m.error for m in report.modules.values()]
inside = sum(m.shape[0] * m.shape[1] for m in report.modules.values())
print(f"{len(report.modules)} layers, {inside:,} of their weights, {next(iter(report.modules.values())).bits:.3f} bits each")
print(f"relative errors from {min(errors):.3f} to {max(errors):.3f}")
print(f"the whole model: {report.before / 1e6:.1f} MB in 32 bits, {report.after / 1e6:.1f} MB now")

# %% [markdown]
# The relative error on normal numbers was 0.092; real layers are close to it. The linear layers shrink to an eighth, the whole model less. What stays in 32 bits are the embeddings, the norms and the output head, a large part of so small a model and a small one of a large. Does the model still predict? Its *loss* on sentences it was not trained on is the mean surprise at each token, lower is better.

# %% tags=["nbval-ignore-output"]
train, test = ln.dataset("tone", "train").language("en"), ln.dataset("tone", "test").language("en")
exact = ln.evaluate(model, tokenizer, test, seq_len=64)
before = ln.evaluate(four, tokenizer, test, seq_len=64)

# %%
print(f"held-out loss: {exact.loss:.2f} in 32 bits, {before.loss:.2f} in four")

# %% [markdown]
# In the forward pass each layer restores its weight, multiplies, and lets it go. The weight gets no gradient, but the *input* does, so that layers further down, and their adapters, can learn. For this the backward pass
# restores the weight once more instead of keeping it:

# %%
from lora_nb.layers.linear4bit import Multiply4bit

ln.show(Multiply4bit)

# %% tags=["nbval-ignore-output"]
frozen = {name: p.clone() for name, p in four.named_parameters() if p.dtype == torch.uint8}
torch.manual_seed(0)
ln.attach(four, ln.LoraConfig(r=16, lora_alpha=32))
run = ln.train(four, tokenizer, train, ln.TrainConfig(max_steps=50, batch_size=16, seq_len=64, learning_rate=5e-3))
after = ln.evaluate(four, tokenizer, test, seq_len=64)
run

# %%
print("the 4-bit weights are the same bytes:    ", all(torch.equal(p, frozen[n]) for n, p in four.named_parameters() if n in frozen))
print("the loss fell by more than the rounding had cost:", before.loss - after.loss > 10 * abs(before.loss - exact.loss))
print("10 points more tokens right:             ", after.token_accuracy > before.token_accuracy + 0.1)

# %% [markdown]
# The adapter learns around the rounding of its base. To remember: it belongs to *this* base now. Merging it into the weights has three possible targets, each of which loses something else: notebook `07`.
#
# ## 8. What it is for: large models on small cards
#
# On the embedded base four bits are an exercise. At 7 billion parameters they decide which card is enough. `estimate` needs no weights; a row is one training step of LoRA, at batch 1 and 512 tokens.

# %%
for name in ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-70b-hf"):
    sizes = []
    for quant in (None, "nf4"):
        e = ln.estimate(name, ln.LoraConfig(r=16), quant=quant, dtype="bf16", seq_len=512, gradient_checkpointing=True)
        sizes.append(f"{e.total / 2**30:6.1f} GiB (weights {e.parts['weights'] / 2**30:5.1f})")
    print(f"{name[11:]:17} bf16 {sizes[0]}   NF4 {sizes[1]}")

# %% [markdown]
# ## 9. Paged optimizers, told
#
# The third invention of the QLoRA paper cannot be shown without a GPU. Memory is short for moments, not all the time: a long batch comes, and a run of hours dies. A *paged* optimizer keeps Adam's two numbers per parameter in memory that the
# driver may move to the computer's own when the card is full, and back when they are needed. Normal batches cost nothing extra. On a processor there is nothing to page, and the package says so:

# %%
from lora_nb.errors import TrainingError

try:
    ln.train(four, tokenizer, train, ln.TrainConfig(max_steps=1, optimizer="paged_adamw"))
except TrainingError as refused:
    print(refused)
state = 8 * sum(p.numel() for p in ln.parameters(four).values())
print(f"state of Adam: {state / 1e6:.1f} MB for the adapter; {8 * inside / 1e6:.1f} MB if all these weights trained")

# %% [markdown]
# With an adapter the state is small to begin with, so paging matters for full fine-tuning and very large adapters, and as an insurance.
#
# ## Three things to remember
#
# 1. Four bits are an index into sixteen levels and a shared scale: 4.5 bits with blocks of 64, 4.127 with double quantization.
# 2. NF4's levels are quantiles of the normal distribution, with zero among them. It is better than even steps, and not the best possible.
# 3. QLoRA trains in full precision beside a base in four bits. The gradient passes through the restored weight; the weight itself never moves.
#
# **To read on:** Dettmers et al., *QLoRA*, arXiv:2305.14314, section 3 and appendix E. Yoshida, *NF4 Isn't Information Theoretically Optimal (and that's Good)*, arXiv:2306.06965. Dettmers et al., *LLM.int8()*,
# arXiv:2208.07339, and *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861.
