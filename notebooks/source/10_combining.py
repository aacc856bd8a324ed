# %% [markdown]
# # Combining: one adapter from several
#
# {{badges}}
#
# **What you will have at the end:** three adapters for one base, made into new ones by sums, by singular values, by votes and by chance; numbers for how far two adapters get in each other's way,
# in their weights and in what they still can do; and an answer to the question when two of them can live together, and whether their order matters.
#
# **Time:** about fifteen minutes to read, forty seconds to run on two processor cores. On a GPU: not measured. **Needs:** nothing but this package. Notebook `00_start` says what an adapter is.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. Three lessons
#
# Three small tasks: turning formal English into informal English, the same in French, and naming the topic of a note (finance, health or law). Each gets an adapter of its own on the same frozen base, and a few
# seconds of training. Adapters that are not active stay on the model and wait.

# %%
import torch

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = ln.load(BASE)
LORA = ln.LoraConfig(r=8, lora_alpha=32)
STEPS = {"english": 32, "french": 32, "topics": 16}
tasks = {"english": ("tone", "en"), "french": ("tone", "fr"), "topics": ("topics", "en")}
held_out = {task: ln.dataset(name, "test").language(lang)[:24] for task, (name, lang) in tasks.items()}
{task: len(data) for task, data in held_out.items()}

# %% [markdown]
# Three trainings, one after the other. `attach` makes the new adapter the active one, and only what is active trains.

# %% tags=["nbval-ignore-output"]
for seed, (task, (name, lang)) in enumerate(tasks.items()):
    torch.manual_seed(seed)  # each starts from another A
    ln.attach(model, LORA, task)
    school = ln.TrainConfig(max_steps=STEPS[task], batch_size=8, learning_rate=5e-3)
    run = ln.train(model, tokenizer, ln.dataset(name, "train").language(lang), school)
    print(f"{task}: loss {run.losses[0]:.2f} → {run.losses[-1]:.2f}")

# %% [markdown]
# How good is each adapter at each task? The measure is the *held-out loss*, the mean of −log of the probability that each right token gets, on examples that were not trained on (in *nats*, the unit of the natural logarithm): lower is better. Read the table along the diagonal first, then look at what a lesson does to a task that it
# was not about.

# %%
def losses():
    """Held-out loss of the model as it stands, for each task."""
    return {task: ln.evaluate(model, tokenizer, data).loss for task, data in held_out.items()}


with ln.disabled(model):
    table = {"base": losses()}
for task in tasks:
    ln.set_active(model, task)
    table[task] = losses()

# %% [markdown]
# A small table for reading, which will come back with more lines:

# %% tags=["nbval-ignore-output"]
def show_losses(names):
    print(f"{'adapter':22}", *(f"{task:>8}" for task in tasks))
    for name in names:
        print(f"{name:22}", *(f"{table[name][task]:8.2f}" for task in tasks))


show_losses(table)

# %%
for task in tasks:
    best = min(table, key=lambda name: table[name][task])
    print(f"best at {task}: {best}")

# %% [markdown]
# Each is best at its own task. The two tones help each other a little: each teaches that an answer is wanted after the arrow. `topics` has learnt to answer with a single word, and with it the model has forgotten how to
# write sentences: its losses on the tones are far above the base's.

# %% [markdown]
# ## 2. Adding
#
# LoRA changes a weight by $\Delta W = s\,BA$. Two changes can simply be added, $W + \Delta W_1 + \Delta W_2$. This is called *task arithmetic* (Ilharco et al., arXiv:2212.04089). The quickest way is to let both act at once:

# %%
ln.set_active(model, ["english", "french"])
table["both act"] = losses()
kept = {t: (table["base"][t] - table["both act"][t]) / (table["base"][t] - table[t][t]) for t in ("english", "french")}
print("both tasks are much better than with the base: ", min(kept.values()) > 0.5)
print("and both worse than with their own adapter alone:", max(kept.values()) < 1)

# %% tags=["nbval-ignore-output"]
show_losses(["base", "english", "french", "both act"])
print({task: f"{share:.0%} of what its own adapter gains" for task, share in kept.items()})

