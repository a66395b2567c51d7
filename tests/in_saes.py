"""Run by the interpreter of another environment, which has SAELens and sparsify: what they make of a store.

    python in_saes.py <task> <folder>       of a store "acts", an export "out" and the oracle "rows.safetensors"

Prints one line of JSON at its end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HOOK, SIZE = "blocks.1.hook_resid_post", 8


def unexplained(out: Tensor, x: Tensor) -> float:
    """Fraction of the variance."""
    return float((out - x).square().sum() / (x - x.mean(0)).square().sum())


def sae(width: int) -> Any:
    import sae_lens

    torch.manual_seed(0)
    config = sae_lens.TopKTrainingSAEConfig(d_in=width, d_sae=32, k=4, apply_b_dec_to_input=True)
    return sae_lens.TopKTrainingSAE(config)


def trainer_config(samples: int) -> Any:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(total_training_samples=samples, train_batch_size_samples=64, lr=1e-2, lr_end=1e-3)


def saelens_directory(folder: Path) -> dict[str, Any]:
    """SAELens's own runner on the export, with a model that it runs nothing on."""
    import sae_lens
    from datasets import Dataset
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    rows = load_file(folder / "rows.safetensors")
    width = rows["acts"].shape[1]
    cfg = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae(width).cfg,
        model_name="none",
        hook_name=HOOK,
        dataset_path="none",
        context_size=SIZE,
        use_cached_activations=True,
        cached_activations_path=str(folder / "out"),
        store_batch_size_prompts=4,
        n_batches_in_buffer=16,
        train_batch_size_tokens=64,
        training_tokens=64 * 400,
        lr=1e-2,
        device="cpu",
        act_store_device="cpu",
        n_eval_batches=0,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        save_final_checkpoint=False,
    )
    model = HookedTransformer(
        HookedTransformerConfig(n_layers=2, d_model=width, n_ctx=SIZE, d_head=4, d_vocab=9, act_fn="relu")
    )
    tokens = Dataset.from_dict({"tokens": [[1] * SIZE] * 4})
    runner = sae_lens.LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tokens)
    before = unexplained(runner.sae(rows["acts"]), rows["acts"])
    acts, ids = zip(*[runner.activations_store.get_raw_llm_batch() for _ in range(3)], strict=True)
    same = torch.equal(torch.cat(acts), rows["acts"][: 3 * 4 * SIZE])
    same_tokens = torch.equal(torch.cat(ids), rows["token_ids"][: 3 * 4 * SIZE].float())
    trained = runner.run()
    after = unexplained(trained(rows["acts"]), rows["acts"])
    return {"same": same, "same_tokens": same_tokens, "before": before, "after": after}


def saelens_batches(folder: Path) -> dict[str, Any]:
    from sae_lens import SAETrainer

    from flex_model.store import ActivationStore, RowDataset
    from flex_model.store.export import Batches

    rows = load_file(folder / "rows.safetensors")["acts"]
    model = sae(rows.shape[1])
    before = unexplained(model(rows), rows)
    data = RowDataset(ActivationStore(folder / "acts"), sites=["model.layers.1"], batch_size=64)
    provider = Batches(data)
    SAETrainer(cfg=trainer_config(64 * 400), sae=model, data_provider=provider).fit()
    state = provider.state_dict()
    taken = state["epoch"] * len(data) + state["batches"]
    return {"before": before, "after": unexplained(model(rows), rows), "taken": taken}


def saelens_hooks(folder: Path) -> dict[str, Any]:
    """Two SAEs of two widths on one stream of tokens."""
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    from flex_model.store import ActivationStore, RowDataset
    from flex_model.store.export import HookBatches

    store = ActivationStore(folder / "acts")
    hooks = {"model.layers.1": HOOK, "model.layers.1.mlp": "blocks.1.hook_mlp_out"}
    rows = {hook: store[site].torch().flatten(1).float() for site, hook in hooks.items()}
    saes = {hook: sae(held.shape[1]) for hook, held in rows.items()}
    before = [unexplained(saes[hook](held), held) for hook, held in rows.items()]
    provider = HookBatches(RowDataset(store, batch_size=64), hook_names=hooks)
    MultiSAETrainer(trainer_config(64 * 400), saes, {hook: hook for hook in saes}, data_provider=provider).fit()
    return {"before": before, "after": [unexplained(saes[hook](held), held) for hook, held in rows.items()]}


def sparsify_replay(folder: Path) -> dict[str, Any]:
    """Its trainer on the CPU, killed at a checkpoint and gone on with; and transcoders."""
    import sparsify
    from sparsify import utils

    from flex_model.store import ActivationStore, RowDataset
    from flex_model.store.export import Replay

    store = ActivationStore(folder / "acts")
    rows = {name: store[name].torch().flatten(1).float() for name in store.sites}
    os.chdir(folder)

    def trainer(epochs: int, name: str, *, transcode: bool = False) -> Any:
        inputs = {"model.layers.1.mlp": "model.layers.1"} if transcode else {}
        data = RowDataset(store, batch_size=32)
        points = {"model.layers.1": "layers.1", "model.layers.1.mlp": "layers.1.mlp"}
        points = {"model.layers.1.mlp": "layers.1.mlp"} if transcode else points
        replay = Replay(data, hookpoints=points, inputs=inputs, epochs=epochs)
        config = sparsify.SparseCoderConfig(k=4, expansion_factor=3, transcode=transcode, skip_connection=transcode)
        made = sparsify.TrainConfig(
            config,
            batch_size=2,
            hookpoints=["layers.1.mlp" if transcode else "layers.1*"],
            log_to_wandb=False,
            run_name=name,
            optimizer="adam",
            lr=1e-2,
            lr_warmup_steps=1,
            save_every=10**6,
        )
        return sparsify.Trainer(made, replay.dataset, replay.model)

    def end(made: Any) -> dict[str, float]:
        return {n: float(made.saes[n](rows[f"model.{n}"]).fvu) for n in made.saes}

    whole = trainer(20, "whole")
    before = end(whole)
    whole.fit()
    half = trainer(10, "half")
    half.fit()
    rest = trainer(20, "half")
    rest.load_state("checkpoints/half")
    steps = rest.global_step
    rest.fit()
    across = trainer(20, "across", transcode=True)
    across.fit()
    (name,) = across.saes
    out = across.saes[name](rows["model.layers.1"], rows["model.layers.1.mlp"])
    return {
        "decoder": utils.decoder_impl.__name__,
        "before": before,
        "after": end(whole),
        "steps": [steps, rest.global_step, whole.global_step],
        "resumed": end(rest),
        "transcoder": [name, float(out.fvu)],
        "saved": sorted(os.listdir("checkpoints/whole")),
    }


TASKS = {f.__name__: f for f in (saelens_directory, saelens_batches, saelens_hooks, sparsify_replay)}

if __name__ == "__main__":
    found = TASKS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(found))
