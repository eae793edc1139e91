"""Each adapter on rows that were written for this test in the columns of its dataset."""

import pytest

from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import BadExample, Chat, PromptResponse
from llmtrain.conversations.preprocessing import resolve
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

DOLLY_HHRLHF = [
    {
        "prompt": f"{INTRO}\n### Instruction:\nName two rivers of France.\n### Response:\n",
        "response": "The Loire and the Rhône.",
    },
    {
        "prompt": f"{INTRO}\n### Instruction:\nWho wrote it?\n\nIt was a dark\nand stormy night.\n### Response:\n",
        "response": "Edward Bulwer-Lytton.\n\nIn 1830.",
    },
    {"prompt": f"{INTRO}\n### Instruction:\nWhat does ### Response: mean?\n### Response:\n", "response": "A marker."},
]


def of(name, row):
    """Role and content of each turn."""
    made = parse(resolve(name)(row))
    assert isinstance(made, Chat)
    return [(message.role, message.content) for message in made.messages]


def test_dolly_hhrlhf():
    assert [of("dolly_hhrlhf", row)[0] for row in DOLLY_HHRLHF] == [
        ("user", "Name two rivers of France."),
        ("user", "Who wrote it?\n\nIt was a dark\nand stormy night."),
        ("user", "What does ### Response: mean?"),
    ]
    assert of("dolly_hhrlhf", DOLLY_HHRLHF[1])[1] == ("assistant", "Edward Bulwer-Lytton.\n\nIn 1830.")
    spaced = {"prompt": f"{INTRO}\n\n### Instruction:\nHi\n\n### Response:", "response": "Hello"}
    assert of("dolly_hhrlhf", spaced) == [("user", "Hi"), ("assistant", "Hello")]
    for prompt in ("Hi", f"{INTRO}\n### Instruction:\nHi", "Answer.\n### Instruction:\nHi\n### Response:\n"):
        with pytest.raises(BadExample, match="not in the Dolly format"):
            of("dolly_hhrlhf", {"prompt": prompt, "response": "x"})


def test_the_dolly_template_gives_the_dataset_its_own_text_again(corpus):
    """What a model is trained on is the prompt and response of `mosaicml/dolly_hhrlhf`, character by character."""
    tokenizer = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer), chat_template="dolly"))
    for row in DOLLY_HHRLHF:
        turns = [{"role": role, "content": content} for role, content in of("dolly_hhrlhf", row)]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        assert rendered == row["prompt"] + row["response"] + tokenizer.eos_token
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        assert asked == row["prompt"]


def test_dolly_15k():
    row = {"instruction": "When did it fly?", "context": "", "response": "In 1903.", "category": "open_qa"}
    assert of("databricks-dolly-15k", row) == [("user", "When did it fly?"), ("assistant", "In 1903.")]
    row["context"] = "The Flyer took off on December 17, 1903."
    assert of("databricks-dolly-15k", row)[0][1] == "When did it fly?\nThe Flyer took off on December 17, 1903."


def test_alpaca():
    row = {"instruction": "Add the numbers.", "input": "2, 3", "output": "5", "text": "..."}
    assert of("alpaca", row) == [("user", "Add the numbers.\n2, 3"), ("assistant", "5")]
    assert of("alpaca", {**row, "input": ""})[0] == ("user", "Add the numbers.")
    with pytest.raises(BadExample, match=r"empty turn: turn 2 \(assistant\)"):
        of("alpaca", {**row, "output": ""})


def test_hh_rlhf():
    first = "\n\nHuman: How do I boil an egg?\n\nAssistant: Eight minutes.\n\nSalt helps."
    chosen = first + "\n\nHuman: Thanks\n\nAssistant: Sure!"
    row = {"chosen": chosen, "rejected": "\n\nHuman: How do I boil an egg?\n\nAssistant: No."}
    assert of("hh-rlhf", row) == [
        ("user", "How do I boil an egg?"),
        ("assistant", "Eight minutes.\n\nSalt helps."),
        ("user", "Thanks"),
        ("assistant", "Sure!"),
    ]
    quoted = {"chosen": "\n\nHuman: What does 'Human: x' mean?\n\nAssistant: Nothing."}
    assert len(of("hh-rlhf", quoted)) == 2


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "duplicate role"),
        ("\n\nHuman: a\n\nAssistant:", "empty turn"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "wrong last role"),
        ("hello", "no turns"),
        ("hello\n\nHuman: a\n\nAssistant: b", "no turns"),
        (None, "missing keys"),
    ],
)
def test_hh_rlhf_rows_that_are_malformed(chosen, reason):
    with pytest.raises(BadExample) as caught:
        of("hh-rlhf", {"chosen": chosen})
    assert caught.value.reason == reason