# %% [markdown]
# Two adapters that act cost their time twice. `combine` makes one of them: with `"cat"` it writes the matrices side by side,
#
# $$w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 = [\,B_1\; B_2\,]\begin{bmatrix} w_1 s_1 A_1 \\ w_2 s_2 A_2 \end{bmatrix}$$
#
# which is exact, and the ranks add up. The code is as short as the formula:

# %%
from lora_nb.factors import concatenate

ln.show(concatenate)

# %%
report = ln.combine(model, {"english": 1.0, "french": 1.0}, "cat", "cat")
print("rank of the new adapter:", report.config.r)
table["cat"] = losses()
print("the same losses as with both acting:", all(abs(table["cat"][t] - table["both act"][t]) < 1e-3 for t in tasks))

# %% [markdown]
# {{exercise 10.1}}
#
# Do it by hand. For two adapters you get `A1`, `B1`, `A2`, `B2`, their scales `s1`, `s2` and the weights `w1`, `w2`. Give `(A, B)` with $BA = w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2$. (`torch.cat([…], dim)` joins matrices
# below each other with `dim=0`, side by side with `dim=1`.)

# %%
def side_by_side(A1, B1, s1, w1, A2, B2, s2, w2):
    ### BEGIN SOLUTION
    return torch.cat([w1 * s1 * A1, w2 * s2 * A2], 0), torch.cat([B1, B2], 1)
    ### END SOLUTION


# %%
ln.check("10.1", side_by_side)

# %% [markdown]
# ## 3. Keeping the rank small
#
# Concatenating ten adapters of rank 8 gives rank 80. The *singular value decomposition* writes a matrix as a sum of directions, sorted by how much each contributes; the sizes are its singular values. Keeping the largest $r$ of them is
# the best that rank $r$ can do (Eckart and Young, 1936). How fast do they fall for the sum of two adapters?

# %%
from lora_nb.factors import updates

path = next(iter(report.matched))  # one layer as an example
values = {name: torch.linalg.svdvals(updates(model, name)[path].delta()[0]) for name in ("english", "french", "cat")}
for name, S in values.items():
    print(f"{name:8} singular values above zero: {(S > 1e-4 * S[0]).sum()}")

# %% [markdown]
# How large are they? Look at how fast the values fall, and at what lies right of the dotted line.

# %% tags=["nbval-ignore-output"]
# %matplotlib inline
from matplotlib.figure import Figure

figure = Figure(figsize=(6.4, 3.0), layout="constrained")
axes = figure.add_subplot(title=f"Singular values of ΔW in {path}")
for (name, S), marker, colour in zip(values.items(), "osx", ("#0072b2", "#e69f00", "#009e73")):
    axes.plot(range(1, 17), S[:16].tolist(), marker=marker, color=colour, label={"cat": "their sum"}.get(name, name))
axes.axvline(8.5, color="black", linewidth=0.8, linestyle=":")
axes.set(xlabel="number of the direction, largest first; dotted: the cut at rank 8", ylabel="singular value")
axes.legend(frameon=False)
figure

# %% [markdown]
# Each adapter has eight directions and the sum sixteen, so the two hardly share any. What lies right of the dotted line is lost when the sum is cut to rank 8: the smaller half of the directions, but not half of the
# sum, as the first few are the large ones.

# %% [markdown]
# {{exercise 10.2}}
#
# How much is lost? From the singular values `S`, largest first, and a `rank`, compute the relative error of the cut, $\|\Delta W - \Delta W_{\text{cut}}\| / \|\Delta W\|$. The square of a matrix's norm is the sum of the squares of its
# singular values.

# %%
def cut_error(S, rank):
    ### BEGIN SOLUTION
    return float((S[rank:].square().sum() / S.square().sum()).sqrt())
    ### END SOLUTION


# %%
ln.check("10.2", cut_error)

# %% [markdown]
# Now the cheap way, found in many scripts: add the matrices themselves, $A = \sum A_i$ and $B = \sum B_i$, each with the root of its weight. It keeps the rank, needs no decomposition, and is wrong: $(B_1 + B_2)(A_1 + A_2)$ has two products in
# it, $B_1 A_2$ and $B_2 A_1$, that nobody has trained. Here are the ways beside the exact sum:

# %%
def whole(name):
    """ΔW of all layers as one long vector."""
    return torch.cat([f.delta().flatten() for f in updates(model, name).values()])


