# %% [markdown]
# # Induction heads
# Find the attention heads that continue what was there before, and see what the model is without them.
#
# `python examples/induction_heads.py`, or over processes: `torchrun --nproc-per-node 3 examples/induction_heads.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
import random

from loading import start

from flex_model import edits
from flex_model.lens import measure, remove_heads, repeated_loss, repeated_tokens, top_heads

fm, _, _, mine, say, show = start()

# %% [markdown]
# Random tokens, repeated once: only what came before tells what comes next. A head's score is its mean attention to the
# token behind the previous occurrence. `measure` removes the best heads, and for comparison as many random ones.

# %%
vocabulary, positions = fm.config.vocab_size, fm.config.max_position_embeddings
ids = mine(repeated_tokens(2, min(50, positions // 2), low=min(500, vocabulary // 2), high=min(15_000, vocabulary)))
found = measure(fm, ids, top=5)
for (layer, head), score in top_heads(found.scores, 5):
    say(f"layer {layer}, head {head}: {score:.3f}")
say(f"loss on the repeated half: {found.loss.second:.3f}")
say(f"without these heads: {found.loss_without.second:.3f}")
say(f"without as many random ones: {found.loss_without_random.second:.3f}")
show(found.plot())

# %% [markdown]
# The same by hand: heads by their general names, which are the same for all architectures.

# %%
whole = fm.full_batch(ids)


def loss() -> float:
    return repeated_loss(fm.full_output(fm(ids, use_cache=False)).logits, whole).second


layer, head = found.removed[0]
with fm.edit(fm.at("z", layer, head=head), edits.zero()):
    say(f"without layer {layer}, head {head}: {loss():.3f}")
other = random.Random(1).choice([h for h in range(found.scores.shape[1]) if (layer, h) not in found.removed])
with remove_heads(fm, [(layer, other)]):
    say(f"without layer {layer}, head {other}: {loss():.3f}")
