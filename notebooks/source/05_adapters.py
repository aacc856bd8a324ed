# %% [markdown]
# # Bottleneck adapters: small networks between the layers
#
# {{badges}}
#
# **What this teaches:** the adapters that came before LoRA (Houlsby), their two best-known descendants (Pfeiffer, parallel), where each stands in a transformer's block and what it looks at, why they start as
# nothing, what stacking them means, and the files in which AdapterHub passes them on.
#
# **What you will have at the end:** an adapter of your own making, three trained ones beside a LoRA of like size, and a file that AdapterHub's library reads.
#
# **Time:** about one minute of computing on two processor cores, and three quarters of an hour for the reader. On a GPU: not measured. **Needs:** nothing but this package; no download.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %%
import torch
from torch import nn

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"

# %% [markdown]
# The base, and what it makes of a sentence: its *logits*, a number for every word piece that could come next. We keep them, to see later what an adapter has changed.

# %%
model, tokenizer = ln.load(BASE)
ids = tokenizer("The old man opened the door and", return_tensors="pt").input_ids
with torch.no_grad():
    base_logits = model(ids).logits

# %% [markdown]
# ## 1. The block, and where something can be added
#
# A transformer is a stack of equal *blocks*. Through all of them runs the *residual stream* $R$: one vector for each token, here of 256 numbers, its *width*. A block has two *sublayers*: attention lets tokens look at each
# other, the MLP works on each token alone. Each reads the stream (through a *norm*, which brings the vector to a standard length) and adds its output $x$ to it:
#
# ```
# R ──┬── norm ── attention ── x ──(+)──┬── norm ── MLP ── x ──(+)── R of the next block
#     └─────────────────────────────────┘└──────────────────────┘
# ```
#
# LoRA adds a product of two thin matrices to the weights *inside* the sublayers. A bottleneck adapter leaves those alone and stands *at their exit*: it is a network of its own, which changes what is added to the stream.
#
# ## 2. The network
#
# Down to a few numbers, a non-linear function $f$, up again, and everything is added to what came in: $x + U f(D x + d) + u$. The narrow middle gives it its name, and the ratio of the stream's width to the middle
# is the *reduction factor*. This is the package's own code for what is added:

# %%
from lora_nb.layers.bottleneck import Bottleneck

ln.show(Bottleneck.update)

# %% [markdown]
# {{exercise 05.1}}
#
# Build it: a class `MyAdapter(width, size)` with two linear layers and their biases. Before it is trained it must give back *exactly* what goes in, and it must be able to learn.

