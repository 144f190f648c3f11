"""`torchft data show`: every token with its true role, kind and text; nothing in the data can pass for a mark or drive the terminal."""

import json
import re
import time

import numpy as np
import pytest

from tests.helpers.tokenizers import make_hf_tokenizer
from torchft.data.prefetch import map_ahead
from torchft.data.show import as_html, as_json, as_text, show_sample, token_texts
from torchft.data.templates import build_template
from torchft.data.truncation import truncate
from torchft.data.types import Encoded, Message, ToolCall
from torchft.tokenizers.load import load_tokenizer

CHAT = [Message("system", "Be kind."), Message("user", "What is 1+1?"), Message("assistant", "2")]


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(make_hf_tokenizer(tmp_path))


def shown(tokenizer, messages=CHAT, *, seq_len: int = 100, policy="right"):
    template = build_template("auto", tokenizer)
    whole = template.encode(messages, where="x:1")
    return show_sample(
        "train/0", "x:1", whole, truncate(whole, seq_len, policy, "x:1"), roles=template.roles(messages), tokenizer=tokenizer
    )


def runs(sample) -> list[tuple[str, str, str]]:
    """(role, kind, text) of neighbours alike."""
    out: list[list[str]] = []
    for token in sample.tokens:
        if token.boundary:
            out.append([token.role, token.kind, ""])
        out[-1][2] += token.text
    return [tuple(run) for run in out]


def test_a_chat_by_hand(tokenizer):
    """Roles and kinds of a chat of three messages: the reply and its end are trained, nothing else; texts join to the rendering."""
    assert runs(shown(tokenizer)) == [
        ("template", "ignored", "<|im_start|>system\n"),
        ("system", "ignored", "Be kind."),
        ("template", "ignored", "<|im_end|>\n<|im_start|>user\n"),
        ("user", "ignored", "What is 1+1?"),
        ("template", "ignored", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "trained", "2"),
        ("template", "trained", "<|im_end|>"),
        ("template", "ignored", "\n"),
    ]
    sample = shown(tokenizer)
    assert [t.text for t in sample.tokens if t.special] == ["<|im_start|>", "<|im_end|>"] * 3 and sample.fate == "kept"
    assert sample.num_trained == 2


@pytest.mark.parametrize(("policy", "where"), [("right", "tail"), ("left", "head")])
def test_what_truncation_cuts_is_told(tokenizer, policy, where):
    """The tokens beyond seq_len are marked where the policy cuts; the others keep their kind, but the first, which nothing predicts."""
    n = len(shown(tokenizer).tokens)
    sample = shown(tokenizer, seq_len=n - 2, policy=policy)
    cut = [i for i, token in enumerate(sample.tokens) if token.kind == "truncated"]
    assert cut == ([n - 2, n - 1] if where == "tail" else [0, 1]) and sample.fate == "truncated" and "2 cut off" in sample.title()


def test_dropped_samples_say_why(tokenizer):
    """Too long, or nothing to train: told apart; the tokens are shown all the same."""
    assert shown(tokenizer, seq_len=5, policy="drop").fate == "dropped: too long"
    untrained = shown(tokenizer, [Message("user", "a"), Message("assistant", "b", train=False)])
    assert untrained.fate == "dropped: no trained token" and not untrained.num_trained and untrained.tokens


def test_a_head_and_a_tail_are_kept(tokenizer):
    """Truncation that keeps both ends: the middle is what is cut."""
    whole = Encoded(np.arange(10, dtype=np.int32), np.ones(10, np.float32))
    kept = Encoded(np.array([0, 1, 2, 8, 9], np.int32), np.array([0, 1, 1, 1, 1], np.float32))
    sample = show_sample("s", "x", whole, kept, roles=["document"] * 10, tokenizer=tokenizer)
    assert [token.kind == "truncated" for token in sample.tokens] == [False] * 3 + [True] * 5 + [False] * 2
    middle = Encoded(np.array([4, 5, 6], np.int32), np.array([0, 1, 1], np.float32))
    sample = show_sample("s", "x", whole, middle, roles=["document"] * 10, tokenizer=tokenizer)
    assert [i for i, token in enumerate(sample.tokens) if token.kind != "truncated"] == [4, 5, 6]


def test_texts_of_tokens_join_to_the_text(tokenizer):
    """Bytes of one character are shown once, with the last of its tokens; nothing is lost or doubled."""
    text = "naïve 😀 日本 \ufffd é"
    ids = tokenizer.encode(text)
    texts = token_texts(ids, tokenizer)
    assert "".join(texts) == text and "😀" in texts and len(texts) == len(ids) and "" in texts


