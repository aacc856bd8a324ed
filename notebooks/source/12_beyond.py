# %% [markdown]
# # Beyond this notebook: larger models, more machines, other people
#
# {{badges}}
#
# **What you will have at the end:** a plan for your own model: what it takes and which card holds it, how to train it on several GPUs and try many settings at once, how to hand the result to a serving engine, and what to look at
# before you publish it. Everything small enough runs here, on this machine; the rest is shown as commands, with what they need.
#
# **Time:** about a minute of computing on two processor cores, and some forty minutes with the exercises. On a GPU: not measured. **Needs:** nothing but this package. The commands need what stands beside
# them. Notebook 00 first; 01 and 03 help.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. Another base: one line
#
# Everything in this course was done on a base of 5.8 million parameters that comes with the package. A real one is a folder of the same kind: a `config.json` that names the architecture, weights in *safetensors* (numbers only, nothing that
# could run), and a tokenizer. The Hugging Face Hub is a library of such folders.

# %%
import torch

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = ln.load(BASE)
LORA = ln.LoraConfig(r=4, lora_alpha=16)
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# | you want | you need | you write |
# | --- | --- | --- |
# | a model from the Hub | a network, once; then it is in the cache | `ln.load("HuggingFaceTB/SmolLM2-135M")` |
# | one behind a licence, such as Llama | an account, the licence accepted on its page, `hf auth login` | `ln.load("meta-llama/Llama-3.1-8B", quant="nf4")` |
# | a model without network | the folder, copied from where there is one: `hf download NAME --local-dir FOLDER` | `ln.load("FOLDER")` |
# | a data set from the Hub | `pip install 'lora-nb[hub]'` | `ln.dataset("owner/name", "train")` |
#
# Another architecture needs nothing else. As a proof without network we write such a folder ourselves: a very small Mistral with random weights.

# %% tags=["nbval-ignore-output"]
from transformers import MistralConfig, MistralForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
torch.manual_seed(0)
MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("adapters/mistral")
tokenizer.save_pretrained("adapters/mistral")
other, its_tokenizer = ln.load("adapters/mistral")
report = ln.attach(other, LORA)
run = ln.train(other, its_tokenizer, ln.dataset("tone")[:64], ln.TrainConfig(max_steps=12, batch_size=8, seq_len=64, learning_rate=1e-2))

# %% [markdown]
# Which layers got an adapter, and did anything train? The names are Mistral's own; nobody told the package.

# %%
print(type(other).__name__, "adapted:", sorted({path.rsplit(".", 1)[-1] for path in report.matched}))
print(f"{report.trainable:,} of {report.total:,} numbers train")
print("the loss fell:", run.losses[-1] < run.losses[0])

# %% [markdown]
# ## 2. What will it take?
#
# Before you download sixteen gigabytes, ask. `ln.estimate` adds up a training step from the shape alone: *weights*, *gradients* and *optimizer* state of what trains, *activations* that the backward pass needs again, and the scores over the
# vocabulary, *logits* (notebook 01 derives each). Look at the total and at the line of cards.

# %%
ln.estimate("meta-llama/Llama-3.1-8B", LORA, batch_size=4, seq_len=512)

# %% [markdown]
# Too much for your card? `advice` says what to change, the harmless things first. Here for a consumer card of 24 GB:

# %%
plan = ln.estimate("meta-llama/Llama-3.1-8B", LORA, batch_size=8, seq_len=1024)
print(f"as it is: {plan.total / 2**30:5.1f} GiB, fits on an RTX 4090: {plan.fits('RTX 4090')}")
for change in plan.advice("RTX 4090"):
    print(f"          {change.total / 2**30:5.1f} GiB  {change.what}  {change.price}")

# %% [markdown]
# The three ways to train, side by side, on the same shape: every weight (*full*), LoRA over 16 bits, LoRA over 4 bits (*QLoRA*). What do you expect to shrink first, and what second?

# %%
from lora_nb import plots