exact, error = whole("english") + whole("french"), {}
recipes = {"svd 16": ("svd", {"svd_rank": 16}), "svd 8": ("svd", {"svd_rank": 8}), "linear": ("linear", {})}
for name, (method, settings) in recipes.items():
    ln.combine(model, {"english": 1.0, "french": 1.0}, method, name, **settings)
    table[name], error[name] = losses(), float((whole(name) - exact).norm() / exact.norm())
error["cat"] = float((whole("cat") - exact).norm() / exact.norm())

# %% [markdown]
# First the updates: how far is each from the exact sum?

# %%
print("cat is exact to rounding:      ", error["cat"] < 1e-5)
print("svd of rank 16 as well:        ", error["svd 16"] < 1e-5)
print("svd of rank 8 loses a part:    ", 0.05 < error["svd 8"] < 0.7)
print("linear misses more than that:  ", error["linear"] > error["svd 8"])

# %% [markdown]
# Then what the model makes of them, in numbers:

# %% tags=["nbval-ignore-output"]
print("error of ΔW:", {name: f"{e:.1e}" if e < 1e-3 else f"{e:.2f}" for name, e in error.items()})
show_losses(["base", "english", "french", "cat", "svd 16", "svd 8", "linear"])

# %% [markdown]
# `cat` and `svd 16` are the sum; `svd 8` has half the rank and is hardly worse. `linear`, at the same rank, misses most of the update and loses a good part of what both adapters had gained.

# %% [markdown]
# ## 4. Votes and chance
#
# Adding lets two adapters cancel each other: where one has $+3$ and the other $-3$, nothing is left of either. *TIES* (Yadav et al., arXiv:2306.01708) takes a vote instead. **Trim**: of each adapter only the largest entries stay.
# **Elect**: for each entry the sign with more weight behind it wins. **Merge**: the mean of those that have the winning sign.
#
# Two adapters of four entries, small enough to check by eye, with half of the entries kept:

# %%
from lora_nb.combine import Recipe, blend, thin

one, two = torch.tensor([3.0, -0.2, 2.0, 0.1]), torch.tensor([-1.0, 0.3, 4.0, 0.2])
ties = Recipe("ties", density=0.5)
print("trimmed:", thin(one, ties, torch.Generator()).tolist(), thin(two, ties, torch.Generator()).tolist())
print("added:  ", [round(x, 1) for x in (one + two).tolist()])
print("TIES:   ", blend([one, two], [1.0, 1.0], ties, torch.Generator()).tolist())

# %% [markdown]
# In the first place $3$ and $-1$ disagree; the sum of the two is positive, so $3$ stays and $-1$ has no say: not $2$, as in the sum, but $3$. In the third both agree, and the result is their mean, $3$, not their sum. This is why TIES gives
# a weighted *mean*: for two adapters that should both act in full, the weights have to be larger than one.

# %% [markdown]
# {{exercise 10.3}}
#
# Write elect and merge. `kept` has a row for each adapter, already trimmed, shape (adapters × entries). For each column: the sign of the column's sum wins (plus, where the sum is zero); give the mean of the entries that have the
# winning sign, and 0 where there are none. Entries that are 0 have no sign and do not count.

# %%
def elect_and_merge(kept):
    ### BEGIN SOLUTION
    winner = torch.where(kept.sum(0) >= 0, 1, -1)
    won = kept.sign() == winner
    return (kept * won).sum(0) / won.sum(0).clamp(min=1)
    ### END SOLUTION


# %%
ln.check("10.3", elect_and_merge)

# %% [markdown]
# *DARE* (Yu et al., arXiv:2311.03099) leaves it to chance: it drops a random share of the entries and makes the others larger by as much, so that the sum stays the same on average. It works as far as an update says everything many times over.
# Look at how one entry in two is kept, and doubled:

# %%
dare = Recipe("dare_linear", density=0.5)
print(thin(torch.ones(12), dare, torch.Generator().manual_seed(0)).tolist())

# %% [markdown]
# With `_svd` in the name, these rules work on the updates $\Delta W$ themselves; without it, on $A$ and on $B$ by themselves, where an entry means little. Which of them helps here? `ties_svd` gets weights of 2, as it takes the mean of two.

