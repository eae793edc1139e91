"""Before the model exists: the process group, seeds, threads, temporary files, and what is said about them."""

import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable
from multiprocessing.util import Finalize
from typing import Any

import torch
import yaml
from composer.devices import DeviceCPU, DeviceGPU
from composer.utils import dist, reproducibility

from llmtrain.cores import threads_of_a_rank
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.kernels.denormals import NOTE, flush_denormals, flushed
from llmtrain.recipe.batch import BatchPlan
from llmtrain.recipe.recipe import Recipe
from llmtrain.redaction import RedactedFormatter, redact, redact_text
from llmtrain.training.determinism import set_determinism
from llmtrain.training.fsdp import ShardingPlan
from llmtrain.training.host_memory import keep_freed_memory
from llmtrain.training.language_model import LanguageModel, trainable_parameters
from llmtrain.user_code import run_code_paths


def say(line: str) -> None:
    """Prints a line once, on rank 0."""
    if dist.get_global_rank() == 0:
        print(redact_text(line), file=sys.stderr, flush=True)  # before W&B, which copies what is printed


def say_each(lines: Iterable[str]) -> None:
    """Prints lines once, on rank 0."""
    for line in lines:
        say(line)


def start(recipe: Recipe) -> torch.device:
    """Prepares this process for training and returns the device it trains on."""
    flush_denormals()  # before anything starts torch's threads, which take it over
    set_allocator(recipe)
    set_determinism(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        dist.initialize_dist(DeviceGPU() if device.type == "cuda" else DeviceCPU(), recipe.dist_timeout)
    if device.type == "cpu":
        if (threads := threads_of_a_rank(int(dist.get_local_world_size()))) is not None:
            torch.set_num_threads(threads)
        keep_freed_memory()
    set_logging(recipe)
    own_temporary_folder()
    run_code_paths(recipe.code_paths)
    return device


def set_allocator(recipe: Recipe) -> None:
    """CUDA allocator settings; they are read when CUDA starts, and what the environment says is kept."""
    settings = []
    if recipe.expandable_segments:
        settings.append("expandable_segments:True")
    if recipe.max_split_size_mb is not None:
        settings.append(f"max_split_size_mb:{recipe.max_split_size_mb}")
    if settings:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ",".join(settings))
    if recipe.cuda_load_lazy:
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")


def set_logging(recipe: Recipe) -> None:
    """Log levels of ours, Composer's and Streaming's loggers; third-party warnings that nobody can act on are muted."""
    handler = logging.StreamHandler()
    line = f"%(asctime)s rank{dist.get_global_rank()} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(RedactedFormatter(line))
    logging.basicConfig(handlers=[handler])
    for name in ("llmtrain", "composer", "streaming"):
        logging.getLogger(name).setLevel(recipe.python_log_level.upper())
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|composer|torchmetrics|streaming)\b.*")


def own_temporary_folder() -> None:
    """Gives the ranks of this node one temporary folder of their own, removed at the end.

    Streaming never removes its lock files, and each one that a killed run leaves makes a name unusable for later runs.
    """
    mine = tempfile.mkdtemp(prefix="llmtrain-") if dist.get_local_rank() == 0 else None
    folders = dist.all_gather_object(mine)
    folder = folders[dist.get_global_rank() - dist.get_local_rank()]
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    if mine is not None:
        # Also where a process that multiprocessing started ends, which skips atexit; last, after workers were joined.
        Finalize(None, shutil.rmtree, args=(mine,), kwargs={"ignore_errors": True}, exitpriority=-1000)


def seed_everything(seed: int) -> None:
    """The same seed on all ranks, so that models built on several ranks start equal."""
    reproducibility.seed_all(seed)


def precision(recipe: Recipe, device: torch.device) -> str:
    """The recipe's precision, or fp32 on a CPU, where Composer accepts nothing else."""
    if device.type == "cpu" and recipe.precision != "fp32":
        say(f"precision: {recipe.precision} needs a GPU; this run is on CPU and trains in fp32.")
        return "fp32"
    return recipe.precision


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, secrets masked."""
    return yaml.safe_dump(redact(recipe.model_dump(mode="json")), sort_keys=False)


def hyperparameters(recipe: Recipe) -> dict[str, Any]:
    """What loggers are told of the recipe, without secrets; `metadata` at the top level unless told otherwise."""
    values = redact(recipe.model_dump(mode="json"))
    metadata = values.pop("metadata") or {}
    return {**values, **metadata} if recipe.flatten_metadata else {**values, "metadata": metadata}


def notes(recipe: Recipe) -> list[str]:
    """Lines about keys that are accepted and mean nothing here."""
    lines = [
        f"{key}: {value!r} is not used; checkpoints are always {name}."
        for key, value, name in (
            ("save_filename", recipe.save_filename, "epE-baB in save_folder"),
            ("save_latest_filename", recipe.save_latest_filename, "linked as `latest` in save_folder"),
        )
        if value is not None
    ]
    recomputes = recipe.fsdp_config is not None and recipe.fsdp_config.checkpointing != "none"
    if not recomputes and getattr(recipe.model, "activation_checkpointing_target", None) is not None:
        lines.append(
            "model.activation_checkpointing_target: nothing is recomputed; set fsdp_config.activation_checkpointing."
        )
    return lines


def attention_kernel(model: LanguageModel, device: torch.device, precision: str) -> dict[str, str]:
    """`kernel`: what will compute attention in training on sequences of full length; `reason`: why that one."""
    if isinstance(model.model, HFCausalLM):
        name = str(model.model.config._attn_implementation)
        return {"kernel": name, "reason": f"{name} of transformers"}
    dtype = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(precision, torch.float32)
    choice = model.model.transformer.expected_choice(device, dtype)
    return {"kernel": choice.kernel.name, "reason": choice.reason}


def summary(
    recipe: Recipe,
    model: LanguageModel,
    batch: BatchPlan,
    sharding: ShardingPlan,
    device: torch.device,
    precision: str,
    step: int,
) -> str:
    """What is about to happen, in a few lines."""
    ranks = dist.get_world_size()
    trained, whole = trainable_parameters(model), sum(p.numel() for p in model.parameters())
    frozen = "" if trained == whole else f", {trained:,} of them trained"
    attention = attention_kernel(model, device, precision)["reason"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tokens = batch.global_batch_size * recipe.max_seq_len
    degree = batch.sequence_parallel_degree
    share = f"{ranks} rank(s)" if degree == 1 else f"{ranks // degree} group(s) of {degree} ranks that share sequences"
    begins = f"continues after step {step}" if step else "starts at step 0"
    lines = [
        f"run         {recipe.run_name}, {begins}, ends at {recipe.max_duration}",
        f"model       {whole:,} parameters{frozen}; attention: {attention}",
        f"batch       {batch.global_batch_size} x {recipe.max_seq_len} = {tokens:,} tokens a step: {share} x "
        f"{batch.accumulation_steps} micro-batch(es) of {batch.microbatch_size}",
        f"device      {ranks} x {name}, {precision}, {sharding.strategy}, torch {torch.__version__}"
        + (", deterministic" if recipe.deterministic else "")
        + (f", {NOTE}" if device.type == "cpu" and flushed() else ""),
    ]
    return "\n".join(lines)
