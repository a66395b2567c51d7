"""``fm.capture`` and ``fm.edit`` on one process: what they hold, how long, and what they say of the rest."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import installed, keep, same_gradients, torch_hook
from models import net, tokens
from safetensors import safe_open
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction, Site, edits
from flex_model.errors import DeliveryError, NameNotFoundError

MLPS = ["layers.0.mlp", "layers.1.mlp"]


def oracle(names=MLPS, *, kind="forward", batch=4) -> dict[str, Tensor]:
    model, seen = net(), {n: [] for n in names}
    for name in names:
        torch_hook(model, name, kind, keep(seen[name]))
    model(tokens(batch)).pow(2).mean().backward()
    return {n: values[0] for n, values in seen.items()}


def test_capture_by_glob_list_and_predicate():
    fm, expected = FlexModel(net()), oracle()
    for pattern in ("layers.*.mlp", MLPS, lambda n: n.endswith("mlp")):
        with fm.capture(pattern) as acts:
            fm(tokens())
        assert list(acts) == MLPS and len(acts) == 2
        assert all(torch.equal(acts[n], expected[n]) for n in MLPS)
    assert fm.output_ptr == {} and installed(fm.module) == 0


def test_values_are_there_when_the_forward_is_over():
    fm, expected = FlexModel(net()), oracle()
    with fm.capture("layers.*.mlp") as acts:
        fm(tokens())
        assert torch.equal(acts[MLPS[0]], expected[MLPS[0]])


def test_a_name_that_two_patterns_match_is_captured_once():
    fm = FlexModel(net())
    with fm.capture("layers.*.mlp", "layers.0.mlp", "module.layers.0.mlp") as acts:
        fm(tokens())
    assert len(acts) == 2 and [len(acts.calls(k)) for k in acts] == [1, 1]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_capture_of_every_type(kind):
    fm, expected = FlexModel(net()), oracle(kind=kind)
    with fm.capture("layers.*.mlp", hook_type=kind) as acts:
        fm(tokens()).pow(2).mean().backward()
    assert all(torch.equal(acts[n], expected[n]) for n in MLPS)


def test_capture_of_parameter_gradients():
    fm, plain = FlexModel(net()), net()
    fm.module.norm.bias.requires_grad_(False)
    with fm.capture("**", hook_type="tensor") as acts:
        for model in (fm, plain):
            model(tokens()).pow(2).mean().backward()
    assert set(acts) == {n for n, _ in plain.named_parameters()} - {"norm.bias"}
    assert all(torch.equal(acts[n], plain.get_parameter(n).grad) for n in acts)


def test_calls_stack_and_the_only_call():
    fm = FlexModel(net())
    with fm.capture("layers.*.mlp") as acts:
        fm(tokens(4)), fm(tokens(2))
    expected = [oracle(batch=b)[MLPS[0]] for b in (4, 2)]
    assert all(torch.equal(a, b) for a, b in zip(acts.calls(MLPS[0]), expected, strict=True))
    with pytest.raises(KeyError, match=r"2 calls.*calls\('layers\.0\.mlp'\)"):
        _ = acts[MLPS[0]]
    with fm.capture("layers.*.mlp", "head") as acts:
        fm(tokens())
    stacked = acts.stack("layers.*.mlp")
    assert torch.equal(stacked, torch.stack(list(oracle().values())))
    assert torch.equal(acts.stack(MLPS), stacked) and torch.equal(acts.stack(lambda n: "mlp" in n), stacked)
    with pytest.raises(NameNotFoundError, match="zzz"):
        acts.stack("zzz")


def test_what_is_missing_says_why():
    fm = FlexModel(net())
    with fm.capture("layers.*.mlp", grad=True) as acts:
        with pytest.raises(DeliveryError, match=r"'layers\.0\.mlp' has not arrived"):
            _ = acts[MLPS[0]]
        fm(tokens())
    with pytest.raises(KeyError, match=r"'head' was not asked for.*'layers.0.mlp'"):
        _ = acts["head"]
    with pytest.raises(KeyError, match=r"gradient of 'layers.0.mlp' has not arrived.*backward"):
        acts.grad(MLPS[0])
    assert "head" not in acts and MLPS[0] in acts and acts.get("head") is None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_gradients_of_what_was_captured(kind, frozen):
    backward = {"forward": "full_backward_pre", "forward_pre": "full_backward"}[kind]
    expected, grads = oracle(kind=kind), oracle(kind=backward)
    fm = FlexModel(net().requires_grad_(not frozen))
    with fm.capture("layers.*.mlp", hook_type=kind, grad=True) as acts:
        fm(tokens()).pow(2).mean().backward()
    for name in MLPS:
        assert torch.equal(acts[name], expected[name])
        assert torch.equal(acts.grad(name), grads[name])
        assert not acts[name].requires_grad
    assert all(p.grad is None for p in fm.parameters()) == frozen


def test_each_backward_has_its_gradient():
    fm, seen, plain = FlexModel(net()), [], net()
    torch_hook(plain, "head", "full_backward_pre", keep(seen))
    with fm.capture("head", grad=True) as acts:
        for model in (fm, plain):
            for batch in (2, 3):
                model(tokens(batch)).pow(2).mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(acts.grads("head"), seen, strict=True))
    with pytest.raises(KeyError, match=r"grads\('head'\)"):
        acts.grad("head")


def test_attached_values_take_part_in_autograd():
    fm, plain, live = FlexModel(net()), net(), {}
    plain.layers[0].mlp.register_forward_hook(lambda m, a, out: live.update(x=out))
    with fm.capture(MLPS[0], detach=False) as acts:
        out = fm(tokens())
    mine = torch.autograd.grad(out.pow(2).mean(), acts[MLPS[0]], retain_graph=True)
    theirs = torch.autograd.grad(plain(tokens()).pow(2).mean(), live["x"], retain_graph=True)
    assert torch.equal(acts[MLPS[0]], live["x"]) and torch.equal(mine[0], theirs[0])
    (acts[MLPS[0]].pow(2).sum() + out.sum()).backward()
    plain.zero_grad()
    out, _ = plain(tokens()), None
    (live["x"].pow(2).sum() + out.sum()).backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(fm.module.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6), name


def test_captures_nest():
    fm, expected = FlexModel(net()), oracle()
    with fm.capture("layers.0.mlp") as outer:
        fm(tokens())
        with fm.capture("layers.*.mlp") as inner:
            fm(tokens())
        fm(tokens())
    assert len(outer.calls(MLPS[0])) == 3 and len(inner.calls(MLPS[0])) == 1
    assert list(outer) == MLPS[:1] and torch.equal(inner[MLPS[1]], expected[MLPS[1]])


def test_edits_nest_in_the_order_they_were_entered():
    fm, plain = FlexModel(net()), net()
    torch_hook(plain, MLPS[0], "forward", lambda x: (x + 1) * 3)
    with fm.edit(MLPS[0], lambda x: x + 1), fm.edit(MLPS[0], lambda x: x * 3):
        assert torch.equal(fm(tokens()), plain(tokens()))
    assert torch.equal(fm(tokens()), net()(tokens())) and fm.output_ptr == {}


def test_a_capture_sees_the_edits_before_it_and_not_those_after():
    fm, expected = FlexModel(net()), oracle()[MLPS[0]]
    with fm.capture(MLPS[0]) as early, fm.edit(MLPS[0], edits.scale(2.0)), fm.capture(MLPS[0]) as late:
        fm(tokens())
    assert torch.equal(early[MLPS[0]], expected) and torch.equal(late[MLPS[0]], expected * 2)


def test_an_edit_over_a_pattern_takes_the_hooks_keywords():
    fm, plain, given = FlexModel(net()), net(), []
    for name in MLPS:
        torch_hook(plain, name, "forward_pre", lambda x: torch.cat([x[:, :-1], x[:, -1:] * 2], 1))
    with fm.edit(
        "layers.*.mlp",
        lambda x: (given.append(x.shape), x * 2)[1],
        hook_type="forward_pre",
        select=(slice(None), -1),
    ) as hooks:
        assert torch.equal(fm(tokens()), plain(tokens()))
        assert [h.module_name for h in hooks] == MLPS
    assert given == [(4, 8)] * 2
    with fm.edit(MLPS[0], lambda x: x * 2, capture=True):
        fm(tokens())
    assert torch.equal(fm.output_ptr[MLPS[0]][0], oracle()[MLPS[0]])


@pytest.mark.parametrize(
    ("preset", "same"),
    [
        (edits.add(torch.arange(8.0), scale=0.5), lambda x: x + 0.5 * torch.arange(8.0)),
        (edits.scale(3.0), lambda x: x * 3.0),
        (edits.zero(), torch.zeros_like),
        (edits.zero([1, 3]), lambda x: x * torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1])),
        (edits.zero([0], dim=1), lambda x: torch.cat([x[:, :1] * 0, x[:, 1:]], 1)),
    ],
)
def test_presets(preset, same):
    fm, plain = FlexModel(net()), net()
    torch_hook(plain, MLPS[0], "forward", same)
    with fm.edit(MLPS[0], preset):
        out = fm(tokens())
        out.pow(2).mean().backward()
    expected = plain(tokens())
    expected.pow(2).mean().backward()
    assert torch.equal(out, expected) and same_gradients(fm.module, plain)


def test_save_writes_every_call_and_gradient(tmp_path):
    fm = FlexModel(net())
    with fm.capture("layers.*.mlp", grad=True) as acts:
        for batch in (4, 2):
            fm(tokens(batch)).pow(2).mean().backward()
    path = acts.save(tmp_path / "acts.safetensors")
    expected = {}
    for i, batch in enumerate((4, 2)):
        for n in MLPS:
            end = f"#{i}" if i else ""
            expected[n + end] = oracle(batch=batch)[n]
            expected[f"grad:{n}{end}"] = oracle(batch=batch, kind="full_backward_pre")[n]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(expected) == set(json.loads(file.metadata()["flex_model.names"]))
        assert all(torch.equal(file.get_tensor(k), v) for k, v in expected.items())


def test_save_of_views_and_sites(tmp_path):
    from safetensors.torch import load_file

    fm = FlexModel(net())
    with fm.capture("layers.0.mlp", select=lambda x: x.transpose(0, 1)[:, :2], unpack_idx="all") as acts:
        fm(tokens())
    loaded = load_file(acts.save(tmp_path / "a.safetensors"))
    assert torch.equal(loaded["layers.0.mlp"], oracle()[MLPS[0]].transpose(0, 1)[:, :2])


class Overwritten(nn.Module):
    """Later layers write in place into what earlier ones returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x + 0))
        return x.mul_(7)