setting = {"batch_size": 1, "seq_len": 512, "gradient_checkpointing": True}
ways = {
    "full": ln.estimate("meta-llama/Llama-3.1-8B", "full", **setting),
    "LoRA, 16 bits": ln.estimate("meta-llama/Llama-3.1-8B", LORA, **setting),
    "LoRA, 4 bits": ln.estimate("meta-llama/Llama-3.1-8B", LORA, quant="nf4", **setting),
}
for name, way in ways.items():
    print(f"{name:14} {way.total / 2**30:6.1f} GiB, smallest card of the table: {way.cards()[0].name if way.cards() else 'none'}")

# %% tags=["nbval-ignore-output"]
# %matplotlib inline
figure = plots.memory_bars(ways, cards=["RTX 4090", "H100 80GB"])
figure.suptitle("A training step of Llama 3.1 8B, 1 × 512 tokens, with gradient checkpointing", x=0.01, ha="left", fontsize="medium")
figure

# %% [markdown]
# Each bar is one way, each colour a part, each dotted line what a card holds. From *full* to LoRA, gradients and optimizer vanish, since hardly anything trains. From 16 to 4 bits it is the weights that shrink. The lines above the
# figure have the totals in numbers.
#
# {{exercise 12.1}}
#
# Write a function that picks, from a list of names, the largest model that trains on a card: rank 16, `quant="nf4"`, `gradient_checkpointing=True`, and everything else as `ln.estimate` has it. *Largest* means most weights. Return its name, or `"none"`.

# %%
def largest_that_trains(names, card):
    ### BEGIN SOLUTION
    def step(name):
        return ln.estimate(name, ln.LoraConfig(r=16), quant="nf4", gradient_checkpointing=True)

    there = [name for name in names if step(name).fits(card)]
    return max(there, key=lambda name: step(name).parts["weights"], default="none")
    ### END SOLUTION


# %%
ln.check("12.1", largest_that_trains)

# %% [markdown]
# ## 3. A real GPU
#
# Nothing in the code changes. What `lora_nb` decides by itself when it finds one, and what you decide:
#
# | by itself | yours to choose |
# | --- | --- |
# | the GPU is used, weights are loaded in bfloat16 | `quant="nf4"` when the weights do not fit |
# | products in bf16, or fp16 with a scaled loss on older cards (*precision*) | `batch_size`, the larger the better, as far as it fits |
# | adapters stay in 32 bits, since small updates vanish in 16 | `gradient_accumulation_steps` for the batches that do not fit at once |
# | the loss over the vocabulary in pieces | `gradient_checkpointing=True`: less memory, about a third more time |
# | | `optimizer="paged_adamw_8bit"`, when it is tight |
#
# How much each of them would save, before you have the card:

# %%
for change in plan.changes():
    print(f"{change.total / 2**30:6.1f} GiB  {change.what}")

# %% [markdown]
# Lines that begin with "and" add up: each keeps the changes of the "and" lines above it. One single change does not help here: the optimizer keeps two numbers for each that trains, and with LoRA these are few.
# Four bits take most of the weights away; but with this batch the activations, not the weights, are the largest part, and they stay as they are until the batch is smaller. A first run on a rented card might be these lines, in a file `train.py` (needs about what the estimate says, and the licence of the model):
#
# ```python
# import lora_nb as ln
#
# model, tokenizer = ln.load("meta-llama/Llama-3.1-8B", quant="nf4")
# ln.attach(model, ln.LoraConfig(r=16, lora_alpha=32))
# config = ln.TrainConfig(num_train_epochs=1, batch_size=8, gradient_checkpointing=True, checkpoint_dir="run", resume=True)
# run = ln.train(model, tokenizer, ln.dataset("mine.jsonl", "train"), config, eval_dataset=ln.dataset("mine.jsonl", "test"))
# ln.save(model, "adapters/mine")
# ```
#
# `resume=True` makes the same command go on where a rented machine was taken away.
#
# ## 4. Several GPUs
#
# The simplest way is *data parallelism*: every GPU has the whole model and takes a share of each batch; after the backward pass they add up their gradients, and all make the same step. What travels between them is the gradient of what trains.
# With LoRA that is little:

