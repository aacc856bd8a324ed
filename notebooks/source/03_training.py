# %% [markdown]
# # Training: the loop, rung by rung
#
# {{badges}}
#
# **What you will have at the end:** a training loop that you understand line by line; a ladder of measured rungs from the loop that one writes first to the package's own, in speed and memory; and full fine-tuning beside LoRA, on cost
# and on quality.
#
# **Time:** a minute and a half to run on two processor cores, an hour and a half with the exercises. On a GPU: not measured. **Needs:** nothing but this package; no download. Notebook 01 has the memory's parts one by one; you need not have read it.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# The data and the tools:

# %%
# %matplotlib inline
import random

import matplotlib.pyplot as plt
import torch

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id
tokenizer = ln.load(BASE)[1]
train, test = ln.dataset("tone", "train"), ln.dataset("tone", "test")

# %% [markdown]
# `tone` is the task of notebook 00, formal sentences and informal ones. Several runs will start from the same place, so here is that place as a function.

# %%
def fresh():
    """The base anew, with an adapter that has learnt nothing yet."""
    torch.manual_seed(0)
    model, _ = ln.load(BASE)
    ln.attach(model, ln.LoraConfig(r=8, lora_alpha=16))
    return model

# %% [markdown]
# ## 1. What is learnt
#
# A text reaches the model as *tokens*, numbers for pieces of words. At each place the model gives a probability to every token that could come next; the *loss* is the mean of −log of the probability that it gave to the token that did come, in
# units called nats. Of a pair `formal => informal` only the second half is to be learnt, so the first has labels that do not count, −100 by PyTorch's custom.

# %%
from lora_nb.blocks import IGNORE, collate

blocks = train.encode(tokenizer, seq_len=256)
ids, labels, _ = blocks[0]
print("given:    ", tokenizer.decode([t for t, label in zip(ids, labels) if label == IGNORE]))
print("learnt:   ", tokenizer.decode([t for t, label in zip(ids, labels) if label != IGNORE]))
counted = sum(label != IGNORE for block in blocks for label in block.labels)
print(f"all pairs: {sum(len(b.input_ids) for b in blocks):,} tokens, of which {counted:,} count")

# %% [markdown]
# ## 2. The loop that one writes first
#
# Take some pairs; let the model read them (*forward*); let autograd find how each trained number should move (*backward*); let the optimizer move them; forget the gradients. `collate` fills shorter rows with *padding*, so that a batch is a rectangle. Does the loss fall?

# %% tags=["nbval-ignore-output"]
model = fresh().train()
device, pad = next(model.parameters()).device, tokenizer.pad_token_id
optimizer = torch.optim.AdamW(ln.parameters(model).values(), lr=2e-3)
random.seed(0)
losses = []
for _ in range(12):
    ids, labels = (t.to(device) for t in collate(random.sample(blocks, 16), pad)[:2])
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("loss by step:", " ".join(f"{loss:.2f}" for loss in losses))

# %%
print("lower at the end than at the start:", losses[-1] < losses[0])

# %% [markdown]
# That is training; the rest of this notebook is about doing it well. Here is the package's loop. Find the same five things in it, and what stands around them: the rate, the clipping of large gradients, a check that the loss is still a number, and a step that no
# interrupt can cut in half.

# %%
ln.show("training.loop._turns")

# %% [markdown]
# Two words on what you see there. The learning rate rises over a *warm-up*, since the first gradients are the wildest, and then falls to zero, so that the end is calm. And *clipping* scales gradients down that are longer than `max_grad_norm`, so that one odd batch cannot throw
# the adapter far. The three shapes that a rate can have:

# %%
from lora_nb.training.optim import learning_rate

figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
for kind, style in (("linear", "-"), ("cosine", "--"), ("constant", ":")):
    config = ln.TrainConfig(max_steps=200, warmup_steps=20, learning_rate=2e-3, lr_scheduler_type=kind)
    axes.plot([learning_rate(config, step, 200) for step in range(200)], style, label=kind)