def test_sharegpt_vicuna():
    def row(*turns):
        return {"id": "QWJhYvA_0", "conversations": [{"from": who, "value": text} for who, text in turns]}

    plain = row(("human", "Hi"), ("gpt", "Hello"), ("human", "2+2"), ("gpt", "4"))
    whole = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2"), ("assistant", "4")]
    assert of("sharegpt", plain) == whole
    part = row(
        ("gpt", "...the rest"), ("human", "Hi"), ("gpt", "Hello"), ("user", "2+2"), ("bing", "4"), ("human", "Ok")
    )
    assert of("sharegpt_vicuna", part) == whole
    assert of("sharegpt", row(("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello")))[0] == ("system", "Be kind.")
    for bad, reason in (
        (row(), "no turns"),
        (row(("human", "Hi")), "no assistant turn"),
        (row(("gpt", "Hello")), "no user turn"),
        (row(("gpt", "Hello"), ("human", "Hi")), "wrong last role"),
        (row(("human", "Hi"), ("human", "Hi?"), ("gpt", "Hello")), "duplicate role"),
        (row(("human", "Hi"), ("gpt", "")), "empty turn"),
        (row(("human", "Hi"), ("gpt", None)), "non-string content"),
        ({"conversations": [["human", "Hi"]]}, "malformed turn"),
        ({"items": []}, "missing keys"),
    ):
        with pytest.raises(BadExample) as caught:
            of("sharegpt", bad)
        assert caught.value.reason == reason


def test_hc3():
    row = {
        "id": "0",
        "question": "Why is the sky blue? Explain like I'm five.",
        "human_answers": ["Cause light .", "Scattering ."],
        "chatgpt_answers": ["", "Because air scatters blue light more.", "Another."],
        "source": "reddit_eli5",
    }
    assert of("hc3", row) == [("user", row["question"]), ("assistant", "Because air scatters blue light more.")]
    for answers, reason in (
        ([], "empty turn"),
        (None, "missing keys"),
        ("text", "missing keys"),
        ([3], "non-string content"),
    ):
        with pytest.raises(BadExample) as caught:
            of("hc3", {**row, "chatgpt_answers": answers})
        assert caught.value.reason == reason


def test_evol_instruct():
    first = {"instruction": "Sort a list, but without sorted().", "output": "def sort(xs): ..."}
    second = {
        "idx": "evol_1",
        "conversations": [{"from": "human", "value": first["instruction"]}, {"from": "gpt", "value": first["output"]}],
    }
    assert (
        of("evol-instruct", first)
        == of("evol-instruct", second)
        == [
            ("user", "Sort a list, but without sorted()."),
            ("assistant", "def sort(xs): ..."),
        ]
    )


@pytest.mark.parametrize(
    ("name", "row", "prompt", "response"),
    [
        ("tatsu-lab/alpaca", {"text": "Do.\n\n### Response:\nDone"}, "Do.\n\n### Response:", "\nDone"),
        (
            "HuggingFaceH4/databricks_dolly_15k",
            {"instruction": "Sum", "input": "1 2", "output": "3", "category": "x"},
            f"{INTRO}\n\n### Instruction:\nSum\n1 2\n\n### Response:\n",
            "3",
        ),
        ("bigscience/P3", {"inputs": "Is it so", "targets": "yes"}, "Is it so:", "yes"),
        ("Muennighoff/flan", {"inputs": "Is it so", "targets": "yes", "task": "x"}, "Is it so", " yes"),
        ("Muennighoff/P3", {"inputs": "Is it so\n", "targets": "yes"}, "Is it so\n", "yes"),
        ("Muennighoff/P3", {"inputs": "Is it so", "targets": "\tyes"}, "Is it so", "\tyes"),
        ("math-ai/StackMathQA", {"Q": "1+1?", "A": "2", "meta": {}}, "1+1?", "2"),
        ("AI-MO/NuminaMath-CoT", {"problem": "1+1?", "solution": "2", "messages": []}, "1+1?", "2"),
    ],
)
def test_what_llm_foundry_registers_gives_the_same_text(name, row, prompt, response):
    assert parse(resolve(None, default_for=name)(row)) == PromptResponse(prompt, response)
    with pytest.raises(BadExample, match="missing keys"):
        resolve(name)({"other": "x"})


def test_openhermes():
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]
    row = {"conversations": turns, "source": "x", "system_prompt": None}
    assert of("teknium/OpenHermes-2.5", row) == [("system", "S"), ("user", "U"), ("assistant", "A")]
