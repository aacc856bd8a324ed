# %% [markdown]
# # Latency: what an adapter costs when the model answers
#
# {{badges}}
#
# **What you will have at the end:** a way of timing that two people on two machines can agree on; the cost of LoRA, DoRA, bottleneck adapters and four-bit weights beside a bare model, taken
# apart into work and number of calls; and the point from which on an adapter hardly costs anything.
#
# **Time:** about fifteen minutes to read, half a minute to run on two processor cores. On a GPU: not measured. **Needs:** nothing but this package. Notebook `00_start` says what an adapter is.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. Two kinds of work
#
# A language model answers in two phases. It reads the prompt, all tokens at once: *prefill*. Then it writes, one token after the other, and keeps what it computed for the earlier ones in a *cache*:
# *decode*. Prefill multiplies matrices by matrices. Decode multiplies the same matrices by a single vector each time, so the work is small and everything around it counts.

# %%
import time

import torch
from IPython.display import display

import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
LENGTH = 32  # tokens in the prompt
# The time on the wall; where torch has one thread to itself, the processor's own time, in which other programs are not.
CLOCK = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
model, tokenizer = ln.load(BASE)
ids = (torch.arange(LENGTH, device=model.device) * 7919 % model.config.vocab_size)[None]  # any tokens will do for timing

# %% [markdown]
# ## 2. Why a stopwatch lies
#
# The simplest measurement: run the model, look at the clock. Do it sixty times with the very same input. Watch the first runs, and how far the later ones lie apart.

# %% tags=["nbval-ignore-output"]
# %matplotlib inline
from matplotlib.figure import Figure

seconds = []
with torch.inference_mode():
    for _ in range(60):
        start = time.perf_counter()
        model(ids, use_cache=False)
        seconds.append(time.perf_counter() - start)
figure = Figure(figsize=(6.4, 2.8), layout="constrained")
axes = figure.add_subplot(title="The same forward pass, sixty times")
axes.plot(range(1, 61), [1e3 * s for s in seconds], "o", markersize=3, color="#0072b2")
axes.set(xlabel="run", ylabel="milliseconds", ylim=(0, None))
figure

# %% [markdown]
# Every dot is the same computation. The first runs are often slow: memory is fetched from the system, code is loaded, caches are empty. Later the machine does other things in between, or changes its
# clock rate. Whoever times A once and then B once measures the machine's mood.
#
# Four habits make it fair:
#
# 1. **Warm up**: let each variant run before anything counts.
# 2. **Interleave**: A, B, A, B, and begin each round with another one, so that a slow moment meets both.
# 3. **Take the ratio within a round**, as both had the same moment.
# 4. **Take the median** over the rounds, which a few bad ones do not move, and show the spread.
#
# On a GPU there is a fifth: calls return before the work is done, so *synchronise* before looking at the clock. This is the loop that does all five:

# %%
from lora_nb.timing import interleaved

ln.show(interleaved)

# %% [markdown]
# A measurement that cannot tell two equal things to be equal is worth nothing. So first the control: the base against itself, on the same weights. The ratio should be 1; what it misses by is
# what we must not take for a finding later. **Middle half** says between which values half of the rounds lie.

# %% tags=["nbval-ignore-output"]
twins = {"base": model, "base again": ln.variants(model)["base"]}
control = ln.measure_latency(twins, seq_len=LENGTH, rounds=16, clock=CLOCK)
control

# %%
print("the same thing takes the same time, to a fifth:", 0.8 < control.ratios["base again"] < 1.25)
print("and starts the same number of operations:      ", len(set(control.operations.values())) == 1)

# %% [markdown]
# {{exercise 08.1}}
#
# You get two lists of seconds, `ours` and `theirs`, measured in the same rounds: `ours[i]` and `theirs[i]` stood side by side. Give one number, how many times as long ours takes. (`statistics.median`
# is imported.)

# %%
from statistics import median


def fair_ratio(ours, theirs):
    ### BEGIN SOLUTION
    return median(a / b for a, b in zip(ours, theirs))
    ### END SOLUTION


