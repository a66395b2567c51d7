"""What the library must never do with data: read from its syntax trees, and tried with hostile files."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flex_model
from flex_model import FlexModel
from flex_model.cli.models import ModelError, find_model
from flex_model.cli.processes import start
from flex_model.cli.spread import Spread

SOURCE = Path(flex_model.__file__).parent
PAGE = SOURCE.parent.parent / "docs" / "security.md"
TREES = {str(p.relative_to(SOURCE)): ast.parse(p.read_text()) for p in sorted(SOURCE.rglob("*.py"))}

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "yaml.load", "numpy.load",
    "np.load", "pd.read_pickle", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
# Objects that ranks of one job send one another: torch pickles them.
OBJECTS = {"all_gather_object", "all_gather_objects", "broadcast_object_list", "gather_object", "scatter_object_list",
           "send_object_list", "recv_object_list"}  # fmt: skip
# From another rank of the same job, over the job's own connections.
UNPICKLES = {"core/stages/messages.py": "save_ctx from stage to stage"}
SERVERS = {"bind", "listen", "TCPStore", "HTTPServer", "ThreadingHTTPServer", "create_server", "serve_forever"}


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, ast.unparse(node.func), node


def test_nothing_is_unpickled_or_executed() -> None:
    assert not [(f, called) for f, called, _ in _calls() if called in FORBIDDEN]
    imports = [
        (f, alias)
        for f, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal", "cloudpickle", "joblib")
        for alias in node.names
    ]
    assert not imports, "import the module, so that its use is seen here"


def test_torch_load_takes_weights_only() -> None:
    unsafe = set()
    for file, called, node in _calls():
        if called == "torch.load":
            given = {k.arg: k.value for k in node.keywords}.get("weights_only")
            if not (isinstance(given, ast.Constant) and given.value is True):
                unsafe.add(file)
    assert unsafe == set(UNPICKLES)
    messages = ast.unparse(TREES["core/stages/messages.py"])
    assert messages.count("torch.load(io.BytesIO(") == messages.count("torch.load("), "from memory, never from a file"


def test_the_page_names_who_sends_objects() -> None:
    senders = {f for f, called, _ in _calls() if called.rpartition(".")[2] in OBJECTS} | set(UNPICKLES)
    assert (
        set(re.findall(r"`([\w/]+\.py)`", PAGE.read_text().split("## Between ranks")[1].split("\n## ")[0])) == senders
    )


def test_no_code_comes_with_a_model() -> None:
    for file, called, node in _calls():
        if called.endswith(".from_pretrained"):
            assert any(k.arg is None for k in node.keywords), f"{file}: pass **SAFE"
        assert not any(k.arg == "shell" for k in node.keywords), file
    from flex_model.cli.models import SAFE

    assert SAFE == {"trust_remote_code": False}
    assert '"use_safetensors": True' in (SOURCE / "cli/spread.py").read_text()


def _imported(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)
    }


def test_nothing_is_served() -> None:
    able = {f for f, tree in TREES.items() if {"socket", "socketserver", "http.server", "asyncio"} & _imported(tree)}
    assert able == {"check/pause.py", "check/doctor.py", "cli/processes.py", "show/watch/server.py"}
    served = [(f, c) for f, c, _ in _calls() if c.rpartition(".")[2] in SERVERS and f in able]
    assert served == [("check/pause.py", "socket.create_server"), ("show/watch/server.py", "ThreadingHTTPServer")]
    assert not [f for f, c, _ in _calls() if c.rpartition(".")[2] == "TCPStore"]
    servers = [n for _, c, n in _calls() if c in ("socket.create_server", "ThreadingHTTPServer")]
    assert [ast.unparse(n.args[0]) for n in servers] == ["('127.0.0.1', port)"] * 2
    texts = [n.value for t in TREES.values() for n in ast.walk(t) if isinstance(n, ast.Constant)]
    assert not {"0.0.0.0", "::", "[::]", "*:0"} & {t for t in texts if isinstance(t, str)}


def _listening(_: object) -> list[str]:
    """Addresses that this process and the one that started it listen on, in the kernel's hexadecimal."""
    value = torch.ones(1)
    dist.all_reduce(value)
    inodes = set()
    for pid in ("self", str(os.getppid())):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
            except OSError:  # closed meanwhile
                continue
    rows = [r.split() for n in ("tcp", "tcp6") for r in Path(f"/proc/net/{n}").read_text().splitlines()[1:]]
    dist.barrier()
    return [r[1].partition(":")[0] for r in rows if r[3] == "0A" and r[9] in inodes]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")
def test_the_command_listens_on_loopback_alone() -> None:
    loopback = ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")
    for addresses in start(_listening, None, 2).values():
        assert addresses and all(a in loopback for a in addresses), addresses


# -- hostile files ---------------------------------------------------------------------------------------------
def _model(folder: Path, files: dict[str, str]) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", "sub/../../b"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = _model(tmp_path, {"up": "a.safetensors", "down": name})
    with pytest.raises(ModelError, match="expected names of files in that folder") as told:
        find_model(str(folder), tmp_path / "cache")
    assert told.value.page == "outside-folder"


def test_an_index_of_its_own_files(tmp_path: Path) -> None:
    assert find_model(str(_model(tmp_path, {"up": "a.safetensors"})), tmp_path / "cache") == tmp_path


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{", '{"weight_map": {"up": 3}}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    _model(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        find_model(str(tmp_path), tmp_path / "cache")


def test_a_gguf_is_converted_inside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_model.cli.models, "_convert", lambda gguf, target: target.mkdir())
    folder, cache = tmp_path / "models", tmp_path / "cache"
    folder.mkdir()
    for name in ("...gguf", "..%2f..gguf", "-rf.gguf", ".gguf.gguf"):
        (folder / name).touch()
        target = find_model(str(folder / name), cache)
        assert target.resolve().parent == cache.resolve()


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot read its config"):
        Spread().check(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_saved_names_are_no_paths(tmp_path: Path) -> None:
    """``acts.save`` writes the one file it is told to, whatever the model's modules are called."""
    model = torch.nn.Sequential()
    model._modules["../up"] = torch.nn.Linear(2, 2)
    fm = FlexModel(model)
    with fm.capture("../up") as acts:
        fm(torch.ones(1, 2))
    (tmp_path / "in").mkdir()
    acts.save(tmp_path / "in" / "acts.safetensors")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["acts.safetensors"]
