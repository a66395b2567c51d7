"""``Trace`` and ``TraceDict`` as baukit documents them, as far as the snippets use them."""

from torch import nn

from given import model  # noqa: F401


class Trace:
    """Keeps one module's output and input, and edits the output."""

    def __init__(self, net: nn.Module, layer: str, retain_input=False, edit_output=None) -> None:
        def hook(module, args, output):
            output = output if edit_output is None else edit_output(output)
            self.input, self.output = args[0] if retain_input else None, output
            return output

        self._handle = net.get_submodule(layer).register_forward_hook(hook)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


class TraceDict(dict):
    """One for each of several modules."""

    def __init__(self, net: nn.Module, layers, retain_input=False) -> None:
        super().__init__((name, Trace(net, name, retain_input)) for name in layers)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for trace in self.values():
            trace.__exit__()