@pytest.mark.parametrize("device", ["cpu", None])
@pytest.mark.parametrize("detach", [True, False])
def test_captured_values_are_copies(device, detach):
    x = torch.randn(3, 4)
    fm = FlexModel(Overwritten(), {}, device=device)
    fm.register_forward_hook(HookFunction("first"))
    fm.register_forward_pre_hook(HookFunction("second"))
    with fm.capture("first", "second", detach=detach) as acts, torch.no_grad():
        out = fm(x)
    out.zero_()
    assert torch.equal(acts["first"], x) and torch.equal(acts["second"], x.relu())
    assert torch.equal(fm.output_ptr["first"][0], x) and torch.equal(fm.output_ptr["second"][0], x)


def test_captured_values_are_copies_of_views_too():
    x, fm = torch.randn(3, 4), FlexModel(nn.Sequential(nn.Flatten(0), nn.ReLU(inplace=True)))
    with fm.capture("0") as acts, torch.no_grad():
        fm(x.clone())
    assert torch.equal(acts["0"], x.flatten())


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("select", [None, (slice(None), -1)])
def test_under_inference_mode_captures_are_ordinary_tensors(kind, select):
    fm = FlexModel(net(), {})
    fm.register_forward_hook(HookFunction("norm"))
    with fm.capture("layers.0.mlp", hook_type=kind, select=select) as acts, torch.inference_mode():
        fm(tokens())
    for value in (acts["layers.0.mlp"], fm.output_ptr["norm"][0]):
        assert not value.is_inference()
        weight = torch.ones(8, requires_grad=True)
        (value * weight).sum().backward()
        assert torch.equal(weight.grad, value.reshape(-1, 8).sum(0))
    expected = oracle(kind=kind)["layers.0.mlp"]
    assert torch.equal(acts["layers.0.mlp"], expected if select is None else expected[:, -1])


