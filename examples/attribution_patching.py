# %% [markdown]
# # Attribution patching
# What would patching each head of every layer do? Estimated for all of them from one gradient, and the largest checked
# by patching them.
#
# `python examples/attribution_patching.py`, or over processes:
# `torchrun --nproc-per-node 3 examples/attribution_patching.py`.
# `MODEL` may be a folder of transformers weights; the numbers are the same on any number of processes.

# %%
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from flex_model import FlexModel, edits
from flex_model.cli.models import find_model
from flex_model.lens import attribution_patching

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
# Two forwards and one backward, whatever the number of heads.

# %%
estimate = attribution_patching(fm, clean, corrupted, difference, component="z", over="head")
say(f"clean {estimate.clean:.3f}, corrupted {estimate.corrupted:.3f}")

# %% [markdown]
# The three largest, and what patching them does.

# %%
with torch.no_grad(), fm.capture(fm.at("z")) as acts:
    fm(**clean)
for cell in estimate.effect.abs().flatten().topk(3).indices.tolist():
    layer, head = divmod(cell, estimate.effect.shape[1])
    clean_head = acts[fm.at("z", layer)][:, :, head]
    with torch.no_grad(), fm.edit(fm.at("z", layer, head=head), edits.patch(clean_head)):
        patched = float(difference(fm.full_output(fm(**corrupted)).logits))
    effect = estimate.effect[layer, head]
    say(f"layer {layer}, head {head}: {effect:+.3f} estimated, {patched - estimate.corrupted:+.3f} patched")
