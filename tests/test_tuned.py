"""The tuned lens: trained by layers on any number of ranks, it is what plain torch trains on one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from oracle import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import run_world

from flex_model import FlexModel, FlexModelError
from flex_model.lens import LensTraining, TunedLens, logit_lens

STEPS = 6
Batch = dict[str, Tensor]


def model(family: str = "llama") -> Any:
    """With weights large enough for layers to differ."""
    made = models.make(family)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return made


def batches(count: int = STEPS) -> list[Batch]:
    """Rows of unequal length."""
    out = []
    for i in range(count):
        ids = torch.randint(1, 60, (4, 6), generator=torch.Generator().manual_seed(i))
        mask = torch.ones_like(ids)
        mask[i % 4, 4:] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def by_hand(plain: Any, steps: int = STEPS, make: Any = None) -> tuple[list[nn.Linear], Tensor]:
    """All translators together in one optimizer, and the loss (steps, translators)."""
    head, norm = (
        plain.get_output_embeddings(),
        getattr(plain.base_model, "norm", getattr(plain.base_model, "ln_f", None)),
    )
    layers, width = plain.config.num_hidden_layers, plain.config.hidden_size
    translators = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    for p in translators.parameters():
        nn.init.zeros_(p)
    plain.requires_grad_(False)
    optimizer = torch.optim.SGD(translators.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for batch in batches(steps):
        real = batch["attention_mask"].bool()
        out = plain(**batch, output_hidden_states=True)
        p = out.logits[real].log_softmax(-1)
        optimizer.zero_grad()
        row = []
        for h, translator in zip(out.hidden_states, translators, strict=False):
            q = head(norm(h[real] + translator(h[real]))).log_softmax(-1)
            row.append((p.exp() * (p - q)).sum(-1).mean())
            row[-1].backward()
        torch.nn.utils.clip_grad_norm_(translators.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(torch.stack(row).detach())
    return list(translators), torch.stack(losses)  # type: ignore[arg-type]


def flat(lens: TunedLens) -> list[float]:
    return torch.cat([p.detach().flatten() for p in lens.translators.parameters()]).tolist()


def error(found: list[float], want: list[float]) -> float:
    return relative_error(torch.tensor(found), torch.tensor(want))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_training_by_hand(family: str) -> None:
    translators, losses = by_hand(model(family))
    lens = TunedLens(FlexModel(model(family)))
    found = lens.fit(batches(), steps=STEPS)
    assert losses.min() > 1e-2 and min(float(t.weight.detach().norm()) for t in translators) > 1e-3
    assert relative_error(found.loss, losses) < 1e-5
    for mine, theirs in zip(lens.translators, translators, strict=True):
        assert relative_error(mine.weight, theirs.weight) < 1e-4 and relative_error(mine.bias, theirs.bias) < 1e-4


def test_one_layer_by_hand() -> None:
    """KL(model | lens) of one batch, and which residual a translator reads."""
    plain, batch = model(), models.inputs("llama")
    lens = TunedLens(FlexModel(model()))
    nn.init.normal_(lens.translators[1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = plain(**batch, output_hidden_states=True)
        h = out.hidden_states[1]  # the input of layer 1, which is the output of layer 0
        q = plain.lm_head(plain.model.norm(h + h @ lens.translators[1].weight.T)).softmax(-1)
        p = out.logits.softmax(-1)
    want = (p * (p / q).log()).sum(-1)
    found = lens(**batch)
    assert relative_error(found.divergence[0], want) < 1e-4 and float(want.mean()) > 1e-2
    assert torch.equal(found.top[0], q.argmax(-1)) and torch.equal(found.top[1], p.argmax(-1))
    rate: Callable[..., Any] = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    loss = lens.fit([batch], steps=1, optimizer=rate).loss
    assert float(loss[0, 1]) == pytest.approx(float(want.mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_new_lens_is_the_logit_lens(family: str) -> None:
    fm, batch = FlexModel(model(family)), models.inputs(family)
    state = torch.get_rng_state()
    lens, plain = TunedLens(fm)(**batch), logit_lens(fm, **batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(lens.divergence, plain.divergence) and torch.equal(lens.top, plain.top)
    few = TunedLens(fm)(**batch, layers=[0])
    assert torch.equal(few.top, plain.top[[0, -1]])


def test_a_trained_lens_is_nearer() -> None:
    fm, batch = FlexModel(model()), models.inputs("llama")
    fm.module.train()
    lens = TunedLens(fm)
    lens.fit([batch], steps=40)
    assert all(m.training for m in fm.module.modules())
    fm.eval()
    before, after = (x(**batch).divergence.mean((1, 2)) for x in (TunedLens(fm), lens))
    assert after[0] < 0.5 * before[0] and after[-1] == before[-1] and after[-1] < 1e-6


# -- the same under every engine -------------------------------------------------------------------------------
def placed(engine: str, family: str, path: Path | None = None) -> tuple[Any, Callable[[Batch], Batch]]:
    """The model under an engine, and this rank's part of a batch."""
    import transformers

    world, rank = dist.get_world_size(), dist.get_rank()
    if engine in ("tp", "pp"):
        config = transformers.distributed.DistributedConfig(**{f"{engine}_size": world})
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(path, distributed_config=config, attn_implementation="eager").eval(), lambda batch: batch
    mine = lambda batch: {k: v.chunk(world)[rank] for k, v in batch.items()}  # noqa: E731
    made = model(family)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(made), mine
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    for layer in getattr(made.base_model, "layers", getattr(made.base_model, "h", ())):
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made, mine


