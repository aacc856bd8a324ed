# %% [markdown]
# # Merging: the adapter inside the weights
#
# {{badges}}
#
# **What you will have at the end:** a model that has an adapter's knowledge in its own weights and can be saved and loaded without this package; a way back that is exact to the last bit;
# and measurements of what merging loses: next to nothing in 32 bits, a little in 16, and in four bits possibly everything that was learnt.
#
# **Time:** about ten minutes to read, half a minute to run on two processor cores. On a GPU: not measured. **Needs:** nothing but this package. Notebook `00_start` says what an adapter is.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. Something worth keeping
#
# Merging only makes sense for an adapter that has learnt something. So first a short training: sixty steps on the English half of `tone`, pairs of a formal sentence and an informal one.
# The *held-out loss* is the number to watch in this notebook: the mean of −log of the probability that the model gives to each right token of sentences that it has not seen (the unit is the *nat*). The lower, the better it foretells them.

# %%
import torch

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = ln.load(BASE)
tone = ln.dataset("tone", "train").language("en")
held_out = ln.dataset("tone", "test").language("en")[:96]
untaught = ln.evaluate(model, tokenizer, held_out).loss

# %% tags=["nbval-ignore-output"]
LORA = ln.LoraConfig(r=8, lora_alpha=32)
SCHOOL = ln.TrainConfig(max_steps=60, batch_size=8, learning_rate=5e-3)
torch.manual_seed(0)
report = ln.attach(model, LORA)
ln.train(model, tokenizer, tone, SCHOOL)

# %%
learnt = ln.evaluate(model, tokenizer, held_out).loss
print("the loss fell by more than a third:", learnt < untaught * 2 / 3)

# %% [markdown]
# ## 2. What merging is
#
# An adapted linear layer computes $Wx + s\,B(Ax)$ with $s = \alpha/r$: the frozen weight $W$, and beside it two thin matrices, which cost time at every call (notebook `08_latency` measures how much).
# But both terms are linear in $x$, so one matrix does the same: $W' = W + s\,BA$. Putting $W'$ in the place of $W$ is *merging*. This is the code that does it:

# %%
ln.show("LoraWeights.merge")

# %% [markdown]
# By hand, on the first layer that the adapter sits on, with random inputs. Look at the difference between the two ways: both are the same number in exact arithmetic, and floating point
# rounds them in a different order.

# %%
from lora_nb.attach import weights
from lora_nb.layers.matrix import matrix

path = next(iter(report.matched))
part = weights(model, "default")[path]
with torch.no_grad():
    W, A, B, s = matrix(model.get_submodule(path)).clone(), part.lora_A, part.lora_B, part.scaling
    x = torch.randn(64, W.shape[1], generator=torch.Generator().manual_seed(1)).to(W.device)
    beside = x @ W.T + s * (x @ A.T) @ B.T
    inside = x @ (W + s * B @ A).T
    print("relative difference below one in a million:", bool((inside - beside).norm() / beside.norm() < 1e-6))

# %% [markdown]
# {{exercise 07.1}}
#
# Write the merge yourself. You get the weight `W` (out × in), the matrices `A` (r × in) and `B` (out × r), and the two settings `alpha` and `r`; give back the merged weight.

# %%
def merged_weight(W, A, B, alpha, r):
    ### BEGIN SOLUTION
    return W + alpha / r * (B @ A)
    ### END SOLUTION


# %%
ln.check("07.1", merged_weight)

# %% [markdown]
# ## 3. The whole model, and back
#
# `ln.merge` does this to every layer, takes the adapter out, and measures what it did, layer by layer. **Update left** is the share of the wanted change that arrived in the weight. **Change of
# output** is how far the layer's output moved by merging, relative to its size, on sample text.

