"""The parts of a model card that are read off configs and files: architecture, data, metrics."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtrain.json_text import parse_json
from llmtrain.model.config import MPTConfig
from llmtrain.redaction import redact

_SHOWN_METRIC = re.compile(r"^(loss/train/total$|metrics/)")


def quantity(number: int) -> str:
    """6649286656 -> `6.65B`; below a million, all digits."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,}"


def architecture(config: MPTConfig, parameters: int, dtype: str) -> str:
    """What the model computes, as a list."""
    attention = config.attn_config
    heads = f"{config.n_heads} of width {config.d_head}"
    if config.kv_heads != config.n_heads:
        heads += f", {config.kv_heads} of keys and values"
    head = "tied to the embedding" if config.tie_word_embeddings else "apart"
    rows = {
        "parameters": f"{parameters:,} in {dtype}",
        "layers": str(config.n_layers),
        "width": f"{config.d_model:,}",
        "heads": heads,
        "positions": _positions(config),
        "context": f"{config.max_seq_len:,} tokens in training",
        "window": f"{attention.sliding_window_size:,} tokens" if attention.sliding_window_size > 0 else None,
        "queries, keys and values": _qkv(config),
        "feed-forward": f"{config.ffn_config.ffn_type}, {config.ffn_config.ffn_act_fn.name}, "
        f"{config.ffn_hidden_size:,} wide",
        "norm": config.norm_type,
        "biases": "none" if config.no_bias and not config.qkv_bias else "yes",
        "vocabulary": f"{config.vocab_size:,}, head {head}",
    }
    return "".join(f"- {key}: {value}\n" for key, value in rows.items() if value)


def _positions(config: MPTConfig) -> str:
    attention = config.attn_config
    if attention.alibi:
        return f"ALiBi, alibi_bias_max {attention.alibi_bias_max:g}"
    if attention.rope:
        return f"rotary, theta {attention.rope_theta:g}"
    return "learned" if config.uses_learned_positions else "none"


def _qkv(config: MPTConfig) -> str | None:
    attention = config.attn_config
    found = [name for name in ("qk_ln", "qk_gn") if getattr(attention, name)]
    found += [f"clipped to {attention.clip_qkv:g}"] if attention.clip_qkv is not None else []
    return ", ".join(found) or None


def data(recipe: Mapping[str, Any] | None) -> str:
    """What the loaders read, as tables; empty when the recipe says nothing of it."""
    recipe = recipe or {}
    found = []
    train, evals = recipe.get("train_loader"), recipe.get("eval_loader") or ()
    if isinstance(train, Mapping):
        found.append("Trained on:\n\n" + _table(_streams(train)))
    for loader in [evals] if isinstance(evals, Mapping) else evals:
        if isinstance(loader, Mapping):
            label = f" ({loader['label']})" if loader.get("label") else ""
            found.append(f"Evaluated on{label}:\n\n" + _table(_streams(loader)))
    return "\n".join(found)


def _streams(loader: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, place and share of each source of a loader."""
    dataset = loader.get("dataset")
    if not isinstance(dataset, Mapping):
        return
    streams = dataset.get("streams")
    for name, stream in streams.items() if isinstance(streams, Mapping) else (("", dataset),):
        place = stream.get("remote") or stream.get("hf_name") or stream.get("local") or stream.get("files") or ""
        if isinstance(place, (list, tuple)):
            place = ", ".join(map(str, place))
        split = stream.get("split") or dataset.get("split")
        share = next((f"{key} {stream[key]:g}" for key in ("proportion", "repeat", "choose") if stream.get(key)), "")
        yield str(name), f"{redact(str(place))}{f' ({split})' if split else ''}", share


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ["| name | place | share |", "|---|---|---|"]
    lines += [f"| {name} | {f'`{place}`' if place else ''} | {share} |" for name, place, share in rows]
    return "\n".join(lines) + "\n"


def metrics(run: Path | None, checkpoint: Path, step: int | None) -> str:
    """The last figures that the run logged up to the step, and what `llmtrain eval` found for the checkpoint."""
    if run is None:
        return ""
    rows = [f"| {name} | {value:.6g} | {at} |" for name, (value, at) in sorted(_logged(run, step).items())]
    text = "\n".join(["| metric | value | step |", "|---|---|---|", *rows]) + "\n" if rows else ""
    return text + _evaluated(run / "eval" / f"{checkpoint.name}.json")


def _logged(run: Path, step: int | None) -> dict[str, tuple[float, int]]:
    """Name -> value and step; of a row at the step itself, only an evaluation came before the checkpoint."""
    found: dict[str, tuple[float, int]] = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = parse_json(line)
            at = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line, of a run that was killed or is writing
        if step is not None and (at > step or (at == step and "loss/train/total" in row)):
            continue
        for name, value in row.items():
            if _SHOWN_METRIC.match(name) and isinstance(value, (int, float)):
                found[name] = (value, at)
    return found


def _evaluated(file: Path) -> str:
    """The results of `llmtrain eval`: losses by length, and tasks."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    text = ""
    lengths = [one for one in content.get("lengths") or () if isinstance(one, Mapping) and "loss" in one]
    if lengths:
        rows = [f"| {one.get('max_seq_len', '')} | {one['loss']:.4f} | {one.get('targets', '')} |" for one in lengths]
        text += "\n".join(["", "| length | loss | targets |", "|---|---|---|", *rows]) + "\n"
    tasks = content.get("tasks")
    tasks = tasks.get("rows") or tasks.get("results") if isinstance(tasks, Mapping) else tasks
    tasks = [one for one in tasks or () if isinstance(one, Mapping) and {"task", "metric", "value"} <= one.keys()]
    if tasks:
        rows = [
            f"| {one['task']} | {one.get('num_fewshot', '')} | {one['metric']} | {one['value']:.4f} |" for one in tasks
        ]
        text += "\n".join(["", "| task | shots | metric | value |", "|---|---|---|---|", *rows]) + "\n"
    return text