# %%
ln.check("08.1", fair_ratio)

# %% [markdown]
# ## 3. The field
#
# Now the ways to adapt a model. `ln.variants` makes models that share the base's memory, each with one change: *LoRA* with two thin matrices beside each weight; *DoRA*, which rescales the rows as well;
# three kinds of *bottleneck adapters*, small networks between the layers; *NF4*, the base in four bits; and where a weight can take an adapter in, the same *merged*.

# %%
field = {
    "LoRA": ln.LoraConfig(r=8),
    "DoRA": ln.LoraConfig(r=8, use_dora=True),
    "Houlsby": ln.BottleneckConfig.houlsby(),
    "Pfeiffer": ln.BottleneckConfig.pfeiffer(),
    "parallel": ln.BottleneckConfig.parallel(),
    "NF4": ln.QuantConfig(),
}
variants = ln.variants(model, field)
print(list(variants))

# %% [markdown]
# Before the clock decides: what would you expect to be the dearest, and which to cost nothing? One more token after a prompt, one row, as in a chat:

# %% tags=["nbval-ignore-output"]
from lora_nb import plots

decode = ln.measure_latency(variants, phase="decode", seq_len=LENGTH, rounds=12, clock=CLOCK)
display(decode)
plots.latency_ratios(decode)

# %%
print("LoRA beside the weights costs something:", decode.ratios["LoRA"] > 1.03)
print("merged it costs nothing, to a fifth:    ", 0.8 < decode.ratios["LoRA, merged"] < 1.25)
print("DoRA costs more than LoRA:              ", decode.ratios["DoRA"] > decode.ratios["LoRA"])
print("four bits cost the most on a CPU:       ", max(decode.ratios, key=decode.ratios.get) == "NF4")

# %% [markdown]
# A bar that ends at 1 costs nothing. The two merged ones do, since they *are* plain models. NF4 is the slowest here: each product first has to turn four bits back into numbers. What it saves
# is memory, and on a CPU it pays for that with time. And reading a prompt, with more work in each product?

# %% tags=["nbval-ignore-output"]
prefill = ln.measure_latency(variants, phase="prefill", seq_len=LENGTH, rounds=8, clock=CLOCK)
plots.latency_ratios(prefill)

# %% [markdown]
# Most bars are shorter than before: the same extra calls, spread over more work. To understand that, the cost must be taken apart.

# %% [markdown]
# {{exercise 08.2}}
#
# First the work. A linear layer with weight (`fan_out` × `fan_in`) needs `fan_out · fan_in` multiplications for one token. How many more, as a share of these, does LoRA of rank `r` beside it need? Give a function.

# %%
def extra_work(fan_in, fan_out, r):
    ### BEGIN SOLUTION
    return r * (fan_in + fan_out) / (fan_in * fan_out)
    ### END SOLUTION


# %%
ln.check("08.2", extra_work)

# %% [markdown]
# ## 4. What a call costs
#
# The table above has two columns that need no clock. **GFLOP** counts multiplications and additions; **operations** counts the calls that compute something, and these are the same on every machine:

# %%
for name in ("LoRA", "LoRA, merged", "DoRA", "Houlsby", "Pfeiffer", "parallel"):
    more, work = decode.operations[name] - decode.operations["base"], decode.flops[name] / decode.flops["base"]
    print(f"{name:13} {more:4} more operations, {work - 1:6.1%} more work")

# %% [markdown]
# Compare with the bars. LoRA's extra work is a few percent, but its extra time is several times that. The rest is the price of *starting* things: each call goes through Python and torch, looks at
# shapes and types, finds memory for its result. On a GPU it also launches a *kernel*, a program on the card. That price hardly depends on how large the matrices are:

