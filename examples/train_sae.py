"""Train a sparse autoencoder on one layer's values while the model runs, then put it in their place.

Run: python examples/train_sae.py                                (a tiny random model)
Run: python examples/train_sae.py --model FOLDER --layer 9       (a real one, with its tokenizer)
Run: torchrun --nproc-per-node 2 examples/train_sae.py           (tensor parallel)
Run: torchrun --nproc-per-node 2 examples/train_sae.py --fsdp2
"""

from pathlib import Path

import torch
import torch.distributed as dist
from loading import start
from torch import Tensor, nn

from flex_model import edits

LENGTH, ROWS, EPOCHS = 32, 16, 3


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


def main() -> None:
    job = start()
    fm, site = job.fm, job.fm.at("resid_post", job.layer)
    text = job.tokens([(Path(__file__).parents[1] / "docs" / "architecture.md").read_text()])["input_ids"][0]
    *train, held = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).split(ROWS)[:-1]

    @torch.no_grad()
    def run(ids: Tensor) -> tuple[Tensor, float]:
        """The values of all tokens (B * S, D), whole on every rank, and the model's loss."""
        with fm.capture(site) as acts:
            loss = fm(input_ids=job.mine(ids), labels=job.mine(ids)).loss
        return acts[site].flatten(0, 1), fm.full_batch(loss[None]).mean().item()

    sae = TopK(run(train[0])[0], features=8 * fm.config.hidden_size)  # every rank has it, and trains it on the same
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        for step, ids in enumerate(train):
            x, _ = run(ids)
            error = (sae.decode(sae.encode(x)) - x).pow(2).sum(-1).mean() / sae.size**2
            error.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                job.show(f"epoch {epoch}: error {error:.4f}")
    x, loss = run(held)
    with torch.no_grad():
        left = (sae.decode(sae.encode(x)) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    job.show(f"of new tokens: {1 - left:.4f} of the variance is explained, by {sae.k} features of {len(sae.read)}")
    with fm.edit(site, edits.sae(sae, keep_error=False)):
        _, spliced = run(held)
    with fm.edit(site, edits.zero()):
        _, zeroed = run(held)
    job.show(f"loss {loss:.4f}; with the autoencoder in its place {spliced:.4f}; with zeros {zeroed:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
