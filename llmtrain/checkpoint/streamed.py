"""A model that is larger than memory, run block by block: weights are read when a module is called, and freed after."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.checkpoint.heap import give_back

Read = Callable[[str], Tensor]
"""Name of a parameter -> its value; called each time that it is needed."""


@contextlib.contextmanager
def streamed(model: nn.Module, blocks: str, read: Read) -> Iterator[None]:
    """While this lasts, a model on the meta device can be called, in float32 on the CPU.

    Each block is one unit, and each other module with parameters of its own is one: a forward hook before it reads its
    parameters, one behind it lets go of them. So a forward never holds more weights than the largest of the units, and
    every forward reads all of them.

    Args:
        model: All its parameters are on the meta device; buffers are real.
        blocks: Name of its list of blocks.
        read: Gives the parameters by the model's names, in any dtype.
    """
    inside = {id(m) for block in model.get_submodule(blocks).children() for m in block.modules()}
    units: list[tuple[str, nn.Module]] = [(f"{blocks}.{i}", b) for i, b in model.get_submodule(blocks).named_children()]
    for name, module in model.named_modules():
        if id(module) not in inside and any(True for _ in module.parameters(recurse=False)):
            units.append((name, module))
    hooks = []
    for name, module in units:
        unit = Unit(name, module, read)
        hooks.append(module.register_forward_pre_hook(unit.before))
        hooks.append(module.register_forward_hook(unit.after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Unit:
    """A module whose parameters are there while it is called, its submodules' included.

    Args:
        name: Of the module in the model, before the names of its parameters.
        module: With parameters on the meta device.
        read: As in :func:`streamed`.
    """

    def __init__(self, name: str, module: nn.Module, read: Read):
        self._read = read
        self._places: list[tuple[nn.Module, str, str, nn.Parameter]] = []
        for path, owner in module.named_modules(prefix=name):
            for leaf, value in owner.named_parameters(recurse=False, remove_duplicate=False):
                self._places.append((owner, leaf, f"{path}.{leaf}" if path else leaf, value))

    def before(self, *_: Any) -> None:
        """Read the parameters."""
        for owner, leaf, name, _meta in self._places:
            value = self._read(name).to(torch.float32)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def after(self, *_: Any) -> None:
        """Free them."""
        for owner, leaf, _name, meta in self._places:
            owner._parameters[leaf] = meta
        give_back()
