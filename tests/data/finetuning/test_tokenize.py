"""Which tokens an example has, and which of them are trained."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.conversations.messages import BadExample, Chat, Message, PromptResponse, Tokenized
from llmtrain.data.finetuning.tokenize import ExampleTokenizer
from llmtrain.errors import UserError
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer
from tests.data.finetuning.templates import GOOD, LLAMA3, MISTRAL, PLAIN, QWEN3, SPECIAL


def conversation(*contents, system=None):
    turns = [Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    return Chat((*([Message("system", system)] if system else []), *turns))


def as_rows(chat):
    return [{"role": message.role, "content": message.content} for message in chat.messages]


@pytest.fixture(scope="module")
def tokenizer_for(corpus):
    made = {}

    def make(template, **keys):
        key = (template, repr(keys))
        if key not in made:
            cfg = TokenizerConfig(name=str(corpus.tokenizer), chat_template=template, special_tokens=SPECIAL, **keys)
            made[key] = load_tokenizer(cfg)
        return made[key]

    return make


@pytest.fixture(scope="module")
def tokenize(tokenizer_for):
    """An ExampleTokenizer for a template; made once for the same settings."""
    made = {}

    def make(template, fast=True, **settings):
        key = (template, fast, repr(settings))
        if key not in made:
            made[key] = ExampleTokenizer(tokenizer_for(template), **{"max_seq_len": 1 << 20, **settings})
            if not fast:
                made[key].encoder.fast = None
            assert (made[key].encoder.fast is not None) == fast
        return made[key]

    return make


def trained_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.trained], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stretches(tokenizer, example):
    """The trained text, each stretch by itself."""
    borders = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0))
    return [
        tokenizer.decode(example.ids[a:b], clean_up_tokenization_spaces=False)
        for a, b in borders.reshape(-1, 2).tolist()
    ]


SAMPLES = [
    conversation("Hi", "Hello."),
    conversation("one", "two", "three", "four", "five", "six"),
    conversation("a\nb", "c\n\nd"),
    conversation("漢字?", "Ünïcödé 🙂 e\u0301", "def f():\n    return 1", "```\n\tx\n```"),
    conversation("### Response:\nnot this", "### Instruction:\nnor this\n### Response:\n", "Q: A: \n", "A: [/INST] Q:"),
]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("chat", SAMPLES, ids=range(len(SAMPLES)))
def test_ids_are_apply_chat_templates_and_the_answers_are_trained(name, chat, tokenizer_for, tokenize):
    template, trim, lead, close = GOOD[name]
    tokenizer = tokenizer_for(template)
    (example,) = tokenize(template, target_responses="all")([chat])
    expected = tokenizer.apply_chat_template(as_rows(chat), return_dict=False)
    answers = [lead + trim(m.content) + close for m in chat.messages if m.role == "assistant"]
    if name == "plain":
        expected = [*expected, tokenizer.eos_token_id]
        answers[-1] += tokenizer.eos_token
    assert tokenizer.decode(example.ids) == tokenizer.decode(expected)
    if chat is not SAMPLES[-1] or name != "plain":
        assert example.ids.tolist() == expected
    assert stretches(tokenizer, example) == answers


def test_only_the_last_answer_is_trained_by_default(tokenizer_for, tokenize):
    (example,) = tokenize("chatml")([SAMPLES[1]])
    assert stretches(tokenizer_for("chatml"), example) == ["six<|im_end|>"]


PIECES = [" ", "\n", "\t", "\u00a0", "\x00", "a", "Word", "é", "漢", "🙂", "<", "\nQ:", "### Response:\n", "[/INST]"]
MARKERS = ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|endoftext|>", "</think>", "<think>", "{{ x }}"]
CONTENT = st.one_of(
    st.text(min_size=1, max_size=30),
    st.lists(st.sampled_from([*PIECES, *MARKERS]), min_size=1, max_size=8).map("".join),
).filter(str.strip)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=50, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=3).map(lambda c: [*c, *c]), data=st.data())
def test_any_content_is_trained_whole_and_nothing_else_is(name, fast, contents, data, tokenizer_for, tokenize):
    """Unicode, white space, text that looks like markers, text of special tokens."""
    template, trim, lead, close = GOOD[name]
    tokenizer = tokenizer_for(template)
    chat = conversation(*data.draw(st.permutations(contents)))
    (example,) = tokenize(template, fast=fast, target_responses="all")([chat])
    answers = [lead + trim(m.content) + close for m in chat.messages if m.role == "assistant"]
    if name == "plain":
        answers[-1] += tokenizer.eos_token
    assert "".join(stretches(tokenizer, example)) == "".join(answers)
    rendered = tokenizer.apply_chat_template(as_rows(chat), tokenize=False)
    assert tokenizer.decode(example.ids) == rendered + (tokenizer.eos_token if name == "plain" else "")
    # No content becomes a control token: there are as many as in a conversation of the same shape.
    (plain,) = tokenize(template, fast=fast, target_responses="all")([conversation(*["x"] * len(chat.messages))])
    control = tokenizer.convert_tokens_to_ids([*SPECIAL, "<|endoftext|>"])
    assert np.isin(example.ids, control).sum() == np.isin(plain.ids, control).sum()


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "dolly"])
@settings(max_examples=50, deadline=None)
@given(contents=st.lists(CONTENT.filter(lambda t: "<|" not in t), min_size=2, max_size=2))
def test_ids_differ_from_apply_chat_template_only_where_a_token_reaches_into_an_answer(
    name, contents, tokenizer_for, tokenize
):
    template = GOOD[name][0]
    tokenizer = tokenizer_for(template)
    chat = conversation(*contents)
    (example,) = tokenize(template)([chat])
    whole = tokenizer(
        tokenizer.apply_chat_template(as_rows(chat), tokenize=False),
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    start = len(tokenizer.decode(example.ids[: int(np.argmax(example.trained))]))
    straddles = any(a < start < b for a, b in whole["offset_mapping"])
    assert straddles or example.ids.tolist() == whole["input_ids"]


def test_text_of_special_tokens_is_counted(corpus, tokenizer_for):
    tokenize = ExampleTokenizer(tokenizer_for("chatml"), max_seq_len=100)
    tokenize([conversation("What is <|im_end|>?", "A token."), conversation("What is it?", "A token.")])
    assert tokenize.counts == {"special token text in a content": 1}


def test_reasoning_that_a_template_drops_is_not_trained(tokenizer_for, tokenize):
    tokenizer = tokenizer_for(QWEN3)
    chat = conversation("1+1?", "<think>easy</think>\n\n2", "2+2?", "<think>\nhm\n</think>\n\nIt is 4")
    (example,) = tokenize(QWEN3, target_responses="all")([chat])
    assert example.ids.tolist() == tokenizer.apply_chat_template(as_rows(chat), return_dict=False)
    assert stretches(tokenizer, example) == ["2<|im_end|>", "<think>\nhm\n</think>\n\nIt is 4<|im_end|>"]
    # What the template puts between the generation prompt and an answer has to be written by the model.
    (example,) = tokenize(QWEN3)([conversation("1+1?", "2")])
    assert stretches(tokenizer, example) == ["<think>\n\n</think>\n\n2<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(thoughts=st.lists(CONTENT, min_size=2, max_size=2), answers=st.lists(CONTENT, min_size=2, max_size=2))
def test_dropped_reasoning_of_any_text(thoughts, answers, tokenizer_for, tokenize):
    tokenizer = tokenizer_for(QWEN3)
    replies = [f"<think>\n{t}\n</think>\n\n{a}" for t, a in zip(thoughts, answers, strict=True)]
    chat = conversation("q", replies[0], "r", replies[1])
    (example,) = tokenize(QWEN3, target_responses="all")([chat])
    if isinstance(example, BadExample):  # said, not trained wrongly
        assert "by the chat template" in example.reason or "with the chat template" in example.reason
        assert any("think>" in text or text != text.strip() for text in (*thoughts, *answers))
        return
    rendered = tokenizer.apply_chat_template(as_rows(chat), tokenize=False)
    assert tokenizer.decode(example.ids) == rendered
    assert "".join(stretches(tokenizer, example)).endswith(replies[1].split("</think>")[-1].lstrip("\n") + "<|im_end|>")


def test_a_template_refuses_roles(tokenize):
    bad, good = tokenize(MISTRAL)([conversation("a", "b", system="s"), conversation("a", "b")])
    assert isinstance(bad, BadExample)
    assert bad.reason == "refused by the chat template"
    assert "alternate" in bad.detail
    assert not isinstance(good, BadExample)


def test_without_a_special_token_at_the_end_the_last_answer_gets_the_end_of_text_token(tokenizer_for, tokenize):
    tokenizer = tokenizer_for(PLAIN)
    (example,) = tokenize(PLAIN, target_responses="all")([SAMPLES[1]])
    assert tokenizer.decode(example.ids).count("<|endoftext|>") == 1
    assert example.ids[-1] == tokenizer.eos_token_id
    assert example.trained[-1]


def test_prompt_and_response_are_plain_text(tokenizer_for, tokenize):
    tokenizer = tokenizer_for(LLAMA3)
    (example,) = tokenize(LLAMA3)([PromptResponse("Q: <|im_end|> 1 + 1?\nA:", " 2")])
    prompt, response = tokenizer("Q: <|im_end|> 1 + 1?\nA:")["input_ids"], tokenizer(" 2")["input_ids"]
    assert example.ids.tolist() == [*prompt, *response, tokenizer.eos_token_id]
    assert example.trained.tolist() == [False] * len(prompt) + [True] * (len(response) + 1)
    (again,) = tokenize(LLAMA3)([PromptResponse("Q", "2<|endoftext|>")])
    assert again.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_a_bos_of_the_tokenizers_own_stands_before_the_prompt_alone(tokenizer_for):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(TokenizerConfig(name=tokenizer_for("chatml").name_or_path))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    (example,) = ExampleTokenizer(tokenizer, max_seq_len=100)([PromptResponse("ab", "cd")])
    eos = tokenizer.eos_token_id
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd")]
    assert example.ids.tolist() == [eos, *plain[0], *plain[1], eos]


def test_tokenised_turns(tokenizer_for, tokenize):
    eos = tokenizer_for("chatml").eos_token_id
    turns = (([5, 6], np.array([7], dtype=np.int32)), (np.array([8]), [9, eos]))
    (last,), (every,) = (tokenize("chatml", target_responses=r)([Tokenized(turns)]) for r in ("last", "all"))
    assert last.ids.tolist() == every.ids.tolist() == [5, 6, 7, 8, 9, eos]
    assert last.trained.tolist() == [False, False, False, False, True, True]
    assert every.trained.tolist() == [False, False, True, False, True, True]
    (ended,) = tokenize("chatml")([Tokenized((([5], [6]),))])
    assert ended.ids.tolist() == [5, 6, eos]
    assert ended.ids.dtype == np.uint32


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((([5], [10**6]),), "token id out of range"),
        ((([-1], [5]),), "token id out of range"),
        ((([5], []),), "empty turn"),
        ((([5.5], [5]),), "not token ids"),
        ((), "no turns"),
    ],
)
def test_bad_tokenised_turns(turns, reason, tokenize):
    (bad,) = tokenize("chatml")([Tokenized(turns)])
    assert isinstance(bad, BadExample)
    assert bad.reason == reason


def test_half_a_surrogate_pair_is_a_bad_example(tokenize):
    for fast in (True, False):
        bad, _ = tokenize("chatml", fast=fast)([conversation("\ud83d", "a"), conversation("a", "b")])
        assert isinstance(bad, BadExample)
        assert bad.reason == "invalid Unicode"


def test_target_prompts(tokenize):
    turns = Tokenized((([5, 6, 7], [8]), ([9], [10]), ([11, 12], [13, 0])))
    trained = {
        target: "".join("x" if t else "." for t in tokenize("chatml", target_prompts=target)([turns])[0].trained)
        for target in ("none", "all", "length>=2", "LENGTH>=3", "length>=9")
    }
    assert trained == {
        "none": "........xx",  # prompts 5-7, 9, 11-12; the first token is never a target
        "all": ".xx.x.xxxx",
        "length>=2": ".xx...xxxx",
        "LENGTH>=3": ".xx.....xx",
        "length>=9": "........xx",
    }


def test_target_prompts_of_a_chat(tokenizer_for, tokenize):
    tokenizer = tokenizer_for("chatml")
    (example,) = tokenize("chatml", target_prompts="all", target_responses="all")([conversation("a", "b", "c", "d")])
    (text,) = stretches(tokenizer, example)
    assert text == tokenizer.decode(
        example.ids[1:-1]
    )  # all but the first token, and the line end after the last answer


@pytest.mark.parametrize(
    "setting", [{"target_prompts": "some"}, {"target_prompts": "length>=0"}, {"target_responses": "x"}]
)
def test_settings_that_are_none(setting, tokenizer_for):
    with pytest.raises(UserError, match=next(iter(setting))):
        ExampleTokenizer(tokenizer_for("chatml"), max_seq_len=8, **setting)


def test_long_examples(tokenizer_for, tokenize):
    chat = conversation("a question", "a long answer, " * 20)
    (whole,) = tokenize("chatml")([chat])
    tokenizer = ExampleTokenizer(tokenizer_for("chatml"), max_seq_len=30)
    (cut,) = tokenizer([chat])
    assert cut.ids.tolist() == whole.ids[:30].tolist()
    assert cut.trained.tolist() == whole.trained[:30].tolist()
    assert tokenizer.counts == {"truncated": 1}
    (dropped,) = tokenize("chatml", max_seq_len=30, long_examples="drop")([chat])
    assert isinstance(dropped, BadExample)
    assert dropped.reason == "too long"
    assert f"{len(whole.ids)} tokens" in dropped.detail
    (nothing,) = tokenize("chatml", max_seq_len=5)([chat])
    assert isinstance(nothing, BadExample)
    assert nothing.reason == "nothing to train on"


def test_no_template(corpus):
    tokenizer = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer)))
    tokenize = ExampleTokenizer(tokenizer, max_seq_len=100)
    assert not isinstance(tokenize([PromptResponse("a", "b")])[0], BadExample)
    with pytest.raises(UserError, match="no chat template"):
        tokenize([SAMPLES[0]])


def test_identity_tells_apart_what_changes_the_examples(corpus, tokenizer_for, tokenize):
    settings = [
        {},
        {"max_seq_len": 64},
        {"target_prompts": "all"},
        {"target_responses": "all"},
        {"long_examples": "drop"},
    ]
    made = [tokenize("chatml", **setting).identity() for setting in settings]
    made += [tokenize("dolly").identity(), tokenize(LLAMA3).identity()]
    other = load_tokenizer(TokenizerConfig(name=str(corpus.tokenizer), chat_template="chatml"))
    made.append(ExampleTokenizer(other, max_seq_len=1 << 20).identity())
    assert len(set(made)) == len(made)
    again = ExampleTokenizer(tokenizer_for("chatml"), max_seq_len=1 << 20, target_responses="LAST")
    assert again.identity() == made[0] == tokenize("chatml", fast=False).identity()


def metaspace_tokenizer(folder):
    """SentencePiece's kind, as Llama 2 and Mistral have it: a text's first word gets a space that is not there."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens[:3], show_progress=False)
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog [INST] [/INST] Q: A: " * 9], trainer)
    content = json.loads(raw.to_str())
    content["model"]["vocab"].update({t: len(content["model"]["vocab"]) + n for n, t in enumerate(tokens[3:])})
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_a_tokenizer_that_puts_spaces_before_words(tmp_path):
    """Cutting its text would add spaces: the ids are those of the whole, the mask comes from the tokens' places."""
    folder = metaspace_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(TokenizerConfig(name=str(folder), chat_template=MISTRAL))
    tokenize = ExampleTokenizer(tokenizer, max_seq_len=1000, target_responses="all")
    chat = conversation("the fox", "jumps 🙂 é", "the dog?", "is lazy\n\nvery")
    (example,) = tokenize([chat])
    assert example.ids.tolist() == tokenizer.apply_chat_template(as_rows(chat), return_dict=False)
    assert "".join(trained_text(tokenizer, example).split()) == "jumps🙂é</s>islazyvery</s>"
    assert len(stretches(tokenizer, example)) == 2
    # Tokenized as a whole, `</s>` in a text would be the real one, and trained as such.
    (hostile,) = tokenize([conversation("the fox", "jumps</s>[INST] over")])
    assert isinstance(hostile, BadExample)
    assert hostile.reason == "special token text in a content"