# %%
recipes = {
    "ties (on A and B)": (2.0, "ties", {"density": 0.5}),
    "ties_svd": (2.0, "ties_svd", {"density": 0.5, "svd_rank": 16}),
    "dare_linear": (1.0, "dare_linear", {"density": 0.8}),
    "dare_linear_svd": (1.0, "dare_linear_svd", {"density": 0.8, "svd_rank": 16}),
}
for name, (weight, method, settings) in recipes.items():
    ln.combine(model, {"english": weight, "french": weight}, method, name.replace(" (on A and B)", ""), **settings)
    table[name] = losses()

# %% tags=["nbval-ignore-output"]
show_losses(["base", "english", "french", "cat", "svd 8", "linear", *recipes])

# %%
mean = {name: (row["english"] + row["french"]) / 2 for name, row in table.items()}
print("the exact sum is better than linear:   ", mean["cat"] < mean["linear"])
print("ties on ΔW is better than on A and B:  ", mean["ties_svd"] < mean["ties (on A and B)"])
print("and none of the four beats the sum:    ", min(mean[name] for name in recipes) > mean["cat"] - 0.05)

# %% [markdown]
# On $A$ and $B$ by themselves the vote destroys most of what was learnt: an entry of $A$ means something only together with its column of $B$, and two adapters number their directions differently. On $\Delta W$ it does better, but here there is little to
# vote on, as the next section shows, and trimming throws half of each adapter away. TIES was made for many models fine-tuned whole. `dare_linear_svd` comes close to the sum, since on average it *is* the sum.

# %% [markdown]
# ## 5. Do they get in each other's way?
#
# Two adapters on one weight can meet in three places. `conflicts` measures them, from 0 to 1: **overlap of A**, whether they read the same directions of the input; **overlap of B**, whether they write into the same directions of the
# output; and the **cosine** of the updates, whether they pull one way (up to 1), against each other (down to −1) or neither. **Sign conflict** is one half for strangers.

# %% tags=["nbval-ignore-output"]
meeting = ln.conflicts(model, ["english", "french", "topics"])
meeting

# %%
from statistics import fmean

width = updates(model, "english")[path].A.shape[2]
strangers = LORA.r / width
print(f"random directions, {LORA.r} of {width}, would overlap by {strangers:.3f}")
cosine = {" and ".join(pair): fmean(by.values()) for pair, by in meeting.cosine.items()}
writing = {" and ".join(pair): fmean(o.B for o in by.values()) for pair, by in meeting.overlap.items()}
print("the two tones pull more alike than either with topics:", max(cosine, key=cosine.get) == "english and french")
print("all write where others write, more than by chance:    ", min(writing.values()) > 1.2 * strangers)

# %% [markdown]
# The updates are almost at right angles to each other, all three pairs; that is usual, as there are so many directions. By their weights alone `topics` should disturb `english` no more than `french` does. Does it?

# %%
for other in ("french", "topics"):
    ln.set_active(model, ["english", other])
    table[f"english and {other}"] = both = losses()
    keeps = (table["base"]["english"] - both["english"]) / (table["base"]["english"] - table["english"]["english"])
    print(f"english beside {other} keeps more than half of its gain:", keeps > 0.5)

# %% tags=["nbval-ignore-output"]
show_losses(["base", "english", "topics", "english and french", "english and topics"])
print("size of ΔW:", {name: round(float(whole(name).norm()), 1) for name in tasks})

# %% [markdown]
# Beside `topics` nothing is left of `english`. Nor is it the size: the updates differ in that by far less than the losses do. The weights show where two adapters *can* meet; what it does to the text, layer upon layer, only the held-out loss shows. So the loss is what to measure. Keep `english` at full weight, and turn
# `french` up from nothing:

# %% tags=["nbval-ignore-output"]
steps = (0.0, 0.25, 0.5, 0.75, 1.0)
curve = {0.0: table["english"], 1.0: table["cat"]}
for weight in steps[1:-1]:
    ln.combine(model, {"english": 1.0, "french": weight}, "cat", "turned up")
    curve[weight] = losses()
    ln.detach(model, "turned up")
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axes = figure.add_subplot(title="english at weight 1, french turned up")
for task, style, colour in (("english", "o-", "#0072b2"), ("french", "s--", "#e69f00")):
    axes.plot(steps, [curve[w][task] for w in steps], style, color=colour, label=f"loss on {task}")
