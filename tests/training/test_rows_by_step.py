from pathlib import Path

from llmtrain.training.rows_by_step import add_rows, forget_later_rows


def test_rows_of_a_step_are_replaced_and_those_taken_again_dropped(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    forget_later_rows(file, 4)
    assert not file.exists()
    add_rows(file, 2, [{"step": 2, "text": "é"}])
    add_rows(file, 4, [{"step": 4, "text": "a"}, {"step": 4, "text": "b"}])
    with file.open("a") as cut_off:
        cut_off.write('{"step": 6, "te')
    add_rows(file, 4, [{"step": 4, "text": "c"}])
    assert file.read_text() == '{"step": 2, "text": "é"}\n{"step": 4, "text": "c"}\n'
    forget_later_rows(file, 2)
    assert file.read_text() == '{"step": 2, "text": "é"}\n'
    forget_later_rows(file, 0)
    assert file.read_text() == ""