def trained(made: Any, mine: Callable[[Batch], Batch]) -> dict[str, list[Any]]:
    fm = FlexModel(made)
    lens, few = TunedLens(fm), TunedLens(fm)
    loss = lens.fit([mine(b) for b in batches()], steps=STEPS).loss
    few.fit([mine(b) for b in batches()], steps=STEPS, tokens=7, seed=3)
    found = lens(**mine(batches()[0]))
    plain = logit_lens(fm, **mine(batches()[0]))
    return {
        "lens": flat(lens),
        "few": flat(few),
        "loss": loss.flatten().tolist(),
        "divergence": found.divergence.flatten().tolist(),
        "logit": plain.divergence.flatten().tolist(),
    }


def _trained(engine: str, family: str, path: Path | None = None) -> dict[str, list[Any]]:
    return trained(*placed(engine, family, path))


@pytest.mark.parametrize(
    ("engine", "family"),
    [(e, "llama") for e in ("tp", "fsdp2", "ddp", "pp")] + [("fsdp2", "gpt2"), ("ddp", "gpt2")],
)
def test_the_same_under_every_engine(engine: str, family: str, tmp_path: Path) -> None:
    alone = trained(model(family), lambda batch: batch)
    assert error(alone["few"], alone["lens"]) > 1e-2
    model(family).save_pretrained(tmp_path)
    for found in run_world(2, _trained, engine, family, tmp_path):
        for key, want in alone.items():
            assert error(found[key], want) < 1e-4, key


def _three_ranks(path: Path) -> list[float]:
    """More ranks than layers: one has none."""
    made, mine = placed("ddp", "llama")
    lens = TunedLens(FlexModel(made))
    lens.fit([mine({k: v[:3] for k, v in b.items()}) for b in batches()], steps=STEPS)
    return flat(lens)


def test_more_ranks_than_layers(tmp_path: Path) -> None:
    lens = TunedLens(FlexModel(model()))
    lens.fit([{k: v[:3] for k, v in b.items()} for b in batches()], steps=STEPS)
    for found in run_world(3, _three_ranks, tmp_path):
        assert error(found, flat(lens)) < 1e-4


