"""llm-foundry's in-context-learning tasks and its gauntlet: `icl_tasks`, `eval_gauntlet`."""
