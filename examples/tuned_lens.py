# %% [markdown]
# # Tuned lens
# What would the model predict if it ended after each layer? Early layers write in a basis that the unembedding does not
# read; a tuned lens learns a translator for each.
#
# `python examples/tuned_lens.py`, or over processes: `torchrun --nproc-per-node 3 examples/tuned_lens.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
from pydoc_data.topics import topics

import torch
from loading import start

from flex_model.lens import TunedLens, logit_lens

fm, tokens, decode, mine, say, show = start()

# %% [markdown]
# Python's manual, in rows of 32 tokens; the last rows are held out.

# %%
text = "".join(topics[name] for name in ("for", "while", "try", "with"))
ids = torch.cat([tokens(line)["input_ids"][0] for line in text.splitlines(keepends=True) if line.strip()])
*batches, held = ids[: len(ids) // 192 * 192].view(-1, 6, 32)

# %% [markdown]
# One translator a layer, trained to give the model's own prediction. Every process trains some of the layers.

# %%
lens = TunedLens(fm)
training = lens.fit([{"input_ids": mine(batch)} for batch in batches], steps=20, tokens=64)
say(f"loss {training.loss[0].mean():.3f} -> {training.loss[-1].mean():.3f}")
show(training.plot())

# %% [markdown]
# How far each layer's prediction is from the model's on the held-out rows, in nats.

# %%
held = {"input_ids": mine(held)}
plain, tuned = logit_lens(fm, **held), lens(**held)
for layer, (a, b) in enumerate(zip(plain.divergence, tuned.divergence, strict=True)):
    say(f"layer {layer}: logit lens {a.mean():.3f}, tuned lens {b.mean():.3f}")

# %% [markdown]
# The predictions themselves, read by the tuned lens.

# %%
prompt = tokens("The for statement is used to iterate over the elements of a")
found = lens(**prompt)
for layer in range(0, len(found.top), max(1, len(found.top) // 6)):
    say(f"layer {layer}: {decode([int(found.top[layer, 0, -1])])!r}")
show(found.plot(decode=lambda token: decode([token])))
