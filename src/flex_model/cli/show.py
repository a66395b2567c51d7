"""``flex-model show``: what is in a model, before there are weights or processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from flex_model import FlexModel
from flex_model.cli.models import SAFE, ModelError, find_model, require
from flex_model.cli.spread import Fsdp, Pp, Spread, Tp
from flex_model.cli.start import Cache, told
from flex_model.core.naming.names import Names
from flex_model.engines import Engines
from flex_model.show import Outline, Picture
from flex_model.show.nowhere import nowhere
from flex_model.show.observe import Seen, Values, observe
from flex_model.show.outline import AxisRow, outline, over_stages
from flex_model.show.rows import ValueRow

__all__ = ["show", "sketch"]

Config = Any  # of transformers


def show(
    model: Annotated[str, typer.Option(help="A folder with a config.json, that file, a GGUF, or: smollm2, tiny-llama")],
    tp: Tp = 1,
    fsdp: Fsdp = 1,
    pp: Pp = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples of each process, in the shapes")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sample")] = 16,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels below the model; default: all")] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="A file: .html, .txt, .svg, .png, .pdf")] = None,
    cache: Cache = Path(".models"),
) -> None:
    """Print a model as a tree: modules, parameters, shapes of what they put out, and how these lie over processes.

    No weights are read, and the processes need not be there: a model for a thousand GPUs is drawn on a laptop.
    """
    with told():
        require(["transformers"], install="'flex-model[hf]'")
        config = _config(model, cache)
        picture = Picture(sketch(config, Spread(tp, fsdp, pp), batch=batch, length=length))
        console = Console(soft_wrap=True)
        if console.is_terminal:
            console.print(picture.drawn(depth))
        else:
            typer.echo(picture.tree(depth))
        if out is not None:
            console.print(f"Wrote {picture.save(out)}.", markup=False)


def _config(model: str, cache: Path) -> Config:
    """Of a model whose weights need not be there."""
    from transformers import AutoConfig

    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        folder = find_model(model, cache)
    try:
        return AutoConfig.from_pretrained(folder, **SAFE)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--model {model}: transformers cannot read its config.json: {reason}") from error


def sketch(config: Config, spread: Spread, *, batch: int = 2, length: int = 16) -> Outline:
    """The outline of a transformers model as one of the processes of ``spread`` would see it, from its configuration.

    Forwards run without FSDP, twice to see what grows with the batch, and without a pipeline, whose stages pass on what
    the plain model's layers do.
    """
    if spread.processes > 1:
        spread.check_config(config.get_text_config(), config.model_type)
    if spread.pp > 1:
        return _staged(config, spread, _inputs(config, batch, length))
    with nowhere(spread.processes) as on_meta:

        def seen_on(samples: int) -> Seen:
            fm = FlexModel(_made(config, Spread(tp=spread.tp), spread))
            with on_meta:
                return observe(fm, (), _inputs(config, samples, length))

        seen = seen_on(batch)
        if spread.fsdp > 1:
            seen = replace(seen, values=_dealt(seen.values, seen_on(2 * batch).values, spread.fsdp))
        return outline(FlexModel(_made(config, spread, spread))._runtime, seen)


def _dealt(mine: Values, twice: Values, ranks: int) -> Values:
    """What data-parallel ranks have of each value together, from one's at its batch and at twice that."""
    return {
        place: [_dealt_row(row, other, ranks) for row, other in zip(rows, twice[place], strict=True)]
        for place, rows in mine.items()
    }


def _dealt_row(row: ValueRow, twice: ValueRow, ranks: int) -> ValueRow:
    if row.shape is None or twice.shape is None:
        return row
    more = [b - a for a, b in zip(row.shape, twice.shape, strict=True)]
    shape = tuple(a + (ranks - 1) * b for a, b in zip(row.shape, more, strict=True))
    word = next((f"S({dim})" for dim, b in enumerate(more) if b), "R")
    return replace(row, shape=shape, placements=(word, *row.placements))


def _staged(config: Config, spread: Spread, inputs: dict[str, Tensor]) -> Outline:
    with nowhere(1) as on_meta:
        fm = FlexModel(_made(config, Spread(), Spread()))
        with on_meta:
            seen = observe(fm, (), inputs)
        whole = outline(fm._runtime, seen)
    held: list[frozenset[str]] = []
    for rank in range(spread.pp):
        with nowhere(spread.pp, rank=rank):
            model = _made(config, spread, spread)
            held.append(frozenset(Names(model, absent=Engines([model]).absent).modules))
    return replace(
        over_stages(whole, held),
        axes=(AxisRow("pp", spread.pp, "stage"),),
        ranks=list(range(spread.pp)),
        engines=("transformers",),
    )


def _made(config: Config, spread: Spread, among: Spread) -> Any:
    """The model on the meta device, split by transformers itself; ``among`` all processes that there are."""
    import transformers
    from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
    from transformers.initialization import no_tie_weights

    named = (config.architectures or [None])[0]
    kind: Any = getattr(transformers, named or "", None)
    with torch.device("meta"), no_tie_weights():
        options = {"attn_implementation": "eager", "dtype": config.dtype or torch.float32}
        chosen = transformers.AutoModelForCausalLM if kind is None else kind
        model = chosen.from_config(config, **options) if kind is None else kind._from_config(config, **options)
    if spread.processes > 1:
        asked = DistributedConfig(**spread.config_sizes)
        _, _, meshes = type(model).prepare_distribute_model(DistributedConfig(**among.config_sizes))
        try:
            plan = model._resolve_parallel_plans(asked)[2]
            if spread.fsdp > 1 and not any(part.isdigit() for name in plan for part in name.split(".")):
                raise ValueError("its `fsdp_plan` names none of the model's layers")
            model = type(model).maybe_distribute_model(model, asked, meshes)
        except ValueError as error:
            raise ModelError(
                f"{spread.asked}: transformers cannot split a {type(model).__name__} like this: {error}",
                page="split-impossible",
            ) from error
    model.tie_weights()
    return model.eval()


def _inputs(config: Config, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.arange(batch * length).view(batch, length) % config.get_text_config().vocab_size
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given