# %%
lora = ln.estimate("meta-llama/Llama-3.1-8B", ln.LoraConfig(r=16), dtype="bfloat16")
numbers, weights = lora.parts["adapters"] // 4, lora.parts["weights"] // 2
print(f"sent for a step, LoRA r=16: {numbers * 4 / 1e6:8,.0f} MB ({numbers:,} numbers of 4 bytes)")
print(f"sent for a step, full:      {weights * 4 / 1e6:8,.0f} MB ({weights:,} numbers)")

# %% [markdown]
# Two processors can play two GPUs. This is the whole program; `distributed.start()` finds the other processes, and `ln.train` does the rest. `torchrun` (here called as a module) starts it twice.

# %%
from pathlib import Path

program = '''
import torch, lora_nb as ln
from lora_nb.training import distributed
rank, count = distributed.start()
model, tokenizer = ln.load("tiny", device="cpu")
torch.manual_seed(0)
ln.attach(model, ln.LoraConfig(r=4, lora_alpha=16))
tell = lambda step: print(f"{count} processes, step {step.step}: {step.loss:.4f}", flush=True) if rank == 0 else None
ln.train(model, tokenizer, ln.dataset("tone")[:64], ln.TrainConfig(max_steps=4, batch_size=8, seq_len=64), callbacks=[tell])
'''
print(Path("adapters/two.py").write_text(program), "characters")

# %% [markdown]
# Starting two Pythons takes most of the time; a line appears for each step.

# %% tags=["nbval-ignore-output"]
import os
import subprocess
import sys

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "adapters/two.py"]
alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
with subprocess.Popen(torchrun, stdout=subprocess.PIPE, text=True, env=alone) as process:
    said = []
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line)
two = [float(line.split()[-1]) for line in said if "step" in line]

# %% [markdown]
# One process does the same, with the whole batch to itself. If the sum over the processes is right, the losses agree, step by step.

# %% tags=["nbval-ignore-output"]
model, tokenizer = ln.load("tiny", device="cpu")
torch.manual_seed(0)
ln.attach(model, LORA)
one = ln.train(model, tokenizer, ln.dataset("tone")[:64], ln.TrainConfig(max_steps=4, batch_size=8, seq_len=64))

# %%
print("steps:", len(two), "and", one.steps)
print("the same losses, to 0.001:", len(two) == one.steps and max(abs(a - b) for a, b in zip(two, one.losses, strict=True)) < 1e-3)

# %% [markdown]
# On a machine with four GPUs the commands are (each needs that machine; the program is the same, without `device="cpu"`):
#
# ```console
# torchrun --standalone --nproc-per-node=4 train.py
# accelerate launch --multi_gpu --num_processes 4 train.py          # pip install accelerate
# ```
#
# or, from a notebook, `accelerate.notebook_launcher(train, num_processes=4)` with a function. If the base does not fit on *one* of them, call `distributed.shard(model)` after `attach`: each then holds its share of every layer (FSDP2), and
# layers come together only while they are computed. This was tested with two processes on CPUs; on GPUs it is not measured.
#
# {{exercise 12.2}}
#
# A trap on the way. Each process computes the gradient of *its own mean* loss: `gradients` is a list of tensors, `tokens` says over how many tokens each mean was taken. Combine them to the gradient of the mean over *all* tokens.

# %%
def combined(gradients, tokens):
    ### BEGIN SOLUTION
    return sum(g * n for g, n in zip(gradients, tokens, strict=True)) / sum(tokens)
    ### END SOLUTION


# %%
ln.check("12.2", combined)

# %% [markdown]
# ## 5. Many settings at once
#
# Which rank, which learning rate? Notebook 04 finds the rank from one run. For everything else one tries: a *sweep* trains under every combination and compares losses on held-out data. `grid` writes the combinations out.

