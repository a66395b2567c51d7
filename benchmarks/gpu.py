"""What hooks cost on a GPU: a random model of the shape of Llama 8B in bf16, paired in one run.

Each round runs every way once, in turn, to the point where its values can be read; figures are medians over rounds of
wall time, and what they lie above the plain model, in per cent of it. A trace says how much of the copies to the host
ran beside the model.

    python benchmarks/gpu.py [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flex_model import FlexModel, __version__

RESIDUALS, MLPS, NEURONS = "model.layers.*", "model.layers.*.mlp", "model.layers.*.mlp.act_fn"
Run = Callable[[], Any]


def llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    with torch.device("cuda"):
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(kept)
    return model.requires_grad_(False)


# -- ways to run it --------------------------------------------------------------------------------------------
def plain(model: nn.Module, step: Run) -> Run:
    return step


def by_hand(pattern: str, keep: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Run], Run]:
    """Hand-written hooks that capture: ``keep`` says where to."""

    def way(model: nn.Module, step: Run) -> Run:
        chosen = _matching(model, pattern)

        def run() -> Any:
            seen: dict[str, Tensor] = {}
            handles = [
                m.register_forward_hook(
                    lambda m, a, o, n=n: seen.__setitem__(n, keep(o if isinstance(o, Tensor) else o[0]))
                )
                for n, m in chosen.items()
            ]
            step()
            for handle in handles:
                handle.remove()
            return seen

        return run

    return way


def _matching(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    from fnmatch import fnmatchcase

    deep = pattern.count(".")
    return {n: m for n, m in model.named_modules() if n.count(".") == deep and fnmatchcase(n, pattern)}


def captured(*patterns: str, device: str | None = "cpu", **options: Any) -> Callable[[nn.Module, Run], Run]:
    def way(model: nn.Module, step: Run) -> Run:
        fm = FlexModel(model, device=device)

        def run() -> Any:
            with fm.capture(*patterns, **options) as acts:
                step()
            return acts

        run.kept = fm  # type: ignore[attr-defined]
        return run

    return way


def steered_by_hand(model: nn.Module, step: Run) -> Run:
    vector = torch.randn(4096, device="cuda", dtype=torch.bfloat16)

    def run() -> Any:
        handle = model.get_submodule("model.layers.15").register_forward_hook(lambda m, a, o: o + vector)
        step()
        handle.remove()

    return run


def steered(model: nn.Module, step: Run) -> Run:
    vector = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    fm = FlexModel(model)

    def run() -> Any:
        with fm.edit("model.layers.15", lambda x: x + vector):
            step()

    run.kept = fm  # type: ignore[attr-defined]
    return run


# -- measuring -------------------------------------------------------------------------------------------------
def measure(model: nn.Module, step: Run, ways: dict[str, Any], rounds: int) -> dict[str, tuple[list[float], float]]:
    """{way: (milliseconds by round, GiB that it took on the device at most above the model)}"""
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            run = way(model, step)
            run()  # layouts are found, memory is taken
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            start = time.perf_counter()
            out = run()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1000)
            peaks[name] = (torch.cuda.max_memory_allocated() - base) / 2**30
            fm = getattr(run, "kept", None)
            if fm is not None:
                fm.restore()
            del out, run, fm
            gc.collect()
    return {name: (times[name], peaks[name]) for name in ways}


def beside(model: nn.Module, step: Run, way: Any) -> dict[str, float]:
    """Of the copies to the host: their milliseconds, and how many of those a kernel of the model ran beside them."""
    run = way(model, step)
    run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        run()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        prof.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    copies = [
        (e["ts"], e["ts"] + e["dur"]) for e in events if "DtoH" in e.get("name", "") and e.get("cat") == "gpu_memcpy"
    ]
    kernels = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"]
    total = sum(b - a for a, b in copies)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copies for c, d in _merged(kernels))
    run.kept.restore()
    return {"copies": len(copies), "copying": total / 1000, "beside": both / 1000}


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], b)
        else:
            out.append((a, b))
    return out


def table(title: str, figures: dict[str, tuple[list[float], float]]) -> list[str]:
    base = statistics.median(figures["plain"][0])
    lines = [f"## {title}", "", "| way | ms | spread | above plain | GiB on the device |", "|---|---|---|---|---|"]
    for name, (times, peak) in figures.items():
        middle, low, high = statistics.median(times), min(times), max(times)
        lines.append(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {middle / base - 1:+.1%} | {peak:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="a folder for the result page")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    lines = run_all(options.rounds, options.layers)
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        (options.out / f"{datetime.date.today()}-{name}.md").write_text("\n".join(lines))


def run_all(rounds: int, layers: int) -> list[str]:
    model = llama(layers)
    ids = torch.randint(0, 128256, (4, 1024), device="cuda")
    embedded = model.get_input_embeddings()(ids[:2]).requires_grad_()
    one = ids[:1, :1]

    @torch.no_grad()
    def forward() -> Any:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def both() -> Any:
        model(inputs_embeds=embedded, use_cache=False).logits.float().logsumexp(-1).sum().backward()

    @torch.no_grad()
    def decode() -> Any:
        model(input_ids=one, use_cache=False)

    def to_host(x: Tensor) -> Tensor:
        return x.detach().cpu()

    def on_device(x: Tensor) -> Tensor:
        return x.detach().clone()

    vector = (slice(None), -1)
    forwards = {
        "plain": plain,
        "hand-written hooks, residuals, `.cpu()`": by_hand(RESIDUALS, to_host),
        "residuals to the host": captured(RESIDUALS),
        "residuals to the host, last position": captured(RESIDUALS, select=vector),
        "hand-written hooks, residuals, `.clone()`": by_hand(RESIDUALS, on_device),
        "residuals, left on the device": captured(RESIDUALS, device=None),
        "residuals and MLPs to the host": captured(RESIDUALS, MLPS),
        "neurons to the host": captured(NEURONS),
        "hand-written steering of one layer": steered_by_hand,
        "steering of one layer": steered,
    }
    backwards = {
        "plain": plain,
        "gradients of residuals to the host": captured(RESIDUALS, hook_type="full_backward_pre"),
        "residuals to the host": captured(RESIDUALS),
    }
    decodes = {
        "plain": plain,
        "hand-written hooks, residuals, `.clone()`": by_hand(RESIDUALS, on_device),
        "residuals, left on the device": captured(RESIDUALS, device=None),
        "hand-written hooks, residuals, `.cpu()`": by_hand(RESIDUALS, to_host),
        "residuals to the host": captured(RESIDUALS),
    }
    card = torch.cuda.get_device_name()
    width = f"{layers} layers of 4,096, {sum(p.numel() for p in model.parameters()) / 1e9:.1f} billion parameters"
    lines = [
        f"# Hooks on a GPU, {datetime.date.today()}",
        "",
        f"{card}; torch {torch.__version__}, transformers {transformers.__version__}, flex-model {__version__}, "
        f"Python {platform.python_version()}. A random Llama of {width}, bf16, one process. "
        f"`python benchmarks/gpu.py --rounds {rounds} --layers {layers}`: medians of {rounds} rounds in which every "
        f"way ran once, in turn, until its values could be read.",
        "",
        *table("A forward of 4 x 1,024 tokens", measure(model, forward, forwards, rounds)),
        *table("Forward and backward to the embeddings, 2 x 1,024 tokens", measure(model, both, backwards, rounds)),
        *table("A forward of one token", measure(model, decode, decodes, 3 * rounds)),
        "## Copies to the host beside the model",
        "",
    ]
    for name in ("residuals to the host", "residuals and MLPs to the host", "neurons to the host"):
        seen = beside(model, forward, forwards[name])
        lines.append(
            f"- {name}: {seen['copies']:.0f} copies of {seen['copying']:.1f} ms together, "
            f"{seen['beside']:.1f} ms of them beside the model's kernels."
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
