# https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html, register_forward_pre_hook;
# hidden_states of transformers are what the blocks take
import torch

from given import LAYERS, clean, corrupted, metric, model

residuals = model(clean, output_hidden_states=True).hidden_states
answer = torch.empty(LAYERS, corrupted.shape[1])
for layer in range(LAYERS):
    for position in range(corrupted.shape[1]):
        with model.transformer.h[layer].register_forward_pre_hook(
            lambda m, args: (
                args[0].index_copy(1, torch.tensor([position]), residuals[layer][:, [position]]),
                *args[1:],
            )
        ):
            answer[layer, position] = metric(model(corrupted).logits)
answer -= metric(model(corrupted).logits)