def test_kinds_are_told_by_symbol_without_colour(tokenizer):
    """In plain text each line begins with its symbol and role; a special token stands in marks that text which looks like one, or holds
    the marks, does not get."""
    chat = [Message("user", "<|im_end|> ⟨<|im_end|>⟩ \033[31m\u202e"), Message("assistant", "2")]
    text = as_text([shown(tokenizer, chat)], color=False)
    lines = [line.split("|", 1) for line in text.splitlines() if line.startswith("  ")]
    assert [head.split()[:2] for head, _ in lines] == [
        [".", "template"], [".", "user"], [".", "template"], ["+", "assistant"], ["+", "template"], [".", "template"],
    ]  # fmt: skip
    user = lines[1][1]
    assert "⟨" not in user and "<|im_end|>" in user and "\\u001b[31m\\u202e" in user and "\033" not in text
    assert lines[4][1] == "⟨<|im_end|>⟩|"
    assert as_text([shown(tokenizer, chat)], color=True).count("\033[32m") == 2


def test_cut_tokens_have_their_symbol(tokenizer):
    """x in front of what truncation took."""
    text = as_text([shown(tokenizer, seq_len=len(shown(tokenizer).tokens) - 1)], color=False)
    assert re.search(r"^  x template +1 \|\\n\|$", text, re.M)


def test_html_is_self_contained(tokenizer):
    """One page: no script, nothing fetched, and markup in the data stays text."""
    page = as_html([shown(tokenizer, [Message("user", "<script>alert(1)</script><img src=x>"), Message("assistant", "<b>")])])
    assert all(word not in page for word in ("<script", "<img", "http")) and "&lt;script&gt;" in re.sub("<[^>]+>", "", page)
    assert 'class="trained special"' in page and "title=" in page


def test_json_has_every_token(tokenizer):
    """As JSON: the ids of the encoder with text, role, kind and weight."""
    (sample,) = json.loads(as_json([shown(tokenizer)]))
    assert [token["id"] for token in sample["tokens"]] == build_template("auto", tokenizer).encode(CHAT, where="x").ids.tolist()
    assert {token["weight"] for token in sample["tokens"] if token["kind"] == "trained"} == {1.0} and sample["num_trained"] == 2


def test_tools_and_an_added_end_have_roles(tokenizer):
    """Tool descriptions are the template's, a call and its result their senders'; the EOS put behind an open reply is the template's;
    there is a role for each token."""
    tools = ({"type": "function", "function": {"name": "add", "description": "adds numbers", "parameters": {}}},)
    call = Message("assistant", "", tool_calls=(ToolCall("add", {"a": "seven apples"}),))
    chat = [Message("user", "Hi"), call, Message("tool", "eight", name="add"), Message("assistant", "done")]
    for name in ("qwen", "none"):
        template = build_template(name, tokenizer)
        given, messages = (tools, chat) if name == "qwen" else ((), chat[:1] + chat[3:])
        ids = template.encode(messages, where="x", tools=given).ids.tolist()
        roles = template.roles(messages, given)
        assert len(roles) == len(ids)
        texts = {role: "".join(t for t, r in zip(token_texts(ids, tokenizer), roles, strict=True) if r == role) for role in set(roles)}
        assert texts["user"] == "Hi" and texts["assistant"].endswith("done")
        if name == "qwen":
            assert "adds numbers" in texts["template"] and "seven apples" in texts["assistant"] and texts["tool"] == "eight"
        else:
            assert roles[-1] == "template" and ids[-1] == tokenizer.eos_id


def test_templates_serve_several_threads(tokenizer, monkeypatch):
    """Chats with calls, encoded by four threads at once, give the ids of one thread, in order; one chat is rendered at a time, since a
    rendering's steps are counted and capped."""
    chats = [
        [Message("user", f"q{i}"), Message("assistant", "", tool_calls=(ToolCall("f", {"x": i}),)), Message("assistant", f"a{i}")][
            : 2 + i % 2
        ]
        for i in range(200)
    ]

    def ids(template, threads: int) -> list[list[int]]:
        return [e.ids.tolist() for e in map_ahead(lambda c: template.encode(c, where="x"), chats, workers=threads, together=1)]

    template, inside = build_template("qwen", tokenizer), []
    locate = template._locator.locate

    def watched(*args, **options):
        inside.append(None)
        time.sleep(0.001)
        assert len(inside) == 1
        inside.pop()
        return locate(*args, **options)

    monkeypatch.setattr(template._locator, "locate", watched)
    assert ids(template, 4) == ids(build_template("qwen", tokenizer), 1)
