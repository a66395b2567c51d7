"""The page of a model (``Picture.save("model.html")``), in a real browser."""

from __future__ import annotations

import random
import shutil
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import engines
import models
import pipelines
import pytest
import torch
from torch import Tensor, nn
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.core.naming.globs import glob_to_regex
from flex_model.errors import RegistrationError
from flex_model.show import Outline, Picture
from flex_model.show.page import frame, page
from flex_model.show.page.data import page_data
from flex_model.show.page.held import held
from flex_model.show.rows import ValueRow

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], headless=True)
        yield chromium
        chromium.close()


class Tab:
    """A page from a file, with what it asked of any network, wrote to the console, or opened."""

    def __init__(self, browser: Any, file: Path, text: str, **options: Any) -> None:
        file.write_text(text, encoding="utf-8")
        self.asked: list[str] = []
        self.told: list[str] = []
        self.context = browser.new_context(viewport={"width": 1300, "height": 800}, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.told.append(dialog.message), dialog.dismiss()))
        self.page.route("**/*", lambda route: self._asked(route, file.as_uri()))
        self.page.goto(file.as_uri())

    def _asked(self, route: Any, own: str) -> None:
        if route.request.url == own:
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def find(self, selector: str) -> Any:
        return self.page.locator(selector)

    def role(self, role: str, name: str | None = None, **options: Any) -> Any:
        return self.page.get_by_role(role, name=name, **options)

    def module(self, name: str) -> None:
        self.page.fill("#search", name)
        self.page.keyboard.press("Enter")
        assert self.find("#panel-module h2").inner_text() == (name or "(model)")

    def says(self, text: str) -> None:
        self.find("#said.shown").get_by_text(text, exact=True).wait_for(timeout=5000)

    def rows(self) -> list[str]:
        return self.find("#tree [role=treeitem] .name b").all_inner_texts()

    def paste(self) -> str:
        """What is on the clipboard, as a person finds out."""
        self.page.evaluate("document.body.append(document.createElement('textarea'))")
        self.find("body > textarea").focus()
        self.page.keyboard.press("Control+V")
        text = self.find("body > textarea").input_value()
        self.page.evaluate("document.querySelector('body > textarea').remove()")
        return str(text)


