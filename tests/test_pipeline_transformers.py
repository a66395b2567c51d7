"""transformers' ``DistributedConfig(pp_size=)``, alone and over tensor parallelism: one script on all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import Count, leaves, plain_hooks, relative_error
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction, Site
from flex_model.errors import FlexModelError, RegistrationError

FAMILIES = ("llama", "qwen3", "gemma3", "qwen3_moe", "mixtral")


def load(family: str, path: Path, **sizes: int) -> tuple[nn.Module, nn.Module]:
    from transformers.distributed import DistributedConfig

    plain = models.make(family)
    config = DistributedConfig(pp_size=2, **sizes)
    return plain, type(plain).from_pretrained(path, distributed_config=config, attn_implementation="eager").eval()


def _every_module(family: str, path: Path) -> tuple[Count, list[str]]:
    plain, model = load(family, path)
    batch, count = models.inputs(family), Count()
    fm = FlexModel(model)
    with torch.no_grad():
        want = plain_hooks(plain, lambda m: m(**batch).logits, backward=False)
        with (
            fm.capture("", "**", unpack_idx="all") as out,
            fm.capture("", "**", hook_type="forward_pre", unpack_idx="all") as into,
        ):
            logits = fm(**batch).logits
    assert relative_error(logits, plain(**batch).logits) < 1e-5
    for (name, kind, index), values in want.items():
        several = sum(1 for n, k, _ in want if (n, k) == (name, kind)) > 1
        key = Site(name, kind, index) if several else name
        try:
            got: Any = {"forward": out, "forward_pre": into}[kind].calls(key)
        except (FlexModelError, KeyError) as error:
            got = error
        count.add(f"{name or '(root)'}.{kind}[{index}]", got, values)
    missing = [n for n, m in plain.named_modules() if n not in fm.wrapped_module_names]
    return count, missing


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module(family: str, tmp_path: Path) -> None:
    models.make(family).save_pretrained(tmp_path)
    for count, missing in run_world(2, _every_module, family, tmp_path):
        print(f"{family}/pp of 2: {count}")
        assert not count.wrong and not count.refused and not missing


def _with_tensor_parallelism(path: Path) -> None:
    with pytest.raises(KeyError, match=r"model\.(embed_tokens|layers.*)\.weight"):
        load("llama", path, tp_size=2)


def test_what_the_engine_cannot_run(tmp_path: Path) -> None:
    models.make("llama").save_pretrained(tmp_path)
    run_world(4, _with_tensor_parallelism, tmp_path)
    print("transformers/pp x tp: not run, transformers 5.23 looks for weights of other stages and fails")


def _use(path: Path) -> None:
    plain, model = load("llama", path)
    batch = models.inputs("llama")
    fm = FlexModel(model)
    last = "model.layers.1.mlp"

    def write(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        return x * 1.5

    plain.get_submodule("model.layers.0.mlp.act_fn").register_forward_hook(lambda m, a, o: o * 1.5)
    plain.get_submodule(last).register_forward_hook(lambda m, a, o: o - o.mean(-1, keepdim=True))
    fm.register_forward_hook(HookFunction("model.layers.0.mlp.act_fn", editing_function=write))
    fm.register_forward_hook(HookFunction(last, editing_function=lambda x: x - x.mean(-1, keepdim=True)))
    with torch.no_grad():
        want = plain(**batch).logits
        got = fm(**batch).logits
        assert relative_error(got, want) < 1e-5 and relative_error(fm.full_output(fm(**batch)).logits, want) < 1e-5
        for name, parameter in plain.named_parameters():
            assert torch.equal(fm.get_module_parameter(name), parameter)
        if dist.get_rank() == 0:
            assert [len(v) for v in fm.output_ptr.values()] == [2, 2]
        else:
            assert not fm.output_ptr
        fm.config.use_cache = plain.config.use_cache = True
        with fm.capture(last, "model.layers.0") as acts:
            mine = fm.generate(**batch, max_new_tokens=4, do_sample=False)
        theirs = plain.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(mine, theirs)
    assert [tuple(v.shape) for v in acts.calls(last)] == [(4, 6, 32)] + [(4, 1, 32)] * 3
    with pytest.raises(RegistrationError, match="no gradients back"):
        fm.register_full_backward_hook(HookFunction("lm_head"))
    assert leaves(acts.calls("model.layers.0"))


def test_edits_parameters_and_generate(tmp_path: Path) -> None:
    models.make("llama").save_pretrained(tmp_path)
    run_world(2, _use, tmp_path)
