"""Editing functions are examined before they run: what is found and what is not, at registration and in a dry run."""

from __future__ import annotations

import inspect
import linecache
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import gradients, installed, unchanged
from edits_bad import BAD, by_rank, in_a_helper, unwrapped
from edits_good import GOOD, printing
from models import inputs, make, net, tokens
from torch import nn
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits
from flex_model.check import CODES, dry_run, examine, try_edit
from flex_model.errors import EditError, EditWarning, ShapeError

PAGES = Path(__file__).parents[1] / "docs" / "errors"
RUN_KEYS = {"run", "random"}


# -- reading ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_found_in_ordinary_edits(name):
    fn, keywords = GOOD[name]
    assert [str(f) for f in examine(fn, **keywords)] == []


@pytest.mark.parametrize("name", BAD)
def test_what_goes_wrong_is_found(name):
    fn, keywords, codes = BAD[name]
    found = examine(fn, **keywords)
    assert {f.code for f in found} == codes
    for one in found:
        assert one.page == f"docs/errors/{one.code}.md"
        assert one.sentence.endswith(".") and "\n" not in one.sentence
        assert one.line == 0 or str(one.line) in one.sentence or one.code in ("FM101",)


def test_every_kind_of_reading_is_among_the_examples():
    of_reading = {c for c in CODES if c < "FM16"}
    assert {c for _, _, codes in BAD.values() for c in codes} == of_reading
    assert len(GOOD) >= 25 and len(BAD) >= 40
    print(f"examples: {len(GOOD)} without a finding, {len(BAD)} with theirs")


def test_the_line_is_that_of_the_file():
    first = inspect.getsourcelines(by_rank)[1]
    assert [f.line for f in examine(by_rank)] == [first + 2]  # below its decorator
    (found,) = examine(BAD["lambda over lines"][0])
    assert "torch.rand" in linecache.getline(__file__.replace("test_examine", "edits_bad"), found.line)
    (helper,) = examine(in_a_helper)
    assert "double()" in helper.sentence and helper.line > inspect.getsourcelines(in_a_helper)[1]


SOURCELESS = {
    "def edit(x):\n    import torch.distributed as dist\n    return x * dist.get_rank()": "FM111",
    "import torch\ndef edit(x):\n    return x + torch.randn_like(x)": "FM121",
    "import numpy as np\ndef edit(x):\n    return x * np.random.rand()": "FM122",
    "def edit(x):\n    print(x.shape)\n    return x": "FM141",
    "seen = []\ndef edit(x):\n    seen.append(x)\n    return x": "FM142",
    "count = 0\ndef edit(x):\n    global count\n    count += 1\n    return x": "FM142",
    "import torch.distributed as dist\ndef edit(x):\n    dist.all_reduce(x)\n    return x": "FM114",
    "edit = lambda x: x.full_tensor()": "FM114",
    "import time\nedit = lambda x: x * time.time()": "FM113",
    "import os\nedit = lambda x: x * os.getpid()": "FM113",
}


@pytest.mark.parametrize("source", SOURCELESS)
def test_without_source_the_bytecode_is_read(source):
    space: dict = {}
    exec(source, space)
    assert SOURCELESS[source] in {f.code for f in examine(space["edit"])}


@pytest.mark.parametrize(
    "source",
    ["edit = lambda x: x * 2", "import torch\ndef edit(x):\n    y = x.clone()\n    y[0] = 0\n    return torch.relu(y)"],
)
def test_without_source_nothing_is_made_up(source):
    space: dict = {}
    exec(source, space)
    assert examine(space["edit"]) == []


def test_one_function_takes_less_than_a_millisecond():
    examine(edits.scale(2.0))
    functions = [fn for fn, _ in GOOD.values()]
    for fn in functions:  # files are read once
        examine(fn)
    start = time.process_time()
    for fn in functions:
        examine(fn)
    each = (time.process_time() - start) / len(functions)
    print(f"examined in {each * 1e3:.2f} ms each")
    assert each < 2e-3  # half a millisecond on an idle machine


