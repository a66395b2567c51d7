# %% [markdown]
# # Induction heads
# Find the attention heads that continue what was there before, and see what the model is without them.
#
# `python examples/induction_heads.py`, or over processes: `torchrun --nproc-per-node 3 examples/induction_heads.py`.
# `MODEL` may be a folder of transformers weights; the numbers are the same on any number of processes.

# %%
import os
import random
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flex_model import FlexModel, edits
from flex_model.cli.models import find_model
from flex_model.lens import induction_scores, remove_heads, repeated_loss, repeated_tokens, top_heads

world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
folder = find_model(os.environ.get("MODEL", "smollm2"), Path(".models"))
spread = {"distributed_config": DistributedConfig(tp_size=world)} if world > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32", **spread).eval()
fm = FlexModel(model)


def say(*words: object) -> None:
    if rank == 0:
        print(*words)


# %% [markdown]
# Random tokens, repeated once: only what came before tells what comes next. A head's score is its mean attention to the
# token behind the previous occurrence.

# %%
vocabulary = min(15_000, model.config.vocab_size)
length = min(50, model.config.max_position_embeddings // 2)
ids = repeated_tokens(2, length, low=vocabulary // 30, high=vocabulary)
scores = induction_scores(fm, ids)
best = top_heads(scores, 5)
for (layer, head), score in best:
    say(f"layer {layer}, head {head}: {score:.3f}")

# %% [markdown]
# The loss on the repeated half: as the model is, without these heads, and without as many others.

# %%
names = [(layer, head) for layer in range(scores.shape[0]) for head in range(scores.shape[1])]
heads = [head for head, _ in best]
others = random.Random(0).sample([n for n in names if n not in heads], min(5, len(names) - len(heads)))


def loss() -> float:
    return repeated_loss(fm.full_output(fm(ids, use_cache=False)).logits, ids).second


say(f"as it is: {loss():.3f}")
for what, removed in (("the induction heads", heads), ("others", others)):
    with remove_heads(fm, removed):
        say(f"without {what}: {loss():.3f}")

# %% [markdown]
# One head alone, by its general name.

# %%
with fm.edit(fm.at("z", heads[0].layer, head=heads[0].head), edits.zero()):
    say(f"without {tuple(heads[0])} alone: {loss():.3f}")
