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

from flex_model import edits
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
# A probe is a direction, which can steer.

# %%
best = sweep.best
prompt = tokens("I saw it, and found it")
for scale in (-1.0, 1.0):
    with fm.edit(fm.at("resid_post", best.layer), edits.add(best.direction, scale=scale)):
        out = fm.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    say(f"along the direction of layer {best.layer}, {scale:+.0f} times:", repr(decode(out[0])))
