"""``flex-model``: analyses from the command line. It starts the processes itself unless torchrun did.

A command a file; what they share is in ``spread`` (over which processes), ``start`` (starting them, telling errors),
``models`` and ``text`` (what ``--model`` and prompts may be).
"""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(f"flex-model needs {missing.name}; run: pip install 'flex-model[cli]'") from missing

from flex_model.cli import doctor, harvest, induction, lens, patch, show, steer, watch

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    show.show,
    induction.induction,
    lens.lens,
    patch.patch,
    steer.steer,
    harvest.harvest,
    watch.watch,
    doctor.doctor,
):
    app.command()(command)


def main() -> None:
    """The ``flex-model`` script."""
    app()


@app.callback()
def flex_model() -> None:
    """Read, edit and probe models that are spread over many processes."""