# %% tags=["nbval-ignore-output"]
before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".adapters." not in name}
ids = tokenizer("Could you please close the window? =>", return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    beside = model(ids).logits
merged = ln.merge(model)
print("\n".join(repr(merged).splitlines()[:9]))

# %%
with torch.no_grad():
    inside = model(ids).logits
print("adapted layers left in the model:", sum(type(m).__name__.startswith("Adapted") for m in model.modules()))
print("logits agree to 1e-4:            ", bool((inside - beside).abs().max() < 1e-4 * beside.abs().max()))
print("held-out loss agrees to 0.001:   ", abs(ln.evaluate(model, tokenizer, held_out).loss - learnt) < 0.001)

# %% [markdown]
# No adapter is left, the layers are plain ones, and the model says what it said. From here on it is as fast as the base, and nothing but transformers is needed to run it.
#
# And back? The update is known, so it could be subtracted. Watch how many of the weights come back as they were, in 32 bits:

# %%
delta = 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(2)).to(W.device)
noisy = torch.randn(W.shape, generator=torch.Generator().manual_seed(3)).to(W.device)
back = (noisy + delta) - delta
print(f"{(back != noisy).float().mean():.0%} of the entries are not what they were")
print("largest error:", f"{(back - noisy).abs().max():.0e}")

# %% [markdown]
# Adding rounds, and subtracting cannot know what was rounded away. The errors are tiny, but they add up when adapters are put in and taken out again and again, and the base is no longer the base
# that the files speak of. `unmerge` does not subtract: `merge` kept the tensors that it replaced, and `unmerge` puts them back.

# %%
ln.unmerge(model)
after = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}
print("the same names:            ", before.keys() == after.keys())
print("the same bits in all of it:", all(torch.equal(before[name], after[name]) for name in before))
with torch.no_grad():
    print("the adapter acts as before:", torch.equal(model(ids).logits, beside))

# %% [markdown]
# The price is the memory of the replaced weights; `merge(model, keep=False)` saves it and gives up the way back.
#
# Not everything merges. DoRA does, as it too ends in a matrix. A bottleneck adapter has a bend in the middle, a function such as ReLU, and no matrix bends:

# %%
ln.detach(model)
ln.attach(model, ln.BottleneckConfig.houlsby())
try:
    ln.merge(model)
except ln.errors.AdapterError as refusal:
    print(refusal)

# %% [markdown]
# ## 4. Sixteen bits round
#
# A floating-point number keeps a fixed number of binary digits, and what is smaller than the last one is lost. 32 bits (`float32`) keep 24 digits, `float16` keeps 11, `bfloat16` only 8, for more range.
# Between a number near 1 and its neighbour lies the *spacing*; adding less than half of it changes nothing.

# %%
for dtype in (torch.float32, torch.float16):
    spacing = torch.finfo(dtype).eps
    one = torch.tensor(1.0)
    kept, lost = (one + 0.6 * spacing).to(dtype) - one, (one + 0.4 * spacing).to(dtype) - one
    print(f"{str(dtype):14} spacing at 1: {spacing:.2e}; adding 0.6 of it gives {kept / spacing:.0f} spacing, adding 0.4 gives {lost / spacing:.0f}")

# %% [markdown]
# {{exercise 07.2}}
#
# A weight of exactly 1 is kept in `bfloat16`, whose spacing there is $2^{-7}$. What is the largest update that vanishes without a trace when it is merged? (When a sum lies exactly in the middle
# between two neighbours, it is rounded to the one whose last digit is zero, which here is 1.) Give a number.

# %%
largest_lost_update = 2**-8  ### SOLUTION

# %%
ln.check("07.2", largest_lost_update)

# %% [markdown]
# So it is no accident that adapters are kept in 32 bits over a base in 16. When they are merged, $W'$ has to be rounded to the base's type. How much does that change a layer's output? First an adapter that
# is the same on every machine: random numbers of about the size of trained ones stand in for them.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())
ln.detach(model)
torch.manual_seed(0)
ln.attach(model, LORA)
with torch.no_grad():
    for part in weights(model, "default").values():
        part.lora_B.normal_(std=0.02)
print("saved:", sorted(file.name for file in ln.save(model, folder / "adapter").iterdir()))

