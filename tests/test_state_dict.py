"""FlexModel as a module: its state, its names, its signature, and what it hands on to the wrapped model."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import inputs, make, net, tokens
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from worlds import run_world

from flex_model import FlexModel, HookFunction

KEYS = list(net().state_dict())


def probed(model: nn.Module) -> FlexModel:
    fm = FlexModel(model)
    fm.register_trainable_module("probe", nn.Linear(8, 8))
    fm.register_forward_hook(HookFunction("norm", editing_function=lambda m, x, c, modules: modules["probe"](x)))
    return fm


def test_keys_are_the_plain_models_and_those_of_trainable_modules():
    fm = probed(net())
    state = fm.state_dict()
    assert sorted(state) == sorted([*KEYS, "trainable_modules.probe.weight", "trainable_modules.probe.bias"])
    assert all(state[k].data_ptr() == v.data_ptr() for k, v in fm.module.state_dict().items())
    assert sorted(fm.state_dict(prefix="x.")) == sorted(f"x.{k}" for k in state)


def test_round_trip():
    one, two = probed(net()), probed(net())
    with torch.no_grad():
        for p in one.parameters():
            p.add_(torch.randn_like(p))
    before = dict(state := one.state_dict())
    missing, unexpected = two.load_state_dict(state)
    assert not missing and not unexpected and dict(state) == before
    assert torch.equal(one(tokens()), two(tokens()))


def test_a_plain_models_state_and_this_one_are_exchangeable():
    plain, fm = net(), FlexModel(net())
    with torch.no_grad():
        plain.head.weight.mul_(2)
    fm.load_state_dict(plain.state_dict())
    assert torch.equal(fm(tokens()), plain(tokens()))
    other = net()
    other.load_state_dict(fm.state_dict())
    assert torch.equal(other(tokens()), plain(tokens()))


def test_strict_loading_names_plain_keys():
    fm = FlexModel(net())
    state = fm.state_dict()
    state["zzz"] = state.pop("head.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*head\.weight.*Unexpected.*zzz"):
        fm.load_state_dict(state)
    missing, unexpected = fm.load_state_dict(state, strict=False)
    assert [n.removeprefix("module.") for n in missing] == ["head.weight"]
    assert [n.removeprefix("module.") for n in unexpected] == ["zzz"]


def test_inside_another_module():
    outer = nn.Sequential(FlexModel(net()), nn.Identity())
    assert list(outer.state_dict()) == [f"0.{k}" for k in KEYS]
    nn.Sequential(FlexModel(net()), nn.Identity()).load_state_dict(outer.state_dict())


def _keys_of_a_wrapped_model(how: str) -> None:
    wrapped = DDP(net()) if how == "ddp" else torch.compile(net())
    fm = FlexModel(wrapped)
    assert list(fm.state_dict()) == KEYS
    state = {k: v + 1 for k, v in net().state_dict().items()}
    fm.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in fm.state_dict().items())


def test_wrappers_leave_no_trace_in_keys_compile():
    _keys_of_a_wrapped_model("compile")


def test_wrappers_leave_no_trace_in_keys_ddp():
    run_world(1, _keys_of_a_wrapped_model, "ddp")


def test_names_of_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fm = FlexModel(model)
    fm.register_trainable_module("probe", nn.BatchNorm1d(1))
    assert [n for n, _ in fm.named_parameters()] == [
        *dict(model.named_parameters()),
        "trainable_modules.probe.weight",
        "trainable_modules.probe.bias",
    ]
    assert [n for n, _ in fm.named_buffers()] == [
        *dict(model.named_buffers()),
        *(f"trainable_modules.probe.{b}" for b in ("running_mean", "running_var", "num_batches_tracked")),
    ]
    assert {id(p) for p in fm.parameters()} == {id(p) for _, p in fm.named_parameters()}
    assert next(iter(fm.named_parameters(prefix="p")))[0] == "p.0.weight"


def test_a_tied_parameter_is_listed_once():
    model = net()
    model.head.weight = model.emb.weight
    fm = FlexModel(model)
    assert [n for n, _ in fm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert len(list(fm.parameters())) == len(list(model.parameters()))


def test_an_optimizer_over_the_wrapper_trains_the_probe():
    fm = probed(net())
    before = [p.clone() for p in fm.parameters()]
    optimizer = torch.optim.SGD(fm.parameters(), lr=0.1)
    fm(tokens()).pow(2).mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, fm.parameters(), strict=True))


def test_signature_is_the_wrapped_models():
    for model in (net(), make("llama"), nn.Linear(2, 2)):
        inner = inspect.signature(model.forward).parameters
        outer = inspect.signature(FlexModel(model).forward).parameters
        assert [n for n in outer if n not in ("groups", "complement")] == list(inner)
        assert all(outer[n].default is inner[n].default for n in inner)
        assert outer["groups"].default == "all" and outer["complement"].default is False
        assert outer["groups"].kind is inspect.Parameter.KEYWORD_ONLY


def test_unknown_attributes_reach_the_wrapped_model():
    model = make("llama")
    fm = FlexModel(model)
    assert (
        fm.config is model.config and fm.model is model.model and fm.get_input_embeddings() is model.model.embed_tokens
    )
    assert not hasattr(fm, "zzz") and fm.dtype == torch.float32
    with pytest.raises(AttributeError, match="zzz"):
        _ = fm.zzz


def test_generate_is_the_wrapped_models():
    batch = inputs("llama", 2, 5)
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = make("llama").generate(**batch, **settings)
    fm = FlexModel(make("llama"), {})
    fm.register_forward_hook(HookFunction("lm_head"))
    assert torch.equal(fm.generate(**batch, **settings), expected)
    assert [v.shape[1] for v in fm.output_ptr["lm_head"]] in ([5, 1, 1, 1], [1, 1, 1, 1])


def test_modes_dtype_and_device_moves_reach_the_wrapped_model():
    fm = probed(net())
    fm.eval()
    assert not any(m.training for m in fm.module.modules())
    fm.train().double()
    assert fm.module.training and all(p.dtype == torch.float64 for p in fm.parameters())
    assert fm(tokens()).dtype == torch.float64
    fm.requires_grad_(False)
    assert not any(p.requires_grad for p in fm.module.parameters())


def test_the_wrapper_starts_in_the_models_mode():
    assert FlexModel(net()).training is True
    assert FlexModel(net().eval()).training is False


def test_save_pretrained_writes_the_plain_model(tmp_path):
    model = make("llama")
    FlexModel(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


def test_the_engines_output_is_returned_as_it_is():
    class Odd(nn.Module):
        def forward(self, x):
            return self.out

    model = Odd()
    model.out = {"a": torch.ones(1), "b": object()}
    fm = FlexModel(model)
    with fm.capture(""):
        assert fm(torch.ones(1)) is model.out
