"""What ``fm.harvest`` costs, paired in one run: against the disk, the model alone, one process, and its peers; and what
is left of it when it is killed.

    python benchmarks/harvest.py [--only disk,model,smollm2,memory,traffic,kills,peers] [--folder /tmp] [--rounds 5]
    python benchmarks/harvest.py --only smollm2 --tokens 60000
    python benchmarks/harvest.py --only disk,model --device cuda --layers 16 --width 4096 --sites 2

Ways alternate within a round; figures are medians over rounds, with the least and the most, and ratios are taken within
a round. Outputs are compared before anything is timed. Each part has a section on the day's page in ``results``; with
``--dry`` it is only shown.
Without SmolLM2's weights part ``model`` runs a random Llama of ``--layers`` of ``--width`` in bf16.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from importlib import import_module
from pathlib import Path

import pages

HERE = Path(__file__).parent
PARTS = ("disk", "model", "smollm2", "memory", "traffic", "kills", "peers")


def smollm2(given: str | None) -> str | None:
    """The folder of its weights, if they can be had here."""
    from flex_model.cli.models import ModelError, find_model

    try:
        return str(find_model(given or "smollm2", HERE.parent / ".models").resolve())
    except ModelError:
        if given:
            raise
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk that is measured")
    parser.add_argument("--model", help="a folder of SmolLM2's weights; 'none' for a random Llama")
    parser.add_argument("--tokens", type=int, default=15000, help="of part smollm2; of memory the third length")
    parser.add_argument("--model-tokens", type=int, default=4000, help="of parts model and peers, each way and round")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=125)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0, help="of part disk, each way and round")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="of parts disk and model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sites", type=int, default=30, help="of part model, at most")
    parser.add_argument("--dry", action="store_true", help="write no page")
    options = parser.parse_args()
    options.model = None if options.model == "none" else smollm2(options.model)
    options.model_name = "SmolLM2-135M in float32"
    page = HERE / "results" / f"{date.today()}-harvest.md"
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="harvest-") as options.folder:
        for part in options.only.split(","):
            about = pages.how("python benchmarks/harvest.py")
            title, *told = import_module(f"harvests.{part}").report(options)
            section = "\n".join([f"## {title}", "", about, "", *told]).rstrip() + "\n"
            print(section, flush=True)
            if not options.dry:
                pages.put(page, section, f"Harvests, {date.today()}")


if __name__ == "__main__":
    main()
