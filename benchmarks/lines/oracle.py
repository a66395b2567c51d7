"""The six answers by plain torch and transformers alone."""

import torch
from torch import Tensor

from given import (
    HEAD,
    HEAD_SIZE,
    LAYER,
    clean,
    corrupted,
    ids,
    labels,
    length,
    metric,
    model,
    negative,
    positive,
    repeated,
    test,
    train,
)

blocks = model.transformer.h


def residuals() -> Tensor:
    """What the blocks return (layers, B, S, D)."""
    return torch.stack(_outputs(ids))


def ablate() -> Tensor:
    """The logits without one head: its rows of the output projection are zero."""
    projection = blocks[LAYER].attn.c_proj
    before = projection.weight.clone()
    projection.weight[HEAD * HEAD_SIZE : (HEAD + 1) * HEAD_SIZE] = 0
    logits = model(ids).logits
    projection.weight.copy_(before)
    return logits


def patch() -> Tensor:
    """(layers, positions): how one residual of the clean run changes the corrupted metric."""
    taken, rows = model(clean, output_hidden_states=True).hidden_states, []
    base = metric(model(corrupted).logits)
    for block, source in zip(blocks, taken, strict=False):
        rows.append([])
        for position in range(corrupted.shape[1]):

            def put(_module, args, source=source, position=position):
                x = args[0].clone()
                x[:, position] = source[:, position]
                return (x, *args[1:])

            with block.register_forward_pre_hook(put):
                rows[-1].append(metric(model(corrupted).logits) - base)
    return torch.tensor(rows)


def steer() -> Tensor:
    """The logits with 4 times the difference of mean last residuals added behind a block."""
    plus, minus = (_outputs(x)[LAYER][:, -1].mean(0) for x in (positive, negative))
    with blocks[LAYER].register_forward_hook(lambda m, a, out: out + 4 * (plus - minus)):
        return model(ids).logits


def induction() -> Tensor:
    """(layers, heads): the mean attention to the token behind the previous occurrence."""
    patterns = model(repeated, output_attentions=True).attentions
    queries = torch.arange(length - 1, 2 * length)
    return torch.stack([p[:, :, queries, queries - length + 1].mean((0, 2)) for p in patterns])


def probe() -> Tensor:
    """What a logistic regression on the last residuals says of the test rows."""
    x, y = _outputs(train)[LAYER][:, -1].double(), labels.double()
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight[1:] + weight[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        value = value + weight[1:].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    found = weight.detach()
    return (_outputs(test)[LAYER][:, -1].double() @ found[1:] + found[0] > 0).long()


def _outputs(tokens: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: seen.append(out)) for b in blocks]
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen
