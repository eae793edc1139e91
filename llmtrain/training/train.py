"""A Recipe becomes a Composer Trainer, and the Trainer runs."""

from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist

from llmtrain.checkpoint.pretrained import read_pretrained
from llmtrain.checkpoint.weights import fill
from llmtrain.errors import UserError
from llmtrain.hf_model.build import build
from llmtrain.hf_model.checkpoint import read_tensors
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.model.sequence_parallel import SequenceParallel
from llmtrain.recipe.batch import batch_plan
from llmtrain.recipe.recipe import Recipe
from llmtrain.tokenizer import fingerprint_of
from llmtrain.training import (
    activation_checkpointing,
    composer_adapter,
    environment,
    resume,
    rewinding,
    skipped_steps,
    watching,
)
from llmtrain.training.agreement import from_all_ranks, from_rank_zero
from llmtrain.training.algorithms import build_algorithms
from llmtrain.training.bad_steps import BadStep, BadSteps, Rewind
from llmtrain.training.best_checkpoint import BestCheckpoint
from llmtrain.training.callbacks import build_callbacks
from llmtrain.training.checkpoint_saver import CheckpointSaver
from llmtrain.training.compile import compile_blocks
from llmtrain.training.console import Console
from llmtrain.training.data import Loaders, open_tokenizer
from llmtrain.training.evaluation_times import EvaluationTimes
from llmtrain.training.exit_codes import BAD_STEPS
from llmtrain.training.fsdp import ShardingPlan, translate
from llmtrain.training.gradient_check import check_gradient_average
from llmtrain.training.hf_checkpointer import exporters, failed_exports
from llmtrain.training.icl_callback import EvalGauntlet, EvalOutputLogging, TaskEvaluation, task_evaluation
from llmtrain.training.language_model import LanguageModel
from llmtrain.training.last_export import last_export_made_up
from llmtrain.training.length_warmup import LengthWarmup
from llmtrain.training.loggers import build_loggers
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.preemption import EXIT_CODE, Preempted, Preemption
from llmtrain.training.profiling import build_profiler
from llmtrain.training.remote_checkpoints import (
    build_remote_checkpoints,
    leave_uploads,
    stop_uploads,
    uploads_finished,
    uploads_made_up,
)
from llmtrain.training.run_folder import MetricsFile, RunFolder
from llmtrain.training.save_space import bytes_of_a_checkpoint, free_space_warning
from llmtrain.training.schedulers import build_scheduler
from llmtrain.training.sources import source_callbacks
from llmtrain.training.step_record import step_record


def train(recipe: Recipe) -> int:
    """Trains a recipe on all ranks of this launch; continues from the run's newest complete checkpoint.

    Returns:
        0: finished, now or before. 1: so, but an export failed. 3: stopped by `bad_steps`. 143: stopped by SIGTERM,
        after a checkpoint.

    Raises:
        UserError: something that the user can mend, before the first step.
    """
    device = environment.start(recipe)
    watching.start(recipe)
    rewinding.finish(recipe)
    start = resume.find(recipe)
    if start.finished:
        environment.say(f"{recipe.run_name} is complete at step {start.step}; nothing to do.")
        return max(uploads_made_up(recipe, start), last_export_made_up(recipe, start))
    while (code := train_from(recipe, start, device)) is None:
        rewinding.collect()
        start = rewinding.starting_point(recipe)
    return code


def train_from(recipe: Recipe, start: resume.StartingPoint, device: torch.device) -> int | None:
    """Trains from a starting point to the end: what `train` returns; None when the run has to go back first."""
    trainer = assemble(recipe, start, device)
    try:
        if recipe.eval_first and trainer.state.timestamp.batch == 0 and trainer.state.evaluators:
            trainer.eval()
        trainer.fit()
    except Preempted:
        trainer.close()
        uploads_finished(trainer.state.callbacks)
        return EXIT_CODE
    except Rewind:
        stop_uploads(trainer.state.callbacks)
        rewinding.let_go(trainer)
        return None
    except BadStep as stop:
        environment.say(f"bad step    {stop}")
        trainer.close()
        uploads_finished(trainer.state.callbacks)
        return BAD_STEPS
    except UserError as error:
        error.rank = dist.get_global_rank()
        leave_uploads(trainer.state.callbacks)
        trainer.engine.close()  # trainer.close() would wait for the other ranks, which may be waiting for this one
        raise
    trainer.close()
    return max(uploads_finished(trainer.state.callbacks), failed_exports(trainer.state.callbacks))


