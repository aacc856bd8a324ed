# %% [markdown]
# # Many adapters, one base
#
# {{badges}}
#
# **What you will have at the end:** a server of your own in twenty lines, which writes texts for several customers at once, each with an adapter of their own; then the package's server
# with 237 adapters behind one model, of which only eight are in their places at any moment; and an adapter that was trained while others were being served.
#
# **Time:** about a minute of computing on two processor cores, and some fifty minutes with the exercises. On a GPU: not measured. **Needs:** nothing but this package, and 60 MB of disk until
# the last cell has run. Notebook 00 first, if you have never trained an adapter.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. Two adapters that know something
#
# An adapter is a small set of numbers beside a frozen model, the *base*: for each linear layer with weight $W$ two thin matrices, $A$ and $B$, so that the layer computes
# $W x + s\,B A x$. Since the base stays as it is, any number of adapters can share it. That is what this notebook is about. Ours are small: rank 8, and only on two of the linear layers of each block,
# the queries' and the values' of *attention* (the part in which tokens look at one another), as in the first paper on LoRA (Hu et al., arXiv:2106.09685).

# %%
import torch

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = ln.load(BASE)
LORA = ln.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# One adapter learns to turn formal sentences into informal ones (`tone`), another to say whether a note is about finance, health or law (`topics`). Forty short steps each are too few to be
# good at it; they are enough to tell them apart. Both end up on the *same* model, each under its name, and in a folder of its own.

# %% tags=["nbval-ignore-output"]
import shutil

shutil.rmtree("adapters/many", ignore_errors=True)  # what an earlier run left
for name in ("tone", "topics"):
    torch.manual_seed(0)  # A starts at random
    ln.attach(model, LORA, name)
    ln.train(model, tokenizer, ln.dataset(name), ln.TrainConfig(max_steps=40, batch_size=8, seq_len=64, learning_rate=1e-2))
    ln.save(model, f"adapters/many/{name}", name)

# %% [markdown]
# What does the model weigh now? Count the base's numbers and each adapter's.

# %%
for name in ("tone", "topics"):
    print(f"{name:7} {sum(p.numel() for p in ln.parameters(model, name).values()):>9,} numbers")
base = {n: p for n, p in model.named_parameters() if ".adapters." not in n}
print(f"base    {sum(p.numel() for p in base.values()):>9,} numbers, once for both")

# %% [markdown]
# ## 2. A hundred of them on disk
#
# We will not train two hundred more. A server does not care what an adapter has learnt, only how large it is, so the others are *stand-ins*: random numbers of about the size that training gives.
# Imagine one for each customer. The loop fills one adapter with new numbers each time and saves it.

# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

ln.attach(model, LORA, "blank")
for i in tqdm(range(235), "saving"):
    generator = torch.Generator().manual_seed(i)
    with torch.no_grad():
        for p in ln.parameters(model, "blank").values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    ln.save(model, f"adapters/many/customer-{i:03d}", "blank")
ln.detach(model, "blank")

# %% [markdown]
# `ln.storage` reads saved adapters and says what they take, beside a whole copy of the base for each. Here are the first three in a table; look at its title.

# %%
from pathlib import Path

from lora_nb.storage import model_bytes

folders = sorted(p for p in Path("adapters/many").iterdir() if p.is_dir())
print(len(folders), "adapters")
ln.storage(folders[:3], model_bytes(model))

# %% [markdown]
# And a hundred? Two ways to count: what the adapters take beside a hundred models, and what adapters *with the one base that they need* take.

# %%
hundred = ln.storage(folders[:100], model_bytes(model))
with_base = hundred.total + hundred.base_bytes
print(f"a hundred models:           {hundred.as_models / 1e6:7,.0f} MB")
print(f"a hundred adapters:         {hundred.total / 1e6:7,.0f} MB, {1 - hundred.total / hundred.as_models:.1%} less")
print(f"a hundred adapters, a base: {with_base / 1e6:7,.0f} MB, {1 - with_base / hundred.as_models:.1%} less")

# %% [markdown]
# One often reads "99 % less". That is about right for the adapters alone, and just missed with the base: among a hundred, the one base is 1 % by itself. How much comes on top depends on size. A layer's weight has
# inputs × outputs numbers, its adapter $r$ × (inputs + outputs), so the larger the layer, the smaller the adapter beside it. `ln.estimate` knows the shapes of large models without loading them.

