# %% [markdown]
# # Attribution patching
# What would patching each head of every layer do? Estimated for all of them from one gradient, and the largest checked
# by patching them.
#
# `python examples/attribution_patching.py`, or over processes:
# `torchrun --nproc-per-node 3 examples/attribution_patching.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
import torch
from loading import start

from flex_model import edits
from flex_model.lens import attribution_patching

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
# Two forwards and one backward, whatever the number of heads.

# %%
estimate = attribution_patching(fm, clean, corrupted, difference, component="z", over="head")
say(f"clean {estimate.clean:.3f}, corrupted {estimate.corrupted:.3f}")

# %% [markdown]
# The three largest, and what patching them does.

# %%
with torch.no_grad(), fm.capture(fm.at("z")) as acts:
    fm(**clean)
for cell in estimate.effect.abs().flatten().topk(3).indices.tolist():
    layer, head = divmod(cell, estimate.effect.shape[1])
    clean_head = acts[fm.at("z", layer)][:, :, head]
    with torch.no_grad(), fm.edit(fm.at("z", layer, head=head), edits.patch(clean_head)):
        patched = float(difference(fm.full_output(fm(**corrupted)).logits))
    effect = estimate.effect[layer, head]
    say(f"layer {layer}, head {head}: {effect:+.3f} estimated, {patched - estimate.corrupted:+.3f} patched")
show(estimate.plot())