def assemble(recipe: Recipe, start: resume.StartingPoint, device: torch.device) -> Trainer:
    """Builds each part of the run and hands them to Composer. Reads in the order in which data flows."""
    run = RunFolder(Path("runs") / recipe.run_name)
    batch = batch_plan(recipe, dist.get_world_size())
    sharding = translate(
        recipe.fsdp_config,
        world_size=dist.get_world_size(),
        local_world_size=dist.get_local_world_size(),
        device_type=device.type,
    )
    environment.say_each((*environment.notes(recipe), *batch.notes, *sharding.notes))
    precision = environment.precision(recipe, device)
    composer_adapter.install()
    if sharding.is_sharded:
        check_gradient_average(device)

    tokenizer = open_tokenizer(recipe)
    from_rank_zero(lambda: run.create(environment.recipe_yaml(recipe), tokenizer, anew=start.step == 0))
    rewinds = from_rank_zero(lambda: skipped_steps.of_run(run.path, anew=start.step == 0))
    loaders = Loaders(recipe, tokenizer, batch)
    warmup = build_warmup(recipe)
    train_data, evaluators = loaders.train(warmup), loaders.evaluators()
    loaders.show(train_data, run.path)
    model = build_model(recipe, sharding, start.weights, n_tokens=len(tokenizer))
    model.tasks = task_evaluation(recipe, tokenizer, model, device, batch.device_eval_batch_size)
    optimizer = build_optimizer(recipe.optimizer, model)
    if batch.sequence_parallel_degree > 1 and isinstance(model.model, MPT):
        model.model.ranks = SequenceParallel.of_this_rank(batch.sequence_parallel_degree, device.type)
    activation_checkpointing.apply(model.model, sharding.checkpointing, offload=sharding.offload_activations)
    compile_blocks(model.model, recipe.compile_config, device)

    saver = build_saver(
        recipe,
        model,
        start,
        tokenizer_fingerprint=fingerprint_of(tokenizer),
        attention=environment.attention_kernel(model, device, precision),
    )
    bad_steps = BadSteps(recipe.bad_steps, run.path, rewinds, saver)
    uploads = build_remote_checkpoints(recipe, start, saver)
    preemption = Preemption(saver)
    built = build_callbacks(recipe.callbacks, tokenizer, run.path, conversations=bool(recipe.finetuning_loaders()))
    for exporter in exporters(built):
        exporter.attach(recipe, run.path, fingerprint_of(tokenizer), lambda: preemption.received)
    restore_rng = composer_adapter.RestoreRNG()
    # The order matters: the random state is restored first; a stop saves before the saver looks whether it is due.
    callbacks = [
        *watching.watch_callbacks(recipe, model.model),
        restore_rng,
        *([warmup] if warmup else []),
        *built,
        *source_callbacks(train_data, evaluators),
        *evaluation_callbacks(recipe, model.tasks, saver, built, run.path),
        bad_steps,
        preemption,
        *([saver] if saver else []),
        *([uploads] if uploads else []),
        *step_record(run.path, batch.sequence_parallel_degree),
    ]
    evaluated = [*evaluators, *(model.tasks.evaluators() if model.tasks is not None else [])]
    for evaluator in evaluated:
        evaluator.eval_interval = EvaluationTimes(recipe.eval_interval)
    loggers = [MetricsFile(run), *build_loggers(recipe.loggers, run.path)]
    if recipe.log_to_console:
        loggers.append(Console(recipe.console_log_interval))

    trainer = Trainer(
        run_name=recipe.run_name,
        seed=recipe.seed,
        device="gpu" if device.type == "cuda" else "cpu",
        precision=precision,
        dist_timeout=recipe.dist_timeout,
        model=model,
        parallelism_config=composer_adapter.parallelism(sharding),
        compile_config=None,  # Composer's is for the whole model; ours compiles blocks
        optimizers=optimizer,
        schedulers=build_scheduler(recipe.scheduler),
        algorithms=build_algorithms(recipe.algorithms),
        algorithm_passes=bad_steps.first,
        max_duration=recipe.max_duration,
        train_dataloader=train_data,
        train_subset_num_batches=recipe.train_subset_num_batches,
        device_train_microbatch_size=batch.microbatch_size,
        accumulate_train_batch_on_tokens=recipe.accumulate_train_batch_on_tokens,
        spin_dataloaders=recipe.spin_dataloaders,
        eval_dataloader=evaluated,
        eval_subset_num_batches=recipe.eval_subset_num_batches,
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=recipe.progress_bar,
        log_to_console=False,  # ours is among the loggers
        auto_log_hparams=False,
        profiler=build_profiler(recipe.profiler, run.path),
        # Checkpoints are found by llmtrain.training.resume and written by .checkpoint_saver, not by Composer.
        autoresume=False,
        load_path=start.load_path,
        load_weights_only=start.load_weights_only,
        load_strict_model_weights=recipe.load_strict_model_weights,
        load_ignore_keys=start.load_ignore_keys,
    )
    if isinstance(model.model, HFCausalLM):
        from_rank_zero(model.model.check_frozen_identity)
    composer_adapter.count_shared_samples_once(trainer, batch.sequence_parallel_degree)
    restore_rng.trainer = trainer
    preemption.install()
    if recipe.log_config:
        trainer.logger.log_hyperparameters(environment.hyperparameters(recipe))
    step = int(trainer.state.timestamp.batch)
    if trainer.state.max_duration is not None and trainer.state.timestamp >= trainer.state.max_duration:
        raise UserError(
            f"load_path: {start.load_path} is at step {step}, and max_duration {recipe.max_duration} is reached. "
            "Take its weights alone (load_weights_only=true), or train longer."
        )
    environment.say(environment.summary(recipe, model, batch, sharding, device, precision, step))
    return trainer