# %%
from lora_nb.training.sweep import grid, trial

for settings in grid({"r": [2, 8], "learning_rate": [1e-4, 5e-3]}):
    print(settings)

# %% [markdown]
# `trial` is one of them: a fresh base, an adapter, a training run, and its held-out loss. Two, with very few steps:

# %% tags=["nbval-ignore-output"]
pairs, held_out = ln.dataset("tone", "train")[:128], ln.dataset("tone", "test")[:32]
config = ln.TrainConfig(max_steps=10, batch_size=8, seq_len=64, warmup_steps=2)
found = {}
for settings in grid({"learning_rate": [1e-4, 5e-3]}):
    found[settings["learning_rate"]] = trial(settings, pairs, held_out, lora=LORA, config=config, loader=lambda: ln.load(BASE))
print(found)

# %%
print("the better rate of the two:", min(found, key=found.get))

# %% [markdown]
# One after another that takes as long as it takes. `sweep` runs the same trials side by side, each in a process of its own, on Ray Tune; with GPUs, a fraction lets several share one. It needs `pip install 'lora-nb[distributed]'`:
#
# ```python
# from lora_nb.training.sweep import sweep
#
# table = sweep({"r": [4, 16], "learning_rate": [1e-3, 5e-3]}, pairs, held_out, config=config, gpus_per_trial=0.5)
# table.best
# ```
#
# On several machines start Ray first (`ray start --head`, then `ray start --address=…` on the others) and call `ray.init("auto")` before `sweep`.
#
# ## 6. Serving engines
#
# vLLM, SGLang and LoRAX serve large models to many users, adapters included. They read the files that `ln.save` writes, since these are PEFT's, but not everything that PEFT can say. Take an adapter that uses some of it: ranks that differ by
# layer, and a scale that goes with the root of the rank.

# %%
torch.manual_seed(0)
model, tokenizer = ln.load(BASE)
ln.attach(model, ln.LoraConfig(r=12, lora_alpha=24, use_rslora=True, rank_pattern={"q_proj": 6}))
with torch.no_grad():
    for p in ln.parameters(model).values():
        p.normal_(std=0.05)  # as if trained
ln.save(model, "adapters/uneven")
for engine, whys in ln.inspect("adapters/uneven").engines.items():
    print(f"{engine:7} {'; '.join(whys) or 'takes it'}")

# %% [markdown]
# Some of this an engine would refuse, and some it would pass over in silence and serve *another* adapter than you trained. `ln.save_for_engines` writes the same function in plainer words: one rank for all, filled up with zeros, and
# every scale multiplied into $B$.

# %%
ln.save_for_engines("adapters/uneven", "adapters/plain")
plain = ln.inspect("adapters/plain")
for engine, whys in plain.engines.items():
    print(f"{engine:7} {'; '.join(whys) or 'takes it'}")
print("rank", plain.config.r, "with alpha", plain.config.lora_alpha, "so the scale is", plain.config.lora_alpha / plain.config.r)

# %% [markdown]
# Is it the same? The model must give the same logits with either.

