# %% [markdown]
# # Activation patching
# Where does a model keep who gets the drink? A sentence of indirect object identification, patched layer by layer and
# position by position from the clean run.
#
# `python examples/patching.py`, or over processes: `torchrun --nproc-per-node 3 examples/patching.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
import torch
from loading import start

from flex_model.lens import activation_patching

fm, tokens, decode, _, say, show = start()

# %% [markdown]
# Two sentences of as many tokens, and one number that tells them apart.

# %%
clean = tokens("When Mary and John went to the store, John gave a drink to")
corrupted = tokens("When Mary and John went to the store, Mary gave a drink to")
mary, john = (int(tokens(name)["input_ids"][0, -1]) for name in (" Mary", " John"))


def difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, mary] - logits[:, -1, john]).mean()


# %% [markdown]
# Every cell is a forward of the corrupted sentence with one residual from the clean one. 1 restores it all.

# %%
layers = fm.config.num_hidden_layers
found = activation_patching(fm, clean, corrupted, difference, component="resid_pre")
say(f"clean {found.clean:.3f}, corrupted {found.corrupted:.3f}")
for layer in (0, layers // 2, layers - 1):
    position = int(found.restored[layer].argmax())
    token = decode([int(clean["input_ids"][0, position])])
    say(f"layer {layer}: {found.restored[layer, position]:.3f} at position {position} {token!r}")
show(found.plot(labels=[decode([int(token)]) for token in corrupted["input_ids"][0]]))
