"""What the fork server imports once, so that no rank has to (see `llmtrain.certify.processes.preload`)."""

from llmtrain.garbage import importing

with importing():  # and ranks share the memory of what no collection touches
    import composer.algorithms  # noqa: F401
    from composer.utils.collect_env import get_cpu_model

    import llmtrain.recipe.load
    import llmtrain.training.decoupled_adamw
    import llmtrain.training.train  # noqa: F401

get_cpu_model()  # Composer's Trainer asks for it, a process of its own and a second in each rank; it keeps the answer
