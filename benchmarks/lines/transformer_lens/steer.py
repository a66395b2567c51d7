# demos/Main_Demo.ipynb, "Hooks: Intervening on Activations"
from given import LAYER, ids, negative, positive
from preamble import model

plus, minus = (
    model.run_with_cache(x)[1]["resid_post", LAYER][:, -1].mean(0) for x in (positive, negative)
)
answer = model.run_with_hooks(
    ids, fwd_hooks=[(f"blocks.{LAYER}.hook_resid_post", lambda x, hook: x + 4.0 * (plus - minus))]
)
