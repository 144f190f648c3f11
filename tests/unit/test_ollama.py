"""The Modelfile's TEMPLATE, rendered by Go's own text/template, gives our prompts; a template without a counterpart is refused."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.tokenizers import CHATML, make_hf_tokenizer
from torchft.data.ollama import modelfile
from torchft.data.templates import build_template
from torchft.data.types import Message
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (lead if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are \"S\".\nAlways.<|im_end|>\n{% endif %}" + CHATML
TEMPLATES = {"chatml": CHATML, "default system": DEFAULT, "bos": "{{ bos_token }}" + CHATML, "llama3": LLAMA3, "gemma": GEMMA3}
TEMPLATES |= {"gemma without system": GEMMA2}
CHATS = [
    [Message("user", "Hi {{ .Role }} <b>&\"'")],
    [Message("system", "Be brief."), Message("user", "a\nb"), Message("assistant", "c"), Message("user", "日本 😀")],
]
PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Input struct { Template string; Chats [][]Message }
func main() {
    var in Input
    if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
    t := template.Must(template.New("").Parse(in.Template))
    for _, chat := range in.Chats {
        if err := t.Execute(os.Stdout, map[string]any{"Messages": chat}); err != nil { panic(err) }
        os.Stdout.Write([]byte{0})
    }
}
"""


def make(folder: Path, source: str, **config):
    tokenizer = load_tokenizer(make_hf_tokenizer(folder, template=source, bos_token="<|bos|>", **config))
    return build_template("auto", tokenizer), tokenizer


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """A program that renders a template for chats given on stdin."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=folder, check=True, timeout=200)

    def render(template: str, chats: list[list[Message]]) -> list[str]:
        given = {"Template": template, "Chats": [[{"Role": m.role, "Content": m.content} for m in chat] for chat in chats]}
        out = subprocess.run([folder / "render"], input=json.dumps(given), capture_output=True, text=True, check=True, timeout=60)
        return out.stdout.split("\0")[:-1]

    return render


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_renders_our_prompts(name, go, tmp_path):
    """Character by character; the default system message is put first where the chat has none, as Ollama does with SYSTEM."""
    template, tokenizer = make(tmp_path, TEMPLATES[name])
    text = modelfile("m.gguf", template, tokenizer)
    source = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert bool(system) == (name == "default system")
    asked = [chat for chat in CHATS if "without system" not in name or chat[0].role != "system"]
    chats = [[Message("system", system[1]), *chat] if system and chat[0].role != "system" else chat for chat in asked]
    assert go(source, chats) == [template.render(chat, add_generation_prompt=True) for chat in asked]


def test_a_system_message_that_gemma_refuses_stands_before_the_text(go, tmp_path):
    """Ollama may send one: it is folded into the first turn, and not repeated in the next."""
    source = re.search(r'TEMPLATE """(.*?)"""', modelfile("m.gguf", *make(tmp_path, GEMMA2)), re.DOTALL)[1]
    later, _ = make(tmp_path / "3", GEMMA3)
    chat = [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert go(source, [chat]) == [later.render(chat, add_generation_prompt=True)]


def test_the_file_names_weights_and_stop(tmp_path):
    """FROM the file beside it; a stop parameter for the end of a turn."""
    text = modelfile("m.gguf", *make(tmp_path, LLAMA3))
    assert text.startswith("FROM ./m.gguf\nTEMPLATE ") and text.endswith('PARAMETER stop "<|eot_id|>"\n')


@pytest.mark.parametrize(
    "source, why",
    [("{{ messages[0]['content'] }}", "none of chatml, llama3, gemma"), ("{{ raise_exception('no') }}", "refuses a plain chat")],
)
def test_an_unknown_template_is_refused(source, why, tmp_path):
    """With the reason, not with a template that is nearly right."""
    with pytest.raises(DataError, match=why):
        modelfile("m.gguf", *make(tmp_path, source))
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="refuses a system message"):
        modelfile("m.gguf", *make(tmp_path / "3", picky))
    with pytest.raises(DataError, match="none of chatml"):
        modelfile("m.gguf", *make(tmp_path / "2", CHATML.replace("message['content']", "message['content'] + ' '")))
