"""Megatron-core's pipeline schedules, plain and interleaved, over tensor and sequence parallelism, on CPU and gloo."""

from __future__ import annotations

from typing import Any

import megatron_cpu as megatron
import parity
import pytest
import torch
import torch.distributed as dist
from megatron_cpu import Spread
from oracle import Count, relative_error
from test_megatron import perturbed, positions
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import RegistrationError

LAYERS, BATCH, LENGTH, MICROBATCHES = 4, 8, 6, 4


def tokens() -> Tensor:
    return torch.randint(0, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


class Stages:
    """A GPTModel whole, and cut over the pipeline's ranks; ``chunks`` of it on each."""

    def __init__(self, *, tp: int = 1, sequence_parallel: bool = False, chunks: int = 1) -> None:
        from megatron.core import parallel_state as state

        sizes = {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
        self.spread = Spread(tp=tp, pipeline_model_parallel_size=2, **sizes)
        shared = {"num_layers": LAYERS, "num_query_groups": 4}
        with self.spread.alone():
            torch.manual_seed(0)
            self.plain = perturbed(megatron.gpt(megatron.config(**shared)))
        if sequence_parallel:  # then the layer itself turns [b, s, h] into [s, b, h]
            self.plain.embedding.reduce_scatter_embeddings = True
            self.plain.embedding.word_embeddings.reduce_scatter_embeddings = True
        self.config = megatron.config(
            **shared,
            **sizes,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=True,
        )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        rank, ranks = state.get_pipeline_model_parallel_rank(), 2
        self.modules = []
        for chunk in range(chunks):
            first, last = rank == 0 and chunk == 0, rank == ranks - 1 and chunk == chunks - 1
            extra = {"vp_stage": chunk} if chunks > 1 else {}
            spec = get_gpt_layer_local_spec(normalization="RMSNorm")
            self.modules.append(megatron.gpt(self.config, spec=spec, pre_process=first, post_process=last, **extra))
        self.module = self.modules[0] if chunks == 1 else nn.ModuleList(self.modules)
        self._load(tp)

    @torch.no_grad()
    def _load(self, tp: int) -> None:
        whole = dict(self.plain.named_parameters())
        for module in self.modules:
            layers = {f"decoder.layers.{i}": m.layer_number - 1 for i, m in enumerate(module.decoder.layers)}
            for name, parameter in module.named_parameters():
                for local, number in layers.items():
                    if name.startswith(f"{local}."):
                        name = f"decoder.layers.{number}{name.removeprefix(local)}"
                        break
                full = whole[name].detach()
                parameter.copy_(megatron.part_of(full, parameter, dist.get_rank() % tp, tp))

    def step(self, model: Any = None, forward_only: bool = False) -> Any:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        def forward(data: Any, model: nn.Module) -> tuple[Any, Any]:
            ids = next(data)
            return model(ids, positions(ids), None), self.loss

        parts = [iter(tokens().chunk(MICROBATCHES)) for _ in self.modules]
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=parts if len(parts) > 1 else parts[0],
            model=list(self.modules if model is None else model),
            num_microbatches=MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=BATCH // MICROBATCHES,
            forward_only=forward_only,
        )

    @staticmethod
    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        whole = output if output.shape[-1] == 64 else gather_from_tensor_model_parallel_region(output)
        mean = whole.float().pow(2).mean()
        return mean, {"loss": mean.detach().clone()}


def _every_module(tp: int, sequence_parallel: bool, chunks: int) -> Count:
    stages, ids = Stages(tp=tp, sequence_parallel=sequence_parallel, chunks=chunks), tokens()

    def plain_loss(plain: nn.Module) -> Tensor:
        return plain(ids, positions(ids), None).float().pow(2).mean()  # type: ignore[no-any-return]

    with stages.spread.alone():
        want = parity.whole_step(stages.plain, plain_loss)
    count, _ = parity.compare_step(FlexModel(stages.module), want, stages.step)
    return count


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "chunks"), [(1, False, 1), (1, False, 2), (2, False, 1), (2, True, 1)]
)
def test_every_module(tp: int, sequence_parallel: bool, chunks: int) -> None:
    for count in run_world(2 * tp, _every_module, tp, sequence_parallel, chunks, timeout=200):
        words = f"tp={tp}{', sequence parallel' if sequence_parallel else ''}{', interleaved' if chunks > 1 else ''}"
        print(f"Megatron-core pipeline of 2, {words}: {count}")
        assert not count.wrong and not count.refused


def _edits() -> None:
    stages = Stages()
    fm, ids, plain = FlexModel(stages.module), tokens(), stages.plain

    def change(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)).tanh()

    for name in ("decoder.layers.0.mlp.linear_fc1", "decoder.layers.3.self_attention.linear_qkv"):
        plain.get_submodule(name).register_forward_hook(lambda m, a, o: (change(o[0]), *o[1:]))
        fm.register_forward_hook(HookFunction(name, editing_function=change))
    losses = stages.step()
    with stages.spread.alone():
        loss = plain(ids, positions(ids), None).float().pow(2).mean()
        loss.backward()
    if dist.get_rank() == 1:
        assert relative_error(torch.stack([x["loss"] for x in losses]).mean(), loss) < 1e-5
    for name, parameter in fm.named_parameters():
        assert relative_error(parameter.grad, plain.get_parameter(name).grad) < 1e-5, name


def test_edits() -> None:
    run_world(2, _edits)


def _stopped() -> None:
    fm = FlexModel(Stages().module)
    with (
        pytest.raises(RegistrationError, match=r"under Megatron-core.* cannot be stopped"),
        fm.capture("decoder.layers.0", stop=True),
    ):
        pass


def test_stages_that_cannot_be_stopped_are_refused() -> None:
    run_world(2, _stopped)
