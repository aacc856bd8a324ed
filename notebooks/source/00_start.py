# %% [markdown]
# # Start: your first adapter
#
# {{badges}}
#
# **What you will have at the end:** a language model that you taught, on this machine, to turn formal sentences into informal ones, by training about 7 % as many
# numbers as it has; a file of under two megabytes that holds what it learnt; and the proof that the model itself was not touched.
#
# **Time:** about two minutes on two processor cores. On a GPU: not measured. **Needs:** nothing but this package; no download, no account.
#
# Run the cells from top to bottom (*Run › Run All Cells* is fine). You can interrupt the training at any time (*Kernel › Interrupt*): what was learnt until then is kept.

# %%
import importlib.util

if importlib.util.find_spec("lora_nb") is None:  # on Colab; torch is there and stays as it is
    # %pip install --quiet --no-deps lora-nb
    # %pip install --quiet "transformers>=5,<6" "bitsandbytes>=0.50" "anywidget>=0.11" regex

# %% [markdown]
# ## 1. A base model
#
# `tiny` comes with the package: a Llama (the kind of model that Meta publishes) of 5.8 million *parameters*, the numbers that training sets. It was trained from scratch on
# English and French novels of 1840 to 1920. It is small enough for a laptop, and it is a real language model, loaded through *transformers*, Hugging Face's library for such
# models. It reads and writes *tokens*, which are words and pieces of words; the cell prints how many it knows. To work with another one, change one line: a folder, or a model's name on the Hugging Face Hub.

# %%
import lora_nb as ln

BASE = "tiny"  # or a folder, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"
model, tokenizer = ln.load(BASE)
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")

# %% [markdown]
# What does it know? Let it go on with a sentence in each language. Expect the manner of an old novel, grammar that holds for a clause or two, and little sense beyond.

# %% tags=["nbval-ignore-output"]
for prompt in ["The old man opened the door and", "Le vieil homme ouvrit la porte et"]:
    print(prompt, ln.generate(model, tokenizer, prompt, max_new_tokens=30, temperature=0.6, seed=1), "\n")

# %% [markdown]
# ## 2. Something to teach it
#
# `tone` holds pairs of sentences written for this course: a formal one and what one would say to a friend. Some are held out: the model is tested on sentences that it has never seen.

# %%
train, test = ln.dataset("tone", "train"), ln.dataset("tone", "test")
train

# %% [markdown]
# A pair reaches the model as one line of text, `formal => informal`, and only what follows the arrow is learnt. How well does the untouched model predict the held-out
# informal sentences? **Tokens right** counts the tokens that it would have put first; **examples all right** the sentences that it would have written without a single fault.
#
# The other lines measure surprise, and less is better. The **loss** is the mean of −log of the probability that the model gave to each right token; with the natural logarithm its unit is called *nat*.
# **Perplexity** is $e$ to the power of the loss: among how many tokens the model is undecided, so to speak. **Bits per byte** spreads the surprise over the bytes of the text, so that models with other tokens compare.

# %%
before = ln.evaluate(model, tokenizer, test)
before

# %% [markdown]
# ## 3. An adapter
#
# *Low-rank adaptation* (LoRA) leaves each weight matrix $W$ as it is and adds a small product to it: $W + \frac{\alpha}{r} B A$, where $A$ has $r$ rows and $B$ has $r$ columns. The number $r$ is called the *rank*, and $\alpha$ sets how
# strongly the product counts. Only $A$ and $B$ are trained; $W$ is *frozen*. A *linear layer* is one that multiplies what it gets by a weight matrix. `attach` puts such a pair on each of them, here with $r = 16$, and reports what it found. Look at the first line: how small a part of the model will train?

# %%
import torch

torch.manual_seed(0)  # A starts at random
report = ln.attach(model, ln.LoraConfig(r=16, lora_alpha=32))
report

# %% [markdown]
# {{exercise 00.1}}
#
# The first line of the table is a layer with 256 inputs and 256 outputs. How many numbers do its $A$ and $B$ have together? Put a number or a product in the place of the
# dots, run the cell, and compare with the table's last column.

# %%
numbers_of_one_layer = 16 * (256 + 256)  ### SOLUTION

# %%
ln.check("00.1", numbers_of_one_layer)

# %% [markdown]
# $B$ starts at zero, so nothing has changed yet: the adapted model still gives exactly the base's output. Compared are the *logits*, the scores that a model gives to every token that may come next.

# %%
ids = tokenizer("Could you please", return_tensors="pt").input_ids
with torch.no_grad():
    adapted = model(ids).logits
    with ln.disabled(model):
        base = model(ids).logits
print("the same, bit for bit:", torch.equal(adapted, base))