def build_model(recipe: Recipe, sharding: ShardingPlan, weights: Path | None, *, n_tokens: int) -> LanguageModel:
    """The model on the device that `init_device` asks for; the same initial weights on all ranks.

    Args:
        recipe: the recipe.
        sharding: with it, `mixed` makes the model on rank 0 alone.
        weights: what it starts from (its vocabulary may grow); not with the device `meta`.
        n_tokens: ids of the tokenizer; a Hugging Face model with fewer embeddings grows.
    """
    where: str = recipe.model.init_device
    if where == "mixed":
        where = "meta" if sharding.is_sharded and dist.get_global_rank() > 0 else "cpu"
    elif where == "meta" and not sharding.is_sharded:
        environment.say("init_device: meta needs a sharded model (fsdp_config); using cpu.")
        where = "cpu"
    environment.seed_everything(recipe.seed)
    if isinstance(recipe.model, HFConfig):
        return build_hf_model(recipe, where, weights, n_tokens)
    model = MPT(recipe.model, device=where)
    if weights is not None and where != "meta":
        fill(model.state_dict(), read_pretrained(weights, recipe.model))
    return LanguageModel(model, recipe.model)


def build_hf_model(recipe: Recipe, where: str, weights: Path | None, n_tokens: int) -> LanguageModel:
    """The same for a model of transformers.

    Raises:
        UserError: on all ranks: the model or its adapters cannot be built, or it cannot keep packed examples apart.
    """
    assert isinstance(recipe.model, HFConfig)
    cfg, made = recipe.model, list[HFCausalLM]()
    from_all_ranks(lambda: made.append(build(cfg, device=where, n_tokens=n_tokens)))
    problem = from_rank_zero(lambda: made[0].no_documents)  # a rank without weights has not tried
    packing = [key for key, loader in recipe.finetuning_loaders().items() if loader.dataset.packs]
    if problem is not None and packing:
        raise UserError(f"{packing[0]}.dataset.packing: {problem}. Set packing: false.")
    model = LanguageModel(made[0], cfg)
    if weights is not None and where != "meta":
        model.load_state_dict({f"model.{name}": value for name, value in read_tensors(weights).items()})
    return model


def build_warmup(recipe: Recipe) -> LengthWarmup | None:
    """What shortens sequences at the start of the run, if the recipe asks for it."""
    cfg = recipe.algorithms.seq_length_warmup if recipe.algorithms is not None else None
    return LengthWarmup(cfg, recipe.train_loader.dataset.max_seq_len) if cfg is not None else None


def evaluation_callbacks(
    recipe: Recipe, tasks: TaskEvaluation | None, saver: CheckpointSaver | None, built: list[Any], run: Path
) -> list[Any]:
    """What looks at the results of an evaluation: the gauntlet, then who may watch it."""
    gauntlet = None
    if recipe.eval_gauntlet is not None and tasks is not None:
        gauntlet = EvalGauntlet(recipe.eval_gauntlet, tasks)
    for callback in built:
        if isinstance(callback, EvalOutputLogging):
            callback.attach(tasks, run)
    best = None
    if recipe.best_checkpoint is not None and saver is not None:
        best = BestCheckpoint(recipe.best_checkpoint, saver, gauntlet)
    return [callback for callback in (gauntlet, best) if callback is not None]


def build_saver(
    recipe: Recipe, model: LanguageModel, start: resume.StartingPoint, **facts: Any
) -> CheckpointSaver | None:
    """The checkpoint callback, or None when the recipe has no save_folder; `facts` go to each checkpoint's manifest."""
    folder = resume.save_folder(recipe)
    if folder is None:
        return None
    from_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
    each = bytes_of_a_checkpoint(model, recipe.optimizer.name, weights_only=recipe.save_weights_only)
    keep, best = recipe.save_num_checkpoints_to_keep, recipe.best_checkpoint is not None
    if warning := free_space_warning(folder, each, keep, best=best):
        environment.say(f"warning: {warning}")
    record: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), **facts}
    return CheckpointSaver(
        folder,
        recipe.save_interval,
        keep=keep,
        keep_every=recipe.save_keep_every,
        weights_only=recipe.save_weights_only,
        ignore_keys=recipe.save_ignore_keys,
        record=record,
        refused=start.refused,
        replaces=start.replaces,
        asynchronous=recipe.save_async,
    )