# %% tags=["nbval-ignore-output"]
sizes = [8, 16, 32, 64, 128, 256, 512]
products = {n: (torch.randn(n, n), torch.randn(n, n)) for n in sizes}
times = interleaved({str(n): lambda a=a, b=b: a @ b for n, (a, b) in products.items()}, rounds=40, settle=1, clock=CLOCK)
micro = [1e6 * times.median(str(n)) for n in sizes]
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axes = figure.add_subplot(title="One product of two n × n matrices")
axes.loglog(sizes, micro, marker="o", color="#0072b2", label="measured")
axes.loglog(sizes, [micro[-1] * (n / sizes[-1]) ** 3 for n in sizes], "--", color="#d55e00", label="if only the work counted")
axes.set(xlabel="n (logarithmic)", ylabel="microseconds (logarithmic)", ylim=(micro[0] / 30, None))
axes.set_xticks(sizes, [str(n) for n in sizes])
axes.legend(frameon=False)
figure

# %% [markdown]
# How far do the ends of the curve lie apart, in work and in time?

# %%
work, taken = (sizes[-1] / sizes[0]) ** 3, micro[-1] / micro[0]
print(f"the largest has {work:,.0f} times the work of the smallest")
print("and takes less than a tenth of that many times as long:", taken < work / 10)

# %% [markdown]
# On the right the two curves agree: there the work counts. On the left the measured one is flat: a product of eight by eight takes what a call takes, however little there is to do. The thin products of LoRA
# for a single token, $Ax$ and $B(Ax)$, live on that flat part. How much does each extra call cost in the model?

# %% tags=["nbval-ignore-output"]
for name in ("LoRA", "DoRA", "Houlsby", "Pfeiffer", "parallel"):
    more = decode.operations[name] - decode.operations["base"]
    slower = decode.seconds["base"] * (decode.ratios[name] - 1)
    print(f"{name:9} {1e6 * slower / more:5.1f} microseconds for each further operation")

# %% [markdown]
# Whatever the method, a further call costs one to a few dozen microseconds on the machine that stored this page, and the most with `parallel`, whose products are the largest. In a small model the number of calls decides, which is why this
# package computes LoRA in two calls a layer, adding in place, and why serving engines record the calls of a step once and replay them (CUDA graphs). Here they are; look at the branches in which nothing learns, the first for a single token:

# %%
ln.show("layers.lora_linear.product")

# %% [markdown]
# ## 5. Where it stops: more rows
#
# If starting is what costs, then more work for each start should make it disappear. More work comes from more *rows*: several people's texts in one batch. Each weight is then read once for all of them.
# `free_from` reads off from which batch size on a variant stays within a limit; `None` means that it never does.

# %% tags=["nbval-ignore-output"]
few = {name: variants[name] for name in ("base", "LoRA", "Houlsby")}
sweep = ln.sweep_latency(few, phase="decode", batch_sizes=(1, 8, 64), seq_lens=(LENGTH,), rounds=8, clock=CLOCK)
display(sweep)
for within in (1.03, 1.10, 1.20):
    print(f"within {within - 1:.0%}:", {name: sweep.free_from(name, within)[LENGTH] for name in ("LoRA", "Houlsby")})
plots.latency_by_batch(sweep)

# %% [markdown]
# The curves fall towards 1. The grey band marks 3 %, about what can be told from nothing on an ordinary machine. Where the work itself grows by more than a limit, no batch is large enough for it.

# %% [markdown]
# {{exercise 08.3}}
#
# A simple model of all this: a step with $n$ rows takes $c + n \cdot w$ seconds, $c$ for starting and $w$ for each row's work. An adapter adds $c' + n \cdot w'$. What is the smallest whole number of rows, at least 1, from which on
# the adapter adds at most the share `limit` of the base's time? Give `float("inf")` where there is none. (`math.ceil` rounds up.)

# %%
import math


def crossover(start, row, extra_start, extra_row, limit):
    ### BEGIN SOLUTION
    if limit * start >= extra_start and limit * row >= extra_row:
        return 1
    if limit * row <= extra_row:
        return float("inf")
    return max(1, math.ceil((extra_start - limit * start) / (limit * row - extra_row)))
    ### END SOLUTION


# %%
ln.check("08.3", crossover)