Open = Callable[..., Tab]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens pages, and at the end looks whether one asked or complained."""
    tabs: list[Tab] = []

    def opened(text: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, tmp_path / f"{len(tabs)}.html", text, **options))
        return tabs[-1]

    yield opened
    for tab in tabs:
        assert tab.asked == [] and tab.told == []
        tab.context.close()


def llama() -> FlexModel:
    return FlexModel(models.make("llama"), {})


@pytest.fixture(scope="module")
def net() -> Outline:
    return FlexModel(models.make("llama")).show(models.inputs("llama")).outline


# -- names -------------------------------------------------------------------------------------------------------
CASES = [
    "layers.*.mlp",
    "layers.**",
    "**.mlp",
    "*",
    "**",
    "layers.?.mlp",
    "layers.[01].mlp",
    "[!l]*",
    "a.b",
    "a+(b)",
    "[",
    "[]",
]


def _cases() -> list[tuple[str, str]]:
    names = ["layers.0.mlp", "layers.12.mlp.up", "head", "a.b", "axb", "a+(b)", "", "[", "é.ü😀"]
    made = random.Random(0)
    parts = ["a", "b", ".", "*", "**", "?", "[ab]", "[!a]", "[^b]", "[a-b]", "[b-a]", "[[&]", "[\\]", *"[]!-|$+(&\\é😀"]
    letters = "aab.[]&\\é😀"
    drawn = [
        ("".join(made.choices(parts, k=made.randrange(5))), "".join(made.choices(letters, k=made.randrange(4))))
        for _ in range(4000)
    ]
    return [(pattern, name) for pattern in CASES for name in names] + drawn


def _matches(pattern: str, name: str) -> bool | None:
    try:
        return glob_to_regex(pattern).fullmatch(name) is not None
    except RegistrationError:
        return None


@pytest.mark.filterwarnings("ignore:Possible set difference")
def test_globs_mean_the_same_in_the_page(open_page: Open) -> None:
    code = files("flex_model.show.page").joinpath("script/glob.js").read_text(encoding="utf-8")
    run = f"""(cases) => {{ {code}
        return cases.map(([pattern, name]) => {{
            try {{ return globToRegExp(pattern).test(name); }}
            catch (error) {{ if (error instanceof SyntaxError) return null; throw error; }}
        }});
    }}"""
    cases = _cases()
    found = open_page("<title>cases</title>").page.evaluate(run, cases)
    expected = [_matches(pattern, name) for pattern, name in cases]
    counts = {str(kind): expected.count(kind) for kind in (True, False, None)}
    print(f"{len(cases)} patterns and names: {counts}")
    assert [(c, f, e) for c, f, e in zip(cases, found, expected, strict=True) if f != e] == []
    assert min(counts.values()) > 100


def test_search_finds_what_capture_takes(open_page: Open) -> None:
    fm = llama()
    names = fm._runtime.names
    tab = open_page(page(fm.show(models.inputs("llama")).outline))
    every = [node.row.name for node in fm.show().outline.root.walk()]
    for pattern in ("model.layers.*.mlp", "**", "model.layers.*", "**.[qk]_proj", "model.*"):
        tab.page.fill("#search", pattern)
        found = [n for n in every if n and glob_to_regex(pattern).fullmatch(n)]
        taken = len(names.match(pattern))
        told = f"{len(found)} modules of {len(every)}; fm.capture takes {taken}"
        assert tab.find("#found").inner_text() == told
        assert tab.find("#matches [role=option] b").all_inner_texts() == found
    tab.role("button", "Copy: capture of model.*").click()
    known: dict[str, Any] = {"fm": fm, "inputs": models.inputs("llama")}
    exec(code := tab.paste().replace("list(acts)", "taken = list(acts)"), known)
    assert "fm.capture" in code and known["taken"] == [key for key, _ in names.match("model.*")]
    tab.page.fill("#search", "Q_Proj")
    assert tab.find("#found").inner_text() == f"2 modules of {len(every)}"
    tab.page.fill("#search", "[z-a]")
    assert tab.find("#found").inner_text() == "not a pattern yet"
    tab.page.fill("#search", "nothing of this name")
    assert tab.find("#found").inner_text() == f"0 modules of {len(every)}"
    tab.page.keyboard.press("Escape")
    assert tab.find("#tree").is_visible() and tab.find("#found").inner_text() == ""


# -- the tree ----------------------------------------------------------------------------------------------------
def test_runs_unfold_to_single_modules(open_page: Open, net: Outline) -> None:
    tab = open_page(page(net))
    assert "0-1" in tab.rows() and tab.find(".times").inner_text() == "\u00d72"
    run = tab.find("[role=treeitem]").filter(has_text="0-1")
    run.locator(".twisty").click()
    assert run.get_attribute("aria-expanded") == "true"
    rows = tab.rows()
    at = rows.index("0-1")
    assert rows[at : at + 3] == ["0-1", "0", "1"]
    tab.find("[role=treeitem]").nth(at + 2).locator(".twisty").click()
    assert tab.find("#panel-module h2").inner_text() == "model.layers.1"
    assert {"self_attn", "mlp"} <= set(tab.rows())
    tab.find("[role=treeitem]").nth(at).locator(".twisty").click()
    assert "self_attn" not in tab.rows() and tab.find("[role=treeitem][tabindex='0']").count() == 1


def test_the_tree_by_keyboard(open_page: Open, net: Outline) -> None:
    tab = open_page(page(net))
    tab.find("#tree [tabindex='0']").focus()

    def press(*keys: str) -> tuple[str, str]:
        for key in keys:
            tab.page.keyboard.press(key)
        label = tab.page.evaluate("document.activeElement.querySelector('b').textContent")
        return label, tab.find("#panel-module h2").inner_text()

    assert press("Home", "ArrowDown") == ("model", "model")
    assert press("ArrowLeft", "ArrowDown") == ("lm_head", "lm_head")
    assert press("ArrowUp", "ArrowRight", "ArrowRight") == ("embed_tokens", "model.embed_tokens")
    assert press("ArrowLeft") == ("model", "model") and press("End") == ("lm_head", "lm_head")
    assert press("Home", " ") == ("(model)", "(model)") and tab.rows() == ["(model)"]
    assert press("Enter", "ArrowDown") == ("model", "model")
    tab.page.keyboard.press("/")
    assert tab.page.evaluate("document.activeElement.id") == "search"
    tab.page.keyboard.type("q_proj")
    tab.page.keyboard.press("ArrowDown")
    active = tab.find("#search").get_attribute("aria-activedescendant")
    assert tab.find(f"#{active} b").inner_text() == "model.layers.0.self_attn.q_proj"
    assert press("ArrowDown", "Enter") == ("q_proj", "model.layers.1.self_attn.q_proj")
    tab.role("tab", "Module").focus()
    tab.page.keyboard.press("ArrowRight")
    assert tab.find("#panel-hooks").is_visible() and not tab.find("#panel-module").is_visible()


def test_roles_and_labels(open_page: Open, net: Outline) -> None:
    tab = open_page(page(net))
    assert tab.role("tree", "Modules of the model").count() == tab.role("combobox", "Search modules").count() == 1
    levels = tab.page.evaluate(
        """[...document.querySelectorAll('[role=treeitem]')].map((e) =>
            ['aria-level', 'aria-posinset', 'aria-setsize'].map((name) => Number(e.getAttribute(name))))"""
    )
    assert levels[:3] == [[1, 1, 1], [2, 1, 2], [3, 1, 4]]
    nameless = tab.page.evaluate(
        """[...document.querySelectorAll('button, input, select')].filter((e) =>
            !(e.getAttribute('aria-label') ?? e.textContent).trim()).length"""
    )
    assert nameless == 0
    tab.role("combobox", "Search modules").focus()
    assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


# -- a module ----------------------------------------------------------------------------------------------------
def test_values_and_parameters_of_a_module(open_page: Open, net: Outline) -> None:
    tab = open_page(page(net))
    tab.module("model.layers.1.mlp.up_proj")
    text = tab.find("#panel-module").inner_text()
    assert "(4, 6, 32)" in text and "(4, 6, 48)" in text and "(48, 32)" in text and "1,536 parameters" in text
    tab.module("model.layers")
    assert "never called" in tab.find("#panel-module").inner_text() and tab.find(".copy").count() == 0


def test_what_is_copied_runs(open_page: Open) -> None:
    fm, inputs = llama(), models.inputs("llama")
    plain = models.make("llama")(**inputs).logits
    tab = open_page(page(fm.show(inputs).outline), permissions=["clipboard-read", "clipboard-write"])
    for name in ("model.layers.1.mlp", ""):
        tab.module(name) if name else tab.find("[role=treeitem]").first.click()
        for site in tab.role("combobox", "Value to hook").locator("option").all_inner_texts():
            if name == "" and site.startswith("in"):
                continue  # ids
            tab.role("combobox", "Value to hook").select_option(label=site)
            for title in ("Capture", "Edit", "Register"):
                button = tab.role("button", f"Copy: {title}")
                button.click()
                tab.says(f"Copied: {title}")
                assert "Copied" in button.inner_text()
                code = tab.page.evaluate("navigator.clipboard.readText()")
                assert code == tab.paste() != ""
                known: dict[str, Any] = {"fm": fm, "inputs": inputs, "HookFunction": HookFunction}
                with torch.no_grad():
                    exec(code, known)
                    if title == "Capture":
                        assert known["acts"][name].shape[:2] == (4, 6)
                if title == "Register":
                    with torch.no_grad():
                        assert not torch.equal(fm(**inputs).logits, plain)
                    known["handle"].remove()
    assert fm.hooks() == []


def test_copying_without_a_clipboard(open_page: Open, net: Outline, tmp_path: Path) -> None:
    tab = open_page(page(net))
    tab.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    tab.module("model.norm")
    tab.role("button", "Copy: Edit").click()
    tab.says("Copied: Edit")
    assert tab.paste() == 'with fm.edit("model.norm", lambda x: x * 2):\n    fm(**inputs)'


def test_refusals_and_diagrams(open_page: Open, net: Outline) -> None:
    norm = next(node for node in net.root.walk() if node.row.name == "model.norm")
    kept = norm.row.values
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 90 40" width="90" height="40" onload="alert(1)">'
        "<style>body{display:none}</style><script>alert(2)</script><foreignObject><b>no</b></foreignObject>"
        '<image href="http://example.org/a.png"/><a href="http://example.org"><path d="M0 0"/></a>'
        '<rect class="node" x="1" y="1" width="80" height="30" fill="url(http://example.org/b)"/>'
        '<path class="edge" marker-end="url(#tip)" d="M0 0L9 9"/><text class="label" x="40" y="16">norm</text></svg>'
    )
    norm.row.values = [ValueRow("out", 0, None, (), "", refusal="rows <b>differ</b> from rank to rank")]
    try:
        outline = replace(net)
        vars(outline)["diagrams"] = {"model.norm": drawing, "lm_head": "<p>no drawing</p>"}
        tab = open_page(page(outline))
    finally:
        norm.row.values = kept
    tab.module("model.norm")
    assert tab.find(".refused").inner_text().endswith("Refused: rows <b>differ</b> from rank to rank")
    inside = tab.page.evaluate("[...document.querySelectorAll('.diagram *')].map((e) => e.nodeName)")
    assert inside == ["svg", "rect", "path", "text"] and tab.find(".diagram .label").inner_html() == "norm"
    assert "example" not in tab.find(".diagram").inner_html() and "alert" not in tab.find(".diagram").inner_html()
    tab.module("lm_head")
    assert tab.find(".diagram").count() == 0
    assert all("The action has been blocked" in said for said in tab.told)  # what browsers say of a handler in a
    tab.told.clear()  # drawing that they parse, and do not run, differs between their versions


# -- hooks -------------------------------------------------------------------------------------------------------
def test_hooks_by_group(open_page: Open) -> None:
    fm = llama()
    edit = HookFunction("model.layers.1.mlp", editing_function=torch.tanh)
    fm.register_forward_hook(edit)
    fm.update_hook_groups(edit, "steering")
    fm.create_hook_group("probes", "q_proj")
    with torch.no_grad(), fm.groups("probes"):
        fm(**models.inputs("llama"))
        tab = open_page(page(fm.show(models.inputs("llama")).outline))
    assert tab.find(".hook:visible").all_inner_texts() == ["1 inside", "2 inside"]  # of the two layers, folded
    assert tab.role("tab", "Hooks (3)").count() == 1
    tab.role("tab", "Hooks (3)").click()

    def listed() -> list[str]:
        return tab.find("#panel-hooks tbody .link").all_inner_texts()

    probes = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert sorted(listed()) == sorted(["model.layers.1.mlp", *probes])
    tab.role("button", "probes").click()
    assert listed() == probes and tab.role("button", "probes", pressed=True).count() == 1
    assert tab.find("#panel-hooks [role=status]").inner_text() == "2 hooks of 3"
    tab.role("button", "steering").click()
    assert len(listed()) == 3
    tab.role("button", "probes").click()
    assert listed() == ["model.layers.1.mlp"] and "○ off" in tab.find("#panel-hooks tbody").inner_text()
    tab.find("#panel-hooks .link").click()
    assert tab.find("#panel-module h2").inner_text() == "model.layers.1.mlp"


def test_why_a_hook_has_not_fired(open_page: Open) -> None:
    fm = llama()
    fm.register_forward_hook(HookFunction("model.norm"))
    why = fm.hooks()[0].missed
    tab = open_page(page(fm.show().outline))
    tab.role("tab", "Hooks (1)").click()
    assert why and tab.find("#panel-hooks td.reason").inner_text() == why
    assert tab.find(".cost").inner_text() == "nothing moves"


def _costs() -> list[Any]:
    fm = FlexModel(engines.place("tp", models.net()).model, {}, deliver="all")
    fm.register_forward_hook(HookFunction("layers.0.mlp.up"))
    fm.register_forward_hook(HookFunction("layers.0.mlp"))
    outline = fm.show(models.tokens()).outline
    with torch.no_grad():
        fm(models.tokens())
    return [page(fm.show().outline), [h["bytes"] for h in page_data(outline)["hooks"]], outline.root.here]


def test_costs_are_bytes(open_page: Open) -> None:
    text, costs, _ = run_world(2, _costs)[0]
    each = 4 * 6 * 16 * 4  # of (4, 6, 16) in float32: each of two ranks sends its half
    assert costs == [0, each]
    tab = open_page(text)
    tab.role("tab", "Hooks (2)").click()
    assert tab.find("#total b").inner_text() == "1.5 KiB" == f"{each / 1024} KiB"
    assert tab.find(".cost").all_inner_texts() == ["nothing moves", "1.5 KiB, all-gather"]


# -- ranks -------------------------------------------------------------------------------------------------------
def _held(engine: str) -> list[Any]:
    if engine in ("gpipe", "interleaved"):
        pipe = pipelines.Pipe(models.net(), engine)
        schedule, fm = pipe.schedule(), FlexModel(pipe.module)
        outline = fm.show(models.tokens(), forward=lambda b: pipelines.step(schedule, b, train=False)).outline
    else:
        placed = engines.place(engine, models.net())
        outline = FlexModel(placed.model).show(placed.mine(models.tokens())).outline
    found = held(outline)
    order = torch.tensor(outline.ranks).flatten().tolist()
    return [outline.root.here, dict(zip(order, found.counts, strict=True)), found.about, page(outline)]


@pytest.mark.parametrize("engine", ["ddp", "tp", "fsdp2", "fsdp1_orig", "gpipe", "interleaved", "hsdp", "2d_tp"])
def test_what_ranks_hold(engine: str, open_page: Open) -> None:
    told = run_world(4 if engine in engines.FOUR_RANKS else 2, _held, engine)
    here = {rank: row[0] for rank, row in enumerate(told)}
    print(f"{engine}: parameters by rank {here}")
    for _, counts, about, _ in told:
        assert about == (engine == "fsdp1_orig")
        assert counts == (pytest.approx(here, rel=0.2) if about else here)
    tab = open_page(told[0][3])
    tab.role("tab", "Ranks").click()
    assert tab.find("#panel-ranks tbody tr").count() == len(told) == tab.find("#panel-ranks .cell").count()
    hues = tab.find("#panel-ranks .cell").evaluate_all("cells => cells.map((e) => e.style.getPropertyValue('--hue'))")
    assert len({*hues}) == {"ddp": 1, "hsdp": 2}.get(engine, len(told))


def test_layouts_on_the_mesh(open_page: Open) -> None:
    tab = open_page(run_world(4, _held, "2d_tp")[0][3])
    tab.module("layers.0.mlp.up")
    out, into = tab.find(".site").all()
    cells = out.locator(".cell").all_inner_texts()
    assert [c.split()[0] for c in cells] == ["0", "1", "2", "3"] and out.locator(".row").count() == 2
    assert len({c.split()[1] for c in cells}) == 4  # split along both axes
    letters = [c.split()[1] for c in into.locator(".cell").all_inner_texts()]
    assert letters == ["a", "a", "b", "b"]  # tensor-parallel ranks have the same input
    assert "split along dim 2" in out.locator(".mesh").get_attribute("aria-label")


def test_stages_on_the_mesh(open_page: Open) -> None:
    tab = open_page(run_world(2, _held, "gpipe")[0][3])
    tab.module("layers.1")
    assert "On stage " in tab.find("#panel-module").inner_text() and tab.find(".tag").first.inner_text() == "stage 0, 1"
    assert tab.find(".site .mesh").first.locator(".cell.away").count() == 1
    tab.role("tab", "Ranks").click()
    assert "stages" in tab.find("#panel-ranks thead").inner_text()


def test_big_meshes_are_cut(open_page: Open, net: Outline) -> None:
    sizes = (8, 2, 64)
    axes = tuple(replace(a, name=n, size=s) for a, n, s in zip(_axes(), ("dp", "cp", "tp"), sizes, strict=True))
    tab = open_page(page(replace(net, axes=axes, ranks=torch.arange(1024).reshape(sizes).tolist())))
    mesh = tab.find(".site .mesh").first
    assert mesh.locator(".cell").count() == 4 * 2 * 10
    assert "and 4 more along dp" in mesh.inner_text() and "and 54 more along tp" in mesh.inner_text()
    tab.role("tab", "Ranks").click()
    assert "and 896 more" in tab.find("#panel-ranks").inner_text()


def _axes() -> Any:
    from flex_model.show.outline import AxisRow

    return [AxisRow("dp", 1, "data"), AxisRow("cp", 1, "sequence"), AxisRow("tp", 1, "tensor")]


# -- looks -------------------------------------------------------------------------------------------------------
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  const light = (colour) => channels(colour).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(colour)) return colour; } };
  const ratios = [...document.querySelectorAll('#app *')].filter((e) => e.offsetParent && !e.closest('.cell, #said')
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); });
  return [ratios.length, Math.min(...ratios)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, open_page: Open, net: Outline) -> None:
    tab = open_page(page(net), color_scheme=scheme)
    back = "getComputedStyle(document.body).backgroundColor"
    before = tab.page.evaluate(back)
    for _ in range(2):
        texts, least = tab.page.evaluate(CONTRAST)
        print(f"begun {scheme}: {texts} texts, the least contrast is {least:.2f}")
        assert texts > 30 and least >= 4.5
        tab.find("#theme").click()
    assert tab.page.evaluate(back) == before
    tab.page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert tab.page.evaluate(back) == before  # what was picked stays
    fresh = open_page(page(net), color_scheme=scheme)
    fresh.page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    pytest.importorskip("playwright.sync_api").expect(fresh.find("body")).not_to_have_css("background-color", before)


class Wide(nn.Module):
    """1,250 blocks of eight modules; neighbours differ, so that nothing is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(*(nn.Linear(1, 1 + i % 2, bias=False) for _ in range(7))) for i in range(1250)
        )