# %% [markdown]
# ## 4. Training
#
# The loop goes over the pairs in a new order each *epoch* (once through all of them), a few at a time. In each *step* it finds in which direction the loss falls, and *AdamW*, the usual
# rule for this, moves $A$ and $B$ a little that way; how far, the *learning rate* says. The loss should fall steeply at first, while the model learns that an answer is wanted,
# and then slowly, while it learns how things are said.

# %% tags=["nbval-ignore-output"]
fingerprint = ln.fingerprint(model)  # of the base: to compare afterwards
run = ln.train(model, tokenizer, train, ln.TrainConfig(max_steps=300, batch_size=16, learning_rate=5e-3))
run

# %% [markdown]
# Now the same measure again, on the same held-out sentences.

# %% tags=["nbval-ignore-output"]
after = ln.evaluate(model, tokenizer, test)
after

# %%
print("20 points more tokens right:  ", after.token_accuracy > before.token_accuracy + 0.2)
print("sentences entirely right:     ", "none before," if before.exact_match == 0 else "some before,", "some after" if after.exact_match else "none after")
print("bits per byte 40 % lower:     ", after.bits_per_byte < 0.6 * before.bits_per_byte)

# %% [markdown]
# ## 5. What changed, in words
#
# Numbers say how much; only reading says what. First the held-out sentences that came out word for word as expected: beside each stands what the base made of it.

# %% tags=["nbval-ignore-output"]
answers = ln.generate(model, tokenizer, test.prompts, max_new_tokens=24)
with ln.disabled(model):
    untaught = ln.generate(model, tokenizer, test.prompts, max_new_tokens=24)
right = [i for i, pair in enumerate(test) if answers[i] == pair.completion]
print(f"{len(right)} of {len(test)} word for word\n")
for i in right[:5]:
    print(f"formal    {test[i].prompt}\nbase      {(untaught[i].splitlines() or [''])[0][:70]}\nadapter   {answers[i]}\n")

# %% [markdown]
# That was the best of it. Now every fortieth, as they come. The model is tiny and old-fashioned, so expect wrong words; look at the *tone*: contractions and short forms in English,
# *tu*, *on* and a dropped *ne* in French.

# %% tags=["nbval-ignore-output"]
for i in range(0, len(test), 40):
    print(f"formal    {test[i].prompt}\nadapter   {answers[i]}\nexpected  {test[i].completion}\n")

# %% [markdown]
# And a sentence of your own: write it before the arrow, run the cell again.

# %% tags=["nbval-ignore-output"]
print(ln.generate(model, tokenizer, "Could you please open the window? =>", max_new_tokens=24))

# %% [markdown]
# ## 6. Keep it
#
# `save` writes two files in the format of *PEFT*, Hugging Face's library for adapters. PEFT, transformers and most *serving engines* (programs that run a model for many users) read it. Compare the size with the base's 12 megabytes, which are in 16 bits where the adapter is in 32.

# %%
folder = ln.save(model, "adapters/tone")
summary = ln.inspect(folder)
print(f"{len(summary.modules)} modules, {summary.bytes / 1e6:.1f} MB, base {summary.base!r}, warnings: {summary.warnings}")

# %% [markdown]
# The base was frozen, so none of its bytes may have changed. `detach` takes the adapter off; then the model is what it was.

# %%
ln.detach(model)
with torch.no_grad():
    print("base unchanged:           ", ln.fingerprint(model) == fingerprint)
    print("output as before training:", torch.equal(model(ids).logits, base))

# %% [markdown]
# A saved adapter goes on in one line. It is checked first: an adapter of another base, or a damaged file, is refused with the reason.

# %%
ln.load_adapter(model, "adapters/tone")
print("the same answers:", ln.generate(model, tokenizer, test.prompts, max_new_tokens=24) == answers)

# %% [markdown]
# Does somebody else's library read it, too? If Hugging Face PEFT is installed, it loads the folder into a fresh copy of the base; its logits must agree with ours to rounding.

# %%
import importlib.util
import logging
import warnings

if importlib.util.find_spec("peft"):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would speak of an optional part
    from peft import PeftModel

    warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers 5 has renamed
    theirs = PeftModel.from_pretrained(ln.load(BASE)[0], "adapters/tone")
    with torch.no_grad():
        print("PEFT agrees to 1e-5:", bool((theirs(ids).logits - model(ids).logits).abs().max() <= 1e-5))
else:
    print("PEFT is not installed here; `pip install peft` and run this cell again.")

# %% [markdown]
# ## Three things to remember
#
# 1. LoRA adds a product of two thin matrices to each frozen weight. It starts at zero, so the model starts as it was.
# 2. What was learnt is a small file beside an unchanged base. It can be taken off, passed on, and put on again.
# 3. Judge by sentences that were held out, with a number *and* by reading them.
#
# **To read on:** Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, sections 4.1 and 4.2. Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*,
# arXiv:1902.00751, for the adapters that came before.
