import time

import pytest

from llmtrain.prep.stages.config import Pii
from tests.prep.stages.passing import judged

ALL = Pii(name="pii", kinds=["email", "ip", "phone"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+news@mail.example.co.uk, please.", "Write to <EMAIL>, please."),
        ("<o'neil_7@a-b.org>", "<<EMAIL>>"),
        ("mailto:x@y.de?subject=a", "mailto:<EMAIL>?subject=a"),
        ("'jane@a.org', -joe@b.org, %3Cx@y.de%3E ...a@b.org", "'<EMAIL>', -<EMAIL>, %<EMAIL>%3E ...<EMAIL>"),
        ("from 8.8.8.8:53 to 1.1.1.1.", "from <IP>:53 to <IP>."),
        ("2001:4860:4860::8888 and 2606:4700:4700:0:0:0:0:1111", "<IP> and <IP>"),
        ("call +49 30 901820 or +1 (212) 555-0123", "call <PHONE> or <PHONE>"),
        ("(212) 555-0123, 415-555-0199, 1-800-555-0199", "<PHONE>, <PHONE>, <PHONE>"),
    ],
)
def test_what_is_replaced(text, expected):
    assert judged(ALL, text)[0] == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "@property\ndef f(a): return a @ b",
        "user@localhost, @jane, a@b, x @ y.com",
        "127.0.0.1, 192.168.0.7, 10.0.0.1, 0.0.0.0, 999.1.1.1, 1.2.3, 1.10.1.2.33.4, v8.8.8.8",
        "::1 fe80::1 std::vector a::b dead::beef 12:30:45 00:1a:2b:3c:4d:5e 2001:",
        "2021-11-24, 3.14159265, 1234567890, 978-3-16-148410-0, 555-0123, ISO 8601-2:2019, x+1 23456789",
    ],
)
def test_what_stays(text):
    assert judged(ALL, text)[0] == [text]


def test_counts_and_samples():
    texts = ["a@b.org and c@d.org at 8.8.8.8", "nothing here", "e@f.org"]
    left, report = judged(Pii(name="pii", email="[mail]"), *texts)
    assert left == ["[mail] and [mail] at <IP>", "nothing here", "[mail]"]
    assert report["counts"] == {"email": 3, "ip": 1}
    assert (report["seen"], report["dropped"], report["changed"]) == (3, 0, 2)
    assert report["samples"][0] == {"place": "docs.jsonl:1", "reason": "2 email, 1 ip", "excerpt": texts[0]}


def test_only_the_kinds_that_are_asked_for():
    text = "a@b.org, 8.8.8.8, 415-555-0199"
    assert judged(Pii(name="pii"), text)[0] == ["<EMAIL>, <IP>, 415-555-0199"]
    assert judged(Pii(name="pii", kinds=["phone"]), text)[0] == ["a@b.org, 8.8.8.8, <PHONE>"]


@pytest.mark.parametrize(
    "unit", ["a", "a.", "a-", "1.", "1", "1 ", "2001:", "f:", "@", "a@", "a.b@c", "@a.", "+1 ", "(212) ", "+", "'"]
)
def test_time_is_linear_in_the_length_of_hostile_texts(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    judged(ALL, text)
    assert time.process_time() - start < 10
