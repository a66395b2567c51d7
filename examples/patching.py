# %% [markdown]
# # Activation patching
# Where does a model keep who gets the drink? A sentence of indirect object identification, patched layer by layer and
# position by position from the clean run.
#
# `python examples/patching.py`, or over processes: `torchrun --nproc-per-node 3 examples/patching.py`.
# `MODEL` may be a folder of transformers weights; the numbers are the same on any number of processes.

# %%
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from flex_model import FlexModel
from flex_model.cli.models import find_model
from flex_model.lens import activation_patching

world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
folder = find_model(os.environ.get("MODEL", "smollm2"), Path(".models"))
spread = {"distributed_config": DistributedConfig(tp_size=world)} if world > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32", **spread).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
fm = FlexModel(model)


def say(*words: object) -> None:
    if rank == 0:
        print(*words)


def tokens(text: str) -> dict:
    return {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}


# %% [markdown]
# Two sentences of as many tokens, and one number that tells them apart.

# %%
clean = tokens("When Mary and John went to the store, John gave a drink to")
corrupted = tokens("When Mary and John went to the store, Mary gave a drink to")
mary, john = (tokenizer(name, add_special_tokens=False)["input_ids"][-1] for name in (" Mary", " John"))


def difference(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, mary] - logits[:, -1, john]).mean()


# %% [markdown]
# Every cell is a forward of the corrupted sentence with one residual from the clean one. 1 restores it all.

# %%
layers = model.config.num_hidden_layers
found = activation_patching(fm, clean, corrupted, difference, component="resid_pre")
say(f"clean {found.clean:.3f}, corrupted {found.corrupted:.3f}")
for layer in (0, layers // 2, layers - 1):
    position = int(found.restored[layer].argmax())
    token = tokenizer.decode([int(clean["input_ids"][0, position])])
    say(f"layer {layer}: {found.restored[layer, position]:.3f} at position {position} {token!r}")
