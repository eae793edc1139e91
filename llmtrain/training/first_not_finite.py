"""Which module is the first whose output, or whose gradient, is not finite? Found by running a micro-batch again."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of names that activation checkpointing and compilation put in."""


@dataclass(frozen=True)
class Culprit:
    """Where a value that is not finite comes up first.

    Attributes:
        module: name of the module, as in the names of weights; "" when only a weight's gradient is known.
        phase: whether it is the module's output, or what its backward pass gives.
        what: for a reader.
    """

    module: str
    phase: Literal["forward", "backward"]
    what: str


def plain_name(name: str) -> str:
    """A module's or a parameter's name without what wraps it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all of this rank's part is finite; numbers that are no floats are."""
    mine = local(tensor.detach())
    if not mine.is_floating_point() or mine.numel() == 0:
        return True
    # One pass over memory; `isfinite(...).all()` writes two tensors and takes thirty times as long on a CPU.
    low, high = torch.aminmax(mine)  # both are NaN when anything is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def search(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    *,
    backward: bool,
) -> Culprit | None:
    """Run a micro-batch once more and watch every module. Gradients are overwritten. Under sharding a collective.

    Args:
        model: what is called; under DDP its module, so that each rank sees its own gradients.
        loss_of: calls the model it is given, and gives the loss.
        backward: watch the backward pass, too (the same on all ranks).

    Returns:
        What came first on this rank, or None where everything was finite.
    """
    called = model.module if isinstance(model, DistributedDataParallel) else model
    for parameter in model.parameters():
        parameter.grad = None
    with _watching(called) as watch:
        loss = loss_of(called)
        if not backward:
            return watch.forward or _of_loss(loss)
        watch.starts_backward()
        loss.backward()  # type: ignore[no-untyped-call]
    return watch.culprit()


def _of_loss(loss: Tensor) -> Culprit | None:
    return None if is_finite(loss) else Culprit("", "forward", "the loss; the outputs of all modules are finite")


class _Watch:
    """Collects, in order of execution, what is not finite."""

    def __init__(self) -> None:
        self.forward: Culprit | None = None
        self._in_forward = True
        self._numbers = itertools.count()
        # Of the backward pass: the tensor that came first, and which modules read it or gave it
        self._tensor: int | None = None
        self._read_by: list[str] = []
        self._given_by: list[str] = []

    def starts_backward(self) -> None:
        """From here on forwards are recomputations of activation checkpointing."""
        self._in_forward = False

    def before(self, name: str, inputs: Any) -> None:
        """A module begins."""
        if self._in_forward:
            self._follow(name, inputs, given=False)

    def after(self, name: str, output: Any) -> None:
        """A module has ended; the modules in it have, before."""
        if not self._in_forward:
            return
        self._follow(name, output, given=True)
        if self.forward is None:
            bad = next((tensor for tensor in tensors(output) if not is_finite(tensor)), None)
            if bad is not None:
                values = local(bad.detach())
                count = int((~torch.isfinite(values)).sum())
                what = f"{count:,} of {values.numel():,} values of its output are not finite"
                self.forward = Culprit(name, "forward", what)

    def _follow(self, name: str, values: Any, *, given: bool) -> None:
        for tensor in tensors(values):
            if tensor.requires_grad:
                # A number, for Python's id of a tensor that is gone may come again.
                number = vars(tensor).setdefault("_watched_as", next(self._numbers))
                tensor.register_hook(self._look(name, number, given))  # type: ignore[no-untyped-call]

    def _look(self, name: str, tensor: int, given: bool) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self._tensor not in (None, tensor) or is_finite(gradient):
                return
            self._tensor = tensor
            (self._given_by if given else self._read_by).append(name)

        return look

    def culprit(self) -> Culprit | None:
        """Of the forward pass, or else of the backward pass."""
        if self.forward is not None or self._tensor is None:
            return self.forward
        given = f", the output of {self._given_by[0]}" if self._given_by else ""
        if self._read_by:  # the modules around it have the same input, and began before it
            what = f"the gradient of its input{given} is not finite, and that of its output is"
            return Culprit(self._read_by[-1], "backward", what)
        inner = self._given_by[0]
        what = f"the gradient of the output of {inner} is not finite"
        return Culprit(inner.rpartition(".")[0], "backward", what)


@contextmanager
def _watching(model: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()
    handles = []

    def begins(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: watch.before(name, (args, kwargs))

    def ends(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: watch.after(name, output)

    for path, module in model.named_modules():
        if name := plain_name(path):
            handles.append(module.register_forward_pre_hook(begins(name), with_kwargs=True))
            handles.append(module.register_forward_hook(ends(name), with_kwargs=True))
    compiled = torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext()
    try:
        with compiled:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    """Whether a forward was compiled: hooks inside of it would not be called."""
    return any("forward" in vars(module) for module in model.modules())


def weight_with_bad_gradient(model: nn.Module) -> Culprit | None:
    """After a backward: the last weight with a bad gradient, for backward comes to it first.

    For where no gradient of an activation says it: gradients of sharded weights are those of all ranks.
    """
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not is_finite(parameter.grad):
            name = plain_name(name)
            return Culprit(name.rpartition(".")[0], "backward", f"the gradient of {name} is not finite")
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def not_finite(named: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors whose part on this rank is not finite."""
    return [plain_name(name) for name, tensor in named if not is_finite(tensor)]
