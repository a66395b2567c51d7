# https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html, register_forward_hook;
# hidden_states of transformers are what the blocks take
from given import LAYER, ids, model, negative, positive

plus, minus = (
    model(x, output_hidden_states=True).hidden_states[LAYER + 1][:, -1].mean(0)
    for x in (positive, negative)
)
with model.transformer.h[LAYER].register_forward_hook(lambda m, a, out: out + 4.0 * (plus - minus)):
    answer = model(ids).logits
