"""`torchft chat`: the library's own samples, streamed; commands; Ctrl-C; piped through the real command."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models import make_model
from torchft.cli.main import main
from torchft.data.types import Message
from torchft.generate import chat as chats
from torchft.generate.chat import Chat, converse
from torchft.generate.generate import generate
from torchft.generate.model import LanguageModel, open_model
from torchft.generate.sampling import SamplingConfig

CFG = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("chat") / "hf", max_seq_len=256)


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return open_model(folder)


def talk(model: LanguageModel, *lines: str, system: str = "") -> tuple[Chat, str]:
    chat, out, rest = Chat(model, CFG, system), io.StringIO(), list(lines)
    converse(chat, lambda: rest.pop(0) if rest else None, out)
    return chat, out.getvalue()


def reply(model: LanguageModel, messages: list[Message], attempt: int = 0) -> str:
    """The same sample from `generate`."""
    cfg = SamplingConfig(**{**vars(CFG), "num_samples": attempt + 1})
    turn = sum(m.role != "system" for m in messages)
    done = generate(
        model.decoder, [model.template.prompt(messages)], cfg=cfg, ids=[turn], stop_ids=model.stop_ids, tokenizer=model.tokenizer
    )
    return done[attempt].text


def test_two_turns_with_a_system_message(model):
    """Each reply is the sample of the whole chat so far by the template of training; the second sees the first."""
    chat, out = talk(model, "Hello", "and then?", system="JSON")
    so_far = [Message("system", "JSON"), Message("user", "Hello")]
    first = reply(model, so_far)
    so_far += [Message("assistant", first), Message("user", "and then?")]
    second = reply(model, so_far)
    assert [m.content for m in chat.messages] == ["Hello", first, "and then?", second] and first != second
    assert out == f"{first}\n{second}\n"


def test_regenerate_reset_and_system(model):
    """/regenerate draws anew on the same messages, each time; /reset and /system change what the next reply sees."""
    chat, _ = talk(model, "Hello", "/regenerate", "/regenerate")
    tries = [reply(model, [Message("user", "Hello")], attempt) for attempt in range(3)]
    assert [m.content for m in chat.messages] == ["Hello", tries[2]] and len(set(tries)) == 3
    chat, _ = talk(model, "Hello", "/reset", "/system Be brief", "Hi")
    assert [m.content for m in chat.messages] == ["Hi", reply(model, [Message("system", "Be brief"), Message("user", "Hi")])]
    assert "nothing to answer" in talk(model, "/regenerate")[1]


def test_save_is_training_data(model, tmp_path):
    """/save appends the chat as a record that the data layer reads as the same messages."""
    from torchft.data.formats import sample_from_record
    from torchft.data.sources import SourceConfig, open_records

    path = tmp_path / "chats.jsonl"
    chat, _ = talk(model, "Hello", f"/save {path}", "More", f"/save {path}", system="S")
    records = [record for _, record, _ in open_records(SourceConfig(str(path))).read(0, 2)]
    assert [len(record["messages"]) for record in records] == [3, 5]
    assert list(sample_from_record(records[1], "x").messages) == [Message("system", "S"), *chat.messages]
    assert "needs a FILE" in talk(model, "/save")[1] and "nothing to save" in talk(model, f"/save {path}")[1]
    assert "No such file" in talk(model, "x", f"/save {tmp_path}/no/such")[1]


def test_ctrl_c_stops_a_reply_not_the_chat(model, monkeypatch):
    """What came before Ctrl-C stays in the chat as the reply, and the next message is answered."""
    real, left = chats.stream, [3]

    def interrupted(*args, **options):
        for piece in real(*args, **options):
            yield piece
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(chats, "stream", interrupted)
    chat, out = talk(model, "Hello", "again")
    whole = reply(model, [Message("user", "Hello")])
    assert out.startswith(chat.messages[1].content + " [stopped]\n")
    assert whole.startswith(chat.messages[1].content) and chat.messages[1].content != whole
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2


def test_errors_do_not_end_the_chat(model):
    """A message too long for the model is refused and forgotten; an unknown command gets the list of commands."""
    chat, out = talk(model, "word " * 400, "/wat", "Hi")
    assert "max_seq_len" in out and "/wat is no command" in out and "/regenerate" in out
    assert [m.role for m in chat.messages] == ["user", "assistant"] and chat.messages[0].content == "Hi"


def test_the_command_through_a_pipe(folder):
    """`torchft chat` reads lines from a pipe, writes the replies and nothing else to stdout, and ends with the input."""
    command = [sys.executable, "-m", "torchft.cli.main", "chat", str(folder), "--device", "cpu", "--seed", "3", "--temperature", "1"]
    lines = "Hello\n/system JSON\nHi\n"
    done = subprocess.run([*command, "--max-new-tokens", "12", "--top-p", "1"], input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model = open_model(folder)
    first = reply(model, [Message("user", "Hello")])
    chat = [Message("system", "JSON"), Message("user", "Hello"), Message("assistant", first), Message("user", "Hi")]
    assert done.stdout == f"{first}\nsystem message set\n{reply(model, chat)}\n"


def test_wrong_folder_and_settings(tmp_path, capsys):
    """Exit 2 with what to do, no traceback."""
    assert main(["chat", str(tmp_path / "none")]) == 2
    assert "fix:" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--top-p", "2"]) == 2
    assert "sampling.top_p" in capsys.readouterr().err
