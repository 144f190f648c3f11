"""Small real tokenizers of every format, trained on the spot on a text of ours."""

import base64
import json
from functools import cache
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
WORDS = ("<think>", "</think>", "<tool_response>")  # added, not special
WORDS_OF_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus() -> list[str]:
    """Sentences with the letters, spaces, digits and marks that chats have."""
    subjects = ("The red boat", "A teacher", "My old neighbour", "Nobody", "The system", "Every user", "An assistant")
    verbs = ("sails over", "answers", "forgets", "counts", "writes to", "asks")
    objects = ("the lake.", "a hard question?", "12 apples and 7 pears!", "her friends, twice", "the letter: yes.", "user input\n")
    return [f"{s} {v} {o}" for s in subjects for v in verbs for o in objects] + [
        "é ü 😀 日本 naïve café",
        *["a\n\nb\n\n\nc  d   e\n\n\nf"] * 20,
        *["[INST] y<|x|> z</x> [/INST]"] * 20,
    ]


@cache
def _bpe_json() -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS_OF_LLAMA3), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(corpus(), trainer)
    tok.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tok.to_str()


def make_hf_tokenizer(folder: Path, *, template: str | None = CHATML, special: tuple[str, ...] = (), **config) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json; `special` comes to its tokens, `config` goes over the defaults."""
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.from_str(_bpe_json())
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tok.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIG, **config}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_prefixing_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer.json as Llama 2's: a space before each stretch of text between special tokens."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def make_byte_fallback_tokenizer(folder: Path) -> Path:
    """A tokenizer.json as transformers makes it of Llama 2's SentencePiece model: `▁` for spaces, <0xE6> for bytes without a piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tok.train_from_iterator(corpus()[:42], trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    content = json.loads(tok.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def make_sp_tokenizer(folder: Path, *, user_defined: tuple[str, ...] = SPECIAL[1:3], model_type: str = "bpe", **config) -> Path:
    """A folder with a SentencePiece model as Llama 2 has it (no normalisation, byte fallback), and a config if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sp_model(user_defined, model_type))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _sp_model(user_defined: tuple[str, ...], model_type: str) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus() for line in text.splitlines() if line]),
        model_writer=model,
        vocab_size=420,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@cache
def _ranks(kind: str) -> dict[bytes, int]:
    """Token bytes -> rank: a byte-level BPE trained on the corpus with the kind's words, 400 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from torchft.tokenizers.rank_files import KINDS
    from torchft.tokenizers.words import byte_level

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level(KINDS[kind].words)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*corpus(), *["caf\u00e9 na\u00efve \u65e5\u672c \u65e5\u672c\u8a9e   spaces    here", "WE'LL we'll don't"] * 20]
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocab = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    return {bytes(byte_of[letter] for letter in token): rank for rank, token in enumerate(vocab)}


def make_rank_tokenizer(folder: Path, kind: str = "llama3", *, file: str = "tokenizer.model", **config) -> Path:
    """A folder with a rank file as tiktoken has it; tokenizer_config.json says of which kind it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _ranks(kind).items()]
    (folder / file).write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"rank_kind": kind, **config}))
    return folder


def make_tekken_tokenizer(folder: Path, *, version: str = "v3", special: list[dict] | None = None, **config) -> Path:
    """A folder with a tekken.json: 20 special tokens before 380 of text, and 20 more of text than it uses."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for token, rank in _ranks("o200k_base").items()
    ]
    sizes = {"num_vocab_tokens": 400, "default_vocab_size": 400, "default_num_special_tokens": 20}
    content = {"config": {"pattern": TEKKEN_WORDS, "version": version, **sizes}, "vocab": vocab}
    (folder / "tekken.json").write_text(json.dumps(content | ({} if special is None else {"special_tokens": special})))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
