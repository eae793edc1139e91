"""Initial weights of one module at a time, by the schemes that MPT documents.

| scheme | weights of linear layers and embeddings |
|---|---|
| `kaiming_normal_`, `kaiming_uniform_` | std = gain / sqrt(fan) (He et al. 2015, arXiv:1502.01852) |
| `xavier_normal_`, `xavier_uniform_` | std = gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010) |
| `small_init_` | normal, std = sqrt(2 / (5 * d_model)) (Nguyen and Salazar 2019, arXiv:1910.05895) |
| `neox_init_` | small_init_, residual projections 2 / (n_layers * sqrt(d_model)) (GPT-NeoX, arXiv:2204.06745) |
| `baseline_` | normal, std = init_std |
| `default_` | torch's: linear layers, bias included, uniform in 1/sqrt(fan_in); embeddings standard normal |

A uniform scheme draws from [-sqrt(3) * std, sqrt(3) * std]. The fused `Wqkv` counts as its slices (one for each of
q, k, v and each head), so that fusing does not change the fans. Projections into the residual stream are divided by
sqrt(2 * n_layers) or as `init_div_is_residual` says. Biases are 0, norms 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtrain.model.config import InitConfig, MPTConfig
from llmtrain.model.linear import FusedLinear, ResidualLinear
from llmtrain.model.norm import RMSNorm


class Draw(NamedTuple):
    """A distribution: normal around 0 with standard deviation `high` (low is None), or uniform in [low, high]."""

    low: float | None
    high: float

    @classmethod
    def normal(cls, std: float) -> "Draw":
        """Normal around 0."""
        return cls(None, std)

    @classmethod
    def uniform(cls, std: float) -> "Draw":
        """Uniform around 0 with that standard deviation."""
        return cls(-math.sqrt(3) * std, math.sqrt(3) * std)

    def into(self, t: Tensor) -> None:
        """Fill t with draws."""
        t.normal_(0.0, self.high) if self.low is None else t.uniform_(self.low, self.high)


def init_module(module: nn.Module, config: MPTConfig) -> None:
    """Initialise the parameters that `module` itself owns, not its children's; sharded ones (DTensor) included.

    Raises TypeError for a module with parameters of a kind that has no rule.
    """
    with torch.no_grad():
        match module:
            case nn.Linear():
                _linear(module, config)
            case nn.Embedding():
                _fill(module.weight, _embedding(config).into)
            case nn.LayerNorm() | RMSNorm():
                _fill(module.weight, lambda t: t.fill_(1.0))
                if isinstance(module, nn.LayerNorm) and module.bias is not None:
                    _fill(module.bias, Tensor.zero_)
            case _ if any(True for _ in module.parameters(recurse=False)):
                raise TypeError(f"no initialisation is known for {type(module).__name__}")


def _linear(module: nn.Linear, config: MPTConfig) -> None:
    slices = module.slices if isinstance(module, FusedLinear) else 1
    draw = _scheme(config, fan_in=module.in_features, fan_out=module.out_features // slices)
    divisor = _residual_divisor(config) if isinstance(module, ResidualLinear) else 1.0
    _fill(module.weight, Draw(draw.low and draw.low / divisor, draw.high / divisor).into)
    if module.bias is not None:
        default = config.init_config.name == "default_"
        _fill(module.bias, draw.into if default else Tensor.zero_)


def _embedding(config: MPTConfig) -> Draw:
    init = config.init_config
    if init.emb_init_std is not None:
        return Draw.normal(init.emb_init_std)
    if isinstance(init.emb_init_uniform_lim, tuple):
        return Draw(*init.emb_init_uniform_lim)
    if init.emb_init_uniform_lim is not None:
        return Draw(-init.emb_init_uniform_lim, init.emb_init_uniform_lim)
    if init.name == "default_":
        return Draw.normal(1.0)
    return _scheme(config, fan_in=config.d_model, fan_out=config.vocab_size)


def _scheme(config: MPTConfig, *, fan_in: int, fan_out: int) -> Draw:
    init = config.init_config
    match init.name:
        case "kaiming_normal_" | "kaiming_uniform_":
            gain = nn.init.calculate_gain(init.init_nonlinearity, init.init_gain)
            std = gain / math.sqrt(fan_in if init.fan_mode == "fan_in" else fan_out)
        case "xavier_normal_" | "xavier_uniform_":
            std = init.init_gain * math.sqrt(2.0 / (fan_in + fan_out))
        case "small_init_" | "neox_init_":
            std = math.sqrt(2.0 / (5.0 * config.d_model))
        case "baseline_":
            assert init.init_std is not None
            std = init.init_std
        case "default_":
            return Draw.uniform(1.0 / math.sqrt(3.0 * fan_in))
    return Draw.uniform(std) if "uniform" in init.name else Draw.normal(std)


def _residual_divisor(config: MPTConfig) -> float:
    init: InitConfig = config.init_config
    if init.name == "default_":
        return 1.0
    if init.name == "neox_init_":
        return config.n_layers / math.sqrt(10.0)  # turns sqrt(2 / (5 d)) into 2 / (n_layers * sqrt(d))
    if isinstance(init.init_div_is_residual, bool):
        return math.sqrt(2.0 * config.n_layers) if init.init_div_is_residual else 1.0
    return init.init_div_is_residual


def _fill(parameter: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill a parameter. A sharded one gets its shard of what rank 0 draws for the whole.

    So the numbers depend on the seed alone, not on the number of ranks, and replicas cannot drift apart. (DTensor's own
    random operators keep neither promise on CPU.) One whole parameter at a time is held for that.
    """
    if not isinstance(parameter, DTensor):
        fill(parameter)
        return
    local = parameter.to_local()
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device_mesh.device_type)
    fill(whole)
    local.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local())
