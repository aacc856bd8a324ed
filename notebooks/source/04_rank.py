# %% [markdown]
# # Rank: how much an adapter can say
#
# {{badges}}
#
# **What this teaches:** what the rank of a matrix is; how the loss depends on it, on a task whose rank is known because we make it; how one training run at a high rank tells
# which rank would have done; and what the scale α, the learning rate and LoRA+ have to do with one another.
#
# **What you will have at the end:** the rank of a task from one run, an adapter cut down to it, and ranks of their own for its modules.
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
from tqdm.auto import tqdm

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"

# %% [markdown]
# ## 1. What a rank is
#
# LoRA adds $\frac{\alpha}{r} B A$ to a frozen weight. $A$ has $r$ rows: each takes *one number* from the input (a dot product). $B$ has $r$ columns: each says where that number goes in the
# output. So $B A$ is a sum of $r$ such one-number channels, and the *rank* of a matrix is the least number of channels that it can be written with. Let us make one of rank 3.

# %%
generator = torch.Generator().manual_seed(0)
B = torch.randn(6, 3, generator=generator)
A = torch.randn(3, 8, generator=generator)
product = B @ A
print("shape:", tuple(product.shape), " numbers in it:", product.numel(), " numbers in B and A:", B.numel() + A.numel())
print("rank: ", int(torch.linalg.matrix_rank(product)))
print("singular values:", [abs(round(v, 1)) for v in torch.linalg.svdvals(product).tolist()])

# %% [markdown]
# The *singular values* come from the singular value decomposition (SVD), which writes any matrix as such a sum of channels: each has a unit vector that reads, a unit vector that writes,
# and a strength, its singular value, and they are sorted by strength. Three are above zero, so three channels are all there is. Cut the list earlier and you get the nearest matrix of a lower rank.

# %% [markdown]
# {{exercise 04.1}}
#
# Write a function that takes a matrix and a number $k$, and gives the matrix of rank $k$ that is nearest to it.

# %%
def nearest_of_rank(matrix, k):
    ### BEGIN SOLUTION
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k]
    ### END SOLUTION


# %%
ln.check("04.1", nearest_of_rank)

# %% [markdown]
# A rank costs numbers to train and to store, in proportion: one row of $A$ and one column of $B$ for each. At some rank an adapter is no longer smaller than the layer that it adapts.

# %% [markdown]
# {{exercise 04.2}}
#
# For a layer with so many inputs and outputs, what is the largest rank at which $A$ and $B$ together have no more numbers than the layer's weight? Give a whole number.

# %%
def break_even(inputs, outputs):
    ### BEGIN SOLUTION
    return inputs * outputs // (inputs + outputs)
    ### END SOLUTION


# %%
ln.check("04.2", break_even)

# %% [markdown]
# ## 2. A task whose rank is known
#
# Which rank does a task need? With a real task nobody knows the true answer, so we first make one where we do. A frozen layer computes $W x$; the data come from $(W + \Delta W)\,x$ plus noise, and we plant
# a $\Delta W$ of rank 6. The adapter has to find it. Sizes are chosen so that update and noise are equally strong, each with mean square 1.

# %%
WIDTH, TRUE_RANK, EXAMPLES, HELD_OUT = 128, 6, 4096, 1024


def planted(rank, noise=1.0, seed=0):
    """W, and the inputs and outputs to learn from and those held out."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5
    update = torch.randn(WIDTH, rank, generator=g) @ torch.randn(rank, WIDTH, generator=g)
    update *= WIDTH**0.5 / update.norm()
    x = torch.randn(EXAMPLES + HELD_OUT, WIDTH, generator=g)
    y = x @ (weight + update).T + noise**0.5 * torch.randn(len(x), WIDTH, generator=g)
    return weight, (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])

# %% [markdown]
# *Held out* means: not used for training, only for judging. The loss is the squared error. No student can get below 1 on average, the noise that nothing predicts; the base alone, which lacks the update, should be near 2.

# %%
task = planted(TRUE_RANK)


def frozen(weight):
    """A model of one linear layer."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    model[0].weight.data.copy_(weight)
    return model


# %% [markdown]
# `losses` gives one number for each held-out example, so that two models can be compared example by example later.