READY = """() => {
  const search = document.getElementById('search');
  search.value = '**.6';
  search.dispatchEvent(new Event('input'));
  return [performance.now(), document.getElementById('found').textContent];
}"""


def test_ten_thousand_modules(open_page: Open) -> None:
    text = page(FlexModel(Wide()).show().outline)
    tab = open_page(text)
    first = tab.find("[role=treeitem]").count()
    ready, told = tab.page.evaluate(READY)
    options = tab.find("#matches [role=option]").count()
    print(
        f"10,002 modules, {len(text) / 2**20:.2f} MiB: {first} rows made, {options} matches listed, "
        f"first search handled {ready:.0f} ms after navigation"
    )
    assert told == "1,251 modules of 10,002; fm.capture takes 1,251"
    assert first <= 203 and options == 100 and "more" in tab.find("#matches li").last.inner_text()
    tab.page.keyboard.press("Escape")
    tab.page.fill("#search", "")
    elements = tab.page.evaluate("document.getElementsByTagName('*').length")
    assert elements < 3000
    tab.find(".item.more").click()
    assert tab.find("[role=treeitem]").count() == first + 200
    tab.module("layers.1249.6")
    assert tab.find("[role=treeitem][aria-selected=true] b").inner_text() == "6"


def test_ten_thousand_that_are_alike(open_page: Open) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10_000)))
    tab = open_page(page(FlexModel(model).show().outline))
    assert tab.rows() == ["(model)", "0-9999"]
    tab.module("5000")
    rows = tab.find("[role=treeitem]")
    assert rows.count() == 2 + 200 + 1 + 200 + 1  # the first page, a row for what is left out, its own page, the rest
    assert rows.nth(202).inner_text() == rows.last.inner_text() == "4,800 more"
    assert tab.find("[aria-selected=true] b").inner_text() == "5000"
    assert "One of" not in tab.find("#panel-module").inner_text()
    rows.last.click()
    assert rows.count() == 604 and tab.find("#panel-module h2").inner_text() == "5200"
    print(f"10,000 alike: {rows.count()} rows made")
    tab.find(".times").click()
    assert "One of 10,000 that are alike: 0 to 9999" in tab.find("#panel-module").inner_text()


