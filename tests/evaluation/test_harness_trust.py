"""Task files of the harness: those of data alone are read, those that name code are not, however they say it."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from llmtrain.errors import UserError
from llmtrain.evaluation.harness_trust import check_files, code_runs_with_trust_only

DATA = "task: mine\ndataset_path: json\ndoc_to_text: '{{question}}'\nmetric_list: [{metric: acc, hf_evaluate: false}]\n"


@pytest.fixture(autouse=True)
def nobody_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMTRAIN_TRUST_CODE", raising=False)


def written(folder: Path, text: str, name: str = "task.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_files_of_data_alone_need_no_trust(tmp_path: Path) -> None:
    file = written(tmp_path, DATA + "include: base.yaml\n")
    written(tmp_path, DATA + "include: task.yaml\n", "base.yaml")  # in a circle, which the harness refuses itself
    check_files("harness.tasks", [file])


@pytest.mark.parametrize(
    "text",
    [
        "process_docs: !function utils.f\n",
        "process_docs: !!python/name:os.system\n",
        "a: {b: [!function utils.f]}\n",
        "class: utils.Task\n",
        "custom_dataset: utils.f\n",
        "metric_list: [{metric: somebody/metric}]\n",
        *(f"metric_list: [{{metric: acc, hf_evaluate: {yes}}}]\n" for yes in ("true", "TRUE", "On", "YES", "y", "1")),
        *(f"dataset_kwargs: {{trust_remote_code: {yes}}}\n" for yes in ("true", "TRUE", "On", "1", "[x]")),
        "dataset_path: pandas\ndataset_kwargs: {data_files: a.pkl}\n",
        "base: &b {class: a.B}\n<<: *b\n",
        '"cl\\x61ss": a.B\n',
    ],
)
def test_code_is_found_however_it_is_said(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"task: mine\n{text}")
    with pytest.raises(UserError, match=r"harness\.tasks: .*task\.yaml would run code: it says.*--trust-code"):
        check_files("harness.tasks", [file])
    outer = written(tmp_path, "include: [task.yaml]\n", "outer.yaml")
    with pytest.raises(UserError, match=r"task\.yaml would run"):
        check_files("harness.tasks", [outer])


def test_what_a_link_includes_is_looked_for_where_the_harness_does(tmp_path: Path) -> None:
    hidden = written(tmp_path / "hidden", "include: base.txt\n", "real.txt")
    written(tmp_path / "hidden", "process_docs: !function utils.f\n", "base.txt")
    written(tmp_path / "shown", DATA, "base.txt")
    (tmp_path / "shown" / "task.yaml").symlink_to(hidden)
    with pytest.raises(UserError, match=r"base\.txt would run"):
        check_files("harness.tasks", [tmp_path / "shown" / "task.yaml"])


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
        "a: &a [*a]\n",
    ],
    ids=["bomb", "circle"],
)
def test_aliases_have_a_limit(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unfolds to more than"):
        check_files("harness.tasks", [written(tmp_path, text)])


def test_while_a_task_is_loaded_its_data_bring_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval import utils

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: "loaded")
    monkeypatch.setattr(utils, "env", utils.env)
    with code_runs_with_trust_only("mine"):
        assert datasets.load_dataset(path="json", data_files="a.jsonl") == "loaded"
        for arguments in ({"path": "a", "trust_remote_code": True}, {"path": "pandas", "data_files": "a.pkl"}):
            with pytest.raises(UserError, match="--trust-code"):
                datasets.load_dataset(**arguments)
        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