# %%
def losses(model, task=task):
    """Held-out loss of each example, (examples,)."""
    x, y = task[2]
    return (model(x) - y).square().mean(1)


print(f"the base alone: {losses(frozen(task[0])).mean().item():.2f}")

# %% [markdown]
# Training is the usual loop, in the open: `attach` adds $A$ and $B$, Adam (the usual optimizer) moves them step by step, and its *learning rate*, the size of a step, falls to zero. Two settings are for later sections: α, and `ratio`, by which $B$'s learning rate is larger than $A$'s.

# %%
def fitted(r, task=task, steps=400, lr=1e-2, alpha=None, ratio=1.0, **settings):
    torch.manual_seed(r)
    model, (inputs, targets) = frozen(task[0]), task[1]
    ln.attach(model, ln.LoraConfig(r=r, lora_alpha=alpha or 2 * r, target_modules=["0"], **settings))
    a, b = ln.parameters(model).values()
    optimizer = torch.optim.Adam([{"params": [a], "lr": lr}, {"params": [b], "lr": ratio * lr}])
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = torch.randint(EXAMPLES, (256,))
        (model(inputs[rows]) - targets[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return model.eval()


# %% [markdown]
# ## 3. The usual way: one run for each rank
#
# A *sweep* trains once for every candidate and compares. Look for two things in the table: where the loss stops falling, and what happens after that.

# %% tags=["nbval-ignore-output"]
RANKS = (1, 2, 4, 6, 8, 16, 48)
models = {r: fitted(r) for r in tqdm(RANKS, desc="sweep", unit="run", leave=False)}
sweep = {r: losses(model).mean().item() for r, model in models.items()}
for r, loss in sweep.items():
    print(f"rank {r:2}: held-out loss {loss:.3f}")

# %%
print("each rank up to the planted one gains at least 0.2:", all(sweep[low] - sweep[high] > 0.2 for low, high in ((1, 2), (2, 4), (4, 6))))
print("the planted rank is within 1 % of the noise:       ", abs(sweep[TRUE_RANK] - 1) < 0.01)
print("eight times the planted rank is worse again:       ", sweep[48] > sweep[TRUE_RANK] + 0.01)

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axes.plot(list(sweep), list(sweep.values()), marker="o", color="#0072b2")
axes.axvline(TRUE_RANK, color="#666666", linestyle=":", label=f"planted: {TRUE_RANK}")
axes.axhline(1, color="black", linewidth=0.8, label="noise: no model gets below")
axes.set_xscale("log", base=2)
axes.set_xticks(RANKS, [str(r) for r in RANKS])
axes.set(xlabel="rank", ylabel="held-out loss (squared error)", title="A run for each rank")
axes.legend(frameon=False);

# %% [markdown]
# Up to rank 6 every rank adds a channel of the planted update, and the loss falls. There it stops, at the level of the noise. Above, it *rises* again a little: the further channels
# have nothing to learn but the noise of the training examples, which is no help on others. More rank is not always better, and not only because it costs more.

# %% [markdown]
# {{exercise 04.3}}
#
# Losses of neighbouring ranks differ by accident, so "the rank with the lowest loss" is a bad rule. Write a better one: the smallest rank whose loss is no more than a share `tolerance` above the lowest.
# `losses` is a dictionary from rank to loss.

# %%
def choose(losses, tolerance):
    ### BEGIN SOLUTION
    lowest = min(losses.values())
    return min(r for r, loss in losses.items() if loss <= (1 + tolerance) * lowest)
    ### END SOLUTION


# %%
ln.check("04.3", choose)

# %% [markdown]
# ## 4. The rank from one run
#
# Seven runs for one number is a lot. `find_rank` needs only the last one, at a rank that is surely enough. It takes the trained update apart into channels, the weightiest first, cuts the
# adapter to rank 1, 2, 4 and so on, and looks at the held-out loss after each cut: no training at all.

# %% tags=["nbval-ignore-output"]
report = ln.find_rank(model=models[48], losses=losses)
report

# %% [markdown]
# The table has a row for each rank that was tried: powers of two first, and then the gap below the choice. *Above the lowest* is how much worse a rank is than the best one, on the same examples; *standard error*
# is how far that difference is uncertain. The rule of the exercise, with this uncertainty, gives the choice. Is it the planted rank? And is the cut adapter as good as one trained at that rank from the start?

# %%
direct, cut, whole = sweep[TRUE_RANK], report.scores[report.rank].loss, report.scores[48].loss
print("rank planted and found:         ", TRUE_RANK, report.rank)
print("interval:                       ", report.interval)
print(f"loss uncut, cut, trained at it:  {whole:.2f}, {cut:.2f}, {direct:.2f}")
print("cut is as good as trained (1 %):", cut <= 1.01 * direct)

# %% tags=["nbval-ignore-output"]
from lora_nb import plots

figure = plots.loss_by_rank(report)
figure.suptitle("The planted task: every rank out of one run")
figure

# %% [markdown]
# The figure is the sweep's curve again, this time out of one run. Cutting even *improved* the adapter: what was cut off was noise. The interval says between which ranks the choice would fall with other
# held-out examples; here that is a single rank. It knows nothing of another training run, which could move the answer as well.
#
# These are the two functions that decide:

# %%
from lora_nb.rank.choice import as_good, choose as choose_rank

ln.show(as_good)

# %%
ln.show(choose_rank)

# %% [markdown]
# ## 5. Why not read the rank off the singular values?
#
# A popular short cut: keep as many channels as hold, say, 90 % of the *energy*, the sum of the squared singular values. No held-out data are needed. Try it on the run above, and on the same task with ten times the noise;
# beside it, what `find_rank` says.

# %%
noisy = planted(TRUE_RANK, noise=10.0)
noisy_report = ln.find_rank(model=fitted(48, noisy), losses=lambda model: losses(model, noisy))
for name, r in {"noise 1": report, "noise 10": noisy_report}.items():
    strengths = r.directions["0"].values
    energy = strengths.square().cumsum(0) / strengths.square().sum()
    ranks = [int((energy < share).sum()) + 1 for share in (0.9, 0.95, 0.99)]
    print(f"{name:8}  90, 95, 99 % of the energy: ranks {ranks}   held-out loss: rank {r.rank}")

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
axes.bar(range(1, 49), strengths.tolist(), color=["#0072b2"] * TRUE_RANK + ["#bbbbbb"] * (48 - TRUE_RANK))
axes.annotate("planted", (6.6, float(strengths[5])), fontsize=9)
axes.annotate("learnt from noise", (20, float(strengths[20]) * 1.3), fontsize=9)
axes.set(xlabel="channel, the strongest first", ylabel="strength (root of output power)", title="Noise 10: six channels of the task, and a long tail");

# %% [markdown]
# Six channels stand out and a long tail follows, weak but never zero, for training has fitted noise with them. Which share of the energy the tail holds depends on the noise, so a threshold that happened to be right for one task is
# wrong for the next. Held-out data know where the tail begins, because noise does not help there.

# %% [markdown]
# ## 6. On a language model
#
# Now `tone` from the first notebook (formal sentences into informal ones), on the embedded base: 42 linear layers instead of one, and no planted answer. We train once, at rank 32, with held-out pairs at hand, and ask the run. Look
# for the knee in the curve, the place where it stops falling.

# %%
model, tokenizer = ln.load(BASE)
train, test = ln.dataset("tone", "train").language("en"), ln.dataset("tone", "test").language("en")
torch.manual_seed(0)
attached = ln.attach(model, ln.LoraConfig(r=32, lora_alpha=32))
print(f"{attached.trainable:,} of {attached.total:,} parameters train, in {len(attached.matched)} modules")

# %% tags=["nbval-ignore-output"]
run = ln.train(model, tokenizer, train, ln.TrainConfig(max_steps=50, batch_size=16, seq_len=64, learning_rate=4e-3), eval_dataset=test)
run

# %% tags=["nbval-ignore-output"]
tone = ln.find_rank(run, cost=0.2)
tone

# %% tags=["nbval-ignore-output"]
figure = plots.loss_by_rank(tone)
figure.suptitle("The tone task: no sharp knee")
figure

# %% [markdown]
# There is no sharp knee: the curve falls and then is nearly flat, so "the" rank is a matter of what one calls as good: half a per cent of the loss by default, the grey band. Hence also the wide interval: with other held-out sentences
# another rank would have been chosen. That is no fault of the method; it says that over this range the rank hardly matters.

# %%
first, last = tone.scores[1].loss, tone.scores[32].loss
print("the base is worse than rank 1:              ", tone.base_loss > first)
print("the chosen rank is below that of the run:   ", tone.rank < 32)
print("cut to it, the loss is within 1 % of uncut: ", tone.scores[tone.rank].loss <= 1.01 * last)
print("doubling rank 1 gains more than the last doubling:", first - tone.scores[2].loss > tone.scores[16].loss - last)

# %% [markdown]
# A sweep over the whole `tone` data, eight runs and longer ones, was made for the package's benchmark, together with the choice from its last run. If you have a checkout of the repository, here it is beside
# ours: look at how little the losses differ from rank 8 on, and where the two choices fall.

# %% tags=["nbval-ignore-output"]
import json
from pathlib import Path

stored = next((p for p in (Path("../benchmarks/results/rank.json"), Path("../../benchmarks/results/rank.json")) if p.is_file()), None)
if stored is None:
    print("No checkout here, so no stored sweep; `python benchmarks/rank.py --only tone` makes one.")
else:
    summary = json.loads(stored.read_text())["tone"]["summary"]
    print("loss by rank:", {int(r): round(loss, 3) for r, loss in summary["losses of the sweep"].items()})
    print("chosen by the sweep:", summary["chosen by the sweep"], " from one run:", summary["chosen from one run"], summary["interval"])

# %% [markdown]
# Where the two choices differ, the losses hardly do: from rank 8 on they are within one per cent of each other, and a tolerance of half a per cent decides among equals. On a curve without a knee no rule gives *the* rank,
# and one run shows that as well as eight do.
#
# ## 7. A rank for each module
#
# One rank for all modules is a convention, not a law. `find_rank` lets the channels of all modules compete for fewer parameters: the one that adds most for its cost comes first, as long as the held-out loss
# stays. AdaLoRA (arXiv:2303.10512) does so during training; here it is done once, afterwards.

# %% tags=["nbval-ignore-output"]
plots.ranks_by_layer(tone)

# %% [markdown]
# Each cell is one module, its number the rank left to it; darker is more. Rows are the kinds of layer, columns go from the first block to the last. Which rows are dark is worth a look in your own runs:
# it says where the task asks the model to change.
#
# `shrink` makes the cut adapter, beside the old one. It is an ordinary LoRA adapter with PEFT's `rank_pattern`, and can be saved, merged or trained on.

# %% tags=["nbval-ignore-output"]
small = ln.shrink(model, tone, "tone-small")
cut_loss = ln.evaluate(model, tokenizer, test, seq_len=64).loss
ln.set_active(model, "default")
whole_loss = ln.evaluate(model, tokenizer, test, seq_len=64).loss

# %%
print("fewer parameters than rank 32:    ", small.trainable < attached.trainable)
print("fewer than the chosen rank for all, or as many:", small.trainable <= attached.trainable * tone.rank // 32)
print("held-out loss within 1.5 %:       ", abs(cut_loss / whole_loss - 1) < 0.015)

# %% tags=["nbval-ignore-output"]
print(f"rank 32: {attached.trainable:,} parameters; cut: {small.trainable:,}, {1 - small.trainable / attached.trainable:.0%} fewer")

# %% [markdown]
# ## 8. α, the learning rate and LoRA+: one knob, three labels
#
# The scale $\frac{\alpha}{r}$ multiplies $B A$. Adam moves every number by about its learning rate, however large its gradient is. So a fourfold α with a quarter of the rate for $B$ must give *the same
# training*: the update stays, only written differently. LoRA+ (arXiv:2402.12354) gives $B$ a larger rate than $A$, which by this argument is a larger α. Is it so?

# %%
few = {"steps": 30, "lr": 3e-3}
plain = fitted(8, alpha=8, ratio=1, **few)
plus = fitted(8, alpha=8, ratio=4, **few)
larger = fitted(8, alpha=32, ratio=1, **few)
for name, fit in {"α = 8": plain, "α = 8, LoRA+ ratio 4": plus, "α = 32": larger}.items():
    print(f"{name:22} held-out loss after 30 steps {losses(fit).mean().item():.2f}")
gap = (losses(plus) - losses(larger)).abs().max().item()
print("the last two agree in every example to 1e-3:", gap < 1e-3)

# %% [markdown]
# They agree, and both are ahead of the first. Of α, $A$'s rate, $B$'s rate and the size of $A$ at the start, only two combinations matter to Adam (Schulman et al., 2025, *LoRA Without Regret*, section on hyperparameters). With clipping of
# gradients or weight decay the equality is only near. In a `TrainConfig` LoRA+ is one setting, and these are the rates that come of it:

# %%
from lora_nb.training.optim import parameter_groups

for group in parameter_groups(model, ln.TrainConfig(learning_rate=1e-3, loraplus_lr_ratio=16)):
    print(f"{len(group['params'])} matrices at rate {group['lr']:g}")

# %% [markdown]
# {{exercise 04.4}}
#
# A run with α = 16 and a rate of 0.01 for $B$ went well. Someone sets α = 64 and leaves rank and $A$'s rate alone. Which rate for $B$ makes Adam do the same training as before?

# %%
rate_of_b = 0.01 * 16 / 64  ### SOLUTION

# %%
ln.check("04.4", rate_of_b)

# %% [markdown]
# ## 9. Tune the rate before the rank
#
# Which choice matters more? We vary both on the planted task, all ranks being large enough. Rows are learning rates, columns are ranks; look first down a column, then along a row.

# %% tags=["nbval-ignore-output"]
RATES, WIDE = (3e-4, 1e-3, 3e-3, 1e-2, 1e-1), (6, 12, 48)
pairs = [(lr, r) for lr in RATES for r in WIDE]
table = {p: losses(fitted(p[1], steps=200, lr=p[0])).mean().item() for p in tqdm(pairs, desc="rates", unit="run", leave=False)}

# %%
print("rate     " + "".join(f"rank {r:<5}" for r in WIDE))
for lr in RATES:
    print(f"{lr:<8g} " + "".join(f"{table[lr, r]:<10.1f}" for r in WIDE))

# %%
def spread(values):
    return max(values) - min(values)


by_rate = min(spread([table[lr, r] for lr in RATES]) for r in WIDE)
by_rank = spread([min(table[lr, r] for lr in RATES) for r in WIDE])
print("a wrong rate costs more than five times what a wrong rank does:", by_rate > 5 * by_rank)

# %% [markdown]
# Down a column the loss changes a great deal; along the row of the best rate hardly. Large studies say the same: with the rate tuned for each, the variants of LoRA come out within one to two per cent of each other
# (arXiv:2602.04998). A comparison of ranks, or of methods, at a single rate compares rates.
#
# In the upper rows the large rank is ahead: `fitted` sets α = 2r, so the scale is 2 at every rank, and more channels add up to larger steps. With α fixed the factor $1/r$ evens that out. *Rank-stabilised* LoRA
# (arXiv:2312.03732) divides by $\sqrt{r}$ instead. How far do two ranks get in 60 steps at the same α and rate?

# %%
for r in (8, 64):
    usual, stable = (losses(fitted(r, steps=60, alpha=16, lr=3e-3, use_rslora=rs)).mean().item() for rs in (False, True))
    print(f"rank {r:2}: α/r = {16 / r:g} gives {usual:.2f} after 60 steps, α/√r = {16 / r**0.5:.1f} gives {stable:.2f}")

# %% [markdown]
# With α/r both ranks are about equally far, so a rate that is good for one is good for the other. With α/√r the larger rank runs ahead: its scale is larger. By section 8 that is the same as a larger rate for $B$, and
# not another kind of adapter.
#
# ## Three things to remember
#
# 1. A rank is a number of channels. Below what the task needs, something cannot be said; above, the rest learns noise and costs numbers.
# 2. One run at a high rank is enough: cut it and look at held-out data. Thresholds on singular values cannot tell task from noise.
# 3. Tune the learning rate first. α and LoRA+ move the same knob; the rank matters less than either once it is enough.
#
# **To read on:** Hu et al., arXiv:2106.09685, section 7.2, on how low the rank may be. Hayou et al., *LoRA+*, arXiv:2402.12354. Kalajdzievski, *rsLoRA*, arXiv:2312.03732. Zhang et al., *AdaLoRA*,
# arXiv:2303.10512. *LoRA-Squeeze*, arXiv:2602.10993, for training at a high rank and cutting afterwards.
