# %% [markdown]
# # Steering
# Add a direction to the residual stream while the model generates.
#
# `python examples/steering.py`, or over processes: `torchrun --nproc-per-node 3 examples/steering.py`.
# `MODEL` may be a folder of transformers weights; the text is the same on any number of processes.

# %%
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from flex_model import FlexModel
from flex_model.cli.models import find_model
from flex_model.lens import steering_vector

world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
folder = find_model(os.environ.get("MODEL", "smollm2"), Path(".models"))
spread = {"distributed_config": DistributedConfig(tp_size=world)} if world > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32", **spread).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
fm = FlexModel(model)


def say(*words: object) -> None:
    if rank == 0:
        print(*words)


def tokens(*texts: str) -> dict:
    """Texts of as many tokens."""
    return dict(tokenizer(list(texts), return_tensors="pt", return_token_type_ids=False))


# %% [markdown]
# The direction: from the mean of one kind of texts to the mean of the other, at their last tokens.

# %%
layer = model.config.num_hidden_layers // 2
kind = tokens("I love this", "I like this")
unkind = tokens("I hate this", "I fear this")
found = steering_vector(fm, kind, unkind, layer=layer)
say(f"layer {layer}, norm {found.vector.norm():.3f}, kinds apart by {found.separation[0] - found.separation[1]:.2f}")

# %% [markdown]
# Greedy, from the same words. `when="decode"` would steer only what is generated, `positions="last"` one token.

# %%
prompt = tokens("I went to the wedding, and")


def generate() -> str:
    out = fm.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0], skip_special_tokens=True)


say("as it is:", generate())
for scale in (-2.0, 2.0):
    with fm.edit(fm.at("resid_post", layer), found.edit(scale)):
        say(f"steered by {scale:+.0f}:", generate())