# %%
ids = tokenizer("The old man opened the door and", return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    before = model(ids).logits
    ln.load_adapter(model, "adapters/plain", "plain")
    change = float((model(ids).logits - before).abs().max())
print("the same logits, to 1e-3:", change < 1e-3)

# %% [markdown]
# {{exercise 12.3}}
#
# Do it for one layer: `a` is (r, inputs), `b` (outputs, r); return a pair `(a2, b2)` of rank `rank` (not below r) such that `b2 @ a2` is `scale * b @ a`.

# %%
def plainly(a, b, scale, rank):
    ### BEGIN SOLUTION
    more = rank - len(a)
    a2 = torch.cat([a, a.new_zeros(more, a.shape[1])])
    b2 = torch.cat([b * scale, b.new_zeros(len(b), more)], dim=1)
    return a2, b2
    ### END SOLUTION


# %%
ln.check("12.3", plainly)

# %% [markdown]
# Then, on a machine with a GPU that holds the base (the estimate says which), and with the engine installed:
#
# ```console
# vllm serve meta-llama/Llama-3.1-8B --enable-lora --max-lora-rank 16 --lora-modules mine=adapters/plain
# python -m sglang.launch_server --model-path meta-llama/Llama-3.1-8B --enable-lora --lora-paths mine=adapters/plain
# lorax-launcher --model-id meta-llama/Llama-3.1-8B          # requests then name adapter_id=adapters/plain, adapter_source=local
# ```
#
# The first two answer OpenAI's requests, where `"model": "mine"` (vLLM) names the adapter. Their options change from version to version; their own pages are the reference:
# [vLLM](https://docs.vllm.ai/en/latest/features/lora.html), [SGLang](https://docs.sglang.io/advanced_features/lora.html), [LoRAX](https://github.com/predibase/lorax).
# The package has a small one, too: `lora-nb serve adapters/` (notebook 09 shows what is inside).
#
# ## 7. Publish an adapter
#
# An adapter is useless without its base, and a stranger must know which one. `ln.save` writes a *card*, the `README.md` of the folder, whose first lines the Hub reads.

# %%
torch.manual_seed(0)
model, tokenizer = ln.load(BASE)
ln.attach(model, LORA)
ln.save(model, "adapters/mine")
print(sorted(p.name for p in Path("adapters/mine").iterdir()))
print(Path("adapters/mine/README.md").read_text())

# %% [markdown]
# What to look at before anybody else does. The last line is False here, and rightly so: nobody can find a base called `tiny` on the Hub. Yours has a name such as `meta-llama/Llama-3.1-8B`.

# %%
summary = ln.inspect("adapters/mine")
print("warnings:                   ", summary.warnings)
print("no pickle that could run:   ", not list(Path("adapters/mine").glob("*.bin")))
print("the base has a fingerprint: ", summary.fingerprint is not None)
print("engines that refuse it:     ", [engine for engine, whys in summary.engines.items() if whys])
print("the base has a Hub id:      ", "/" in summary.base)

# %% [markdown]
# What no program sees, and what belongs on the card:
#
# - **Licences**: the base's (Llama's wants its name in yours) and that of your data.
# - **What it was trained on**, how long, and how well it does on data that was *held out*, beside the bare base.
# - **What it must not be used for**, and where it fails: you have read its texts, others have not.
# - **Privacy.** Models can repeat what they were trained on, word for word (Carlini et al., arXiv:2012.07805). An adapter trained on letters of your customers is as confidential as the letters.
#
# Then, with an account and `hf auth login`:
#
# ```console
# hf upload your-name/mine adapters/mine --private
# ```
#
# Whoever may read it loads it with `ln.load_adapter(model, folder)` after `hf download your-name/mine --local-dir folder`, or with PEFT. Make it public when somebody else has tried it.

# %%
import shutil

for folder in ("mistral", "uneven", "plain", "mine"):
    shutil.rmtree(f"adapters/{folder}")
print("removed")

# %% [markdown]
# ## Three things to remember
#
# 1. A larger model is another name in one line; ask `ln.estimate` before you rent or download anything.
# 2. Several GPUs share out each batch and add up gradients, which are small for LoRA; means must be weighted by tokens.
# 3. What you hand on is a file, and a file can be misread in silence: inspect it, say which base it belongs to, and say what is in it.
#
# **To read on:** Dettmers et al., *QLoRA*, arXiv:2305.14314, for large models on one card. Zhao et al., *PyTorch FSDP*, arXiv:2304.11277, for bases that do not fit. Kwon et al., *Efficient Memory Management for Large Language Model Serving with
# PagedAttention* (vLLM), arXiv:2309.06180. Carlini et al., *Extracting Training Data from Large Language Models*, arXiv:2012.07805. Mitchell et al., *Model Cards for Model Reporting*, arXiv:1810.03993.