def test_edits_under_inference_mode():
    fm, plain = FlexModel(net()), net()
    torch_hook(plain, "norm", "forward", lambda x: x * 2)
    with torch.inference_mode(), fm.edit("norm", lambda x: x.mul_(2)):
        assert torch.equal(fm(tokens()), plain(tokens()))


def test_an_exception_in_the_block_takes_the_hooks_off():
    fm = FlexModel(net())
    with pytest.raises(ZeroDivisionError), fm.capture("**") as acts, fm.edit("head", lambda x: x * 2):
        fm(tokens())
        raise ZeroDivisionError
    assert installed(fm.module) == 0 and fm.hooks() == [] and len(acts) > 3


def test_a_model_that_is_called_by_others_is_captured():
    model = net()
    fm = FlexModel(model)
    with fm.capture("layers.0.mlp") as acts:
        model(tokens())
    assert torch.equal(acts["layers.0.mlp"], oracle()["layers.0.mlp"])
    x = torch.randn(2, 3, 8)
    with fm.capture("layers.0.mlp") as acts:
        out = model.layers[0].mlp(x)  # a part alone
    assert torch.equal(acts["layers.0.mlp"], out)


def test_full_output_and_full_batch_on_one_process():
    fm = FlexModel(net())
    out = fm(tokens())
    assert fm.full_output(out) is out
    batch = {"ids": tokens()}
    assert fm.full_batch(batch)["ids"] is batch["ids"]