# %%
class MyAdapter(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        ### BEGIN SOLUTION
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return x + self.up(torch.relu(self.down(x)))
        ### END SOLUTION


# %%
ln.check("05.1", MyAdapter)

# %% [markdown]
# ## 3. Three kinds: what the adapter looks at
#
# The network is the same; the kinds differ in its input $h$ and its place. The papers' names and AdapterHub's:
#
# | kind | stands | looks at | AdapterHub | paper |
# | --- | --- | --- | --- | --- |
# | Houlsby | after attention and after the MLP | the sublayer's output, $h = x$ | `double_seq_bn` | arXiv:1902.00751 |
# | Pfeiffer | after the MLP | the stream with the output in it, $h = x + R$ | `seq_bn` | arXiv:2005.00247 |
# | parallel | beside the MLP | what the MLP reads, $h = R$ | `par_bn` | arXiv:2110.04366 |
#
# In the package that is one function:

# %%
ln.show(Bottleneck.look)

# %% [markdown]
# `tap` is how the adapter sees the stream: it keeps what a module in front of the sublayer was called with. Attach each kind to the base and count. Expect Houlsby to have twice as many modules as Pfeiffer, and the parallel
# one, whose reduction factor is 2 instead of 16, to be the largest by far.

# %%
KINDS = {
    "Houlsby": ln.BottleneckConfig.houlsby(),
    "Pfeiffer": ln.BottleneckConfig.pfeiffer(),
    "parallel": ln.BottleneckConfig.parallel(),
}
for name, config in KINDS.items():
    report = ln.attach(model, config, name)
    print(f"{name:9} {len(report.matched):2} modules, bottleneck {256 // config.reduction_factor:3}, {report.trainable:>7,} parameters")

# %% [markdown]
# {{exercise 05.2}}
#
# The base has 6 blocks and a stream of 256 numbers. How many numbers would Houlsby's adapters have with a reduction factor of 8? Work it out first; `attach` under another name tells whether you are right.

# %%
houlsby_8 = 6 * 2 * (2 * 256 * 32 + 32 + 256)  ### SOLUTION

# %%
ln.check("05.2", houlsby_8)

# %% [markdown]
# ## 4. They start as nothing
#
# With $U$ and $u$ at zero the update is zero, whatever $D$ is, and the model must give exactly the base's output. AdapterHub's own start, `"bert"`, makes all matrices small random numbers instead: near the base, but not it.

# %%
with torch.no_grad():
    for name in KINDS:
        ln.set_active(model, name)
        print(f"{name:9} changes the output by {(model(ids).logits - base_logits).abs().max().item():.1f}")
    ln.attach(model, ln.BottleneckConfig.pfeiffer(init_weights="bert"), "near")
    print("with init_weights='bert' the output changes:", not torch.equal(model(ids).logits, base_logits))
ln.detach(model, "near")

# %% [markdown]
# Why not zero both matrices? Since $\partial L / \partial D$ has $U$ as a factor and $\partial L / \partial U$ has $f(D h)$: one of them must be there for the other to move. In the first step only $U$ and its bias learn;
# it is the same story as with LoRA's $B$ and $A$. See it in the gradients.

# %%
ln.set_active(model, "Houlsby")
model(input_ids=ids, labels=ids).loss.backward()
moved = {"down": 0, "up": 0}
for name, p in ln.parameters(model).items():
    if name.endswith("weight"):
        moved["down" if ".down." in name else "up"] += bool(p.grad.any())
model.zero_grad()
print("matrices with a gradient in the first step:", moved)

# %% [markdown]
# ## 5. Three kinds and a LoRA, trained alike
#
# The tone task of the first notebook: formal English sentences into informal ones, judged on sentences that were not trained on. The *loss* is the mean surprise at each right token, lower is better. Each method gets the same 40 steps over the same pairs. Rank and reduction factors are chosen so that
# all four have about as many parameters: Houlsby has two adapters a block, so its bottlenecks are half as wide.

# %% tags=["nbval-ignore-output"]
train, test = ln.dataset("tone", "train").language("en"), ln.dataset("tone", "test").language("en")
ln.detach(model)
METHODS = {
    "Houlsby": ln.BottleneckConfig.houlsby(reduction_factor=16),
    "Pfeiffer": ln.BottleneckConfig.pfeiffer(reduction_factor=8),
    "parallel": ln.BottleneckConfig.parallel(reduction_factor=8),
    "LoRA": ln.LoraConfig(r=4, lora_alpha=8),
}
before = ln.evaluate(model, tokenizer, test, seq_len=64)

# %%
print(f"the base: loss {before.loss:.2f}, {100 * before.token_accuracy:.0f} % of the tokens right")

# %% tags=["nbval-ignore-output"]
after, sizes = {}, {}
for name, config in METHODS.items():
    torch.manual_seed(0)
    sizes[name] = ln.attach(model, config, name).trainable
    ln.train(model, tokenizer, train, ln.TrainConfig(max_steps=40, batch_size=8, seq_len=64, learning_rate=5e-3))
    after[name] = ln.evaluate(model, tokenizer, test, seq_len=64)
    print(f"{name:9} {sizes[name]:>7,} parameters, loss {after[name].loss:.2f}, {100 * after[name].token_accuracy:.0f} % of the tokens right")

# %%
print("parameters:", sizes)
print("all four are far below the base's loss:   ", all(e.loss < 0.8 * before.loss for e in after.values()))
print("all four get 10 points more tokens right: ", all(e.token_accuracy > before.token_accuracy + 0.1 for e in after.values()))

# %% [markdown]
# All of them learn the task. Do not read a ranking out of one seed and one learning rate: notebook `11` compares methods with three seeds and a tuned rate for each. What this cell shows is that a
# network at the exits of the sublayers learns as willingly as an update inside them.
#
# ## 6. What a bottleneck cannot do
#
# LoRA's update is a matrix, so it can be added to the weight, and then costs nothing at inference. A bottleneck has a non-linearity in it; no matrix does the same. The package says so rather than approximating:

# %%
from lora_nb.errors import AdapterError

ln.set_active(model, "Pfeiffer")
try:
    ln.merge(model)
except AdapterError as error:
    print(error)

# %% [markdown]
# So a bottleneck adapter stays a layer of its own, two small products one after the other at each place, which the processor cannot do side by side with the large ones they follow. What that costs, by
# batch and length, is measured in notebook `08`.
#
# ## 7. Two at once: stacking and order
#
# A second adapter for another skill: a label for a short note (finance, health or law). Then both are made active. The second one *reads what the first has written*, and a bottleneck is not linear, so the order should matter.

# %% [markdown]
# {{exercise 05.3}}
#
# `first` and `second` are the updates $\Delta$ of two adapters as functions. What comes out when both act on $x$, the first one before the second?

# %%
def stacked(x, first, second):
    ### BEGIN SOLUTION
    h = x + first(x)
    return h + second(h)
    ### END SOLUTION


# %%
ln.check("05.3", stacked)

# %% tags=["nbval-ignore-output"]
topics = ln.dataset("topics", "train").language("en")
torch.manual_seed(1)
runs = {}
for kind in ("Pfeiffer", "LoRA"):
    ln.attach(model, METHODS[kind], f"{kind} topics")
    runs[kind] = ln.train(model, tokenizer, topics, ln.TrainConfig(max_steps=20, batch_size=8, seq_len=64, learning_rate=5e-3))

# %%
for kind, run in runs.items():
    print(f"{kind} topics: {run.steps} steps, the loss fell to less than half: {run.losses[-1] < run.losses[0] / 2}")

# %%
def logits(*names):
    ln.set_active(model, names)
    with torch.no_grad():
        return model(ids).logits


change = {}
for kind in ("LoRA", "Pfeiffer"):
    there, back = logits(kind, f"{kind} topics"), logits(f"{kind} topics", kind)
    change[kind] = ((there - back).norm() / (there - base_logits).norm()).item()
print("LoRA: the order changes nothing but rounding:          ", change["LoRA"] < 1e-4)
print("Pfeiffer: it changes more than a hundredth of the effect:", change["Pfeiffer"] > 0.01)

# %% tags=["nbval-ignore-output"]
print("change by order, as a share of what both adapters do:", {kind: f"{c:.1e}" for kind, c in change.items()})

# %% [markdown]
# LoRA's updates are added to the same weight, and a sum has no order. Stacked bottlenecks are a composition, $\Delta_2$ after $\Delta_1$. How well do they get along? Each was trained without the other: measure both
# tasks with one, the other, and the stack in both orders.

# %% tags=["nbval-ignore-output"]
topics_test = ln.dataset("topics", "test").language("en")[:60]
for names in (["Pfeiffer"], ["Pfeiffer topics"], ["Pfeiffer", "Pfeiffer topics"], ["Pfeiffer topics", "Pfeiffer"]):
    ln.set_active(model, names)
    tone_loss = ln.evaluate(model, tokenizer, test[:100], seq_len=64).loss
    topics_loss = ln.evaluate(model, tokenizer, topics_test, seq_len=64).loss
    print(f"{' then '.join(names):34} tone {tone_loss:.2f}   topics {topics_loss:.2f}")

# %% [markdown]
# The topics adapter has its way in both orders: it makes the model answer with one of three words, whatever is asked, and the skill of tone drowns. Adapters that never met in training are no team.
# Those that shall be stacked are trained stacked: MAD-X (arXiv:2005.00052) puts a task's adapter on a language's, which is
# frozen and already there. What else can be made out of several adapters is the matter of notebook `10`.
#
# ## 8. AdapterHub's files
#
# LoRA adapters are saved in the format of Hugging Face PEFT, which knows no bottlenecks. These have a home of their own, AdapterHub, whose library `adapters` writes two files, settings and weights. `save` writes the same two, and a card for readers:

# %%
folder = ln.save(model, "adapters/pfeiffer-tone", "Pfeiffer")
print(sorted(path.name for path in folder.iterdir()))
summary = ln.inspect(folder)
print(f"{len(summary.modules)} modules, {summary.bytes / 1e6:.2f} MB, base {summary.base!r}, warnings: {summary.warnings}")

# %% [markdown]
# The settings carry AdapterHub's names, most of which have a twin in `BottleneckConfig`. In the weights' names the adapter's own name stands in the middle, behind the path of the block.

# %%
import json

from safetensors import safe_open

settings = json.loads((folder / "adapter_config.json").read_text())["config"]
print({key: settings[key] for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel")})
with safe_open(folder / "adapter.safetensors", "pt") as file:
    for key in sorted(file.keys())[:4]:
        print(key, file.get_slice(key).get_shape())

# %% [markdown]
# Back on a fresh copy of the base it must be the same adapter, to the bit. And since a file may be damaged or belong elsewhere, it is checked before the model is touched: here it is offered to a model with other weights.

# %%
fresh, _ = ln.load(BASE)
ln.load_adapter(fresh, folder)
with torch.no_grad():
    print("the same output, bit for bit:", torch.equal(fresh(ids).logits, logits("Pfeiffer")))

other, _ = ln.load(BASE)
next(other.parameters()).data += 0.1
try:
    ln.load_adapter(other, folder)
except ln.errors.AdapterFileError as error:
    print("refused:", "another base" in str(error))

# %% [markdown]
# Does AdapterHub's own library agree? It wants another version of transformers than this course, so it cannot run here; the package's tests hold files that it has written for seven architectures, read them to the same
# outputs and write them to the same bytes (source: `tests/interop/test_adapterhub.py`).
#
# ## Three things to remember
#
# 1. A bottleneck adapter is a small non-linear network at the exit of a sublayer. The kinds differ in what it looks at: the output, the stream, or what the sublayer reads.
# 2. It starts as the identity because its second matrix is zero, and it can never be merged.
# 3. LoRA's updates add up in any order; stacked bottlenecks are composed, and their order counts.
#
# **To read on:** Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, arXiv:1902.00751. Pfeiffer et al., *AdapterFusion*, arXiv:2005.00247, and *MAD-X*, arXiv:2005.00052. He et al., *Towards a
# Unified View of Parameter-Efficient Transfer Learning*, arXiv:2110.04366. Poth et al., *Adapters*, arXiv:2311.11077, for AdapterHub's library.
