# %% [markdown]
# # A sparse autoencoder, trained on the fly
# Train it on one layer's values while the model runs, then put it in their place.
#
# `python examples/train_sae.py`, or over processes: `torchrun --nproc-per-node 3 examples/train_sae.py`.
# The numbers are the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
from pydoc_data.topics import topics

import torch
from loading import start
from torch import Tensor, nn

from flex_model import edits

fm, tokens, _, mine, say, _ = start()
site = fm.at("resid_post", fm.config.num_hidden_layers // 3)


class TopK(nn.Module):
    """Of each token the k largest features. Gao et al., "Scaling and evaluating sparse autoencoders" (2024)."""

    def __init__(self, some: Tensor, *, features: int, k: int = 8) -> None:
        super().__init__()
        drawn = torch.randn(features, some.shape[-1], generator=torch.Generator().manual_seed(0))
        self.k, self.centre = k, nn.Parameter(some.mean(0))
        self.size = (some - self.centre).norm(dim=-1).mean().item()  # lengths are about 1 inside
        self.write = nn.Parameter(nn.functional.normalize(drawn, dim=1))
        self.read = nn.Parameter(self.write.detach().clone())

    def encode(self, x: Tensor) -> Tensor:
        best = ((x - self.centre) / self.size @ self.read.T).relu().topk(self.k)
        return torch.zeros(*x.shape[:-1], len(self.read)).scatter(-1, best.indices, best.values)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.write * self.size + self.centre


# %% [markdown]
# Python's manual, in rows of 32 tokens. The model runs as far as the site, and no further.

# %%
text = "".join(topics[name] for name in ("for", "while", "try", "with"))
ids = torch.cat([tokens(line)["input_ids"][0] for line in text.splitlines(keepends=True) if line.strip()])
*batches, held = ids[: len(ids) // 512 * 512].view(-1, 16, 32)


def values(ids: Tensor) -> Tensor:
    """(tokens, width), whole on every process."""
    with torch.no_grad(), fm.capture(site, stop=True) as acts:
        fm(input_ids=mine(ids))
    return acts[site].flatten(0, 1)


sae = TopK(values(batches[0]), features=8 * fm.config.hidden_size)  # every process has it, and trains it alike
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
for epoch in range(3):
    for step, batch in enumerate(batches):
        x = values(batch)
        error = (sae.decode(sae.encode(x)) - x).pow(2).sum(-1).mean() / sae.size**2
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            say(f"epoch {epoch}: error {error:.3f}")

# %% [markdown]
# In the place of the values: what does the model lose?

# %%
for what, edit in (
    ("as it is", edits.scale(1.0)),
    ("with it", edits.sae(sae, keep_error=False)),
    ("zeros", edits.zero()),
):
    with torch.no_grad(), fm.edit(site, edit):
        loss = fm(input_ids=mine(held), labels=mine(held)).loss
    say(f"loss on new tokens, {what}: {fm.full_batch(loss[None]).mean():.3f}")