# %%
for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"):
    parts = ln.estimate(name, ln.LoraConfig(r=16), dtype="bfloat16").parts
    base_bytes, adapter = parts["weights"], parts["adapters"] / 2  # the estimate trains in 32 bits; a file of 16 bits has half
    with_base = 1 - (base_bytes + 100 * adapter) / (100 * base_bytes)
    print(f"{name:26} base {base_bytes / 1e9:6.1f} GB, adapter {adapter / 1e6:6.1f} MB: {1 - adapter / base_bytes:.1%} less, {with_base:.1%} with the base")

# %% [markdown]
# All of them are of rank 16 on every linear layer. From one to seventy billion parameters the share of an adapter falls from just below one per cent to a third of one.
#
# {{exercise 09.1}}
#
# Write a function that gives the bytes of an adapter. `layers` is a list of (inputs, outputs), one pair for each linear layer that is adapted; `bytes_per_number` is 4 for 32 bits and 2 for 16.
# You need no model for it.

# %%
def adapter_bytes(r, layers, bytes_per_number=2):
    ### BEGIN SOLUTION
    return sum(r * (inputs + outputs) for inputs, outputs in layers) * bytes_per_number
    ### END SOLUTION


# %%
ln.check("09.1", adapter_bytes)

# %% [markdown]
# Files can be smaller still. `ln.store` writes an adapter again in 16 bits, or in 8 bits with a scale for each row of $A$ and each column of $B$. What is lost on the way? We load each under a name of its
# own and compare what the model computes (its *logits*, a number for every token that may come next) with the original's.

