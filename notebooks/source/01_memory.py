# %% [markdown]
# # Memory: where the bytes go
#
# {{badges}}
#
# **What you will have at the end:** a formula for the memory of a training step, derived term by term and held against a step that this machine measures; and a table that says
# which model fits which graphics card, and with which method.
#
# **Time:** under a minute to run on two processor cores, an hour with the exercises. On a GPU: not measured; nothing here needs one. **Needs:** nothing but this package; no download.
#
# A *graphics card* (GPU) computes fast and has little memory, so "does it fit?" is the first question of every training. Most answers are rules of thumb. Here is a count.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# The embedded model is small enough to be measured in seconds. It is loaded into the processor's memory, where every byte can be followed.

# %%
# %matplotlib inline
import torch
import torch.nn.functional as F

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id
model, tokenizer = ln.load(BASE, device="cpu")  # what is measured below are bytes of the processor's memory
vocabulary, width = model.get_input_embeddings().weight.shape
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocabulary:,} tokens, width {width}")

# %% [markdown]
# ## 1. Weights
#
# A *parameter* is one number that training sets; a model is its parameters and a fixed recipe that uses them. A number in 32 bits takes 4 bytes, in 16 bits 2, in 4 bits half a
# byte. So the first term is a product: parameters times bytes. Where are the parameters? Each block of the model has the same matrices: four for *attention* (how tokens look at
# each other), three for the *MLP* (what is made of each token by itself), and outside the blocks stands the *embedding*, one row of numbers for each token of the vocabulary.

# %%
counts = {"embedding": 0, "attention": 0, "MLP": 0, "norms": 0}
for name, p in model.named_parameters():
    kind = "norms" if p.ndim == 1 else "attention" if "attn" in name else "MLP" if "mlp" in name else "embedding"
    counts[kind] += p.numel()
for kind, count in counts.items():
    print(f"{kind:10} {count:10,} parameters {4 * count / 2**20:6.2f} MiB in 32 bits")

# %% [markdown]
# A *MiB* is 2²⁰ bytes, a *GiB* 2³⁰. In so small a model the embedding is a large part; in large ones the matrices of the blocks are nearly all. `ln.estimate` counts the same from the model's
# *shape* alone, its widths and numbers of layers, so it can answer for a model that is not here. In which formats does a model of 7 billion parameters fit a card of 24 GiB?

# %%
LLAMA = "meta-llama/Llama-2-7b-hf"  # only its shape is needed: no download
for dtype, quant in (("float32", None), ("bfloat16", None), ("bfloat16", "bnb-int8"), ("bfloat16", "nf4")):
    weights = ln.estimate(LLAMA, dtype=dtype, quant=quant).parts["weights"]
    print(f"{quant or dtype:9} {weights / 2**30:6.2f} GiB")
print("the tiny model, counted and there:", ln.estimate(model).parts["weights"] == sum(p.nbytes for p in model.parameters()))

# %% [markdown]
# The last two lines are *quantized*: each weight of a linear layer is rounded to one of 256 or 16 levels (notebook 06). Embedding and output head stay in 16 bits, so four bits are a little more than a quarter of sixteen.
#
# {{exercise 01.1}}
#
# Write the count yourself, for a model of the Llama family: `vocabulary`, `width` (h), `inner` (f, the MLP's width), `layers`, and how wide all key heads are together (`keys`).
# In each block $W_q$ and $W_o$ are h × h, $W_k$ and $W_v$ keys × h, the MLP has three matrices of f × h, and two norms have h numbers each. There is one more norm at the end; embedding and output head have a matrix each.

# %%
def parameters_of(vocabulary, width, inner, layers, keys):
    """How many parameters a Llama has."""
    ### BEGIN SOLUTION
    block = 2 * width * width + 2 * keys * width + 3 * inner * width + 2 * width
    return 2 * vocabulary * width + layers * block + width
    ### END SOLUTION

# %%
ln.check("01.1", parameters_of)