# -- text is text ------------------------------------------------------------------------------------------------
BAD = "<img src=x onerror=alert(1)>"
WORSE = "</script><script>alert(2)</script>"


def test_markup_in_names_is_text(open_page: Open) -> None:
    kind = type("<b>Odd</b><!--", (nn.Sequential,), {})
    inside = type(WORSE, (nn.Linear,), {})
    model = kind()
    model.add_module(BAD, inside(3, 3))
    model.add_module("a\"'\\*", inside(3, 3))
    fm = FlexModel(model, {})
    fm.create_hook_group(WORSE, BAD)
    picture = fm.show(torch.ones(2, 3))
    text = page(picture.outline)
    tab = open_page(text)
    assert tab.page.title() == "<b>Odd</b><!--" == tab.find("h1").inner_text()
    tab.module(BAD)
    assert tab.find("#tree .name .muted").all_inner_texts() == ["<b>Odd</b><!--", WORSE, WORSE]
    tab.role("tab", "Hooks (1)").click()
    assert any(WORSE in chip for chip in tab.find(".chip").all_inner_texts())
    assert tab.find("img").count() == tab.find("h1 b").count() == 0
    tab.page.fill("#search", 'a"')
    tab.page.keyboard.press("Enter")
    for i, title in enumerate(("Capture", "Edit", "Register")):
        code = tab.find(".code pre").nth(i).inner_text()
        known: dict[str, Any] = {"fm": _positional(fm), "inputs": {}, "HookFunction": HookFunction}
        exec(code, known)
        assert title != "Capture" or known["acts"]["a\"'\\*"].shape == (2, 3)
    assert tab.page.evaluate("document.scripts.length") == 2


