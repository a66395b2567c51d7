# %% [markdown]
# # Steering
# Add a direction to the residual stream while the model generates.
#
# `python examples/steering.py`, or over processes: `torchrun --nproc-per-node 3 examples/steering.py`.
# The text is the same; `examples/loading.py` says which models and ways of spreading them there are.

# %%
from loading import start

from flex_model.lens import steering_vector

fm, tokens, decode, _, say, show = start()

# %% [markdown]
# The direction: from the mean of one kind of texts to the mean of the other, at their last tokens.

# %%
layer = fm.config.num_hidden_layers // 2
kind, unkind = tokens("I love this", "I like this"), tokens("I hate this", "I fear this")
found = steering_vector(fm, kind, unkind, layer=layer)
say(f"layer {layer}, norm {found.vector.norm():.3f}, kinds apart by {found.separation[0] - found.separation[1]:.2f}")

# %% [markdown]
# Greedy, from the same words. `found.edit(2.0, when="decode")` would steer only what is generated, and
# `positions="last"` only the last token.

# %%
prompt = tokens("I went to the wedding, and")


def generate() -> str:
    return decode(fm.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0])


say("as it is:", repr(generate()))
for scale in (-2.0, 2.0):
    with fm.edit(fm.at("resid_post", layer), found.edit(scale)):
        say(f"steered by {scale:+.0f}:", repr(generate()))
show(found.plot())
