"""Analyses: what they must agree with, whatever is parallel."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from flex_model import FlexModel, FlexModelError, edits, result
from flex_model.errors import EngineError
from flex_model.lens import (
    LogitLens,
    activation_patching,
    attribution_patching,
    direct_logit_attribution,
    logit_lens,
    save_figure,
    steering_vector,
)

pandas = pytest.importorskip("pandas")


def inputs(other: bool = False) -> dict[str, Tensor]:
    ids = models.inputs("llama")["input_ids"]
    if other:  # two tokens differ
        ids = ids.clone()
        ids[:, 1:3] = ids[:, 1:3].flip(1) + 1
    return {"input_ids": ids}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean()


def placed(engine: str, path: str) -> tuple[Any, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """The model of ``path`` under an engine, and this rank's part of a batch."""
    import transformers

    world, rank = dist.get_world_size(), dist.get_rank()
    if engine == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        model = transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", device_mesh=mesh)
        return model.eval(), lambda batch: batch
    model = models.make("llama")
    mine = lambda batch: {k: v.chunk(world)[rank] for k, v in batch.items()}  # noqa: E731
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model), mine
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model, mine


def _all(fm: FlexModel, mine: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, list[Any]]:
    """Every analysis, as lists."""
    clean, corrupted = mine(inputs()), mine(inputs(True))
    lens = logit_lens(fm, **clean)
    by_position = activation_patching(fm, clean, corrupted, metric)
    by_head = activation_patching(fm, clean, corrupted, metric, component="z", over="head")
    estimate = attribution_patching(fm, clean, corrupted, metric)
    direct = direct_logit_attribution(fm, torch.arange(4), against=torch.tensor(9), **clean)
    vectors = [steering_vector(fm, clean, corrupted, layer=0, method=m).vector for m in ("mean", "pca")]
    return {
        "top": lens.top.tolist(),
        "divergence": lens.divergence.tolist(),
        "tokens": lens.tokens.tolist(),
        "positions": by_position.effect.tolist(),
        "heads": by_head.effect.tolist(),
        "estimate": estimate.effect.tolist(),
        "direct": direct.contribution.tolist(),
        "vectors": [v.tolist() for v in vectors],
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    models.make("llama").save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    return _all(FlexModel(models.make("llama")), lambda batch: batch)


def _spread(engine: str, path: str) -> dict[str, list[Any]]:
    model, mine = placed(engine, path)
    return _all(FlexModel(model), mine)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tp"])
def test_the_same_under_every_engine(engine: str, path: str, alone: dict[str, list[Any]]) -> None:
    for found in run_world(2, _spread, engine, path):
        assert found["top"] == alone["top"] and found["tokens"] == alone["tokens"]
        for key in ("divergence", "positions", "heads", "estimate", "direct", "vectors"):
            assert relative_error(torch.tensor(found[key]), torch.tensor(alone[key])) < 1e-4, key


# -- ablation --------------------------------------------------------------------------------------------------
def _without(branch: str, model: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """The model whose second layer has no such branch: what goes in comes out."""
    layer = model.model.layers[1]
    part = layer.self_attn if branch == "attn_out" else layer.mlp
    nothing = part.o_proj if branch == "attn_out" else part.down_proj
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nothing, "forward", lambda x: x.new_zeros(*x.shape[:-1], model.config.hidden_size))
        return run(model)


def _ablated(engine: str, path: str) -> list[float]:
    plain, batch = models.make("llama"), inputs()
    model, mine = (plain, lambda b: b) if engine == "none" else placed(engine, path)
    fm, errors = FlexModel(model), []
    for branch, before, after in (("attn_out", "resid_pre", "resid_mid"), ("mlp_out", "resid_mid", "resid_post")):
        want = _without(branch, models.make("llama"), lambda m: m(**batch).logits)
        stream = fm.at(before, 1), fm.at(after, 1)
        with torch.no_grad(), fm.edit(fm.at(branch, 1), edits.zero()), fm.capture(*stream) as acts:
            logits = fm.full_output(fm(**mine(batch))).logits
        assert torch.equal(*(acts[place] for place in stream))  # type: ignore[arg-type]
        errors.append(relative_error(logits, want))
    return errors


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "tp"])
def test_a_branch_of_zeros_is_a_branch_dropped(engine: str, path: str) -> None:
    for errors in [_ablated(engine, path)] if engine == "none" else run_world(2, _ablated, engine, path):
        assert max(errors) < 1e-6