# %% [markdown]
# Now the base is loaded in each of the three types, the same adapter goes onto it and is merged, and of the change of output that `merge` reports for each layer we keep the median.

# %%
from statistics import median

changes = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    rounded, _ = ln.load(BASE, dtype=dtype)
    ln.load_adapter(rounded, folder / "adapter")
    changes[dtype] = median(ln.merge(rounded).output_change.values())
for dtype, low, high in [(torch.float32, 1e-8, 1e-6), (torch.float16, 1e-4, 1e-3), (torch.bfloat16, 1e-3, 1e-2)]:
    print(f"{str(dtype):15} between {low:.0e} and {high:.0e}: {low < changes[dtype] < high}")

# %% [markdown]
# The figure has the values, on a logarithmic axis, where a step to the left is a tenth. Compare each bar with its black mark, half a spacing of the type.

# %% tags=["nbval-ignore-output"]
# %matplotlib inline
from matplotlib.figure import Figure

figure = Figure(figsize=(6.4, 2.4), layout="constrained")
axes = figure.add_subplot(title="What merging changes in a layer's output")
names = [str(dtype).removeprefix("torch.") for dtype in changes]
axes.barh(names, list(changes.values()), color="#56b4e9")
axes.plot([torch.finfo(d).eps / 2 for d in changes], names, "k|", markersize=24)
axes.set(xscale="log", xlim=(1e-8, 1e-1), xlabel="‖change‖ / ‖output‖, median over the layers (black mark: half a spacing)")
print({name: f"{change:.1e}" for name, change in zip(names, changes.values())})
figure

# %% [markdown]
# In 16 bits the bars end at their marks: what merging changes is the rounding of the type and nothing else, some in ten thousand in `float16` and some in a thousand in `bfloat16`. In `float32` it is a few in ten
# million, and most of that comes from adding up the products in another order.
#
# A few thousandths of noise in every layer are what a model in `bfloat16` lives with anyway: each of its products is rounded so. It becomes a loss only if the update itself is not much larger than that.
# Below is where that happens.

# %% [markdown]
# ## 5. Over a base in four bits
#
# QLoRA trains an adapter beside a base whose weights were rounded to sixteen levels, *NF4*: 4 bits a weight instead of 16 or 32 (notebook `06_quantization` builds it). The adapter learns around
# that rounding: what it sees is $\hat W$, the rounded weight, not $W$.

# %% tags=["nbval-ignore-output"]
small, _ = ln.load(BASE, quant="nf4")
torch.manual_seed(0)
ln.attach(small, LORA)
ln.train(small, tokenizer, tone, SCHOOL)

# %% [markdown]
# Where should the update go now? There are three places, and tools differ in which they take, often without a word:
#
# | `into=` | the weight becomes | in words |
# | --- | --- | --- |
# | `"dequantized"` | $\hat W + s\,BA$ in 16 or 32 bits | what training saw |
# | `"original"` | $W + s\,BA$ in 16 or 32 bits | the base before it was rounded |
# | `"requantized"` | $\hat W + s\,BA$, rounded to four bits again | as small as before |
#
# Each in turn, with the held-out loss and the bytes of the model; `unmerge` brings back the four bits every time. Which of them keeps the loss of the unmerged model?

