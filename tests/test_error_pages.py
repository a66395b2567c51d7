"""Every message of the library leads to a page, and every page shows what it says: its examples are run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import error_pages
import pytest
from error_pages import FOLDER, SECTIONS, Page

import flex_model
from flex_model import errors

SOURCE = Path(flex_model.__file__).parent
PAGES = {p.stem: p for p in sorted(FOLDER.glob("*.md")) if p.stem != "README" and not p.stem.startswith("FM")}
for _module in pkgutil.walk_packages(flex_model.__path__, "flex_model."):
    importlib.import_module(_module.name)


def _classes(error: type[errors.FlexModelError]) -> Iterator[type[errors.FlexModelError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _classes(kind)


CLASSES = {c.__name__: c for c in _classes(errors.FlexModelError) if c.__name__ != "NoReference"}  # a row's text

# Examples that cannot run here, and where their error is shown instead.
CANNOT = {
    "gradient-unknown": "needs Megatron-core with a parameter that is no axis of the model's: tests/test_megatron.py",
    "parameter-packed": "needs bitsandbytes: tests/test_quantised.py",
    "parameter-unknown": "needs a fairscale model with layers of its own: tests/test_fairscale_limits.py",
    "pipeline-output": "needs 4 ranks, a pipeline with data ranks",
    "no-terminal": "needs a process without a terminal",
    "process-failed": "needs a process of the command to die",
    "rows-are-parts": "needs a mixture of experts that is spread over ranks: tests/test_experts.py",
    "trainable-sharded": "needs a mixture of experts and FSDP2: tests/test_experts.py",
    "zig-zag-sharded-again": "needs 4 ranks, and an engine that shards the sequence twice",
}

# What else the library raises, none of it for a user to read.
INTERNAL = {
    "AttributeError": "what Python expects of __getattr__",
    "ChildFailedError": "becomes process-failed in the command",
    "NoReference": "becomes a row of a report",
    "NoRectangle": "caught in routing/assembly.py",
    "NeedsTheWhole": "caught in core/editing.py",
    "NotImplementedError": "a method that an engine must have",
    "Opaque": "ends the twin early",
    "Stop": "ends a forward, and is taken up where it began",
    "SystemExit": "the command's packages are not installed",
    "ValueError": "caught in engines/own_sizes.py, layout/moves.py, check/run.py",
    "_Refusal": "becomes the refusal of a claim",
    "typer.Exit": "ends the command",
}


def _calls(path: Path) -> Iterator[tuple[str, str]]:
    """(place, page) of every error of the library that a file makes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in CLASSES:
            continue
        place = f"{path.relative_to(SOURCE)}:{node.lineno}"
        given = {k.arg: k.value for k in node.keywords}.get("page")
        if given is None:
            yield place, CLASSES[node.func.id].page
        elif isinstance(given, ast.Constant):
            yield place, str(given.value)


SITES = [site for path in sorted(SOURCE.rglob("*.py")) for site in _calls(path)]


def test_every_message_has_a_page() -> None:
    assert len(SITES) > 100
    missing = [f"{place}: {page or 'none'}" for place, page in SITES if page not in PAGES]
    missing += [f"{name}: {c.page}" for name, c in CLASSES.items() if c is not errors.FlexModelError and not c.page]
    assert not missing


def test_every_page_has_a_message() -> None:
    used = {page for _, page in SITES} | {c.page for c in CLASSES.values()}
    assert set(PAGES) <= used
    assert set(CANNOT) <= set(PAGES)


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"\]\((\S+)\.md\)", (FOLDER / "README.md").read_text())
    assert sorted(n for n in listed if not n.startswith("FM")) == sorted(PAGES)


def test_nothing_else_is_raised() -> None:
    other = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                if re.fullmatch(r"[\w.]*[A-Z]\w*", name) and name not in CLASSES:
                    other.add(name)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id[0].isupper():
                other.add(node.exc.id)
    assert other <= set(INTERNAL)


@pytest.mark.parametrize("slug", PAGES)
def test_page_has_its_parts(slug: str) -> None:
    page = Page.read(PAGES[slug])
    assert list(page.sections) == SECTIONS
    assert page.classes and set(page.classes) <= set(CLASSES)
    assert page.symptom.endswith(f"(docs/errors/{slug}.md)")
    for section in ("Example", "Fix"):
        assert page.code(section).strip()
        compile(page.code(section), slug, "exec")
    for section in ("Cause", "Fix"):
        assert page.sections[section].split("```")[0].strip(), f"{section} says nothing"


@pytest.mark.parametrize("slug", [s for s in PAGES if s not in CANNOT])
def test_example_raises_and_fix_runs(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEX_MODEL_CHECK", raising=False)
    page = Page.read(PAGES[slug])
    if "fairscale" in page.code("Example"):
        pytest.importorskip("fairscale")
    monkeypatch.setenv("FLEX_MODEL_CHECK", "")  # what an example sets is gone after it
    told = [t for t in error_pages.run(page) if t is not None]
    shown = [(kind, message) for kind, slug_, message in told if slug_ == slug]
    assert shown, told
    assert all(kind in page.classes for kind, _ in shown)
    assert any(page.shows(message) for _, message in shown), shown


def test_cannot_run() -> None:
    """The ones that are not run are listed with the reason."""
    assert CANNOT.keys() <= PAGES.keys() and all(CANNOT.values())
    print(f"error pages: {len(PAGES) - len(CANNOT)} of {len(PAGES)} examples run")
    for slug, reason in CANNOT.items():
        print(f"error pages, not run: {slug} {reason}")