axes.set(xlabel="step", ylabel="learning rate")
axes.set_title("20 steps of warm-up, then as lr_scheduler_type says", loc="left", fontsize="medium")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. Padding, and packing
#
# Padding is computed and thrown away. How much is it? With pairs as they come; with pairs of like length in one batch, as the package's sampler arranges them; and *packed*, several short pairs in one row, none of which sees another.

# %%
from lora_nb.blocks import pack
from lora_nb.training.sampler import order

def padding(rows, size):
    """Share of padding when rows are taken in this order, `size` at a time."""
    batches = [[len(r.input_ids) for r in rows[i : i + size]] for i in range(0, len(rows), size)]
    return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)

random.seed(0)
by_length = [blocks[i] for i in order(blocks, ln.TrainConfig(batch_size=16), epoch=0)]
packed = pack(blocks, 256)
for name, rows, size in (("as they come", random.sample(blocks, len(blocks)), 16), ("by length", by_length, 16), ("packed", packed, 2)):
    print(f"{name:13} {padding(rows, size):5.1%} padding, {-(-len(rows) // size)} forwards for all pairs")

# %% [markdown]
# The picture shows the first batch of the first kind and of the last: text in grey, padding in white. The left one has a row for each pair; in the right one a row has many, and the grey changes from pair to pair.

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axes, rows, title in ((panels[0], blocks[:16], "16 pairs, padded"), (panels[1], packed[:2], "two packed rows")):
    longest = max(len(r.input_ids) for r in rows)
    picture = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        document = torch.tensor([place == 0 for place in row.positions or range(len(row.input_ids))]).cumsum(0)
        picture[i, : len(document)] = 0.4 + 0.4 * (document % 2)
    axes.imshow(picture.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="token", ylabel="row", yticks=range(0, len(rows), max(1, len(rows) // 4)))
    axes.set_title(title, loc="left", fontsize="medium")
plt.show()

# %% [markdown]
# Packing must not change what is learnt. `ln.steps` is the loop as a generator, one step a turn; let it take the same 8 pairs both ways, and compare the loss and the length of all gradients together. (A base with dropout of its own, such as GPT-2, draws other
# numbers each time; then the two only come close.)

# %%
def first_step(**settings):
    """The first step on the same 8 pairs."""
    return next(ln.steps(fresh(), tokenizer, train[:8], ln.TrainConfig(max_steps=1, seq_len=512, **settings)))

apart, together = first_step(batch_size=8), first_step(batch_size=8, packing=True)
print(f"tokens computed: {apart.tokens} apart, {together.tokens} packed")
print("the same loss to 1e-4:         ", abs(apart.loss / together.loss - 1) < 1e-4)
print("the same gradient norm to 1e-3:", abs(apart.grad_norm / together.grad_norm - 1) < 1e-3)

# %% [markdown]
# ## 4. Accumulation, counted in tokens
#
# When a batch of eight does not fit, one takes two of four, adds up the gradients and steps once: *gradient accumulation*. The loss of a batch is a mean over its labelled tokens, so is the mean of the two means the mean of all? Take the four shortest and the four
# longest of the same eight pairs.

# %%
eight = sorted(train[:8].encode(tokenizer, 256), key=lambda b: len(b.labels))
model = fresh()
means, counts = [], []
for four in (eight[:4], eight[4:]):
    ids, labels, *_ = collate(four, pad)
    with torch.no_grad():
        means.append(model(input_ids=ids.to(device), labels=labels.to(device)).loss.item())
    counts.append(int((labels[:, 1:] != IGNORE).sum()))
print("labelled tokens", counts, " mean losses", [round(mean, 3) for mean in means])
print(f"mean of the two means {sum(means) / 2:.3f}, loss of all eight {apart.loss:.3f}")

# %% [markdown]
# It is not: the short texts' tokens count for more than the long ones'. Libraries had this fault for years ([Hugging Face, *Fixing Gradient Accumulation*, 2024](https://huggingface.co/blog/gradient_accumulation)).
#
# {{exercise 03.1}}
#
# Write `combined(means, counts)`: the loss of all micro-batches together, from the mean loss and the number of labelled tokens of each.

# %%
def combined(means, counts):
    """The mean over all labelled tokens."""
    ### BEGIN SOLUTION
    return sum(mean * count for mean, count in zip(means, counts)) / sum(counts)
    ### END SOLUTION

# %%
ln.check("03.1", combined)

# %% [markdown]
# The package sums the loss over tokens in each forward and divides by the count of *all* forwards of the step, which it knows beforehand. So two forwards of four are one of eight, to rounding:

# %%
accumulated = first_step(batch_size=4, gradient_accumulation_steps=2)
print("the same loss to 1e-5:         ", abs(accumulated.loss / apart.loss - 1) < 1e-5)
print("the same gradient norm to 1e-4:", abs(accumulated.grad_norm / apart.grad_norm - 1) < 1e-4)

# %%
ln.show("training.loop._accumulate")

# %% [markdown]
# ## 5. The loss, some tokens at a time
#
# The model's last layer, its *head*, turns each token's *hidden state*, the row of numbers that the layers have made of it, into one score (*logit*) for each token of the vocabulary. The plain loss makes all scores at once, and keeps them, their logarithms and their gradients. With Llama 3's vocabulary
# and a text of 4,096 tokens that is about 6 GiB, as notebook 01 finds. But the loss is a sum over tokens, so it can be made from a few rows at a time.
#
# {{exercise 03.2}}
#
# `head` is a function from hidden states (n, width) to logits (n, vocabulary). Give back the **sum** of the cross-entropy over all tokens, without ever asking `head` for more than `rows` tokens. `F.cross_entropy(logits, labels, reduction="sum")` is the sum of one chunk.

# %%
import torch.nn.functional as F

def chunked_loss(head, hidden, labels, rows):
    """Σ cross-entropy of (n, width) hidden states and (n,) labels, `rows` tokens at a time."""
    ### BEGIN SOLUTION
    pieces = zip(torch.split(hidden, rows), torch.split(labels, rows))
    return sum(F.cross_entropy(head(x), y, reduction="sum") for x, y in pieces)
    ### END SOLUTION

# %%
ln.check("03.2", chunked_loss)

# %% [markdown]
# That bounds what exists at once on the way forward, but autograd would still keep each chunk's logits for the way back. The package goes one step further: it finds the gradient while a chunk's logits are there, in their own memory, and keeps only the gradient of the
# hidden states, which is no larger than these.

# %%
ln.show("LinearLoss.forward")

# %% [markdown]
# What does it save? 1,024 tokens, width 256, a vocabulary of 32,000. `rise` says by how much allocated memory rises at most while something runs (notebook 01 shows its code); the two gradients are compared as well.

# %%
from lora_nb.memory.measured import rise
from lora_nb.training.loss import Head

torch.manual_seed(0)
layer = torch.nn.Linear(256, 32000, bias=False).requires_grad_(False)
hidden, goals = torch.randn(1024, 256, requires_grad=True), torch.randint(32000, (1024,))
ways = {
    "all at once": lambda: torch.autograd.grad(F.cross_entropy(layer(hidden), goals, reduction="sum"), hidden)[0],
    "in chunks": lambda: torch.autograd.grad(Head(layer).loss_sum(hidden, goals), hidden)[0],
}
highest = {name: rise(way) for name, way in ways.items()}
for name, count in highest.items():
    print(f"{name:12} {count / 2**20:4.0f} MiB at the highest")
print("the same gradient to 1e-4:", torch.allclose(*(way() for way in ways.values()), atol=1e-4))

# %% [markdown]
# ## 6. Sixteen bits
#
# On a GPU products in 16 bits are several times as fast as in 32, and *automatic mixed precision* (AMP) uses them where that is safe: `precision="bf16"` makes the forward's products in bfloat16, while sums, norms and the adapter itself stay in 32 bits. There are two formats of 16 bits;
# what does each give up?

# %%
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    info = torch.finfo(dtype)
    print(f"{str(dtype)[6:]:9} largest {info.max:8.1e}, smallest above zero {info.smallest_normal * info.eps:8.1e}, next after 1: 1 + {info.eps:.1e}")
print("a gradient of 1e-8 in float16:", torch.tensor(1e-8).half().item(), " times 65536 first:", torch.tensor(1e-8 * 65536).half().item() > 0)

# %% [markdown]
# float16 has no numbers below some 6e-8, where many gradients lie, so its loss is multiplied by a large number before the way back and divided out after (*loss scaling*). bfloat16 has float32's range but few digits. That is why adapters are *kept* in 32 bits: a small step added to a
# weight in bfloat16 is lost.
#
# {{exercise 03.3}}
#
# What is the smallest power of two that can be added to 1 in bfloat16 such that the sum is not 1 again? Find out with `torch.tensor(1.0).bfloat16()`, or from the number of its digits.

# %%
smallest_step = 2.0**-7  ### SOLUTION

# %%
ln.check("03.3", smallest_step)

# %% [markdown]
# Does it harm the loss? One step with bfloat16 products, beside the one in 32 bits:

# %%
halved = first_step(batch_size=8, precision="bf16")
print("the same loss to 1 %:", abs(halved.loss / apart.loss - 1) < 0.01)

# %% [markdown]
# ## 7. Checkpointing: compute again instead of keeping
#
# The way back needs what the layers computed on the way forward. With `gradient_checkpointing=True` only each block's input is kept, and the block is computed once more when its turn comes: about a third more work for a fraction of the memory, and the same gradients.

# %%
light = first_step(batch_size=8, gradient_checkpointing=True)
print("the same gradient norm to 1e-5:", abs(light.grad_norm / apart.grad_norm - 1) < 1e-5)
for wanted in (False, True):
    found = ln.estimate("meta-llama/Llama-3.1-8B", ln.LoraConfig(r=8), seq_len=4096, gradient_checkpointing=wanted)
    held = dict(found.timeline)["loss"]["activations"]
    print(f"Llama-3.1-8B, 4,096 tokens, checkpointing {wanted}: activations {held / 2**30:.1f} GiB")

# %% [markdown]
# ## 8. Stopping, and going on
#
# A run of hours will be interrupted. With a `checkpoint_dir` the loop writes what trains, the optimizer's moments and the step's number, each file whole or not at all. Order of the data and random numbers follow from seed and step, so a resumed run is the *same* run. Here one is stopped after
# step 3 of 6, resumed on a fresh model, and compared with one that was never stopped.

# %% tags=["nbval-ignore-output"]
import tempfile

folder = tempfile.mkdtemp()
plan = {"max_steps": 6, "batch_size": 8}
whole = ln.train(fresh(), tokenizer, train, ln.TrainConfig(**plan))
stopped = ln.train(fresh(), tokenizer, train, ln.TrainConfig(**plan, checkpoint_dir=folder), callbacks=[lambda step: step.step == 3])
resumed = ln.train(fresh(), tokenizer, train, ln.TrainConfig(**plan, checkpoint_dir=folder, resume=True))

# %%
print(f"stopped by {stopped.stopped_by} after {stopped.steps} steps; resumed to {resumed.steps}")
print("losses equal to the last bit:", resumed.losses == whole.losses)

# %% [markdown]
# The stop was a *callback*, a function that sees each step and may say "enough". The panel's Stop button is one, too; *Kernel › Interrupt* and a full memory end a run in the same orderly way.
#
# ## 9. The ladder
#
# Now everything together, one thing more at each rung, and each rung measured: time for the same text, and how far memory rises. First LoRA as one writes it, put into the model by hand; it works in the place of any layer, since it calls what was there.

# %%
class PlainLora(torch.nn.Module):
    """W x + s · B A x around any linear layer; `shape` is (outputs, inputs)."""

    def __init__(self, base, shape, r=8, s=2.0):
        super().__init__()
        self.base, self.s = base, s
        self.A = torch.nn.Parameter(torch.randn(r, shape[1], device=device) / shape[1] ** 0.5)
        self.B = torch.nn.Parameter(torch.zeros(shape[0], r, device=device))

    def forward(self, x):
        return self.base(x) + (x.to(self.A.dtype) @ self.A.T @ self.B.T * self.s).to(x.dtype)

# %% [markdown]
# And the loop of section 2 around it, which takes rows of tokens and a way to compute the loss:

# %%
def by_hand(rows, size, loss_of):
    """The loop of section 2 around the plain layer: a function that does the next step."""
    model = fresh().train()
    matched = ln.attach(model, ln.LoraConfig(r=8), "paths").matched  # which layers, and their shapes
    ln.detach(model)
    for path, found in matched.items():
        model.set_submodule(path, PlainLora(model.get_submodule(path).requires_grad_(False), found.shape))
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name.endswith((".A", ".B"))], lr=1e-4)
    def turn():
        batch = collate(random.sample(rows, size), pad)[:3]
        loss_of(model, *(t if t is None else t.to(device) for t in batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return turn

# %% [markdown]
# Two losses, all logits at once and in chunks, and the package's own loop with more and more of its settings. Every rung takes about 16 pairs a step: as 16 padded rows, or as two packed ones.

# %%
from lora_nb.training.loss import loss_sum

def at_once(model, ids, labels, places):
    return model(input_ids=ids, labels=labels, position_ids=places, use_cache=False).loss

def in_chunks(model, ids, labels, places):
    return loss_sum(model, ids, labels, places) / (labels[:, 1:] != IGNORE).sum()

def package(**settings):
    config = ln.TrainConfig(max_steps=10**6, batch_size=2, seq_len=224, packing=True, learning_rate=1e-4, **settings)
    turns = ln.steps(fresh(), tokenizer, train[:256], config)
    return lambda: next(turns)

# %% [markdown]
# The rungs, each with all that the ones before it have; and how many tokens of text a step of each takes in.

# %%
rows = train[:256].encode(tokenizer, 224)
full_rows = pack(rows, 224)
tokens = sum(len(r.input_ids) for r in rows)
rungs = {
    "the loop of section 2": by_hand(rows, 16, at_once),
    "+ packing": by_hand(full_rows, 2, at_once),
    "+ loss in chunks": by_hand(full_rows, 2, in_chunks),
    "+ fused LoRA": package(),
    "+ checkpointing": package(gradient_checkpointing=True),
}
text = {name: tokens / len(rows) * 16 if "section" in name else tokens / len(full_rows) * 2 for name in rungs}  # tokens a step, no padding

# %% [markdown]
# The rungs are measured in turn, several rounds, so that a slow moment of the machine hits all of them; the median counts. Speed is tokens of text a second, over the first rung's; padding is no text.

# %% tags=["nbval-ignore-output"]
import statistics
import time

from tqdm.auto import tqdm

seconds = {name: [] for name in rungs}
for number in tqdm(range(4), desc="rounds"):
    for name, turn in rungs.items():
        start = time.perf_counter()
        turn()
        seconds[name] += [time.perf_counter() - start] * (number > 0)  # the first warms up

# %% [markdown]
# In numbers, the speed over the first rung's:

# %% tags=["nbval-ignore-output"]
first = next(iter(rungs))
speed = {name: text[name] / statistics.median(seconds[name]) for name in rungs}
memory = {name: rise(turn, device) / 2**20 for name, turn in rungs.items()}
for name in rungs:
    print(f"{name:22} {speed[name] / speed[first]:5.2f} × the speed, memory rises by {memory[name]:4.0f} MiB")

# %% [markdown]
# As a picture: longer is better on the left, shorter on the right.

# %% tags=["nbval-ignore-output"]
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for axes, values, label in ((panels[0], {n: v / speed[first] for n, v in speed.items()}, "speed over the first rung's"), (panels[1], memory, "MiB by which a step's memory rises")):
    axes.barh(list(values), list(values.values()), color="#0072b2")
    for i, value in enumerate(values.values()):
        axes.text(value, i, f" {value:.3g}", va="center")
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
panels[0].invert_yaxis()
panels[0].set_title("one step of LoRA on about 16 pairs of tone", loc="left", fontsize="medium")
plt.show()

# %% [markdown]
# Speed depends on the machine and on what else it does; memory hardly does. In words, what holds everywhere:

# %%
print("the loss in chunks needs less memory:      ", memory["+ loss in chunks"] < memory["+ packing"])
print("fused LoRA needs less again:               ", memory["+ fused LoRA"] < memory["+ loss in chunks"])
print("checkpointing needs the least:             ", memory["+ checkpointing"] == min(memory.values()))
print("all of it: less than half of the first rung:", memory["+ checkpointing"] < memory[first] / 2)

# %% [markdown]
# Packing spares the padding, the more the lengths differ; in sentences as short and as alike as these that shows little in time. Fused LoRA passes over memory less often, which is the largest step in speed here. Chunks and fused LoRA take memory away, and checkpointing trades speed for most of the rest. With a large vocabulary the
# rung of chunks weighs far more. In a checkout of the project `python benchmarks/training.py --only ladder` climbs higher, on a larger model: on to the compiler, 8-bit moments and QLoRA, each rung in a process of its own.
#
# ## 10. Full fine-tuning beside LoRA
#
# Is LoRA as good? Both train on the same pairs for as many steps, each with a rate that suits it: LoRA wants a larger one than full fine-tuning, here five times as large. Held-out pairs judge. Watch quality and cost together.

# %% tags=["nbval-ignore-output"]
from lora_nb.training.optim import trainable

def trial(config, rate):
    """Train, and judge on the held-out pairs: (numbers that train, seconds, evaluation)."""
    torch.manual_seed(0)
    model, _ = ln.load(BASE)
    if config != "full":
        ln.attach(model, config)
    settings = ln.TrainConfig(max_steps=30, batch_size=2, packing=True, learning_rate=rate, lr_scheduler_type="cosine")
    run = ln.train(model, tokenizer, train, settings)
    return sum(p.numel() for p in trainable(model)), run.seconds, ln.evaluate(model, tokenizer, test)

untrained = ln.evaluate(ln.load(BASE)[0], tokenizer, test)
trials = {name: trial(config, rate) for name, config, rate in (("full", "full", 1e-3), ("LoRA r=16", ln.LoraConfig(r=16, lora_alpha=32), 5e-3))}

# %% [markdown]
# Side by side, with what the untrained model makes of the same sentences:

# %% tags=["nbval-ignore-output"]
from lora_nb.render import text_table

rows = [("untrained", "–", "–", f"{untrained.bits_per_byte:.3f}", f"{untrained.token_accuracy:.0%}")]
for name, (numbers, seconds_taken, found) in trials.items():
    rows.append((name, f"{numbers:,}", f"{seconds_taken:.0f}", f"{found.bits_per_byte:.3f}", f"{found.token_accuracy:.0%}"))
print(text_table(["method", "numbers that train", "seconds", "bits per byte", "tokens right"], rows))

# %%
full, lora = trials["full"], trials["LoRA r=16"]
gain = (untrained.bits_per_byte - lora[2].bits_per_byte) / (untrained.bits_per_byte - full[2].bits_per_byte)
print(f"LoRA trains {lora[0]:,} numbers, full fine-tuning {full[0]:,}: {full[0] / lora[0]:.0f} times as many")
print(f"gradients, moments and the trained numbers: {16 * lora[0] / 2**20:.1f} MiB and {16 * full[0] / 2**20:.1f} MiB")
print("LoRA reaches at least 80 % of full fine-tuning's gain:", gain > 0.8)

# %% [markdown]
# *Bits per byte* is the loss per byte of text, so that it compares across tokenizers; lower is better. LoRA gets most or all of the gain with a small part of the numbers, and keeps the base as it was. Thirty steps and one seed prove nothing in general; notebook 11 compares eleven methods on three tasks with several seeds.
#
# ## Three things to remember
#
# 1. Count in tokens: what is learnt, what is padding, and what a step's mean is taken over.
# 2. Memory goes to logits and activations first; chunks and checkpointing take them away without changing a gradient.
# 3. Measure in turn and compare with the loop that you would write first; resume means *the same run*.
#
# **To read on:** Micikevicius et al., *Mixed Precision Training*, arXiv:1710.03740. Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, arXiv:1711.05101, for AdamW. Hsu et al., *Liger Kernel*, arXiv:2410.10989, section 3.2, for the loss in chunks. Krell et al., *Efficient Sequence
# Packing*, arXiv:2107.02027. Biderman et al., *LoRA Learns Less and Forgets Less*, arXiv:2405.09673, for LoRA against full fine-tuning at size.