# %%
def size(model):
    """Bytes of all weights."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


losses = {"unmerged": ln.evaluate(small, tokenizer, held_out).loss}
bytes_of, survived = {"unmerged": size(small)}, {}
original = ln.load(BASE)[0]
for into in ("dequantized", "original", "requantized"):
    merged = ln.merge(small, into=into, original=original if into == "original" else None)
    losses[into], bytes_of[into] = ln.evaluate(small, tokenizer, held_out).loss, size(small)
    survived[into] = median(merged.survived.values())
    ln.unmerge(small)

# %% [markdown]
# Read the losses downwards: which line is the same as the first one, and which line is as small?

# %% tags=["nbval-ignore-output"]
for name, loss in losses.items():
    print(f"{name:12} loss {loss:.4f}   {bytes_of[name] / 1e6:5.1f} MB   update left {survived.get(name, 1):.1%}")

# %%
apart = {name: abs(loss - losses["unmerged"]) for name, loss in losses.items()}
print("dequantized is the nearest to unmerged:", min(survived, key=apart.get) == "dequantized")
print("and nearer than 0.001:                 ", apart["dequantized"] < 0.001)
print("requantized is as small as unmerged:   ", bytes_of["requantized"] < 1.1 * bytes_of["unmerged"])
print("the other two are larger:              ", min(bytes_of["dequantized"], bytes_of["original"]) > 1.5 * bytes_of["unmerged"])

# %% [markdown]
# `"dequantized"` gives back what was trained, and is the one to take where memory allows. `"original"` sounds better, since $W$ is more exact than $\hat W$; but the adapter has learnt to
# make up for the rounding errors of $\hat W$, and these are gone. `"requantized"` rounds once more, this time with nobody to make up for it. Here the update was large, so most of it survived.

# %% [markdown]
# ## 6. How a small update dies
#
# A real adapter on a large model may change its weights by a percent or less: in [one report](https://github.com/unslothai/unsloth-zoo/issues/810) the rounding is ten to a hundred and fifty times as large as the update. To see what rounding does to that, take a random weight of known size and a random update of rank 16, scale the
# update to a share of the weight, $\|\Delta\| / \|W\|$, and round the sum to NF4 again. **Left** is the part of what arrived that points along the update; **noise** is how far what arrived
# is from it.

# %%
from lora_nb.layers.nf4 import dequantize, quantize

random = torch.Generator().manual_seed(0)
grid = dequantize(quantize(torch.randn(512, 512, generator=random)))  # a weight that lies on NF4's levels
direction = torch.randn(512, 16, generator=random) @ torch.randn(16, 512, generator=random)
shares, left, noise = [0.3, 0.2, 0.1, 0.06, 0.03, 0.01], [], []
for share in shares:
    update = direction * share * grid.norm() / direction.norm()
    arrived = dequantize(quantize(grid + update)) - grid
    left.append(float((arrived * update).sum() / update.square().sum()))
    noise.append(float((arrived - update).norm() / update.norm()))
    print(f"update of {share:4.0%} of the weight: {left[-1]:4.0%} left, noise {noise[-1]:.1f} times the update")

# %% [markdown]
# The same as a picture, with both curves in per cent of the update:

# %% tags=["nbval-ignore-output"]
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axes = figure.add_subplot(title="What four bits leave of an update")
axes.plot([100 * s for s in shares], [100 * k for k in left], marker="o", color="#0072b2", label="left of the update")
axes.plot([100 * s for s in shares], [100 * n for n in noise], marker="s", linestyle="--", color="#d55e00", label="noise")
axes.set(xscale="log", xlabel="size of the update, % of the weight; logarithmic", ylabel="% of the update", ylim=(0, 115))
axes.set_xticks([100 * s for s in shares], [f"{100 * s:.0f}" for s in shares], minor=False)
axes.minorticks_off()
axes.legend(frameon=False, loc="center left")
figure

# %% [markdown]
# Read the figure from right to left. At 30 % the update arrives whole. At 10 % a sixth is gone. From 3 % down hardly anything is left: nearly every weight is moved by less than half the way to the next level and
# falls back to where it was. Rounding is a cliff, not a slope.

# %% [markdown]
# {{exercise 07.3}}
#
# Write the measure that made this curve, which `merge` reports for each layer: from a weight `before`, the sum `wanted`, and what really `arrived` in its place, the share of the update that is left.
# It is the projection of what was added onto what should have been added: 1 if all is there, 0 if nothing is, whatever noise came along at right angles.

# %%
def update_left(before, wanted, arrived):
    ### BEGIN SOLUTION
    update = wanted - before
    return float(((arrived - before) * update).sum() / (update * update).sum())
    ### END SOLUTION


# %%
ln.check("07.3", update_left)

# %% [markdown]
# Does it matter to the model? Scale the trained adapter down until each layer's update is 3 % of its weight. It still helps, as long as it stays beside the weights. Then merge it into four bits, and
# listen to what `merge` has to say.

# %%
import warnings

with torch.no_grad():
    for name, part in weights(small, "default").items():
        part.lora_B.mul_(0.03 * matrix(small.get_submodule(name)).norm() / part.delta().norm())
with ln.disabled(small):
    nothing = ln.evaluate(small, tokenizer, held_out).loss
gentle = ln.evaluate(small, tokenizer, held_out).loss
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    ln.merge(small, into="requantized")
rounded_away = ln.evaluate(small, tokenizer, held_out).loss
print([w.category.__name__ for w in said], str(said[0].message).split(", such as")[0])

# %% tags=["nbval-ignore-output"]
print(f"base {nothing:.3f}, adapter beside it {gentle:.3f}, merged into four bits {rounded_away:.3f}")

# %%
print("beside the weights it helps:               ", gentle < nothing - 0.02)
print("rounded, less than a third of that is left:", nothing - rounded_away < (nothing - gentle) / 3)

# %% [markdown]
# No error, no crash, a file of the right size: the model has simply forgotten its lesson. This is one of the oldest complaints about QLoRA tools (for example
# [this thread of transformers](https://github.com/huggingface/transformers/issues/31293) and [this one of PEFT](https://github.com/huggingface/peft/issues/2321)), and it is why `merge` measures and warns.

# %% [markdown]
# ## 7. A merge that keeps what was learnt
#
# The same small adapter, now merged into `"dequantized"`, saved with transformers' own `save_pretrained`, and loaded again as an ordinary model. Transformers alone can read that folder; this package is not needed for it.

# %% tags=["nbval-ignore-output"]
ln.unmerge(small)
ln.merge(small, into="dequantized")
small.save_pretrained(folder / "merged")
tokenizer.save_pretrained(folder / "merged")
plain, _ = ln.load(folder / "merged")

# %%
kinds = {type(m).__name__ for m in plain.modules() if type(m).__name__.startswith(("Linear", "Conv", "Adapted"))}
print("its linear layers:           ", *sorted(kinds))
print("the loss as with the adapter:", abs(ln.evaluate(plain, tokenizer, held_out).loss - gentle) < 0.001)

# %% [markdown]
# {{exercise 07.4}}
#
# Three people ask you where their adapter should go. Answer each with `"dequantized"`, `"original"`, `"requantized"` or `"beside"` (do not merge).
#
# - **Ana** trained over an NF4 base and serves in 16 bits from an engine that knows no adapters.
# - **Ben** trained over an NF4 base; his card only has room for four bits, and the updates are about 1 % of the weights.
# - **Chloé** trained over an NF4 base; her card only has room for four bits, her engine knows no adapters, and `merge` reports that 97 % of every update is left.

# %%
where = {"Ana": "dequantized", "Ben": "beside", "Chloé": "requantized"}  ### SOLUTION

# %%
ln.check("07.4", where)

# %% [markdown]
# ## Three things to remember
#
# 1. LoRA merges because it is linear: one matrix does what two did, at the base's own speed. A bottleneck adapter does not.
# 2. Rounding is what merging costs. In 32 or 16 bits it hardly shows; an exact way back exists only if the old weights are kept.
# 3. Over four bits, merge into the dequantized weights. Rounding again erases small updates without a word, so measure what is left.
#
# **To read on:** Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, section 4.1, on why merging costs no time at inference. Dettmers et al., *QLoRA: Efficient Finetuning of
# Quantized LLMs*, arXiv:2305.14314, section 3, for the base in four bits. Guo et al., *LQ-LoRA*, arXiv:2311.12023, and Xu et al., *QA-LoRA*, arXiv:2309.14717, for adapters that are made to fit the rounding.