def _positional(fm: FlexModel) -> Any:
    """``fm()`` with the only argument that it takes."""

    class Given:
        def __call__(self) -> Tensor:
            return fm(torch.ones(2, 3))

        def __getattr__(self, name: str) -> Any:
            return getattr(fm, name)

    return Given()


# -- where it is shown -------------------------------------------------------------------------------------------
def test_in_a_notebook(open_page: Open, net: Outline) -> None:
    html = Picture(net)._repr_html_()
    assert html == frame(net)
    tab = open_page(f"<!doctype html><title>notebook</title><p id=own>own</p>{html}")
    outer = tab.find("iframe")
    assert outer.get_attribute("sandbox") == "allow-scripts"
    inner = tab.page.frame_locator("iframe")
    assert inner.locator("h1").inner_text() == "LlamaForCausalLM"
    inner.locator("#search").fill("norm")
    assert inner.locator("#found").inner_text().startswith("5 modules")
    inner.locator("#search").press("Enter")
    inner.get_by_role("button", name="Copy: Capture").click()
    inner.locator("#said.shown").get_by_text("Copied: Capture").wait_for(timeout=5000)
    assert tab.paste().startswith("with fm.capture(")
    child = tab.page.frames[1]
    assert child.evaluate("(() => { try { return parent.document.title; } catch { return 'closed'; } })()") == "closed"
    assert tab.find("#own").inner_text() == "own"