def test_sites_as_keys_of_a_capture():
    class Two(nn.Module):
        def forward(self, x):
            return x, x * 2

    fm, x = FlexModel(nn.Sequential(Two())), torch.randn(3)
    with fm.capture("0", unpack_idx="all") as acts:
        fm(x)
    assert torch.equal(acts[Site("0", "forward", 1)], x * 2)
    with pytest.raises(KeyError):
        _ = acts["0"]


def test_run_is_a_block_of_one_call():
    fm, expected = FlexModel(net()), oracle()
    acts = fm.capture("layers.*.mlp").run(tokens())
    assert list(acts) == MLPS and all(torch.equal(acts[n], expected[n]) for n in MLPS)
    with fm.edit("layers.0", edits.zero()):
        plain, within = fm(tokens()), fm.capture("head").run(tokens())["head"]
    assert torch.equal(fm.edit("layers.0", edits.zero()).run(tokens()), plain) and torch.equal(within, plain)
    assert not torch.equal(fm(tokens()), plain) and installed(fm.module) == 0


def test_run_leaves_nothing_behind_when_the_model_raises():
    fm = FlexModel(net())
    for block in (fm.capture("layers.*.mlp"), fm.edit("layers.0", edits.zero())):
        with pytest.raises((TypeError, AttributeError)):
            block.run("no tensor")
        assert installed(fm.module) == 0