# %%
ids = tokenizer("Could you please close the window? =>", return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    ln.set_active(model, "tone")
    original = model(ids).logits
    for kind, limit in (("fp16", 0.001), ("int8", 0.02)):
        folder = ln.store("adapters/many/tone", f"adapters/small/{kind}", kind)
        ln.load_adapter(model, folder, kind)
        change = float((model(ids).logits - original).norm() / original.norm())
        ln.detach(model, kind)
        print(f"{kind}: {ln.inspect(folder).bytes / ln.inspect('adapters/many/tone').bytes:.0%} of the bytes; change below {limit:.1%}: {change < limit}")

# %% [markdown]
# About half and about a third of the bytes (a file also has names and sizes in it), for a change that no reader of the texts would notice. The 16-bit files are still PEFT's; the 8-bit ones only this package reads.
#
# ## 3. One batch, many adapters
#
# Models are fast when they compute several texts at once, a *batch*: the weights are read from memory once for all rows. But a batch has one model, and our customers have an adapter each. The
# way out is that $W x$ does not depend on the adapter. So compute it once for everybody, and add to each row its own $s\,B A x$.

# %% tags=["nbval-ignore-output"]
prompts = [
    "Could you please close the front door? =>",
    "The tenant says the landlord came in twice without notice. =>",
    "The old man opened the door and",
]
names = ["tone", "topics", None]  # None: the base alone
for prompt, name, text in zip(prompts, names, ln.generate(model, tokenizer, prompts, adapter=names, max_new_tokens=12), strict=True):
    print(f"{name or 'base':7} {prompt} {text}")

# %% [markdown]
# Three rows, three manners, one forward pass for each token. Is every row what it would be alone? `ln.rows` says for each row of a batch whose it is; here the same sentence goes through all three.

# %%
with torch.no_grad():
    with ln.rows(model, names):
        mixed = model(ids.repeat(3, 1)).logits
    for row, name in enumerate(names):
        ln.set_active(model, [name] if name else [])
        alone = model(ids).logits[0]
        print(f"row {row}, {name or 'base'}: as alone, to 1e-4: {bool((mixed[row] - alone).abs().max() < 1e-4)}")

# %% [markdown]
# This is the code that runs for a small batch. `a` and `b` are stacks with the matrices of all G adapters (`b` has the factor $s$ in it already). Every adapter gets as many places as the one that has most tokens
# needs; some may stay empty. So one product of G small matrices does for all adapters at once, and `back` says from which place each token takes its result. The base's tokens get nothing added.

# %%
ln.show("batched")

# %% [markdown]
# Empty places are work for nothing, which a batch of single tokens hardly notices. For long texts of many adapters the package sorts tokens by adapter and multiplies group by group; for one or two adapters it multiplies by
# all $A$ at once and sets the rest to zero. It takes whichever costs least (`ln.show("choose")`).
#
# {{exercise 09.2}}
#
# Write the layer yourself, by a loop or with all adapters at once. `x` is (n, inputs), `w` (outputs, inputs), `a` (G, r, inputs), `b` (G, outputs, r), `scale` (G,); `whose` is a list of n numbers: which adapter, or −1 for the base.

# %%
def mixed_layer(x, w, a, b, scale, whose):
    ### BEGIN SOLUTION
    y = x @ w.T
    for i, g in enumerate(whose):
        if g >= 0:
            y[i] += scale[g] * (b[g] @ (a[g] @ x[i]))
    return y
    ### END SOLUTION


# %%
ln.check("09.2", mixed_layer)

# %% [markdown]
# What does a mixed batch cost? Sixteen rows; first all with the same adapter, then with four, then each with its own. A forward of such a batch:

# %%
customers = [folder.name for folder in folders[:16]]
for name in customers:
    ln.load_adapter(model, f"adapters/many/{name}", name)


@torch.no_grad()
def mixed_forward(ids, whose):
    """One forward in which each row has its own adapter."""
    with ln.rows(model, whose):
        return model(ids).logits


# %% [markdown]
# Beside it the naive way: a forward for each adapter, over its own rows. The two are run in turn, round by round, so that a slow moment of the machine hits both.

# %% tags=["nbval-ignore-output"]
from lora_nb.timing import interleaved

batch, runs = torch.randint(1, 1000, (16, 8), generator=torch.Generator().manual_seed(0)).to(model.device), {}
for count in (1, 4, 16):
    whose, size = [customers[i * count // 16] for i in range(16)], 16 // count
    parts = [(batch[i : i + size], whose[i : i + size]) for i in range(0, 16, size)]
    runs[count, "mixed"] = lambda whose=whose: mixed_forward(batch, whose)
    runs[count, "one by one"] = lambda parts=parts: [mixed_forward(*part) for part in parts]
times = interleaved(runs, rounds=4)
for count, way in runs:
    print(f"{count:2} adapters, {way:10} {1e3 * times.median((count, way)):6.1f} ms")

# %% [markdown]
# The same as a picture. Look at how the two lines start together and part.

# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for way, line in (("one by one", "s--"), ("mixed", "o-")):
    axes.plot([1, 4, 16], [1e3 * times.median((n, way)) for n in (1, 4, 16)], line, label=way)
axes.set(xlabel="adapters among 16 rows", ylabel="milliseconds", title="A forward over 16 rows of 8 tokens", xticks=[1, 4, 16], ylim=(0, None))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The dashed line with squares is the naive way: it climbs with every adapter, since the base is gone through again for each. The solid line with circles stays nearly flat: only the small parts differ. How far apart they
# are depends on the machine; on any machine the mixed batch should win clearly.

# %%
print("16 adapters: one by one takes at least 1.5 times as long:", times.ratio((16, "one by one"), (16, "mixed")) >= 1.5)
growth = {way: times.ratio((16, way), (1, way)) for way in ("mixed", "one by one")}
print("from 1 to 16 adapters the mixed batch grows less than half as much:", growth["mixed"] < growth["one by one"] / 2)
ln.detach(model)  # the model carries nothing any more: the next sections take adapters from disk

# %% [markdown]
# ## 4. A server in twenty lines
#
# Requests do not come in neat batches. One customer wants two tokens, another fifty. If a batch starts together and ends together, the short ones wait for the longest. *Continuous batching* lets everybody
# join and leave between two steps: who is done makes room at once. The first half of the server is a step: one token more for every text under way.

# %%
def step(running):
    """One more token for each, with its own adapter; shorter texts are filled up on the left, and the filling is masked."""
    longest = max(len(r["ids"]) for r in running)
    ids = torch.tensor([[0] * (longest - len(r["ids"])) + r["ids"] for r in running], device=model.device)
    mask = torch.tensor([[0] * (longest - len(r["ids"])) + [1] * len(r["ids"]) for r in running], device=model.device)
    with torch.no_grad(), ln.rows(model, [r["adapter"] for r in running]):
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    for request, token in zip(running, logits.argmax(-1).tolist(), strict=True):
        request["ids"].append(token)
        request["left"] -= 1


# %% [markdown]
# The second half decides who takes part. It keeps a line of those who wait and a list of those under way, and before every step it fills the places that are free.

# %%
def serve(requests, places=4):
    """Serve them all, so many at the same time; returns the number of steps."""
    waiting, running, steps = list(requests), [], 0
    while waiting or running:
        while waiting and len(running) < places:
            running.append(waiting.pop(0))
        step(running)
        steps += 1
        running = [r for r in running if r["left"] > 0]
    return steps


# %% [markdown]
# Eight requests for four places. Two of them want twelve tokens, the others two. Served batch by batch they would take 12 + 12 = 24 steps, since each batch has a long one in it. And with places that are filled at once?

# %%
for name in customers[:8]:
    ln.load_adapter(model, f"adapters/many/{name}", name)
lengths = [2, 12, 2, 2, 2, 2, 12, 2]
start = tokenizer("The garden was").input_ids
requests = [{"ids": list(start), "adapter": name, "left": n} for name, n in zip(customers, lengths, strict=False)]
print("steps:", serve(requests))
again = {"ids": list(start), "adapter": customers[6], "left": lengths[6]}
serve([again])
print("the seventh got the text that it gets alone:", again["ids"] == requests[6]["ids"])

# %% [markdown]
# Fewer steps for the same texts, and the short requests are done long before the long ones. That is the heart of every serving engine.
#
# {{exercise 09.3}}
#
# Work out both numbers without a model: `lengths` are the tokens that each request wants, in the order of their coming, and there are so many `places`. Return a pair: steps if batches start and end together, steps if a
# free place is filled at once.

# %%
def steps_needed(lengths, places):
    ### BEGIN SOLUTION
    together = sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    ends = [0] * places  # when each place is free
    for n in lengths:
        first = ends.index(min(ends))
        ends[first] += n
    return together, max(ends)
    ### END SOLUTION


# %%
ln.check("09.3", steps_needed)

# %% [markdown]
# What the twenty lines lack: they compute the whole text again for every token, where a real server keeps the *keys and values* that attention needs of earlier tokens; they let one customer with a thousand requests
# block all others; and all adapters must be on the model. `ln.AdapterServer` does these three things.
#
# ## 5. 237 adapters, eight places
#
# Memory next to the processor is dear, on a GPU above all. So adapters live on three *tiers*, as in the serving engines S-LoRA (arXiv:2311.03285) and LoRAX:
#
# | tier | how many here | what it means |
# | --- | --- | --- |
# | device slot | 8 | acts in the batch |
# | host memory (the computer's own) | 32 | read and checked; takes a slot within a moment |
# | disk | all 237 | is read in the background, while others are served |
#
# When a slot is wanted and none is free, the adapter that nobody uses and that was used longest ago goes down a tier. Ask for one text of each of the 237.

# %% tags=["nbval-ignore-output"]
ln.detach(model)
with ln.AdapterServer(model, tokenizer, device_slots=8, host_slots=32, folder="adapters/many") as server:
    tickets = [server.submit("The garden was", adapter=name, max_new_tokens=3) for name in server.adapters()]
    for ticket in tqdm(tickets, "answered"):
        ticket.result(timeout=120)
    figures = server.figures()
print(f"{figures.tokens} tokens in {figures.steps} steps and {figures.seconds:.1f} s")

# %% [markdown]
# `submit` gives a *ticket* at once and does not wait; `result` waits. The server counted what it did:

# %%
print("requests answered:  ", sum(f.done for f in figures.adapters.values()), "of", len(tickets))
print("adapters read:      ", sum(figures.loads.values()))
print("now in slots:       ", len(figures.in_slots))
print("now in host memory: ", len(figures.in_host))
print("fewer steps than one for each token:", figures.steps < figures.tokens)

# %% [markdown]
# Every adapter was asked for once, so every one had to be read once. Real traffic is kinder: few customers are popular and many are rare. Draw 80 requests so that the first customer is asked for most, the second half as
# often, the third a third, and so on (Zipf's law). How often is the disk read when host memory keeps none, and when it keeps 64?

# %% tags=["nbval-ignore-output"]
import random

weights = [1 / (i + 1) for i in range(235)]
wanted = random.Random(0).choices([f"customer-{i:03d}" for i in range(235)], weights, k=80)
reads = {}
for kept in (0, 64):
    with ln.AdapterServer(model, tokenizer, device_slots=4, host_slots=kept, folder="adapters/many", max_batch=4) as server:
        tickets = [server.submit("The garden was", adapter=name, max_new_tokens=2) for name in wanted]
        for ticket in tqdm(tickets, f"{kept} in host memory"):
            ticket.result(timeout=120)
        reads[kept] = sum(server.figures().loads.values())
print(reads)

# %% [markdown]
# The numbers depend a little on who came when. What does not:

# %%
print("requests:", len(wanted), " different adapters among them:", len(set(wanted)))
print("with 64 in host memory the disk is read less often:", reads[64] < reads[0])
print("and once for each adapter at least:", reads[64] >= len(set(wanted)))

# %% [markdown]
# {{exercise 09.4}}
#
# Count such reads yourself. `requests` is a list of names, in order; memory holds `slots` of them, empty at first. A name that is not there is read, and if memory is full the one that was *used* longest ago makes room.

# %%
def reads_from_disk(requests, slots):
    ### BEGIN SOLUTION
    memory, reads = [], 0  # the one used longest ago first
    for name in requests:
        if name in memory:
            memory.remove(name)
        else:
            reads += 1
            memory = memory[1:] if len(memory) == slots else memory
        memory.append(name)
    return reads
    ### END SOLUTION


# %%
ln.check("09.4", reads_from_disk)

# %% [markdown]
# Would that work for a large model? A much-quoted article tells of a company that serves 237 adapters on one model of seventy billion parameters (notebook 11 examines it). We have no such machine here; the bytes can be worked out from the shape.

# %%
parts = ln.estimate("meta-llama/Llama-2-70b-hf", ln.LoraConfig(r=16), dtype="bfloat16").parts
base_gb, adapter_gb = parts["weights"] / 1e9, parts["adapters"] / 2 / 1e9
print(f"a base:          {base_gb:8.1f} GB")
print(f"237 models:      {237 * base_gb:8.1f} GB")
print(f"237 adapters:    {237 * adapter_gb:8.1f} GB on disk or in host memory")
print(f"8 of them:       {8 * adapter_gb:8.1f} GB in slots, {8 * adapter_gb / base_gb:.1%} of the base")

# %% [markdown]
# So the claim is plausible as far as memory goes: the base on two or three large GPUs, the adapters in the host's memory, a few in slots. What it says about speed at that size is not measured here.
#
# ## 6. Train one while the others are served
#
# Training and serving do the same thing to the base: they read its frozen weights. So rows that train can ride along in the forward that serves (FlexLLM, arXiv:2402.18789). Each row sees only itself; the *loss* of the
# training rows goes backward into their adapter, and nowhere else. This is the code:

# %%
ln.show("Beside.learn")

# %% [markdown]
# We ask for two texts first, then start the training of a French adapter and ask for the same texts again while it runs. Do the texts change?

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
ln.attach(model, LORA, "tone-fr")
french = ln.dataset("tone").language("fr")
lessons = ln.TrainConfig(max_steps=24, batch_size=4, seq_len=48, learning_rate=5e-3, warmup_steps=2)
with ln.AdapterServer(model, tokenizer, folder="adapters/many") as server:
    before = server.generate(prompts[:2], ["tone", "topics"], max_new_tokens=20)
    training = server.train("tone-fr", french, lessons, rows_at_once=2)
    meanwhile = server.generate(prompts[:2], ["tone", "topics"], max_new_tokens=20)
    served_at_step = training.run.steps
    with tqdm(total=24, desc="training beside") as bar:
        while not training.stopped.wait(0.2):
            bar.update(training.run.steps - bar.n)
    run = training.result()

# %% [markdown]
# Look at the texts, at when they came, and at what the training did meanwhile.

# %%
print("the same texts while another adapter trains:", meanwhile == before)
print("they came before the training was over:     ", served_at_step < run.steps)
print("steps of training:", run.steps)
print("the loss fell:    ", sum(run.losses[-4:]) < sum(run.losses[:4]))

# %% [markdown]
# Served texts do not change by a row that trains beside them, and the training ends as it would have ended alone (the package's tests hold both to that). What changes is the time: a token waits for the training rows of its
# forward. `rows_at_once` sets how many those are; fewer make better neighbours.
#
# Last, tidy up: this removes the 237 folders.

# %%
ln.detach(model)
for folder in ("adapters/many", "adapters/small"):
    shutil.rmtree(folder)
print("removed")

# %% [markdown]
# ## Three things to remember
#
# 1. A base is stored, loaded and read once; each adapter adds little, and the less, the larger the model is.
# 2. In a mixed batch $W x$ is computed once for all rows; only the thin products differ. A forward for each adapter is what to avoid.
# 3. A server is a line of requests, places that are filled at once, and tiers for what is not needed now. Training can ride along.
#
# **To read on:** Chen et al., *Punica: Multi-Tenant LoRA Serving*, arXiv:2310.18547. Sheng et al., *S-LoRA: Serving Thousands of Concurrent LoRA Adapters*, arXiv:2311.03285. Oliaro et al., *FlexLLM*, arXiv:2402.18789.
# Sheng et al., *Fairness in Serving Large Language Models*, arXiv:2401.00588, for the line that is fair. Yu et al., *Orca*, OSDI 2022, for continuous batching. In the package: `lora_nb/layers/ways.py`, `lora_nb/tiers.py`, `lora_nb/beside.py`.
