"""What a checkpoint holds, taken at one moment: training may go on while it is written."""

import io
from typing import Any

import torch
from composer import State
from composer.utils import dist, reproducibility
from composer.utils.checkpoint import glob_filter
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

_ALIGNMENT = 64


def state_to_save(
    state: State, *, weights_only: bool = False, ignore_keys: list[str] | None = None, on_device: bool = False
) -> dict[str, Any]:
    """The state as Composer lays it out in a checkpoint (a collective call).

    Args:
        state: of the trainer.
        weights_only: leave the optimizer and the rest of the training state out.
        ignore_keys: glob patterns of keys to leave out.
        on_device: leave shards on their device, for the caller to copy; otherwise they are moved to the host.
    """
    sharded = bool(state.fsdp_sharded_state_dict_enabled)
    if on_device:
        # Composer's own always moves them, through memory that is not pinned, and names all parameters twice.
        options = StateDictOptions(full_state_dict=False, cpu_offload=False)
        optimizers = () if weights_only else state.optimizers[:1]
        weights, moments = get_state_dict(state.model, optimizers, options=options)
        state.get_model_state_dict = lambda: weights
        state.get_optim_state_dict = lambda: {type(optimizer).__qualname__: moments for optimizer in optimizers}
    try:
        content: dict[str, Any]
        if weights_only:
            parts = {
                "model": state.get_model_state_dict(),
                "integrations": state._get_integrations_state_dict(),
                "metadata": state._get_state_metadata(),
            }
            content = {"state": parts}
        else:
            content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
    finally:
        if on_device:
            del state.get_model_state_dict, state.get_optim_state_dict
    if ignore_keys:
        glob_filter(ignore_keys)(content)
        content.setdefault("state", {})
    if sharded and dist.get_global_rank() > 0:
        content.pop("rng", None)  # rank 0 has those of all ranks
    return content


class HostMemory:
    """One block of host memory that each save copies its tensors into; pinned where there is a GPU."""

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._pinned = False

    def copies_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies, each with a storage of its own as `torch.save` writes it; what they held before is overwritten."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT if _fits(tensor) else 0 for tensor in tensors]
        block = self._at_least(sum(sizes))
        copies, offset = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            if size == 0:  # empty, or with an odd layout
                copies.append(tensor.detach().cpu().clone())
                continue
            part = memoryview(block.numpy().data)[offset : offset + tensor.nbytes]
            copy = torch.frombuffer(part, dtype=tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor.detach(), non_blocking=True))
            offset += size
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def close(self) -> None:
        """Gives the memory back."""
        if self._block is not None and self._pinned:
            _cuda().cudaHostUnregister(self._block.data_ptr())
        self._block, self._pinned = None, False

    def _at_least(self, size: int) -> Tensor:
        if self._block is None or self._block.numel() < size:
            self.close()
            self._block = torch.empty(max(size, 1), dtype=torch.uint8)
            if torch.cuda.is_available():
                # Not `pin_memory=True`, which takes the next power of two.
                answer = _cuda().cudaHostRegister(self._block.data_ptr(), self._block.numel(), 0)
                self._pinned = int(answer) == 0
        return self._block


def _cuda() -> Any:
    runtime: Any = torch.cuda
    return runtime.cudart()


def _fits(tensor: Tensor) -> bool:
    return tensor.nbytes > 0 and tensor.is_contiguous() and type(tensor.detach()) is Tensor


class TakenState(DefaultSavePlanner):
    """torch's planner, of a state that was taken when this was made: objects are pickled, tensors copied by then.

    Args:
        content: the state.
        memory: where copies go; None to write the tensors themselves, which must not change before that is done.
        known: what was planned at the save before; None plans all of it.
    """

    def __init__(self, content: dict[str, Any], memory: HostMemory | None, known: "KnownItems | None" = None) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)  # as Composer's saves
        super().set_up_planner(content)
        items = (known or KnownItems()).of(self.state_dict)
        self._plan = SavePlan(items, planner_data=self.mappings)
        taken: list[Any] = [super(TakenState, self).resolve_data(item) for item in self._plan.items]
        if memory is not None:
            places = [place for place, value in enumerate(taken) if isinstance(value, Tensor)]
            copies = memory.copies_of([taken[place] for place in places])
            for place, copy in zip(places, copies, strict=True):
                taken[place] = copy
        self._taken: dict[MetadataIndex, Any] = {
            item.index: value for item, value in zip(self._plan.items, taken, strict=True)
        }
        self.state_dict = {}
        self.size = sum(_size(value) for value in taken)
        """Bytes, of this rank."""

    def set_up_planner(self, *args: Any, is_coordinator: bool = False, **kwargs: Any) -> None:
        """The state is known."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Made when the state was taken."""
        return self._plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """What is written."""
        value: Tensor | io.BytesIO = self._taken[write_item.index]
        return value


class KnownItems:
    """What this rank writes under each key. The next save asks for the same nearly always: torch's own way takes 0.2 ms
    for each sharded tensor, three of them a parameter, while training waits.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, list[WriteItem]]] = {}

    def of(self, state: dict[str, Any]) -> list[WriteItem]:
        """The items of torch's plan of a flat state, in its order."""
        known = {}
        for key, value in state.items():
            shape = _layout(value)
            before = self._known.get(key)
            if before is not None and before[0] == shape:
                known[key] = before
            else:
                known[key] = shape, create_default_local_save_plan({key: value}, False).items
        self._known = known
        return [item for _, items in known.values() for item in items]


def _layout(value: Any) -> Any:
    """All that torch looks at to plan a value: equal when its items are."""
    if isinstance(value, DTensor):
        return value.shape, value.device_mesh, value.placements, *_properties(value.to_local())
    if type(value) in (Tensor, Parameter):
        return _properties(value)
    if isinstance(value, Tensor) or hasattr(value, "__create_write_items__"):
        return object()  # tells nobody what it looks like
    return "pickled"


def _properties(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.layout, tensor.requires_grad, tensor.device, tensor.is_pinned()


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else len(value.getbuffer())
