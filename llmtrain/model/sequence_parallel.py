"""One sequence over several ranks (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509).

Each rank of a group holds all weights (or its shards of them) and a slice of every sequence. All but attention works on
one token at a time. Around attention two exchanges (all-to-all) turn slices of the sequence with all heads into whole
sequences of some heads, and back: so attention is computed as on one rank, by any kernel, with each head's own ALiBi
slope. Activations take 1 / degree of the memory.
"""

from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from llmtrain.model.kernels.interface import Attention, Kernel
from llmtrain.model.rotary import Rotation

DATA, SEQUENCE = "data", "sequence"
"""Names of the mesh's dimensions."""


class SequenceParallel:
    """The ranks that share sequences, as one of them sees it.

    A sequence is padded at its end to a multiple of the degree; rank r has the r-th slice.

    Args:
        group: the ranks; all of them call the model with the same batch.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.degree = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    @classmethod
    def of_this_rank(cls, degree: int, device_type: str) -> "SequenceParallel":
        """Groups of `degree` consecutive ranks: a mesh (ranks / degree, degree). A collective call."""
        shape = (dist.get_world_size() // degree, degree)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=(DATA, SEQUENCE))
        return cls(mesh.get_group(SEQUENCE))

    def padded(self, whole: Tensor, fill: int | bool) -> Tensor:
        """(batch, T) with `fill` behind it, so that all slices are equal."""
        return F.pad(whole, (0, -whole.shape[1] % self.degree), value=fill)

    def tokens(self, length: int) -> slice:
        """Which tokens of a padded sequence are this rank's."""
        own = -(-length // self.degree)
        return slice(self.rank * own, (self.rank + 1) * own)

    def part(self, whole: Tensor, fill: int | bool) -> Tensor:
        """This rank's slice of (batch, T)."""
        return self.padded(whole, fill)[:, self.tokens(whole.shape[1])]

    def slopes(self, slopes: tuple[float, ...] | None, kv_heads: int) -> tuple[float, ...] | None:
        """ALiBi slopes of this rank's heads.

        Heads are dealt out, each with the others that read the same keys: neighbours have similar slopes, and a small
        slope means many keys to attend to. In halves, one rank would have most of the work.
        """
        if slopes is None:
            return None
        together = len(slopes) // lcm(kv_heads, self.degree)
        return tuple(slope for head, slope in enumerate(slopes) if head // together % self.degree == self.rank)

    def positions(self, positions: Tensor) -> Tensor:
        """Positions (T,) or (batch, T), padded with the last one: no position that the sequence has not."""
        missing = -positions.shape[-1] % self.degree
        return torch.cat([positions, positions[..., -1:].expand(*positions.shape[:-1], missing)], dim=-1)

    def gathered(self, part: Tensor, length: int) -> Tensor:
        """The slices of all ranks, (batch, T / degree) each, as (batch, T); without a gradient."""
        parts = [torch.empty_like(part) for _ in range(self.degree)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, :length]


class ParallelAttention(Attention):
    """Attention of slices of the sequence: exchanged, computed by the kernel for some heads, exchanged back.

    Shapes are those of `Attend` with the slice's length; the kernel was prepared for the whole (padded) sequence and
    for this rank's heads. Where the degree does not divide the key-value heads, they are repeated as often as it takes.
    """

    def __init__(self, kernel: Kernel, prepared: Any, rotation: Rotation | None, ranks: SequenceParallel) -> None:
        super().__init__(kernel, prepared, rotation)
        self.ranks = ranks

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        dropout_p: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of this rank's queries over all keys."""
        times = lcm(k.shape[1], self.ranks.degree) // k.shape[1]
        if times > 1:
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        heads = [t.shape[1] // self.ranks.degree for t in (q, k, v)]
        q, k, v = torch.split(self._to_heads(q, k, v, kv_heads=k.shape[1]), heads, dim=1)
        out = super().__call__(q, k, v, softmax_scale=softmax_scale, dropout_p=dropout_p, softcap=softcap)
        return self._to_slices(out, kv_heads=k.shape[1])

    def _to_heads(self, *tensors: Tensor, kv_heads: int) -> Tensor:
        """(batch, heads, T / degree, d) each -> (batch, all their heads / degree, T, d), in one exchange."""
        dealt = (kv_heads // self.ranks.degree, self.ranks.degree, -1)  # see `SequenceParallel.slopes`
        send = torch.cat([torch.unflatten(t, 1, dealt).movedim(2, 0).flatten(2, 3) for t in tensors], dim=2)
        return _exchange(send, self.ranks.group).movedim(0, 2).flatten(2, 3)

    def _to_slices(self, out: Tensor, *, kv_heads: int) -> Tensor:
        """(batch, heads / degree, T, d) -> (batch, heads, T / degree, d); this rank has `kv_heads` key heads."""
        send = torch.unflatten(out, 2, (self.ranks.degree, -1)).movedim(2, 0).contiguous()
        received = torch.unflatten(_exchange(send, self.ranks.group), 2, (kv_heads, -1))
        return received.movedim(0, 2).flatten(1, 3)


def _exchange(send: Tensor, group: dist.ProcessGroup) -> Tensor:
    """send[i] goes to rank i of the group, what comes from rank j lies at [j]."""
    received: Tensor = _Exchange.apply(send, group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, send: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(send, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, send.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        back = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(back, grad.contiguous(), group=ctx.group)
        return back, None
