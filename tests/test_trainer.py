"""transformers' Trainer with hooks on: FlexModel as its model, or hooks on the model it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

STEPS, BATCH, ROWS = 3, 4, 16
LOOKED_AT, EDITED = "model.layers.0.mlp", "model.layers.1.mlp"
ENGINES = ("ddp", "fsdp2", "transformers")

# Trainer itself refuses to resume a model that transformers sharded at load time.
RESUMES = ("ddp", "fsdp2")


def rows() -> Any:
    """Sixteen rows, with a column that no model takes."""
    ids = models.inputs("llama", ROWS)["input_ids"].tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "weight": [[1.0]] * ROWS})


def trainer(model: nn.Module, engine: str, folder: Path, **options: Any) -> Any:
    size = BATCH // dist.get_world_size()
    if engine == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **options,
    )
    if engine == "fsdp2":
        _pretend_accelerators(args)
    return transformers.Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows())


def _pretend_accelerators(args: Any) -> None:
    """accelerate has FSDP for accelerators only; told that the ranks are some, it shards CPU tensors as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def probe(trained: bool) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(32, 32).requires_grad_(trained)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def use(module: nn.Module, x: Tensor, save_ctx: object, modules: nn.ModuleDict) -> Tensor:
    return modules["probe"](x)


def oracle(folder: Path, trained: bool) -> None:
    """Trainer on one process, torch's own hooks on the plain model."""
    seen: list[Tensor] = []
    model = models.make("llama")
    model.probe = probe(trained)
    model.get_submodule(LOOKED_AT).register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    model.get_submodule(EDITED).register_forward_hook(lambda m, a, out: model.probe(out))
    one = trainer(model, "ddp", folder, save_strategy="no")
    one.train()
    found = {"losses": losses(one), "eval_loss": one.evaluate()["eval_loss"], "seen": seen, "state": model.state_dict()}
    torch.save(found, folder / f"{trained}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the oracle's results lie, and the plain model."""
    path = tmp_path_factory.mktemp("trainer")
    models.make("llama").save_pretrained(path / "plain")
    for trained in (True, False):
        run_world(1, oracle, path, trained)
    return path


def hooked(engine: str, folder: Path, trained: bool) -> FlexModel:
    model = models.make("llama")
    if engine == "transformers":
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(fsdp_size=2)
        model = type(model).from_pretrained(
            folder / "plain", distributed_config=config, attn_implementation="eager", use_cache=False
        )
    fm = FlexModel(model, deliver="all")
    fm.register_trainable_module("probe", probe(trained))
    fm.register_forward_hook(HookFunction(LOOKED_AT))
    # Evaluation of the plain model under DDP is not in lockstep, so that there an edit sees its own rows only.
    axes = () if engine == "ddp" and not trained else None
    fm.register_forward_hook(HookFunction(EDITED, editing_function=use, capture=False, axes=axes))
    fm.register_forward_hook(HookFunction("model.norm", editing_function=lambda x: x * 0))
    fm.update_hook_groups("layers", "wanted")
    return fm


def wrong_weights(fm: FlexModel, state: dict[str, Tensor]) -> list[str]:
    bad = []
    for name, want in state.items():
        own = name.startswith("probe.")
        got = fm.trainable_modules.get_parameter(name).detach() if own else fm.get_module_parameter(name)
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        if relative_error(got, want) > 1e-5:
            bad.append(f"{name}: off by {relative_error(got, want):.2g}")
    return bad


def saved_keys(folder: Path) -> set[str]:
    from safetensors.torch import load_file

    return set(load_file(folder / "model.safetensors"))


def _trained(engine: str, wrapped: bool, folder: Path) -> None:
    """``wrapped``: Trainer gets FlexModel, and trains the probe too."""
    want = torch.load(folder / f"{wrapped}.pt")
    out = folder / f"{engine}-{wrapped}"
    # Trainer saves what is no PreTrainedModel key by key, which transformers' own sharding does not allow.
    saves = {} if engine in RESUMES else {"save_strategy": "no"} if wrapped else {"save_only_model": True}
    fm = hooked(engine, folder, wrapped)
    run = trainer(fm if wrapped else fm.module, engine, out, **saves)
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "labels"}
    with fm.groups("wanted"):
        run.train()
        captured = list(fm.output_ptr[LOOKED_AT])
        eval_loss = run.evaluate()["eval_loss"]
        fm.flush()
    assert "model.norm" not in fm.output_ptr
    assert len(captured) == STEPS and len(fm.output_ptr[LOOKED_AT]) == STEPS + ROWS // BATCH
    for got, value in zip(fm.output_ptr[LOOKED_AT], want["seen"], strict=True):
        assert relative_error(got, value) < 1e-5
    assert losses(run) == pytest.approx(want["losses"], rel=1e-5)
    assert eval_loss == pytest.approx(want["eval_loss"], rel=1e-5)
    assert wrong_weights(fm, want["state"]) == []
    if saves.get("save_strategy") == "no":
        fm.save_pretrained(out)
        dist.barrier()
        assert saved_keys(out) == {k for k in want["state"] if not k.startswith("probe.")}
        return
    own = {k if not k.startswith("probe.") else f"trainable_modules.{k}" for k in want["state"]}
    keys = own if wrapped else {k for k in own if not k.startswith("trainable_modules.")}
    assert saved_keys(out / "checkpoint-2") == keys
    if engine in RESUMES:
        again = hooked(engine, folder, wrapped)
        with torch.no_grad():
            for parameter in again.module.parameters():
                parameter.zero_()
        with again.groups("wanted"):
            run = trainer(again if wrapped else again.module, engine, out)
            run.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        assert run.state.global_step == STEPS and len(again.output_ptr[LOOKED_AT]) == 1
        assert wrong_weights(again, want["state"]) == []


@pytest.mark.parametrize("wrapped", [True, False], ids=["flex_model", "plain_model"])
@pytest.mark.parametrize("engine", ENGINES)
def test_trainer(engine: str, wrapped: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_world(2, _trained, engine, wrapped, folder)
