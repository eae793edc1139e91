"""Quality steps between reading and tokenising: `stages` of a data recipe."""

from llmtrain.prep.stages.inputs import describe_stages
from llmtrain.prep.stages.passes import passes, reduce, sign
from llmtrain.prep.stages.pipeline import Pipeline, needs_whole_documents
from llmtrain.prep.stages.report import merge_reports, print_stage_report

__all__ = [
    "Pipeline",
    "describe_stages",
    "merge_reports",
    "needs_whole_documents",
    "passes",
    "print_stage_report",
    "reduce",
    "sign",
]
