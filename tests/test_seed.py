"""The example of the seed's README, as written there, and the import paths that it promises."""

from __future__ import annotations

import logging
from functools import partial

import torch
from conftest import installed, same_gradients
from models import Block, net, tokens
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from worlds import run_world

import flex_model.core
import flex_model.core.core_utils
from flex_model import FlexModel, HookFunction
from flex_model.utils import setup_logger

HIDDEN = 16
NAME = "layers.1.mlp.up"


def probe() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(HIDDEN, HIDDEN)


def editing_function(current_module, inputs, save_ctx, modules) -> Tensor:
    # Save input activation tensor for later use
    save_ctx.activation = inputs

    # Edit the activation tensor
    edited_activations = inputs * 2

    # Apply torch.nn.Modules to the activation tensor (can generate grads)
    edited_activations = modules["mlp"].forward(edited_activations)

    return edited_activations


def oracle(inputs: Tensor) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """(model, probe, activation, output) after a backward, with torch's own hook."""
    model, mlp, seen = net(), probe(), []

    def hook(module, args, out):
        seen.append(out.detach().clone())
        return mlp(out * 2)

    model.get_submodule(NAME).register_forward_hook(hook)
    out = model(inputs)
    out.pow(2).mean().backward()
    return model, mlp, seen[0], out.detach()


def hooked(model: nn.Module, output_dict: dict, ranks: int) -> FlexModel:
    model = FlexModel(
        model,
        output_dict,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=ranks,
    )
    model.register_trainable_module("mlp", probe())
    hook_function = HookFunction(
        module_name=NAME,
        expected_shape=(None, None, HIDDEN),
        editing_function=editing_function,
    )
    model.register_forward_hook(hook_function)
    return model


def test_example_on_one_process():
    inputs, output_dict = tokens(), {}
    plain, mlp, activation, expected = oracle(inputs)
    model = hooked(net(), output_dict, 1)

    out = model.forward(inputs)
    assert torch.equal(out, expected)
    assert list(output_dict) == [NAME] and torch.equal(output_dict[NAME][0], activation)
    assert torch.equal(model.save_ctx.activation, activation)

    out.pow(2).mean().backward()
    assert same_gradients(model.module, plain)
    assert same_gradients(model.trainable_modules["mlp"], mlp)


def _example_under_fsdp(inputs: Tensor) -> None:
    rank, output_dict = torch.distributed.get_rank(), {}
    wrapped = FSDP(
        net(), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("cpu")
    )
    model = hooked(wrapped, output_dict, 2)
    plain, mlp, activation, expected = oracle(inputs)

    mine = inputs.chunk(2)[rank]
    out = model.forward(mine)
    assert relative_error(out, expected.chunk(2)[rank]) < 1e-5
    assert relative_error(model.save_ctx.activation, activation) < 1e-5
    if rank == 0:
        assert [len(v) for v in output_dict.values()] == [1]
        assert relative_error(output_dict[NAME][0], activation) < 1e-5
    else:
        assert output_dict == {}

    out.pow(2).mean().backward()
    for mine, theirs in zip(model.trainable_modules["mlp"].parameters(), mlp.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-5
    with FSDP.summon_full_params(wrapped, with_grads=True):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if not n.startswith("trainable_modules.")}
    for name, parameter in plain.named_parameters():
        assert relative_error(grads[name], parameter.grad) < 1e-5, name


def test_example_under_fsdp():
    run_world(2, partial(_example_under_fsdp, tokens()))


def test_import_paths():
    assert flex_model.core.FlexModel is FlexModel is flex_model.FlexModel
    assert flex_model.core.HookFunction is HookFunction is flex_model.HookFunction
    assert flex_model.core.core_utils.DummyModule is flex_model.DummyModule


def test_dummy_module_is_a_place_to_hook():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = flex_model.DummyModule()

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return self.scores(q @ k.transpose(-1, -2)).softmax(-1)

    q, k = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    model = FlexModel(Attention())
    model.register_forward_hook(HookFunction("scores", editing_function=lambda x: x.tril()))
    assert torch.equal(model(q, k), (q @ k.transpose(-1, -2)).tril().softmax(-1))
    assert torch.equal(model.output_ptr["scores"][0], q @ k.transpose(-1, -2))


def test_setup_logger_touches_only_its_own_logger():
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    logger = setup_logger("debug")
    try:
        assert logger.name == "flex_model" and logger.level == logging.DEBUG
        assert setup_logger(logging.WARNING) is logger
        assert logger.level == logging.WARNING and len(logger.handlers) == 1
        assert (root.level, root.handlers) == before
    finally:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)


def test_the_wrapped_module_is_left_as_it_was():
    model = net()
    before = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    keys = set(vars(model))
    fm = hooked(model, {}, 1)
    fm(tokens())
    assert fm.restore() is model
    assert installed(model) == 0 and set(vars(model)) == keys
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert torch.equal(model(tokens()), net()(tokens()))