class Part(nn.Module):
    """Attention and MLP of a layer, of any kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(width), Mean(width), nn.LayerNorm(width), Mean(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Mean(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Decoder(nn.Module):
    """The names of a transformer, cut at will: what one stage holds of it, or all."""

    def __init__(self, stage: int = 0, stages: int = 1, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        emb, all_, norm = nn.Embedding(66, 16), [Part(16) for _ in range(layers)], nn.LayerNorm(16)
        head = nn.Linear(16, 66, bias=False)
        low, high = stage * layers // stages, (stage + 1) * layers // stages
        self.embed_tokens = emb if stage == 0 else None
        self.layers = nn.ModuleDict({str(i): all_[i] for i in range(low, high)})
        self.norm, self.lm_head = (norm, head) if stage == stages - 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.norm is None else self.lm_head(self.norm(x))


def _through_a_schedule() -> tuple[list[float], list[float]]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, stages = dist.get_rank(), dist.get_world_size()
    part = Decoder(rank, stages)
    schedule = ScheduleGPipe(PipelineStage(part, rank, stages, torch.device("cpu")), 2)
    fm = FlexModel(part)
    lens = TunedLens(fm)

    def forward(batch: Any) -> Any:
        return schedule.eval(*([batch["input_ids"]] if rank == 0 else []))

    run = lens.fit(batches(), steps=STEPS, forward=forward)
    return flat(lens), run.loss.flatten().tolist()


def test_a_pipelines_schedule() -> None:
    lens = TunedLens(FlexModel(Decoder()))
    run = lens.fit(batches(), steps=STEPS, forward=lambda batch: lens.model(batch["input_ids"]))
    assert run.loss[:, :3].min() > 1e-2
    for found, loss in run_world(2, _through_a_schedule):
        assert error(found, flat(lens)) < 1e-4 and error(loss, run.loss.flatten().tolist()) < 1e-4


# -- checkpoints -----------------------------------------------------------------------------------------------
def breaking(after: int) -> Iterator[Batch]:
    yield from batches()[:after]
    raise KeyboardInterrupt


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)


def _interrupted(folder: Path) -> None:
    made, mine = placed("ddp", "llama")
    lens = TunedLens(FlexModel(made))
    with pytest.raises(KeyboardInterrupt):
        batches_here = (mine(b) for b in breaking(5))
        lens.fit(batches_here, steps=STEPS, optimizer=_adam, checkpoint=folder, every=2)
    assert not any(flat(lens))


def _gone_on(folder: Path) -> tuple[list[float], list[Any]]:
    made, mine = placed("ddp", "llama")
    lens = TunedLens(FlexModel(made))
    run = lens.fit([mine(b) for b in batches()], steps=STEPS, optimizer=_adam, checkpoint=folder, every=2)
    return flat(lens), run.loss.flatten().tolist()


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_goes_on(before: int, after: int, tmp_path: Path) -> None:
    """On any number of ranks."""
    whole = TunedLens(FlexModel(model()))
    losses = whole.fit(batches(), steps=STEPS, optimizer=_adam).loss.flatten().tolist()
    if before == 1:
        lens = TunedLens(FlexModel(model()))
        with pytest.raises(KeyboardInterrupt):
            lens.fit(breaking(5), steps=STEPS, optimizer=_adam, checkpoint=tmp_path, every=2)
        assert not any(flat(lens))
    else:
        run_world(2, _interrupted, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["done"] == 4
    if after == 1:
        lens = TunedLens(FlexModel(model()))
        run = lens.fit(batches(), steps=STEPS, optimizer=_adam, checkpoint=tmp_path, every=2)
        found = [(flat(lens), run.loss.flatten().tolist())]
    else:
        found = run_world(2, _gone_on, tmp_path)
    for parameters, loss in found:
        assert error(parameters, flat(whole)) < 1e-4 and error(loss, losses) < 1e-5
        assert before + after > 2 or (parameters == flat(whole) and loss == losses)
    assert [p.name for p in tmp_path.glob("step-*")] == [f"step-{STEPS}"]
    with pytest.raises(FlexModelError, match=r"is of a run with steps=6, tokens=None; give the same"):
        TunedLens(FlexModel(model())).fit(batches(), steps=7, tokens=3, checkpoint=tmp_path)


def _folders_differ(folder: Path) -> str:
    made, mine = placed("ddp", "llama")
    with pytest.raises(FlexModelError) as caught:
        own = folder / str(dist.get_rank())
        TunedLens(FlexModel(made)).fit([mine(b) for b in batches()], steps=STEPS, checkpoint=own)
    return str(caught.value)


def test_a_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    TunedLens(FlexModel(model())).fit(batches(), steps=STEPS, checkpoint=tmp_path / "1")
    assert all(f"after [0, {STEPS}] steps" in text for text in run_world(2, _folders_differ, tmp_path))


# -- what goes wrong -------------------------------------------------------------------------------------------
def _explodes(made: Any, mine: Callable[[Batch], Batch]) -> tuple[str, list[float]]:
    """A token whose embedding is not finite is in the third batch, on one rank."""
    with torch.no_grad():
        made.get_parameter(next(n for n, _ in made.named_parameters() if "embed_tokens" in n))[65] = torch.nan
    lens = TunedLens(FlexModel(made))
    given = [mine(b) for b in batches()]
    bad = batches()[2]
    bad["input_ids"][0, 1] = 65
    with pytest.raises(FlexModelError, match=r"translators \[0, 1\] of the lens.*is not finite in step 2") as caught:
        lens.fit([*given[:2], mine(bad)], steps=STEPS, decay=False)
    again = TunedLens(lens.model)
    again.fit(given, steps=2, decay=False)
    assert caught.value.page == "loss-not-finite" and flat(again) == flat(lens)
    return str(caught.value), flat(lens)


def _explodes_on_two() -> tuple[str, list[float]]:
    return _explodes(*placed("ddp", "llama"))


def test_a_loss_that_is_not_finite() -> None:
    text, alone = _explodes(model(), lambda batch: batch)
    assert any(alone)
    for told, found in run_world(2, _explodes_on_two):
        assert told == text and error(found, alone) < 1e-4


def _fails_on_one() -> str:
    made, mine = placed("ddp", "llama")
    lens = TunedLens(FlexModel(made))
    given = [mine(b) for b in batches()]
    if dist.get_rank():
        given[3] = "text"  # type: ignore[call-overload]
    try:
        lens.fit(given, steps=STEPS)
    except FlexModelError as error:
        return str(error)
    return ""


def test_a_batch_that_one_rank_has_not() -> None:
    first, second = run_world(2, _fails_on_one)
    assert "a batch must be a mapping" in first and "rank 1 failed" in first
    assert second.startswith("a batch must be a mapping of the model's keywords")


def test_bad_input(tmp_path: Path) -> None:
    fm = FlexModel(model())
    lens = TunedLens(fm)
    for keywords, text in (
        ({"steps": 0}, "steps=0: expected a positive number"),
        ({"steps": 2, "tokens": 0}, "tokens=0: expected a positive number or None"),
        ({"steps": 2, "clip": -1.0}, r"clip=-1\.0"),
        ({"steps": 2, "every": 0}, "every=0: expected a positive number"),
        ({"steps": 7}, "the batches ended before step 6 of 7"),
    ):
        with pytest.raises(FlexModelError, match=text):
            lens.fit(iter(batches()), **keywords)  # type: ignore[arg-type]
    ids = batches()[0]["input_ids"]
    with pytest.raises(FlexModelError, match="has no token that is not padding"):
        lens.fit([{"input_ids": ids, "attention_mask": 0 * ids}], steps=1)
    with pytest.raises(FlexModelError, match=r"expected a tensor \(B, S\), found shape"):
        lens.fit([{"input_ids": ids, "attention_mask": torch.ones(4, 1, 6, 6)}], steps=1)
    with pytest.raises(FlexModelError, match="register_trainable_module"), lens.joined():
        pass
    with pytest.raises(FlexModelError, match="no forward has run within"):
        _ = lens.loss
    with pytest.raises(FlexModelError, match=r"is no tuned lens: expected config\.json and params\.pt"):
        TunedLens.load(fm, tmp_path)
    lens.save(tmp_path)
    with pytest.raises(FlexModelError, match="expected a linear_tuned_lens of 2 layers and width 32, found"):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        TunedLens.load(fm, tmp_path)
    torch.save(nn.Linear(2, 2), tmp_path / "params.pt")  # a pickled object is not read
    with pytest.raises(FlexModelError, match="is no tuned lens"):
        TunedLens.load(fm, tmp_path)


def test_logits_that_are_more_than_an_unembedding_are_refused() -> None:
    import transformers

    sizes = dict(vocab_size=66, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    lens = TunedLens(FlexModel(transformers.Gemma2ForCausalLM(config).eval()))
    with pytest.raises(FlexModelError, match="the model does something more with them"):
        lens.fit(batches(), steps=1)


# -- on disk ---------------------------------------------------------------------------------------------------
def random_lens(fm: FlexModel) -> TunedLens:
    lens, generator = TunedLens(fm), torch.Generator().manual_seed(0)
    for parameter in lens.translators.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return lens


def test_the_layout_on_disk(tmp_path: Path) -> None:
    fm = FlexModel(model())
    lens = random_lens(fm)
    lens.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "params.pt"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert {k: config[k] for k in ("d_model", "num_hidden_layers", "bias", "lens_type")} == {
        "d_model": 32,
        "num_hidden_layers": 2,
        "bias": True,
        "lens_type": "linear_tuned_lens",
    }
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "0.weight": (32, 32),
        "0.bias": (32,),
        "1.weight": (32, 32),
        "1.bias": (32,),
    }
    assert flat(TunedLens.load(fm, tmp_path)) == flat(lens)
    other = model()
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.warns(UserWarning, match="was trained with another unembedding"):
        TunedLens.load(FlexModel(other), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_are_those_of_the_package_tuned_lens(family: str, tmp_path: Path, caplog: Any) -> None:
    theirs = pytest.importorskip("tuned_lens", reason="tuned-lens is not installed")
    made, batch = model(family), models.inputs(family)
    fm = FlexModel(made)
    lens = random_lens(fm)
    with torch.no_grad():
        out = made(**batch, output_hidden_states=True)
        lens.save(tmp_path / "mine")
        loaded = theirs.TunedLens.from_model_and_pretrained(made, str(tmp_path / "mine"), weights_only=True)
        assert not [r for r in caplog.records if "unembedding" in r.getMessage()]  # it compares its hash
        logits = loaded(out.hidden_states[1], 1)
        found = lens(**batch)
        assert relative_error(found.probability[0], logits.softmax(-1).max(-1).values) < 1e-5
        assert torch.equal(found.top[0], logits.argmax(-1))
        for parameter in loaded.layer_translators.parameters():
            parameter.mul_(2)
        loaded.save(tmp_path / "theirs")
        back = TunedLens.load(fm, tmp_path / "theirs")
    assert flat(back) == [2 * x for x in flat(lens)]


def _saved(folder: Path) -> list[float]:
    made, _ = placed("fsdp2", "llama")
    fm = FlexModel(made)
    fm.register_trainable_module("lens", lens := random_lens(fm))  # its parameters are DTensors now
    lens.save(folder)
    return flat(TunedLens.load(fm, folder))


def test_saved_by_many(tmp_path: Path) -> None:
    want = flat(random_lens(FlexModel(model())))
    assert run_world(2, _saved, tmp_path) == [want, want]


# -- in a loop of the user's own -------------------------------------------------------------------------------
def plain_loop(steps: int, clip: float = 0.1) -> tuple[list[float], list[float]]:
    """Model and translators in one AdamW, on one process, without this library."""
    made = model().train()
    width = made.config.hidden_size
    translators = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
    for p in translators.parameters():
        nn.init.zeros_(p)
    everything = [*made.parameters(), *translators.parameters()]
    optimizer = torch.optim.AdamW(everything, lr=1e-3, eps=1e-4)
    for batch in batches(steps):
        real = batch["attention_mask"].bool()
        out = made(input_ids=batch["input_ids"], output_hidden_states=True)
        with torch.no_grad():
            p = out.logits[real].log_softmax(-1)
            head, gain = made.lm_head.weight.clone(), made.model.norm.weight.clone()
        losses = []
        for h, translator in zip(out.hidden_states, translators, strict=False):
            h = h.detach()[real]
            h = h + translator(h)
            h = gain * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + made.config.rms_norm_eps)
            losses.append((p.exp() * (p - (h @ head.T).log_softmax(-1))).sum(-1).mean())
        (out.logits.pow(2).mean() * 1e-2 + torch.stack(losses).mean()).backward()
        torch.nn.utils.clip_grad_norm_(everything, clip)
        optimizer.step()
        optimizer.zero_grad()
    vector = torch.nn.utils.parameters_to_vector
    return vector(made.parameters()).tolist(), vector(translators.parameters()).tolist()


class Loop:
    """The same with a lens, under an engine."""

    def __init__(self, made: Any, mine: Callable[[Batch], Batch], clip: bool = True) -> None:
        self.fm, self.mine, self.clip = FlexModel(made.train()), mine, clip
        self.lens = TunedLens(self.fm)
        self.fm.register_trainable_module("lens", self.lens)
        self.optimizer = torch.optim.AdamW(self.fm.parameters(), lr=1e-3, eps=1e-4)

    def run(self, start: int, stop: int) -> None:
        for batch in batches(stop)[start:]:
            mine = self.mine(batch)
            with self.lens.joined(mine["attention_mask"]):
                out = self.fm(input_ids=mine["input_ids"])
                (out.logits.pow(2).mean() * 1e-2 + self.lens.loss).backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.fm.parameters(), 0.1)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> tuple[list[float], list[float]]:
        whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten()  # noqa: E731
        both = self.fm.module.parameters(), self.lens.parameters()
        return tuple(torch.cat([whole(p) for p in x]).tolist() for x in both)  # type: ignore[return-value]


def _joined(engine: str, path: Path) -> tuple[list[float], list[float]]:
    loop = Loop(*placed(engine, "llama", path), clip=engine != "tp")  # torch cannot clip tensors beside DTensors
    loop.run(0, STEPS)
    return loop.parameters()


@pytest.mark.parametrize("engine", ["fsdp2", "ddp", "tp"])
def test_joined_to_a_loop(engine: str, tmp_path: Path) -> None:
    want = plain_loop(STEPS, clip=float("inf") if engine == "tp" else 0.1)
    model().save_pretrained(tmp_path)
    for found in run_world(2, _joined, engine, tmp_path):
        for mine, theirs in zip(found, want, strict=True):
            assert error(mine, theirs) < 1e-5


def _stopped_half_way(folder: Path) -> tuple[list[float], list[float]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    loop = Loop(*placed("fsdp2", "llama"))
    loop.run(0, STEPS // 2)
    model_state, optimizer_state = get_state_dict(loop.fm, loop.optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    loop = Loop(*placed("fsdp2", "llama"))
    model_state, optimizer_state = get_state_dict(loop.fm, loop.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(loop.fm, loop.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loop.run(STEPS // 2, STEPS)
    return loop.parameters()


def test_a_loop_that_is_saved_and_gone_on(tmp_path: Path) -> None:
    want = plain_loop(STEPS)
    for found in run_world(2, _stopped_half_way, tmp_path):
        for mine, theirs in zip(found, want, strict=True):
            assert error(mine, theirs) < 1e-5


def test_the_lens_does_not_reach_the_model() -> None:
    gradients = []
    for joined in (False, True):
        fm, batch = FlexModel(model()), batches()[0]
        lens = TunedLens(fm)
        fm.register_trainable_module("lens", lens)
        if joined:
            fm.module.gradient_checkpointing_enable()
            fm.module.train()
            with lens.joined(batch["attention_mask"], tokens=5):
                (fm(**batch).logits.pow(2).mean() + lens.loss).backward()
            assert all(float(p.grad.norm()) > 0 for p in lens.parameters() if p.dim() > 1)
        else:
            fm(**batch).logits.pow(2).mean().backward()
        gradients.append([p.grad for p in fm.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- tables and pictures -----------------------------------------------------------------------------------------
def test_tables_and_pictures(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("plotly")
    found = TunedLens(FlexModel(model())).fit(batches(), steps=3)
    table = found.to_dataframe()
    assert isinstance(found, LensTraining) and isinstance(table, pandas.DataFrame)
    assert list(table.columns) == ["step", "translator", "loss"] and len(table) == 6
    assert table["loss"][3] == float(found.loss[1, 1])
    found.plot().write_html(tmp_path / "picture.html")
    assert (tmp_path / "picture.html").stat().st_size > 1000