axes.set(xlabel="weight of french", ylabel="held-out loss, nats a token")
axes.legend(frameon=False)
figure

# %% [markdown]
# Follow the two curves from left to right: one falls, the other rises, but not at the same places.

# %%
print("French gets better when its adapter comes in:   ", curve[0.75]["french"] < curve[0.0]["french"])
print("English pays for it at full weight:             ", curve[1.0]["english"] > curve[0.0]["english"])
print("and pays less at half of it than at full weight:", curve[0.5]["english"] < curve[1.0]["english"])

# %% [markdown]
# French has most of its gain at half weight, and until then English pays little; beyond three quarters English pays more than French still gains. So these two live together well at weights below one, and a curve like this, seconds of
# evaluation, says how far below. Where no weight suits both, as with `topics`, keep them apart and choose one for each request (notebook `09_many_adapters`).

# %% [markdown]
# ## 6. Does the order matter?
#
# LoRA adapters add to what comes from beneath, and sums do not care for order. A *bottleneck* adapter reads what comes from beneath, passes it through a bend, and adds the result: if two are stacked, the second reads what the first has written.
# This is what both do with a stack:

# %%
ln.show("layers.adapted.through")

# %% [markdown]
# Two bottlenecks of Houlsby's kind, with a short training each on the same two tasks as before; then both stacks, and the largest difference in the logits, the model's raw scores, relative to the largest score.

# %% tags=["nbval-ignore-output"]
stacked, _ = ln.load(BASE)
for seed, task in enumerate(("english", "french")):
    torch.manual_seed(seed)
    ln.attach(stacked, ln.BottleneckConfig.houlsby(8), task)
    short = ln.TrainConfig(max_steps=16, batch_size=8, learning_rate=5e-3)
    ln.train(stacked, tokenizer, ln.dataset("tone", "train").language(task[:2]), short)

# %% [markdown]
# Each order in turn on the same sentence; if the order does not matter, the logits are the same but for rounding.

# %%
ids = tokenizer("Could you please close the window? =>", return_tensors="pt").input_ids.to(model.device)


@torch.no_grad()
def order_matters(of):
    """Largest difference of logits between the two orders, over the largest logit."""
    ln.set_active(of, ["english", "french"])
    first = of(ids).logits
    ln.set_active(of, ["french", "english"])
    return float((of(ids).logits - first).abs().max() / first.abs().max())


print("LoRA: the order matters by less than 0.001 %:     ", order_matters(model) < 1e-5)
print("bottlenecks: the order matters by more than 0.1 %:", order_matters(stacked) > 1e-3)

# %% [markdown]
# The first difference is rounding, as floating-point sums do depend a little on their order. The second is real: `english` on top of `french` is another model than `french` on top of `english`. So a file that lists stacked bottlenecks has to keep their order;
# for LoRA a set would do.

# %% [markdown]
# {{exercise 10.4}}
#
# For which pairs does the order make no difference, apart from rounding? Each pair sits on the same layer and both have been trained. Answer `True` where the order does not matter. Think of what each one does to the output $y$ that comes from beneath: LoRA adds to it, a
# bottleneck of Houlsby's kind reads it and adds, DoRA adds and then multiplies each entry by a number of its own.

# %%
order_is_free = {"LoRA and LoRA": True, "Houlsby and Houlsby": False, "LoRA and DoRA": False}  ### SOLUTION

# %%
ln.check("10.4", order_is_free)

# %% [markdown]
# ## Three things to remember
#
# 1. The sum of LoRA updates is exact with `cat`, and at a chosen rank with `svd`. Averaging $A$ and $B$ by themselves computes something else.
# 2. Overlap and cosine say where adapters can meet; the held-out loss of each task says what it costs. Measure both tasks after every combination.
# 3. LoRA adapters may come in any order, stacked bottlenecks may not.
#
# **To read on:** Ilharco et al., *Editing Models with Task Arithmetic*, arXiv:2212.04089. Yadav et al., *TIES-Merging*, arXiv:2306.01708. Yu et al., *Language Models are Super Mario* (DARE), arXiv:2311.03099. Pfeiffer et al.,
# *AdapterFusion*, arXiv:2005.00247, and *MAD-X*, arXiv:2005.00052, for combining and stacking bottlenecks.
