"""Stages applied to lists of texts, cut into partitions, the way a preparation does it."""

from llmtrain.prep.documents import Document
from llmtrain.prep.stages import Pipeline, merge_reports, passes, reduce, sign


def document(text, n=0, part="whole"):
    return Document(text, len(text.encode()), f"docs\0{n}", f"docs.jsonl:{n + 1}", part)


def numbered(texts, start=0):
    return [document(text, n) for n, text in enumerate(texts, start)]


def carry_out(stages, partitions, sources=None):
    """Kept documents of each partition (lists of documents), and the merged report."""
    sources = sources or [0] * len(partitions)
    drops = [{} for _ in partitions]
    for name in passes(stages):
        signed = [sign(stages, name, iter(part), drop) for part, drop in zip(partitions, drops, strict=True)]
        parts = [lambda arrays=arrays: arrays for arrays in signed]
        for drop, ordinals in zip(drops, reduce(stages, name, parts, sources), strict=True):
            drop[name] = ordinals
    kept, reports = [], []
    for part, drop in zip(partitions, drops, strict=True):
        pipeline = Pipeline(stages, drop)
        kept.append(list(pipeline.run(iter(part))))
        reports.append(pipeline.report())
    return kept, merge_reports(reports)


def judged(stage, *texts):
    """What a stage makes of each text: another text, None for dropped; and its report."""
    kept, report = carry_out([stage], [numbered(texts)])
    by_key = {doc.key: doc.text for doc in kept[0]}
    return [by_key.get(doc.key) for doc in numbered(texts)], report["stages"][0]
