"""What FlexModel costs, beside plain torch, beside the limit, and beside its peers: ``make bench``.

    python benchmarks/bench.py [--only hooks,sharded,...] [--processes 5]

Every figure is a ratio of ways that alternate within one run, in fresh processes; outputs are compared before anything
is timed. Each part has a section on the day's page in ``results``; with ``--dry`` it is only shown. Peers are in
environments of their own, made when they are first needed.
"""

from __future__ import annotations

import argparse
import platform
from datetime import date
from importlib import import_module
from pathlib import Path

import pages
from harvest import smollm2 as weights

HERE = Path(__file__).parent
PARTS = ("hooks", "sharded", "split")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--processes", type=int, default=5, help="fresh ones of each way")
    parser.add_argument("--hook-rounds", type=int, default=150, help="of part hooks, in each process")
    parser.add_argument("--rounds", type=int, default=15, help="of the other parts, in each process")
    parser.add_argument("--model", help="a folder of SmolLM2's weights")
    parser.add_argument("--dry", action="store_true", help="write no page")
    options = parser.parse_args()
    options.model = weights(options.model)
    page = HERE / "results" / f"{date.today()}-bench.md"
    for part in options.only.split(","):
        about = pages.how("python benchmarks/bench.py")
        title, *told = import_module(f"speeds.{part}").report(options)
        section = "\n".join([f"## {title}", "", f"{about} {processor()}.", "", *told]).rstrip() + "\n"
        print(section, flush=True)
        if not options.dry:
            pages.put(page, section, f"Benchmarks, {date.today()}")


if __name__ == "__main__":
    main()