# -- at registration -------------------------------------------------------------------------------------------
def test_registering_warns_once_and_at_the_functions_own_line():
    def noisy(x):
        return x + torch.randn_like(x)

    fm = FlexModel(net())
    with pytest.warns(EditWarning, match=r"FM121.*random=True.*docs/errors/FM121\.md") as told:
        fm.register_forward_hook(HookFunction("layers.0.mlp", editing_function=noisy))
    assert [(w.filename, w.lineno) for w in told] == [(__file__, inspect.getsourcelines(noisy)[1] + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.register_forward_hook(HookFunction("layers.1.mlp", editing_function=noisy))
        with fm.edit("layers.*", noisy, random=True), fm.capture("**"):
            pass


def test_the_warning_can_be_silenced_by_code():
    def told(x):
        print(x.shape)
        return x

    fm = FlexModel(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=EditWarning, message="FM141")
        fm.register_forward_hook(HookFunction("norm", editing_function=told))


def test_a_warning_that_is_an_error_leaves_nothing_registered():
    fm = FlexModel(net())
    with warnings.catch_warnings(), unchanged(fm):
        warnings.simplefilter("error")
        with pytest.raises(EditWarning, match="FM112"):
            fm.register_forward_hook(
                HookFunction("norm", editing_function=lambda x: x / torch.distributed.get_world_size())
            )


def test_a_decorator_that_hides_its_arguments_fails_as_was_said():
    fm = FlexModel(net())
    edit = unwrapped(lambda x: x * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fm.register_forward_hook(HookFunction("norm", editing_function=edit))
    with pytest.raises(TypeError):
        fm(tokens())
    assert [f.code for f in examine(edit)] == ["FM101"] and examine(printing(lambda x: x * 2)) == []


# -- the dry run -----------------------------------------------------------------------------------------------
def by_site(rows):
    return {(t.name, t.hook_type): t for t in rows}


def test_a_dry_run_meets_the_shapes_of_the_run():
    model, seen = make("llama"), {}
    fm = FlexModel(model)
    names = [n for n in fm.wrapped_module_names if not n.endswith("layers")]

    def look(x, site):
        seen.setdefault((site.name, site.hook_type), (tuple(x.shape), x.dtype))

    kinds = ("forward", "forward_pre", "full_backward")
    for name in names:
        for kind in kinds:
            if not (kind != "forward" and name in ("", "model", "model.rotary_emb", "model.embed_tokens")):
                index = "hidden_states" if name.endswith("self_attn") and kind != "forward" else 0
                hook = HookFunction(name, editing_function=look, capture=False, unpack_idx=index)
                register = {"forward_pre": fm.register_forward_pre_hook, "forward": fm.register_forward_hook}
                register.get(kind, fm.register_full_backward_hook)(hook)
    rows = dry_run(fm, inputs("llama"))
    tried = dict(seen)
    seen.clear()
    fm(**inputs("llama")).logits.pow(2).mean().backward()
    assert tried == seen and len(rows) == len(seen) and not rows.findings
    print(f"dry run shapes: {sum(tried.get(k) == v for k, v in seen.items())} exact of {len(seen)}")


def test_wrong_shapes_dtypes_and_errors_are_found_before_the_model_runs():
    model, ran = net(), []
    model.register_forward_hook(lambda m, a, out: ran.append(1))
    fm = FlexModel(model)
    wrong = {
        "layers.0.mlp": (lambda x: x[..., :4], "FM161", r"layers\.0\.mlp.*\(4, 6, 4\), expected \(4, 6, 8\)"),
        "layers.1.mlp": (
            lambda x: x + torch.zeros(8, dtype=torch.float64),
            "FM162",
            r"float64, expected torch\.float32",
        ),
        "norm": (lambda x: x @ torch.ones(3, 3), "FM163", r"RuntimeError.* at line \d+"),
        "head": (lambda x: [x][0].tolist, "FM103", "expected a tensor or None"),
        "layers.0.norm": (lambda x: x.to("meta"), "FM164", r"on meta, expected cpu; end it with \.to\(x\.device\)"),
        "layers.0.mlp.up": (lambda x: nn.functional.relu(x, inplace=True), "FM131", "wrote into its input in place"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (fn, _, _) in wrong.items():
            fm.register_forward_hook(HookFunction(name, editing_function=fn))
        fm.register_forward_hook(HookFunction("layers.1", editing_function=lambda x: x * 2))
        fm.register_forward_hook(HookFunction("layers.1.norm", editing_function=lambda x: x if x.sum() > 0 else -x))
        fm.register_hook(HookFunction("head.weight", editing_function=lambda x: x.t()))
    rows = dry_run(fm, tokens())
    found = by_site(rows)
    for name, (_, code, text) in wrong.items():
        assert found[name, "forward"].finding.code == code
        assert re.search(text, found[name, "forward"].finding.sentence)
    assert found["head.weight", "tensor"].finding.code == "FM161"
    assert found["layers.1", "forward"].outcome == "fits"
    assert found["layers.1.norm", "forward"].outcome == "not tried" and "numbers" in str(
        found["layers.1.norm", "forward"]
    )
    assert str(rows).splitlines()[-1] == "1 fits, 7 wrong, 1 not tried"
    assert not ran
    for name in ("layers.0.mlp", "layers.1.mlp"):
        fresh = FlexModel(net())
        with fresh.edit(name, wrong[name][0]), pytest.raises(ShapeError) as error:
            fresh(tokens())
        assert str(error.value).startswith(found[name, "forward"].finding.sentence)  # the same words


def test_a_dry_run_leaves_no_trace():
    fm = FlexModel(net(), {})
    fm.register_trainable_module("probe", nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6)))

    def edit(module, x, save_ctx, modules):
        save_ctx.count = getattr(save_ctx, "count", 0) + 1
        save_ctx.list.append(x)
        save_ctx.noise = torch.randn(3)
        torch.manual_seed(5)
        return x + modules["probe"](x) + VECTOR.mul_(2)

    fm.save_ctx.list = [1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for register, name in ((fm.register_forward_hook, "layers.0"), (fm.register_full_backward_hook, "norm")):
            register(HookFunction(name, editing_function=edit, random=name == "norm"))
    fm(tokens()).sum().backward()
    del fm.save_ctx.count, fm.save_ctx.noise
    fm.save_ctx.list[:] = [1]
    fm.output_ptr.clear()
    before = {n: t.clone() for n, t in [*fm.named_parameters(), *fm.named_buffers()]}
    grads, vector, state, hooks = gradients(fm), VECTOR.clone(), torch.get_rng_state(), installed(fm.module)
    with unchanged(fm):
        rows = dry_run(fm, tokens())
    assert [t.outcome for t in rows] == ["fits", "fits"], str(rows)
    assert vars(fm.save_ctx) == {"list": [1]} and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(VECTOR, vector) and installed(fm.module) == hooks
    after = {n: t for n, t in [*fm.named_parameters(), *fm.named_buffers()]}
    assert all(torch.equal(before[n], after[n]) and type(after[n].detach()) is torch.Tensor for n in before)
    assert all(torch.equal(grads[n], g) for n, g in gradients(fm).items())


VECTOR = torch.ones(8)


def test_hooks_see_in_save_ctx_what_earlier_ones_left():
    fm = FlexModel(net())

    def save(module, x, save_ctx, modules):
        save_ctx.early = x

    def use(module, x, save_ctx, modules):
        return x + save_ctx.early[..., :4]

    with fm.edit("layers.0", save), fm.edit("layers.1", use):
        rows = by_site(dry_run(fm, {"ids": tokens()}))
    assert rows["layers.1", "forward"].finding.code == "FM163"
    with fm.edit("layers.1", use):
        (row,) = dry_run(fm, (tokens(),))
    assert row.outcome == "not tried" and "'early'" in row.untried


def test_selections_modules_that_do_not_run_and_expected_shapes():
    fm = FlexModel(net())
    fm.module.spare = nn.Linear(2, 2)
    fm = FlexModel(fm.restore())
    fm.register_forward_hook(
        HookFunction("norm", editing_function=lambda x: x.mean(0), select=(slice(None), -1), capture=False)
    )
    fm.register_forward_hook(HookFunction("spare", editing_function=lambda x: x * 2))
    fm.register_forward_hook(HookFunction("head", (None, None, 31), editing_function=lambda x: x * 2))
    rows = by_site(dry_run(fm, tokens()))
    assert "(8,), expected (4, 8)" in rows["norm", "forward"].finding.sentence
    assert "does not run" in rows["spare", "forward"].untried
    assert "expected_shape" in rows["head", "forward"].finding.sentence


def test_one_function_can_be_tried_by_itself():
    assert try_edit(lambda x: x * 2, (2, 3)).outcome == "fits"
    assert try_edit(lambda x: x.half(), (2, 3), torch.float16).outcome == "fits"
    assert try_edit(lambda x: x[:1], (2, 3)).finding.code == "FM161"
    assert try_edit(HookFunction("a", editing_function=lambda x: x.mean(), select=0), (2, 3)).finding.code == "FM161"
    fn = lambda module, x, save_ctx, modules: modules["p"](x) + save_ctx.y  # noqa: E731
    kept = try_edit(fn, (2, 3), modules={"p": nn.Linear(3, 3)}, save_ctx=type("C", (), {})())
    assert kept.outcome == "not tried"


# -- check mode ------------------------------------------------------------------------------------------------
def test_check_mode_tries_an_edit_before_it_runs(monkeypatch):
    monkeypatch.setenv("FLEX_MODEL_CHECK", "1")
    calls = []

    class Fake(nn.Module):  # what an edit calls tells whether it ran on real numbers
        def forward(self, x):
            calls.append(type(x).__name__)
            return x

    fm, watch = FlexModel(net(), {}), Fake()
    fm.register_trainable_module("watch", watch)
    ok = HookFunction("layers.0", editing_function=lambda module, x, save_ctx, modules: modules["watch"](x * 2))
    fm.register_forward_hook(ok)
    fm(tokens()), fm(tokens())
    assert calls == ["FakeTensor", "Tensor", "Tensor"]
    calls.clear()
    with (
        fm.edit("layers.1", lambda module, x, save_ctx, modules: modules["watch"](x)[..., :2]),
        pytest.raises(ShapeError, match=r"\(4, 6, 2\), expected \(4, 6, 8\)"),
    ):
        fm(tokens())
    assert calls == ["Tensor", "FakeTensor"]


def test_check_mode_changes_no_result(monkeypatch):
    def edit(module, x, save_ctx, modules):
        save_ctx.n = getattr(save_ctx, "n", 0) + 1
        return x + 0.1 * torch.randn_like(x) if x.sum() > -1e9 else x

    results = []
    for check in ("", "1"):
        monkeypatch.setenv("FLEX_MODEL_CHECK", check)
        fm, seen = FlexModel(net()), []
        with fm.edit("layers.*", edit, random=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fm.edit("norm", lambda x, seen=seen: seen.append(x.shape)):
                out = fm(tokens())
        results.append((out, fm.save_ctx.n, len(seen)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:] == (2, 1)


# -- ranks -----------------------------------------------------------------------------------------------------
def dry_on_ranks(engine):
    from engines import place

    placed = place(engine, net())
    fm = FlexModel(placed.model)
    seen = {}

    def look(x, site):
        seen[site.name] = tuple(x.shape)

    names = ["emb", "layers.0", "layers.0.mlp.up", "layers.1.mlp.act", "layers.1.mlp.down", "norm", "head"]
    for name in names:
        fm.register_forward_hook(HookFunction(name, editing_function=look))
    rows = dry_run(fm, placed.mine(tokens()))
    tried = dict(seen)
    seen.clear()
    fm(placed.mine(tokens())).float().sum().backward()
    with fm.edit("layers.0.mlp.act", lambda x: x[..., :8]), fm.edit("layers.0.mlp", lambda x: x[:1], axes=()):
        wrong = [t.finding.sentence for t in dry_run(fm, placed.mine(tokens())) if t.finding]
    return rows, tried, seen, wrong


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp", "sp"])
def test_on_ranks_the_shapes_are_the_full_ones(engine):
    exact = tried_in_all = 0
    for rows, tried, seen, wrong in run_world(2, dry_on_ranks, engine):
        assert not rows.findings, str(rows)
        assert tried == seen
        assert any("(4, 6, 8), expected (4, 6, 16)" in w for w in wrong), wrong
        exact, tried_in_all = exact + len(tried), tried_in_all + len(seen)
    print(f"dry run under {engine}: {exact} exact of {tried_in_all}")


def on_fsdp1():
    from engines import place

    placed = place("fsdp1", net())
    fm = FlexModel(placed.model)
    with fm.edit("norm", edits.scale(2.0)):
        (row,) = dry_run(fm, placed.mine(tokens()))
    return row


def test_what_cannot_be_tried_says_why():
    assert all("FSDP1" in row.untried for row in run_world(2, on_fsdp1))


def checked_on_shards():
    import os

    from engines import place

    os.environ["FLEX_MODEL_CHECK"] = "1"
    placed = place("tp", net())
    fm = FlexModel(placed.model)
    kinds, out = [], {}

    class Scale(nn.LayerNorm):
        def forward(self, x):
            kinds.append(type(x.to_local()).__name__)
            return super().forward(x)

    def double(module, x, save_ctx, modules):
        return modules["scale"](x) * 2

    fm.register_trainable_module("scale", Scale(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fm.edit("layers.0.mlp", double, run="sharded"):
            out["fits"] = fm(tokens()).sum().item()
            (row,) = dry_run(fm, tokens())
        with fm.edit("layers.0.mlp.act", lambda x: x[..., :4], run="sharded"):
            try:
                fm(tokens())
            except EditError as error:
                out["error"] = str(error)
    return kinds, out, str(row), row.outcome


def test_check_mode_on_ranks_and_on_shards():
    fm = FlexModel(net())
    with fm.edit("layers.0.mlp", lambda x: nn.functional.layer_norm(x, (8,)) * 2):
        want = fm(tokens()).sum().item()
    for kinds, out, row, outcome in run_world(2, checked_on_shards):
        assert out["fits"] == pytest.approx(want, rel=1e-4)
        assert outcome == "fits", row
        assert re.search(r"\(4, 6, 4\), expected \(4, 6, 16\)", out["error"])
        assert kinds == ["FakeTensor", "Tensor", "FakeTensor"]  # tried, run, and tried by the dry run


def warned_on_ranks():
    from engines import place

    fm = FlexModel(place("tp", net()).model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with fm.edit("layers.*", lambda x: x * torch.distributed.get_rank()):
            pass
    return [str(w.message)[:5] for w in told if isinstance(w.message, EditWarning)]


def test_every_rank_warns_alike():
    assert run_world(2, warned_on_ranks) == [["FM111"]] * 2


# -- pages -----------------------------------------------------------------------------------------------------
def blocks(code):
    text = (PAGES / f"{code}.md").read_text()
    return {kind: body for kind, body in re.findall(r"```python (bad|fixed)\n(.*?)```", text, re.DOTALL)}


def codes_of(source, name):
    """What is found in a page's example, by reading it or by trying it."""
    space: dict = {"__name__": "page"}
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), space)
    keywords = {k: space[k] for k in RUN_KEYS if k in space and k in source}
    found = {f.code for f in examine(space["edit"], **keywords)}
    if "FM101" not in found:
        trial = try_edit(HookFunction("a", editing_function=space["edit"], **keywords), (4, 6, 8))
        found |= {trial.finding.code} if trial.finding is not None else set()
    return found


@pytest.mark.parametrize("code", CODES)
def test_every_finding_has_a_page_whose_examples_are_true(code):
    assert blocks(code).keys() == {"bad", "fixed"}
    assert code in codes_of(blocks(code)["bad"], f"<{code} bad>")
    assert codes_of(blocks(code)["fixed"], f"<{code} fixed>") == set()


def test_there_is_no_page_without_a_finding():
    assert {p.stem for p in PAGES.glob("FM*.md")} == set(CODES)