# -- the logit lens --------------------------------------------------------------------------------------------
def test_the_logit_lens_by_hand() -> None:
    model, batch = models.make("llama"), inputs()
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        logs = [model.lm_head(model.model.norm(h)).log_softmax(-1) for h in out.hidden_states[1:-1]]
        logs.append(out.logits.log_softmax(-1))  # transformers' last hidden state is behind the norm
        final = logs[-1]
    lens = logit_lens(FlexModel(model), **batch)
    for layer, log in enumerate(logs):
        assert torch.equal(lens.top[layer], log.argmax(-1))
        kl = (final.exp() * (final - log)).sum(-1)
        assert relative_error(lens.divergence[layer], kl.clamp_min(0)) < 1e-4 or float(kl.abs().max()) < 1e-6
    assert float(lens.divergence[-1].max()) < 1e-6
    few = logit_lens(FlexModel(model), layers=[0], **batch)
    assert torch.equal(few.top, lens.top[[0, -1]])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "opt", "mixtral"])
def test_the_logit_lens_of_other_families(family: str) -> None:
    lens = logit_lens(FlexModel(models.make(family)), **models.inputs(family))
    assert float(lens.divergence[-1].max()) < 1e-5


def test_logits_that_are_more_than_an_unembedding_are_refused() -> None:
    import transformers

    sizes = dict(vocab_size=66, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with pytest.raises(FlexModelError, match="the model does something more with them"):
        logit_lens(FlexModel(model), **inputs())


# -- patching --------------------------------------------------------------------------------------------------
def test_patching_every_position_gives_the_clean_run() -> None:
    fm = FlexModel(models.make("llama"))
    with torch.no_grad(), fm.capture(fm.at("resid_pre", 1)) as acts:
        want = fm(**inputs()).logits
    with torch.no_grad(), fm.edit(fm.at("resid_pre", 1), edits.patch(acts.ref("@resid_pre.1"))):
        assert torch.equal(fm(**inputs(True)).logits, want)
        assert torch.equal(fm(**inputs()).logits, want)  # what it was patches nothing


def test_patching_itself_changes_nothing() -> None:
    found = activation_patching(FlexModel(models.make("llama")), inputs(), inputs(), metric)
    assert float(found.effect.abs().max()) == 0 and found.clean == found.corrupted


def test_the_first_layer_is_patched_only_where_tokens_differ() -> None:
    found = activation_patching(FlexModel(models.make("llama")), inputs(), inputs(True), metric)
    assert found.effect[0].nonzero().flatten().tolist() == [1, 2]
    assert found.restored.shape == (2, 6)


def test_attribution_is_the_derivative_of_patching() -> None:
    """A small step of each cell towards the clean value, by finite differences."""
    model = models.make("llama").double()
    fm = FlexModel(model)
    estimate = attribution_patching(fm, inputs(), inputs(True), metric)
    step = 1e-2  # the norms compute in float32 whatever they are given
    with torch.no_grad():
        with fm.capture(fm.at("resid_pre")) as good:
            fm(**inputs())
        with fm.capture(fm.at("resid_pre")) as bad:
            fm(**inputs(True))
        for layer in range(2):
            key = f"@resid_pre.{layer}"
            towards = step * (good[key] - bad[key])  # type: ignore[operator]
            for position in range(6):
                found = []
                for sign in (1, -1):
                    moved = edits.add(sign * towards, positions=[position])
                    with fm.edit(fm.at("resid_pre", layer), moved):
                        found.append(metric(fm(**inputs(True)).logits))
                slope = float(found[0] - found[1]) / (2 * step)
                assert slope == pytest.approx(float(estimate.effect[layer, position]), abs=1e-4)


# -- direct logit attribution ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "mixtral"])
def test_parts_sum_to_the_logits(family: str) -> None:
    """It is an error where they do not."""
    fm = FlexModel(models.make(family))
    found = direct_logit_attribution(fm, torch.tensor(3), **models.inputs(family))
    assert found.contribution.shape == (5, 4) and found.parts[:3] == ("embed", "attn_out.0", "mlp_out.0")
    with torch.no_grad():
        logits = fm(**models.inputs(family)).logits[:, -1, 3]
    assert relative_error(found.logits, logits) < 1e-6
    assert relative_error(found.contribution.sum(0) + found.bias, logits) < 1e-4


def test_flattened_tokens_are_refused() -> None:
    with pytest.raises(FlexModelError, match="has no dim of positions"):
        direct_logit_attribution(FlexModel(models.make("opt")), torch.tensor(3), **models.inputs("opt"))


def test_what_a_part_writes_by_hand() -> None:
    """The last MLP's output, through the norm at the scale it had, along the two tokens' directions."""
    model, batch = models.make("llama"), inputs()
    found = direct_logit_attribution(FlexModel(model), torch.arange(4), against=torch.tensor(9), position=2, **batch)
    with torch.no_grad():
        seen: dict[str, Tensor] = {}
        handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, o: seen.update(mlp=o))
        last = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.update(last=o))
        model(**batch)
        handle.remove()
        last.remove()
        scale = (seen["last"][:, 2].pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        wrote = seen["mlp"][:, 2] * scale * model.model.norm.weight
        unembed = model.lm_head.weight
        want = (wrote * (unembed[torch.arange(4)] - unembed[9])).sum(-1)
    assert found.parts[-1] == "mlp_out.1"
    assert relative_error(found.contribution[-1], want) < 1e-5


# -- steering --------------------------------------------------------------------------------------------------
def test_steering_by_nothing_is_nothing() -> None:
    fm = FlexModel(models.make("llama"))
    found = steering_vector(fm, inputs(), inputs(True), layer=-1)
    assert found.layer == 1 and found.separation[0] > 0 > found.separation[1]
    with torch.no_grad():
        plain = fm(**inputs()).logits
        with fm.edit(fm.at("resid_post", 1), found.edit(0.0)):
            assert torch.equal(fm(**inputs()).logits, plain)
        with fm.edit(fm.at("resid_post", 1), found.edit(5.0)):
            assert not torch.equal(fm(**inputs()).logits, plain)


# -- tables and pictures ---------------------------------------------------------------------------------------
def test_tables_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    fm = FlexModel(models.make("llama"))
    lens = logit_lens(fm, **inputs())
    patching = activation_patching(fm, inputs(), inputs(True), metric, component="z", over="head")
    steering = steering_vector(fm, inputs(), inputs(True), layer=0)
    table = lens.to_dataframe()
    assert list(table.columns) == ["layer", "sample", "position", "top", "probability", "divergence"]
    assert len(table) == 2 * 4 * 6 and table["top"][7] == int(lens.top[0, 1, 1])
    assert list(patching.to_dataframe().columns) == ["layer", "head", "effect", "restored"]
    assert len(steering.to_dataframe()) == 32
    direct = direct_logit_attribution(fm, torch.tensor(1), **inputs())
    assert list(direct.to_dataframe()["part"][::4]) == list(direct.parts)
    for one in (lens, patching, steering, direct):
        figure = one.plot()
        figure.write_html(tmp_path / "picture.html")
        assert (tmp_path / "picture.html").stat().st_size > 1000
    assert isinstance(lens, LogitLens)


# -- bad input -------------------------------------------------------------------------------------------------
def test_bad_input() -> None:
    fm = FlexModel(models.make("llama"))
    short = {"input_ids": inputs()["input_ids"][:, :3]}
    with pytest.raises(FlexModelError, match="need input_ids of one shape"):
        activation_patching(fm, inputs(), short, metric)
    with pytest.raises(FlexModelError, match="over='layer' is unknown"):
        activation_patching(fm, inputs(), inputs(True), metric, over="layer")  # type: ignore[arg-type]
    with pytest.raises(FlexModelError, match="has no heads to patch"):
        activation_patching(fm, inputs(), inputs(True), metric, over="head")
    with pytest.raises(FlexModelError, match="method='ica' is unknown"):
        steering_vector(fm, inputs(), inputs(True), layer=0, method="ica")  # type: ignore[arg-type]
    with pytest.raises(FlexModelError, match="3 answers for a batch of 4"):
        direct_logit_attribution(fm, torch.arange(3), **inputs())
    with pytest.raises(FlexModelError, match="needs pairs"):
        steering_vector(fm, inputs(), {"input_ids": inputs()["input_ids"][:2]}, layer=0, method="pca")


def _whole(engine: str) -> list[float]:
    import engines

    plain = models.net()
    model = engines.place(engine, models.net()).model
    fm = FlexModel(model)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    return [relative_error(fm.whole_module(n)(x), plain.get_submodule(n)(x)) for n in ("layers.0.mlp", "norm", "head")]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_orig", "fsdp2", "tp", "sp"])
def test_a_whole_module(engine: str) -> None:
    assert run_world(2, _whole, engine) == [[0.0] * 3] * 2


def test_a_whole_module_of_parts_is_refused() -> None:
    def _refused() -> str:
        import engines

        fm = FlexModel(engines.place("fairscale", models.net()).model)
        try:
            fm.whole_module("head")
        except EngineError as error:
            return str(error)
        return ""

    assert all("modules under fairscale are parts" in said for said in run_world(2, _refused))


def _whole_of_stages(schedule: str) -> tuple[list[float], str]:
    from pipelines import Pipe

    plain = models.net(layers=4)
    pipe = Pipe(models.net(layers=4), schedule)
    run, fm = pipe.schedule(), FlexModel(pipe.module)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    errors = []
    for name in ("layers.0.mlp", "layers.3", "norm", "head"):
        module = fm.whole_module(name)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        errors.append(relative_error(module(x), plain.get_submodule(name)(x)))
    try:
        fm.whole_module("layers")
    except EngineError as error:
        return errors, str(error)
    return errors, f"nothing, under {run}"


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_a_whole_module_of_another_stage(schedule: str) -> None:
    for errors, refused in run_world(2, _whole_of_stages, schedule):
        assert errors == [0.0] * 4 and "several stages of the pipeline have parts of it" in refused


# -- pictures in files -----------------------------------------------------------------------------------------
def _figure() -> Any:
    go = pytest.importorskip("plotly.graph_objects")
    return go.Figure(go.Heatmap(z=[[0.0, 1.0], [2.0, 3.0]]))


NO_CHROMIUM = not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")))


@pytest.mark.skipif(NO_CHROMIUM, reason="no Chromium to draw static pictures")
def test_a_result_is_saved_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    found = activation_patching(FlexModel(models.make("llama")), inputs(), inputs(True), metric)
    png = found.save_plot(tmp_path / "found.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1400, 900)
    save_figure(_figure(), tmp_path / "found.svg")
    assert "<svg" in (tmp_path / "found.svg").read_text()


def test_a_page_needs_no_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    assert "plotly" in save_figure(_figure(), str(tmp_path / "found.html")).read_text()


def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = _figure()
    with pytest.raises(FlexModelError, match=r"ends in \.html, \.png, \.svg, \.pdf, got 'found\.bmp'"):
        save_figure(figure, tmp_path / "found.bmp")
    if find_spec("kaleido") is not None:
        monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
        with pytest.raises(FlexModelError, match=r"a \.png needs Chromium or Chrome \(.+\); install it") as told:
            save_figure(figure, tmp_path / "found.png")
        assert told.value.page == "not-installed"
    monkeypatch.setattr(result, "find_spec", lambda name: None)
    with pytest.raises(FlexModelError, match=r"a \.pdf needs kaleido; install flex-model\[plot\]"):
        save_figure(figure, tmp_path / "found.pdf")
    assert not list(tmp_path.iterdir())


def _saved(folder: Path) -> bool:
    path = save_figure(_figure(), folder / f"{dist.get_rank()}.html")
    return path.exists()


def test_the_lowest_rank_writes(tmp_path: Path) -> None:
    assert run_world(2, _saved, tmp_path) == [True, False]


def test_token_ids_alone_are_inputs():
    fm = FlexModel(models.make("llama"))
    clean, corrupted = inputs()["input_ids"], inputs(True)["input_ids"]
    for analyse in (activation_patching, attribution_patching):
        alone = analyse(fm, clean, corrupted, metric).effect
        assert torch.equal(alone, analyse(fm, {"input_ids": clean}, {"input_ids": corrupted}, metric).effect)
    keywords = [{"input_ids": x} for x in (clean, corrupted)]
    found = steering_vector(fm, clean, corrupted, layer=1)
    assert torch.equal(found.vector, steering_vector(fm, *keywords, layer=1).vector)
