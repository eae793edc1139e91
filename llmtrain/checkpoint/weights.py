"""A model's tensors where they lie: each is read when it is asked for, so no one needs memory for all of them."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmtrain.errors import UserError


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read one at a time.

    Asking for a tensor reads the whole of it, on the CPU, in memory of its own and in the dtype that was saved; asking
    again reads it again, so whoever needs it twice keeps it. Names, shapes and dtypes cost nothing.

    Args:
        names: Of the tensors, in order.
    """

    def __init__(self, names: Collection[str]):
        self._listed = names

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is none of this name.
            UserError: the file is damaged.
        """

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor as it was saved; reads nothing."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor (Mapping would read it to find out)."""
        return name in self._listed

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names are known to mean the same bytes, as those of a tied head; False where it is not known."""
        return one == other

    def shapes(self) -> dict[str, torch.Size]:
        """Of all tensors; reads nothing."""
        return {name: self.shape(name) for name in self}

    def size(self, name: str) -> int:
        """Bytes of one tensor; reads nothing."""
        return self.shape(name).numel() * self.dtype(name).itemsize

    def total_size(self) -> int:
        """Bytes of all tensors; reads nothing."""
        return sum(self.size(name) for name in self)


class InMemory(Weights):
    """Tensors that are held already."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        super().__init__(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._tensors[name].dtype

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names are known to mean the same bytes."""
        return one == other or self._tensors[one] is self._tensors[other]


class Renamed(Weights):
    """Some of other weights, under other names.

    Args:
        inner: What is read.
        names: New name -> name in `inner`.
    """

    def __init__(self, inner: Weights, names: Mapping[str, str]):
        self._inner = inner
        self._names = dict(names)
        super().__init__(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self._inner[self._names[name]]

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""
        return self._inner.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._inner.dtype(self._names[name])

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names are known to mean the same bytes."""
        return self._inner.same_place(self._names[one], self._names[other])


class Joined(Weights):
    """The tensors of several files as one.

    Raises:
        UserError: a name is in two of them.
    """

    def __init__(self, parts: Sequence[Weights], where: str):
        self._parts: dict[str, Weights] = {}
        for part in parts:
            for name in part:
                if name in self._parts:
                    raise UserError(f"{where}: `{name}` is in two of its files.")
                self._parts[name] = part
        super().__init__(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name][name]

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""
        return self._parts[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._parts[name].dtype(name)

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names are known to mean the same bytes."""
        return self._parts[one] is self._parts[other] and self._parts[one].same_place(one, other)


def without(weights: Weights, names: Iterable[str]) -> Weights:
    """The same weights but for some."""
    left_out = set(names)
    return Renamed(weights, {name: name for name in weights if name not in left_out})


def equal(weights: Weights, one: str, other: str) -> bool:
    """Whether two tensors of one source hold the same bits of value; reads both unless they lie in one place."""
    if weights.shape(one) != weights.shape(other):
        return False
    return weights.same_place(one, other) or torch.equal(weights[one], weights[other])


def fill(parameters: Mapping[str, Tensor], weights: Weights) -> None:
    """Copy weights into a model's state dict, one tensor at a time, so that they are never there twice.

    Args:
        parameters: `model.state_dict()`, of the same names and shapes, in any dtype and on any device.
        weights: What they become.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