# %% [markdown]
# ## 2. Gradients and the optimizer
#
# Training asks of each number in which direction the loss falls: its *gradient*, as large as the number itself. The usual *optimizer*, AdamW, keeps two more for each: a running mean of the gradient
# and one of its square, which together say how large a step is safe. Let one step happen to a single matrix, and count what is there.

# %%
W = torch.nn.Parameter(torch.randn(512, 512))
optimizer = torch.optim.AdamW([W])
(W @ torch.randn(512, 8)).square().mean().backward()
optimizer.step()
moments = sum(t.nbytes for t in optimizer.state[W].values() if t.ndim)
print(f"weight {W.nbytes:,} bytes, gradient {W.grad.nbytes:,}, moments {moments:,}: {(W.nbytes + W.grad.nbytes + moments) // W.numel()} bytes a number")

# %% [markdown]
# Four times four bytes for each number that trains. That is why *full fine-tuning*, where all train, is dear, and what LoRA saves first: the base stays frozen, without gradient and moments, and
# only the adapter has all four. The next cell compares the two on the model that is loaded; look at the rows *gradients* and *optimizer*.

# %%
lora = ln.LoraConfig(r=8, lora_alpha=16)
size = {"batch_size": 4, "seq_len": 256}  # texts at once, and tokens of each
for name, config in {"full": "full", "LoRA": lora}.items():
    moment = dict(ln.estimate(model, config, **size).timeline)["optimizer"]  # when the optimizer steps
    print(f"{name:5}", ", ".join(f"{part} {count / 2**20:.2f} MiB" for part, count in moment.items()))

# %% [markdown]
# {{exercise 01.2}}
#
# Full fine-tuning of a model of 7 billion parameters in 32 bits: how many **GiB** do weights, gradients and AdamW's moments take together, before a single text is read? A number or an expression.

# %%
gib_before_any_text = 7e9 * 16 / 2**30  ### SOLUTION

# %%
ln.check("01.2", gib_before_any_text)

# %% [markdown]
# ## 3. Activations
#
# What the layers compute on the way forward are *activations*. The way back needs some of them again: autograd, the part of PyTorch that finds gradients, keeps of each operation
# what its derivative needs. We can listen while it does. The function below adds up what is kept, leaving out the weights, which are there anyway.

