"""Models on the Hugging Face hub, by id: downloaded into huggingface_hub's cache, and published.

    org/name[@revision] --local_folder--> HF_HOME/hub/models--org--name/snapshots/<commit>        FOLDER --push_folder--> org/name

Only weights as safetensors, JSON and the tokenizer's files are fetched: no pickles, no code. A token is taken from the environment
(HF_TOKEN) or from the login, by huggingface_hub itself; none is ever an option, saved or shown. Several processes on a machine may ask
for one model at once: huggingface_hub's file locks make the others wait for the first.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torchft.config.problems import redact_text
from torchft.errors import CheckpointError
from torchft.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+(?:/[\w.-]+)*))?")  # org/name, org/name@revision
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "tokenizer.model.v*", "*.tiktoken", "merges.txt", "vocab.txt")
UNWANTED = ("*/*", "consolidated*")  # folders with the same weights in other formats; Mistral's second copy of its weights
PUBLISHED = (*WANTED, "*.gguf", "Modelfile", "README.md")
TO_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_hub_id(path: str) -> bool:
    """True for org/name[@revision], unless that is a path here: a folder that exists, or one in a folder `org` that does."""
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists() and not Path(path).parent.is_dir()


def local_folder(path: str | Path) -> Path:
    """`path` itself, or the copy here of the model that a hub id names, downloaded if need be. Raises CheckpointError."""
    return download(str(path)) if is_hub_id(str(path)) else Path(path)


def download(name: str, *, to: Path | None = None) -> Path:
    """Fetches org/name[@revision] into the cache, or into the folder `to`; the folder. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    repo, revision = _parts(name)
    places: dict[str, Any] = {} if to is None else {"local_dir": to}
    patterns = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    found = Path(_explained(lambda: snapshot_download(repo, revision=revision, **patterns, **places), name, "downloaded"))
    if not any(any(found.glob(pattern)) for pattern in ("*.json", "*.safetensors", "tokenizer.model")):
        given, expected = "no safetensors, JSON or tokenizer file in it", "a model in Hugging Face's format"
        raise _failure(f"{name} is no model", given, expected, "choose the repository that has the weights")
    log.info("%s: %s", name, found)
    return found


def push_folder(folder: Path, name: str, *, public: bool = False, message: str = "Upload with torchft") -> str:
    """Publishes an exported folder as org/name[@branch]; the commit's page. A new repository is private unless `public`.

    Weights, tokenizer, card and Modelfile are sent, nothing else that lies there. Raises CheckpointError.
    """
    from huggingface_hub import HfApi

    api, (repo, branch) = HfApi(), _parts(name)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        fix = "export first: torchft export RUN --out FOLDER"
        raise _failure(f"{folder}: nothing to publish", "no *.safetensors or *.gguf", "an exported folder", fix)
    if not has_token():
        raise _failure(f"{name} can't be published", "no token", "one that may write there", TO_LOG_IN)

    def push() -> str:
        api.create_repo(repo, private=not public, exist_ok=True)
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        sent = {"folder_path": folder, "allow_patterns": list(PUBLISHED), "ignore_patterns": list(UNWANTED)}
        return str(api.upload_folder(repo_id=repo, revision=branch, commit_message=message, **sent).commit_url)

    return _explained(push, name, "published")


def _parts(name: str) -> tuple[str, str | None]:
    """org/name and the revision."""
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise _failure(f"{name!r} is no hub id", name, "org/name, or org/name@revision", "copy it from the model's page")
    return match[1], match[2]


def has_token() -> bool:
    """True if huggingface_hub finds a token, in the environment or of a login."""
    from huggingface_hub import get_token

    return get_token() is not None


def _explained(call: Callable[[], T], name: str, done: str) -> T:
    """What `call` gives; its failure in words of ours."""
    from huggingface_hub import errors

    token = "a token without the right to it" if has_token() else "no token"
    try:
        return call()
    except errors.GatedRepoError:
        given, expected = f"a gated model, and {token}", "an account that its owners have let in"
        fix = f"ask for access on the model's page, then {TO_LOG_IN}"
    except errors.RepositoryNotFoundError:
        given, expected = f"no such model on the hub, or a private one and {token}", "an id of the hub, or a folder here"
        fix = f"check the spelling; for a private model {TO_LOG_IN}"
    except errors.RevisionNotFoundError:
        given, expected, fix = "no such revision", "a branch, a tag or a commit of that model", "check what follows the @"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        given = f"no complete copy in the cache, and the hub can't be reached ({_first_line(error)})"
        expected = "a network, or a model that was downloaded before"
        fix = (
            f"`torchft download {name}` where there is a network and take the cache along (HF_HOME), or give a folder; unset HF_HUB_OFFLINE"
        )
    except Exception as error:  # of the HTTP client, which is another one from release to release, or a full disk
        given, expected, fix = f"{type(error).__name__}: {_first_line(error)}", "an answer of the hub, and room on the disk", "try again"
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            given, expected, fix = f"{token}: {_first_line(error)}", "a token that may do this", TO_LOG_IN
    raise _failure(f"{name} can't be {done}", given, expected, fix)


def _failure(what: str, given: str, expected: str, fix: str) -> CheckpointError:
    return CheckpointError(f"{what}\n  given:    {given}\n  expected: {expected}\n  fix:      {fix}")


def _first_line(error: BaseException) -> str:
    return redact_text(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
