"""Runs one tool's snippets and prints their answers as JSON; with FlexModel's, the oracle's."""

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def main(tool: str, tasks: list[str], needs: list[str]) -> None:
    sys.path.insert(0, str(HERE / tool))
    packages = [need.partition("==")[0] for need in needs]
    found: dict = {"versions": {p: version(p) for p in packages}, "answers": {}, "oracle": {}}
    for task in tasks:
        if tool == "flex_model":
            import oracle

            found["oracle"][task] = getattr(oracle, task)().tolist()
        try:
            answer = runpy.run_path(str(HERE / tool / f"{task}.py"))["answer"]
            found["answers"][task] = answer.tolist()
        except Exception as error:  # the table tells it
            lines = str(error).strip().splitlines() or [""]
            found["answers"][task] = f"{type(error).__name__}: {lines[0]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(","))
