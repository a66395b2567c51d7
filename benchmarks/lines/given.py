"""What all snippets are given: a small random GPT-2 of transformers, token ids, labels, metric."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

LAYER, HEAD, LAYERS, HEAD_SIZE = 1, 2, 3, 8

_random = torch.Generator().manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
)
model.eval().requires_grad_(False)
for _name, _parameter in sorted(model.named_parameters()):  # the same in every environment
    _parameter.copy_(torch.randn(_parameter.shape, generator=_random) * 0.3)
    if ".ln_" in _name and _name.endswith("weight"):
        _parameter.add_(1)


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=_random)


ids = _tokens(4, 10)
clean, corrupted = _tokens(1, 8), _tokens(1, 8)
positive, negative = _tokens(5, 6), _tokens(5, 6)
length = 12
repeated = _tokens(2, length).repeat(1, 2)
train, test = _tokens(64, 5), _tokens(48, 5)
labels, test_labels = train[:, 0] % 2, test[:, 0] % 2
for _rows, _kinds in ((train, labels), (test, test_labels)):  # far enough apart for any probe
    _rows[:, 1:] = 7 + _kinds[:, None]


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean()
