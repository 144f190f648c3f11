"""A rank file as tokenizer.json, so that an exported folder opens in transformers and servers with the same ids.

Merges stand nowhere in a rank file: tiktoken merges any two neighbours whose joint bytes are a token, lowest rank first. So every way to
cut a token into two tokens is a merge, in the order of the joint token's rank.
"""

from collections.abc import Iterator, Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from torchft.tokenizers.rank_files import Kind
from torchft.tokenizers.words import byte_level


def rank_tokenizer_json(
    ids: Mapping[bytes, int], kind: Kind, special: Mapping[str, int], words: Mapping[str, int], bos: int | None
) -> bytes:
    """ids: token bytes -> id; bos: the token that plain text begins with, None if it does not."""
    letters = _letters()
    added = {**special, **words}
    written = {token: "".join(letters[byte] for byte in token) for token in ids}
    vocab = {written[token]: i for token, i in ids.items()} | added
    merges = [(written[a], written[b]) for a, b in _merges(ids)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC() if kind.nfc else None
    tokenizer.pre_tokenizer = byte_level(kind.words)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        text = next(token for token, i in special.items() if i == bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{text} $A", f"{text} $A {text}:1 $B:1", [(text, bos)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer.to_str(pretty=False).encode()


def _merges(ids: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for token in sorted(ids, key=ids.__getitem__):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in pairs if a in ids and b in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's): itself if it is printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