# %%
def kept(function, *inputs, weights=()):
    """Bytes that autograd keeps of `function(*inputs)` for the way back, each storage once."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    found = {}

    def note(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = function(*inputs)  # noqa: F841 - what is kept lives as long as the result
    return sum(count for place, count in found.items() if place not in known)

# %% [markdown]
# Four operations on 512 tokens of width 256, in units of the input's own size. Which of them need their input for the gradient, and which do not?

# %%
x = torch.randn(512, 256, requires_grad=True)
trained, frozen = torch.nn.Linear(256, 256, bias=False), torch.nn.Linear(256, 256, bias=False).requires_grad_(False)
for name, layer in {"linear layer that trains": trained, "frozen linear layer": frozen}.items():
    print(f"{name:25} keeps {kept(layer, x, weights=layer.parameters()) / x.nbytes:.0f} × its input")
print(f"{'SiLU, x · sigmoid(x)':25} keeps {kept(F.silu, x) / x.nbytes:.0f} × its input")
print(f"{'product of two':25} keeps {kept(torch.mul, x, torch.randn_like(x).requires_grad_()) / x.nbytes:.0f} × its input")

# %% [markdown]
# The gradient of $y = Wx$ with respect to $W$ is made from $x$, so a layer that trains keeps its input. The gradient with respect to $x$ is made from $W$ alone: **a frozen layer keeps nothing**. This is LoRA's second saving,
# and the one that most calculators miss. The estimator applies such rules to a whole block, operation by operation; here they are, as the package has them.

# %%
import lora_nb.memory.block

print(lora_nb.memory.block.__doc__)

# %% [markdown]
# Adding them up over a block gives so many bytes for each token, as a multiple of the width h, the MLP's width f and the widths of queries (q) and keys (k). Compare the two lines: what falls away when the base is frozen
# and only the projections of queries and values have adapters?

# %%
qv = ln.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
for name, config in {"full fine-tuning": "full", "LoRA on q and v": qv, "LoRA on every linear": ln.LoraConfig(r=8)}.items():
    found = ln.estimate(LLAMA, config, batch_size=1, seq_len=1024, precision="fp32")  # no autocast: all in the weights' 16 bits
    per_token = found.formula["activations"].split("(", 1)[1].split(" bytes")[0].rstrip(")")
    print(f"{name}\n    {per_token}")

# %% [markdown]
# Is it true of code that runs? The count below lets the tiny model read 4 × 24 tokens with every weight trained, listens to autograd, and holds the sum against the formula. It is exact but for
# what does not grow with the model: positions and masks.

# %%
few = {"batch_size": 4, "seq_len": 24}
ids = torch.arange(96).view(4, 24) % vocabulary
model.train()
heard = kept(lambda: model.base_model(ids, use_cache=False), weights=model.parameters())
said = dict(ln.estimate(model, "full", **few).timeline)["loss"]["activations"]
print(f"heard {heard:,} bytes, said {said:,}: within one per cent: {abs(said / heard - 1) < 0.01}")

# %% [markdown]
# ## 4. Logits
#
# At the end the model gives a score, a *logit*, for every token of the vocabulary at every place of the text. That is tokens × vocabulary numbers, and the loss needs them in 32 bits and several times over: the scores,
# their probabilities, and the gradient. Vocabularies have grown; let us see how much this is for one text.

# %%
from lora_nb.memory.estimate import shape_of

for name in (LLAMA, "meta-llama/Llama-3.1-8B", "google/gemma-2-9b"):
    whole = ln.estimate(name, lora, seq_len=4096, loss="full", gradient_checkpointing=True)
    chunks = ln.estimate(name, lora, seq_len=4096, loss="chunked", gradient_checkpointing=True)
    logits = [dict(e.timeline)["loss"]["logits"] / 2**30 for e in (whole, chunks)]
    print(f"{name:26} vocabulary {shape_of(name).vocabulary:,}: all at once {logits[0]:5.2f} GiB, in chunks {logits[1]:.2f} GiB")

# %% [markdown]
# Nothing in the mathematics asks for all of them at once: the loss is a sum over places. The package's loop makes the scores of some places, turns them into their gradient, and drops them before the next (*chunked
# cross-entropy*, notebook 03). So this term does not grow with the text.
#
# {{exercise 01.3}}
#
# One text of 4,096 tokens, a vocabulary of 128,256 (Llama 3): how many bytes does *one* copy of all its logits take in 32 bits?

# %%
bytes_of_the_logits = 4096 * 128_256 * 4  ### SOLUTION

# %%
ln.check("01.3", bytes_of_the_logits)

# %% [markdown]
# ## 5. Held against a step
#
# The formula is only worth what a measurement says of it. On a GPU one asks `torch.cuda.max_memory_allocated()`. On a processor PyTorch's profiler records each allocation and each release, and their running
# sum at its highest is the same thing. This is the instrument:

# %%
from lora_nb.memory.measured import rise

ln.show(rise)

# %% [markdown]
# A step of the public loop, `ln.steps`, is measured: the second one, since AdamW's moments come into being in the first. What is there before it is known from the tensors' sizes.

# %%
text = ln.dataset([" ".join(pair.prompt for pair in ln.dataset("tone"))])  # rows that are all full

def measured(model, **settings):
    """Bytes at the highest moment of a training step."""
    turns = ln.steps(model, tokenizer, text, ln.TrainConfig(max_steps=2, **size, **settings))
    next(turns)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + 2 * trained
    return there + rise(lambda: next(turns))

# %% [markdown]
# Three kinds of step: LoRA; LoRA with *checkpointing*, which keeps only each block's input and computes the block again on the way back; and full fine-tuning. The estimate was made without running anything.

# %% tags=["nbval-ignore-output"]
kinds = {"LoRA": (lora, {}), "LoRA, checkpointing": (lora, {"gradient_checkpointing": True}), "full": ("full", {})}
estimated, seen = {}, {}
for name, (config, settings) in kinds.items():
    fresh, _ = ln.load(BASE, device="cpu")
    estimated[name] = ln.estimate(fresh, config, **size, **settings)
    if config != "full":
        ln.attach(fresh, config)
    seen[name] = measured(fresh, **settings)
    print(f"{name:20} estimated {estimated[name].total / 2**20:6.1f} MiB, measured {seen[name] / 2**20:6.1f} MiB")

# %%
for name, estimate in estimated.items():
    print(f"{name:20} within 5 %: {abs(estimate.total / seen[name] - 1) < 0.05}")

# %% [markdown]
# The same as a picture: each bar is an estimate, divided by part at the moment when most is there; the cross is what was measured.

# %%
from lora_nb import plots

figure = plots.memory_bars(estimated)
figure.axes[0].plot([seen[name] / 2**30 for name in estimated], [i + 0.3 for i in range(len(seen))], "kx", markersize=9)
figure.axes[0].set_title("one step of the tiny model, 4 × 256 tokens: estimated, and measured (×)", loc="left", fontsize="medium")
figure

# %% [markdown]
# Activations are the largest part, until checkpointing takes most of them away and the logits lead. In the full step AdamW's moments come on top; the gradients do not show, since at the moment of the peak there are none yet.
# What helps depends on which part is large: look before you turn a knob.
#
# ## 6. Over the step
#
# When is the peak? `ln.trace_memory` runs the model's own code on tensors that have a shape and no content, so it takes seconds, whatever the size, and needs no memory to speak of. It notes what comes and goes, and so finds the
# same peak in another way. Watch the height of the activations: they grow while the text goes forward, and shrink on the way back.

# %%
traced = ln.trace_memory(model, lora, **size)
figure = plots.memory_course(traced)
figure.axes[0].set_title("LoRA on the tiny model, 4 × 256 tokens: what is there, moment by moment", loc="left", fontsize="medium")
figure

# %%
print(f"peak: traced {traced.total / 2**20:.1f} MiB, formula {estimated['LoRA'].total / 2**20:.1f} MiB")
print("traced within 5 % of the measured:", abs(traced.total / seen["LoRA"] - 1) < 0.05)

# %% [markdown]
# ## 7. Which card fits what
#
# Now to sizes that matter. Four ways to train a model of 7 billion parameters on one text of 2,048 tokens at a time, in 16 bits, with what three cards hold as dotted lines.
# *QLoRA* is LoRA over a base in four bits.

# %%
one = {"batch_size": 1, "seq_len": 2048}
ways = {
    "full": ln.estimate(LLAMA, "full", **one),
    "LoRA r=16": ln.estimate(LLAMA, ln.LoraConfig(r=16), **one),
    "LoRA, checkpointing": ln.estimate(LLAMA, ln.LoraConfig(r=16), gradient_checkpointing=True, **one),
    "QLoRA, checkpointing": ln.estimate(LLAMA, ln.LoraConfig(r=16), quant="nf4", gradient_checkpointing=True, **one),
}
figure = plots.memory_bars(ways, ["RTX 3060", "RTX 4090", "A100 80GB"])
figure.axes[0].set_xlabel("GiB at the peak of a step of Llama-2-7B, 1 × 2,048 tokens, estimated")
figure

# %% [markdown]
# Each method takes one part away: LoRA the gradients and the moments, checkpointing the activations, four bits most of the weights. Only the last bar leaves room on the smallest of the three cards. Here it is in full, with its formulas and what they rest on.

# %%
ways["QLoRA, checkpointing"]

# %% [markdown]
# Is it right at that size, too? We have no such GPU here, but others have published what theirs said. litgpt lists 19.77 GB for LoRA of rank 32 on Llama-2-7B's queries and values, two texts of 512 tokens
# ([litgpt, config_hub/finetune](https://github.com/Lightning-AI/litgpt/tree/main/config_hub/finetune)). The estimator can count as litgpt's code does:

# %%
theirs = ln.LoraConfig(r=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
found = ln.estimate(LLAMA, theirs, framework="litgpt", batch_size=2, seq_len=512, gradient_accumulation_steps=8)
print(f"estimated {found.allocated / 1e9:.2f} GB, published 19.77 GB: {found.allocated / 19.77e9 - 1:+.1%}")

# %% [markdown]
# And the table that one wants: the smallest card that holds a step, by model and method, one text of 2,048 tokens, with checkpointing. A dash means that no single card of the package's list does.

# %%
from lora_nb.render import text_table

MODELS = ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B")
METHODS = {"full": ("full", None), "LoRA r=16": (ln.LoraConfig(r=16), None), "QLoRA r=16": (ln.LoraConfig(r=16), "nf4")}

def smallest(name, config, quant):
    cards = ln.estimate(name, config, quant=quant, gradient_checkpointing=True, **one).cards()
    return cards[0].name if cards else "–"

rows = [(name.split("/")[1], *(smallest(name, *method) for method in METHODS.values())) for name in MODELS]
print(text_table(["model", *METHODS], rows))

# %% [markdown]
# When something does not fit, `advice` says what to change, beginning with what leaves the result as it is. For example: 8 billion parameters, LoRA, eight texts of 2,048 tokens, on a card of 24 GiB.

# %%
wish = ln.estimate("meta-llama/Llama-3.1-8B", ln.LoraConfig(r=16), batch_size=8, seq_len=2048)
print(f"as wished: {wish.total / 2**30:.1f} GiB; fits an RTX 4090: {wish.fits('RTX 4090')}")
for change in wish.advice("RTX 4090"):
    print(f"{change.what}: {change.total / 2**30:.1f} GiB; the price: {change.price}")

# %% [markdown]
# {{exercise 01.4}}
#
# How long may a text be? Write `longest(card)`: the largest multiple of 256 tokens such that a QLoRA step of `"meta-llama/Llama-3.1-8B"` (rank 16, `quant="nf4"`, one text, checkpointing) still fits `card`.
# `estimate(…).fits(card)` answers for one length; try one after the other.

# %%
def longest(card):
    """Tokens of the longest text that a QLoRA step of Llama-3.1-8B can take on that card."""
    ### BEGIN SOLUTION
    step = {"quant": "nf4", "gradient_checkpointing": True}
    tokens = 0
    while ln.estimate("meta-llama/Llama-3.1-8B", ln.LoraConfig(r=16), seq_len=tokens + 256, **step).fits(card):
        tokens += 256
    return tokens
    ### END SOLUTION

# %%
ln.check("01.4", longest)

# %% [markdown]
# What the count leaves out, so that you are not surprised: memory inside of a single kernel, what the allocator loses by fragments (2 to 10 %, says each estimate; `fits` leaves room for it), other programs on the
# card, and a screen. When in doubt, take the next smaller setting, start, and read `run.memory`.
#
# ## Three things to remember
#
# 1. A step holds weights, gradients, two moments for each number that trains, activations and logits. LoRA does away with gradients and moments of the base, and with part of the activations; quantization shrinks the
#    weights; checkpointing the activations; chunks the logits.
# 2. A frozen layer keeps nothing for the way back.
# 3. Ask first: `ln.estimate("…", config)` needs a shape and no download, and says what to change.
#
# **To read on:** Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models*, arXiv:2205.05198, for activations counted by hand. Dettmers et al., *QLoRA*, arXiv:2305.14314, section 3. Chen et al.,
# *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174, for checkpointing. Kim et al., *LLMem*, arXiv:2404.10933, for an estimator of another kind.