# %% [markdown]
# ## 6. Where it stops: wider models
#
# There is a second way to more work: larger matrices. By exercise 08.2 the extra work of LoRA falls as the model grows wider, $2r/\text{width}$ on a square layer. Here are small Llamas with random weights,
# two layers each, from 64 to 1,024 channels wide, reading a prompt with and without LoRA of rank 8:

# %% tags=["nbval-ignore-output"]
from transformers import LlamaConfig, LlamaForCausalLM

by_width = {}
for width in (64, 128, 256, 512, 1024):
    shape = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, vocab_size=256
    )
    pair = ln.variants(LlamaForCausalLM(shape).to(model.device), {"LoRA": ln.LoraConfig(r=8)})
    by_width[width] = ln.measure_latency({n: pair[n] for n in ("base", "LoRA")}, phase="prefill", seq_len=LENGTH, rounds=10, clock=CLOCK)

# %%
for width, table in by_width.items():
    print(f"{width:5} channels: {table.flops['LoRA'] / table.flops['base'] - 1:6.1%} more work")

# %% [markdown]
# The work falls as the formula says. Does the time?

# %% tags=["nbval-ignore-output"]
widths = list(by_width)
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axes = figure.add_subplot(title=f"LoRA of rank 8 over the base, prompt of {LENGTH} tokens")
axes.plot(widths, [t.ratios["LoRA"] for t in by_width.values()], marker="o", color="#0072b2", label="time")
axes.plot(widths, [t.flops["LoRA"] / t.flops["base"] for t in by_width.values()], "s--", color="#d55e00", label="work")
axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
axes.set(xscale="log", xlabel="width of the model, channels (logarithmic)", ylabel="LoRA over base")
axes.set_xticks(widths, [str(w) for w in widths])
axes.minorticks_off()
axes.legend(frameon=False)
figure

# %%
narrow, wide = by_width[64].ratios["LoRA"], by_width[1024].ratios["LoRA"]
print("the wide model pays less than the narrow one:", wide < narrow)
print("and its work grows by less than 2 %:         ", by_width[1024].flops["LoRA"] < 1.02 * by_width[1024].flops["base"])

# %% [markdown]
# The lower, dashed curve is the work, the upper one the time; the gap between them is what the calls cost. Both go towards 1. A model of seven billion parameters is 4,096 channels wide
# (Touvron et al., arXiv:2307.09288, Llama 2): by the formula rank 8 adds well under one percent of work on its square layers. There the calls are what is left, and with one row on a fast GPU they still show.

# %% [markdown]
# {{exercise 08.4}}
#
# You serve one adapter, always the same, and time is all that matters. For which of these can the cost be made to vanish altogether, by merging? Give a set of names out of `"LoRA"`, `"DoRA"`, `"Houlsby"`, `"Pfeiffer"`, `"parallel"`.

# %%
free_once_merged = {"LoRA", "DoRA"}  ### SOLUTION

# %%
ln.check("08.4", free_once_merged)

# %% [markdown]
# And if there is not one adapter but a hundred, for a hundred users in the same batch? Then merging is no way out, as there would have to be a hundred models. Notebook `09_many_adapters` is about that.

# %% [markdown]
# ## Three things to remember
#
# 1. Time variants in turn, take ratios within a round and medians over rounds, and measure a thing against itself first.
# 2. An adapter costs work and calls. With one row and a small model the calls are most of it; with more rows or a wider model both fade.
# 3. Merged, LoRA and DoRA cost nothing at all. A bottleneck adapter cannot be merged; four bits save memory, and on a processor they cost time.
#
# **To read on:** Hu et al., *LoRA*, arXiv:2106.09685, section 3, table 1, measure the latency of bottleneck adapters by batch and length. Rücklé et al., *AdapterDrop*, arXiv:2010.11918, measure how it falls when adapters
# are left out. Dettmers et al., *QLoRA*, arXiv:2305.14314, for the base in four bits. Pope et al., *Efficiently Scaling Transformer Inference*, arXiv:2211.05102, for prefill and decode.
