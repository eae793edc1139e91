"""A Recipe becomes a Composer Trainer, and the Trainer runs."""

import sys
from pathlib import Path
from typing import Any

from composer import Evaluator, Trainer
from composer.core import DataSpec
from composer.utils import dist

from llmtrain.data.batch import tokens_in_batch
from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.text import build_text_loader
from llmtrain.errors import UserError
from llmtrain.model.mpt import MPT
from llmtrain.recipe.batch import batch_plan
from llmtrain.recipe.recipe import Recipe
from llmtrain.tokenizer import fingerprint, load_tokenizer
from llmtrain.training import composer_adapter, environment, resume
from llmtrain.training.algorithms import build_algorithms
from llmtrain.training.callbacks import build_callbacks
from llmtrain.training.checkpoint_saver import CheckpointSaver, free_space_warning
from llmtrain.training.console import Console
from llmtrain.training.fsdp import ShardingPlan, translate
from llmtrain.training.gradient_check import check_gradient_average
from llmtrain.training.language_model import LanguageModel
from llmtrain.training.loggers import build_loggers
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.preemption import EXIT_CODE, Preemption
from llmtrain.training.run_folder import MetricsFile, RunFolder
from llmtrain.training.schedulers import build_scheduler


def train(recipe: Recipe) -> int:
    """Trains a recipe on all ranks of this launch; resumes when its checkpoints are there.

    Returns:
        0: finished, now or before. 143: stopped by SIGTERM, with a checkpoint.

    Raises:
        UserError: something that the user can mend, before the first step.
    """
    device = environment.start(recipe)
    run = RunFolder(Path("runs") / recipe.run_name)
    point = resume.find(recipe)
    if point.finished:
        environment.say(f"{recipe.run_name} is complete at step {point.step}; nothing to do.")
        return 0

    tokenizer = load_tokenizer(recipe.tokenizer)
    tokenizer_hash = fingerprint(recipe.tokenizer.name)
    if dist.get_global_rank() == 0:
        run.create(environment.recipe_yaml(recipe))
        tokenizer.save_pretrained(run.tokenizer)
    batch = batch_plan(recipe, dist.get_world_size())
    sharding = translate(
        recipe.fsdp_config,
        world_size=dist.get_world_size(),
        local_world_size=dist.get_local_world_size(),
        device_type=device.type,
    )
    environment.say_each((*batch.notes, *sharding.notes))

    def data_spec(loader: TextLoaderConfig, device_batch_size: int) -> DataSpec:
        return DataSpec(
            build_text_loader(
                loader,
                eos_token_id=tokenizer.eos_token_id,
                tokenizer_fingerprint=tokenizer_hash,
                vocab_size=recipe.model.vocab_size,
                device_batch_size=device_batch_size,
            ),
            get_num_tokens_in_batch=tokens_in_batch,
        )

    composer_adapter.install()
    if sharding.strategy in ("fsdp", "hsdp"):
        check_gradient_average(device)
    model = build_model(recipe, sharding)
    optimizer = build_optimizer(recipe.optimizer, model)
    saver = build_saver(recipe, tokenizer_hash, model)
    preemption = Preemption(saver)
    restore_rng = composer_adapter.RestoreRNG()
    trainer = Trainer(
        run_name=recipe.run_name,
        seed=recipe.seed,
        model=model,
        optimizers=optimizer,
        schedulers=build_scheduler(recipe.scheduler),
        algorithms=build_algorithms(recipe.algorithms),
        parallelism_config=composer_adapter.parallelism(sharding),
        device="gpu" if device.type == "cuda" else "cpu",
        precision=environment.precision(recipe, device),
        compile_config=recipe.compile_config,
        dist_timeout=recipe.dist_timeout,
        # data
        train_dataloader=data_spec(recipe.train_loader, batch.device_batch_size),
        train_subset_num_batches=recipe.train_subset_num_batches,
        device_train_microbatch_size=batch.microbatch_size,
        accumulate_train_batch_on_tokens=recipe.accumulate_train_batch_on_tokens,
        spin_dataloaders=recipe.spin_dataloaders,
        max_duration=recipe.max_duration,
        # evaluation
        eval_dataloader=[
            Evaluator(label=label, dataloader=data_spec(loader, batch.device_eval_batch_size))
            for label, loader in recipe.evaluators().items()
        ],
        eval_interval=recipe.eval_interval,
        eval_subset_num_batches=recipe.eval_subset_num_batches,
        # what a run shows
        loggers=[MetricsFile(run), Console(recipe.console_log_interval), *build_loggers(recipe.loggers, run.path)],
        callbacks=[
            restore_rng,
            *build_callbacks(recipe.callbacks),
            preemption,
            *([saver] if saver is not None else []),
        ],
        progress_bar=recipe.progress_bar,
        log_to_console=False,
        python_log_level=recipe.python_log_level,
        auto_log_hparams=False,
        # starting point; checkpoints are found and written by llmtrain.training.resume and .checkpoint_saver
        autoresume=False,
        load_path=point.load_path,
        load_weights_only=point.load_weights_only,
        load_strict_model_weights=recipe.load_strict_model_weights,
        load_ignore_keys=point.load_ignore_keys,
    )
    restore_rng.trainer = trainer
    preemption.install()
    trainer.logger.log_hyperparameters(recipe.model_dump(mode="json"))
    environment.say(environment.summary(recipe, model, batch, sharding, device, point.step))
    if recipe.eval_first and trainer.state.timestamp.batch == 0 and trainer.state.evaluators:
        trainer.eval()
    trainer.fit()
    trainer.close()
    return EXIT_CODE if preemption.stopped_at is not None else 0


def build_model(recipe: Recipe, sharding: ShardingPlan) -> LanguageModel:
    """The model on the device that `init_device` asks for; the same initial weights on all ranks."""
    where: str = recipe.model.init_device
    sharded = sharding.strategy in ("fsdp", "hsdp")
    if where == "mixed":
        where = "cpu" if dist.get_global_rank() == 0 or not sharded else "meta"
    elif where == "meta" and not sharded:
        environment.say("init_device: meta needs a sharded model; using cpu.")
        where = "cpu"
    environment.seed_everything(recipe.seed)
    return LanguageModel(MPT(recipe.model, device=where), recipe.model)


def build_saver(recipe: Recipe, tokenizer_hash: str, model: LanguageModel) -> CheckpointSaver | None:
    """The checkpoint callback, or None when the recipe has no save_folder."""
    folder = resume.save_folder(recipe)
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    if warning := free_space_warning(folder, n_parameters, recipe.save_num_checkpoints_to_keep):
        environment.say(f"warning: {warning}")
    record: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "tokenizer_fingerprint": tokenizer_hash}
    return CheckpointSaver(
        folder,
        recipe.save_interval,
        keep=recipe.save_num_checkpoints_to_keep,
        weights_only=recipe.save_weights_only,
        ignore_keys=recipe.save_ignore_keys,
        record=record,
    )
