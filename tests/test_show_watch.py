"""``fm.log`` and ``flex-model watch``: what a run writes is right on every engine; the page shows it and no more."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
import models
import pipelines
import pytest
import torch
from oracle import plain_hooks
from worlds import run_world

from flex_model import FlexModel, HookFunction
from flex_model.errors import FlexModelError
from flex_model.show.watch import serve
from flex_model.show.watch.reading import Run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SITES = ("layers.*", "layers.*.mlp.up", "head")
STEPS = 3


def _tokens(step: int) -> torch.Tensor:
    return models.tokens().roll(step, 0) if step else models.tokens()


def expected(step: int) -> dict[str, float]:
    """The root mean square of every value of the plain model."""
    seen = plain_hooks(models.net(), lambda m: m(_tokens(step)), backward=False)
    return {
        name: float(values[0].float().square().mean().sqrt())
        for (name, kind, _), values in seen.items()
        if kind == "forward"
    }


def _train(engine: str, path: str) -> list[Any]:
    placed = engines.place(engine, models.net())
    fm = FlexModel(placed.model)
    fm.register_forward_hook(HookFunction("layers.0.norm"))
    with fm.log(path, *SITES):
        for step in range(STEPS):
            fm(placed.mine(_tokens(step))).float().pow(2).mean().backward()
    return [len(fm.module._forward_hooks)]


@pytest.mark.parametrize("engine", ["none", "ddp", "fsdp2", "tp", "sp", "2d_tp"])
def test_what_is_logged_is_that_of_one_process(engine: str, tmp_path: Path) -> None:
    ranks = {"none": 1, "2d_tp": 4}.get(engine, 2)
    if engine == "none":
        fm = FlexModel(models.net())
        fm.register_forward_hook(HookFunction("layers.0.norm"))
        with fm.log(tmp_path, *SITES):
            for step in range(STEPS):
                fm(_tokens(step)).pow(2).mean().backward()
    else:
        run_world(ranks, _train, engine, str(tmp_path))
    state = Run(tmp_path).state()
    assert len(state["ranks"]) == ranks and len(state["lines"]) == 5
    for step in range(STEPS):
        want = expected(step)
        for name, line in state["lines"].items():
            assert line[step] == [step, pytest.approx(want[name], rel=1e-4)], name
    for rank in state["ranks"].values():
        assert rank["calls"] == STEPS and rank["ended"] and rank["refused"] == {}
        assert rank["hooks"] == [["layers.0.norm", "forward", True, False, STEPS]]


def _stages(path: str) -> list[Any]:
    pipe = pipelines.Pipe(models.net(), "gpipe")
    schedule, fm = pipe.schedule(), FlexModel(pipe.module)
    with fm.log(path, "layers.*"):
        pipelines.step(schedule, models.tokens(), train=False)
    return []


def test_a_pipeline(tmp_path: Path) -> None:
    run_world(2, _stages, str(tmp_path))
    state, want = Run(tmp_path).state(), expected(0)
    assert [r["calls"] for r in state["ranks"].values()] == [4, 4]  # a line a microbatch
    found = {name: [point[1] for point in line] for name, line in state["lines"].items()}
    assert found == {name: [pytest.approx(want[name], rel=1e-4)] for name in ("layers.0", "layers.1")}


def test_every_so_many_forwards(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    with fm.log(tmp_path, "head", every=2):
        for step in range(5):
            fm(_tokens(step))
    state = Run(tmp_path).state()
    assert [point[0] for point in state["lines"]["head"]] == [0, 2, 4] and state["ranks"]["rank-00000"]["calls"] == 5
    with fm.log(tmp_path, "head"):  # goes on in the same folder
        fm(_tokens(0))
    state = Run(tmp_path).state()
    assert state["ranks"]["rank-00000"]["calls"] == 1 and len(state["lines"]["head"]) == 1
    with pytest.raises(FlexModelError, match="every=0"), fm.log(tmp_path, every=0):
        pass
    with pytest.raises(FlexModelError, match="no such folder"):
        Run(tmp_path / "none")


def test_a_line_that_is_half_written(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    with fm.log(tmp_path, "head"):
        fm(_tokens(0))
    file = tmp_path / "log" / "rank-00000.jsonl"
    text = file.read_bytes()
    run = Run(tmp_path)
    for end in (10, len(text) // 2, len(text)):
        file.write_bytes(text[:end])
        state = run.state()
    assert state["ranks"]["rank-00000"]["ended"] and len(state["lines"]["head"]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_a_full_disk_does_not_disturb_the_run(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    want = fm(_tokens(0))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank-00000.jsonl").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="cannot be written.*the run goes on"), fm.log(tmp_path, "head"):
        found = [fm(_tokens(0)) for _ in range(3)]
    assert all(torch.equal(want, f) for f in found)


def test_a_harvest_is_read_as_it_goes(tmp_path: Path) -> None:
    fm = FlexModel(models.net())
    run = Run(tmp_path)
    assert run.state()["store"] is None
    with fm.log(tmp_path / "acts"):
        fm.harvest([_tokens(s) for s in range(6)], "layers.*", tmp_path / "acts", commit_every=2)
    state = Run(tmp_path / "acts").state()
    rank, state = state["ranks"]["rank-00000"], state["store"]
    assert state["steps"] == 6
    assert rank["calls"] == 6 and rank["hooks"][0][:2] == ["layers.0", "forward"]
    assert [c[0] for c in state["commits"]] == [1, 3, 5] and [c[2] for c in state["commits"]] == [48, 96, 144]
    with torch.no_grad():
        seen = [plain_hooks(models.net(), lambda m, s=s: m(_tokens(s)), backward=False) for s in range(6)]
    rows = torch.cat([s["layers.1", "forward", 0][0].flatten(0, 1) for s in seen])
    want = float(rows.double().square().sum(-1).mean().sqrt())
    assert state["lines"]["layers.1"][-1] == [5, pytest.approx(want, rel=1e-6)]


# -- the server and the page -------------------------------------------------------------------------------------
@contextmanager
def served(path: Path) -> Iterator[str]:
    with serve(Run(path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_only_this_machine_and_only_its_pages(tmp_path: Path) -> None:
    with served(tmp_path) as address:
        assert json.load(urllib.request.urlopen(f"{address}/state"))["ranks"] == {}
        for path in ("/../../etc/passwd", "/log/rank-00000.jsonl", "/page.py"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{address}/state", headers={"Host": "evil.example:80"}))
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(urllib.request.Request(f"{address}/state", data=b"x"))
        with pytest.raises(FlexModelError, match="cannot be had"):
            serve(Run(tmp_path), int(address.rpartition(":")[2]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome")
def test_the_page(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    fm = FlexModel(models.net())
    fm.register_forward_hook(HookFunction("layers.0.norm"))
    with fm.log(tmp_path, "layers.*"):
        for step in range(4):
            fm(_tokens(step))
    line = {"call": 4, "time": 1.0, "fired": [0], "hooks": [["<img src=x onerror=alert(1)>", "forward", True, False]]}
    line["squares"] = {"<b>bold</b>": [4.0, 1.0]}
    evil = [{"begin": 0.0, "rank": 1, "every": 1}, *({**line, "call": call} for call in range(4))]
    (tmp_path / "log" / "rank-00001.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evil))
    asked, errors = [], []
    with served(tmp_path) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#norms .legend")
        assert "layers.0.norm" in page.inner_text("#hooks") and "<img src=x" in page.inner_text("#hooks")
        assert "1 of them on and never fired" in page.inner_text("#about-hooks")
        assert "<b>bold</b>" in (page.text_content("#norms .legend") or "") and not page.query_selector(
            "#hooks img, #norms b"
        )
        assert "1 of 2 ranks have written nothing" in page.inner_text("#status")
        with fm.log(tmp_path, "layers.*"):  # the page goes on by itself
            for _ in range(7):
                fm(_tokens(0))
        page.wait_for_selector("#ranks td:text-is('7')")
        browser.close()
    assert not errors and all(url.startswith((address, "data:")) for url in asked)


def test_the_command(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("flex-model")),
        "watch",
        str(tmp_path),
        "--port",
        str(port),
        "--no-browser",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert f"http://127.0.0.1:{port}/" in run.stdout.readline()
        assert json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/state"))["store"] is None
        run.send_signal(2)
        assert run.wait(10) == 0
