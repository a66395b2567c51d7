# %% [markdown]
# # Probes
# Which layers know whether a film was liked? A linear probe on each, scored on words that it has not seen.
#
# `python examples/probe.py`, or over processes: `torchrun --nproc-per-node 3 examples/probe.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
import torch
from loading import start
from torch import Tensor

from flex_model.lens import train_probes

fm, tokens, decode, mine, say, show = start()

# %% [markdown]
# Sentences with words of two kinds. The last four of each are for the test.

# %%
BAD = ("awful", "bad", "boring", "dull", "poor", "sad", "weak", "ugly", "terrible", "dreadful", "horrible", "tedious")
GOOD = (
    "fine",
    "good",
    "great",
    "nice",
    "fun",
    "lovely",
    "superb",
    "strong",
    "wonderful",
    "excellent",
    "amazing",
    "gripping",
)
FRAMES = ("I saw it, and found it {}. That film", "The plot was {} and so I", "My friend called it {}, which")


def batch(frame: str, words: slice) -> tuple[dict[str, Tensor], Tensor]:
    """One sentence with every word, and whether it is a good one: this process's rows."""
    pairs = [(word, kind) for kind, of in enumerate((BAD, GOOD)) for word in of[words]]
    return tokens(*(frame.format(word) for word, _ in pairs)), mine(torch.tensor([kind for _, kind in pairs]))


train = [batch(frame, slice(0, 8)) for frame in FRAMES]
test = [batch(frame, slice(8, 12)) for frame in FRAMES]

# %% [markdown]
# A probe on every layer's residual stream at the last token, from one forward a batch.

# %%
sweep = train_probes(fm, train, test=test)
for probe in sweep:
    say(f"layer {probe.layer}: accuracy {probe.train_score:.3f}, of new words {probe.accuracy:.3f}")
show(sweep.plot())

# %% [markdown]
# The best of them, on sentences of its own: above 0 it says that the film was liked.

# %%
best = sweep.best
mine_too = tokens("It was a joy from start to end", "It was a waste of my evening")
with torch.no_grad(), fm.capture(fm.at("resid_post", best.layer)) as acts:
    fm(**mine_too)
mask = fm.full_batch(mine_too["attention_mask"])
values = acts[fm.at("resid_post", best.layer)][torch.arange(2), mask.sum(1) - 1]  # at the last token
say(f"layer {best.layer}:", [round(float(liked - not_liked), 3) for not_liked, liked in best(values)])