def test_the_policy_of_the_page_forbids_networks(browser: Any, net: Outline, tmp_path: Path) -> None:
    tab = Tab(browser, tmp_path / "page.html", page(net))
    asked = "async (url) => { try { await fetch(url); return 'sent'; } catch { return 'refused'; } }"
    assert tab.page.evaluate(asked, "http://example.org/") == "refused" and tab.asked == []
    assert any("Content Security Policy" in told for told in tab.told)
    tab.context.close()


def test_without_scripts_there_is_the_tree(browser: Any, net: Outline, tmp_path: Path) -> None:
    tab = Tab(browser, tmp_path / "page.html", page(net), java_script_enabled=False)
    assert "layers" in tab.find("noscript pre").inner_text() and not tab.find("#app").is_visible()
    tab.context.close()


def test_saved_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: Outline) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: shown.append(url))
    picture = Picture(net)
    text = picture.save(tmp_path / "model.html").read_text(encoding="utf-8")
    path = picture.open()
    assert text == page(net) == path.read_text(encoding="utf-8") and shown == [path.as_uri()]
    shutil.rmtree(path.parent)


def _saved(folder: Path) -> list[bool]:
    fm = FlexModel(engines.place("tp", models.net()).model)
    path = fm.show(models.tokens()).save(folder / f"{torch.distributed.get_rank()}.html")
    return [path.exists()]


def test_the_lowest_rank_writes(tmp_path: Path) -> None:
    assert run_world(2, _saved, tmp_path) == [[True], [False]]
