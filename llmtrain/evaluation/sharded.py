"""A model for an evaluation, on one rank or sharded over several (FSDP2), its weights read one tensor at a time."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtrain.checkpoint.pretrained import pretrained_config
from llmtrain.checkpoint.read import read_weights
from llmtrain.checkpoint.source import Source, open_source
from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.same_function import as_recipe_says, check_same_tokens
from llmtrain.evaluation.source import Place
from llmtrain.generation.load import DTYPES
from llmtrain.hf_model.build import build
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.load import cast
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.hf_model.source import open_hf
from llmtrain.model.config import MPTConfig
from llmtrain.model.kernels.denormals import flush_denormals
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_model(
    place: Place, ranks: Ranks, *, shard: bool = False, dtype: str | None = None
) -> "tuple[MPT | HFCausalLM, PreTrainedTokenizerFast]":
    """The model in evaluation mode on this rank's device, and its tokenizer.

    Of an MPT, a rank holds one whole tensor at a time beside its own part; one of transformers is made whole on each
    rank's CPU first.

    Args:
        place: where it lies.
        ranks: the processes that share the evaluation.
        shard: shard it over them, block by block; every rank must then make the same forwards. Else each holds all.
        dtype: `float32`, `bfloat16`, `float16` or `float64`; by default bfloat16 on a GPU, float32 on the CPU.

    Raises:
        UserError: nothing usable there, no tokenizer is known, or what the recipe says contradicts the weights.
    """
    flush_denormals()
    name = dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    if name not in DTYPES:
        raise UserError(f"dtype {dtype}: use one of {', '.join(DTYPES)}.")
    shard = shard and ranks.world > 1
    if isinstance(place.model, HFConfig) and place.weights is None:
        return _of_transformers(place, build(place.model).eval(), _own(place.model), ranks, shard, DTYPES[name])
    assert place.weights is not None
    if (found := open_hf(place.weights, place.recipe_file)) is not None:
        made = HFCausalLM(found.model, found.peft).eval()
        return _of_transformers(place, made, found.tokenizer, ranks, shard, DTYPES[name])
    source = _open(place)
    tokenizer = _tokenizer(place, source.tokenizer)
    if len(tokenizer) > source.config.vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: {len(tokenizer):,} tokens, but the model has {source.config.vocab_size:,} "
            "embeddings: they do not belong together."
        )
    model = MPT(source.config, device="meta").to(DTYPES[name]).eval()
    if shard:
        _shard(model, model.transformer.blocks, ranks)
    _fill(model, source.weights, ranks.device)
    return model, tokenizer


def _open(place: Place) -> Source:
    """The weights with the config that they say themselves, or, where they say nothing, that of the recipe."""
    assert place.weights is not None
    if isinstance(place.model, MPTConfig) and not pretrained_config(str(place.weights)):
        config, weights = read_weights(place.weights, otherwise=place.model)
        return Source(place.weights, config, weights, None)
    source = open_source(place.weights, place.recipe_file)
    if isinstance(place.model, MPTConfig):
        config = as_recipe_says(source.config, place.model, str(place.weights))
        return Source(source.path, config, source.weights, source.tokenizer)
    return source


def _of_transformers(
    place: Place,
    model: HFCausalLM,
    tokenizer: TokenizerConfig | None,
    ranks: Ranks,
    shard: bool,
    dtype: torch.dtype,
) -> "tuple[HFCausalLM, PreTrainedTokenizerFast]":
    opened = _tokenizer(place, tokenizer)
    cast(model.hf, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if shard:
        _shard(model, [module for module in model.modules() if model.fsdp_wrap_fn(module)], ranks)
    return model.to(ranks.device), opened


def _own(cfg: HFConfig) -> TokenizerConfig:
    return TokenizerConfig(name=cfg.pretrained_model_name_or_path)


def _tokenizer(place: Place, known: TokenizerConfig | None) -> "PreTrainedTokenizerFast":
    """The recipe's tokenizer, if it gives the ids of the one beside the weights; or that one."""
    if place.tokenizer is None and known is None:
        raise UserError(
            f"{place.weights}: no tokenizer is known for this model (no tokenizer.json beside it, no recipe). Name it: "
            "`tokenizer` in the evaluation recipe, or its training recipe with --recipe yamls/x.yaml"
        )
    if place.tokenizer is None:
        assert known is not None
        return load_tokenizer(known)
    wanted = load_tokenizer(place.tokenizer)
    if known is not None and known.name != place.tokenizer.name:
        check_same_tokens(wanted, load_tokenizer(known), str(place.weights))
    return wanted


def _shard(model: nn.Module, units: Any, ranks: Ranks) -> None:
    """FSDP2: parameters are split over the ranks by their first dimension; a unit gathers its own when it runs."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def _fill(model: MPT, weights: Weights, device: torch.device) -> None:
    """Give parameters on the meta device their values; of a sharded one, this rank's part alone is kept."""
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name in weights:
        parameter = parameters.pop(name)
        value = weights[name].to(parameter.dtype)
        if isinstance(parameter, DTensor):
            # No communication: each rank reads the tensor and cuts its own part out of it.
            part = distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(value)
    assert not parameters, f"no weights for {sorted(parameters)}"  # their names were compared when they were opened
