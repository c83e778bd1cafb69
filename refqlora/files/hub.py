"""A model on the Hugging Face hub: from its id, such as org/name or org/name@revision, to a local directory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .model_files import COMPANIONS, INDEX
from .reading import PICKLED, UNPICKLE

BUNDLED = Path(__file__).parent.parent / "assets"  # the directory of the bundled base model

# What is downloaded: the files that are read here, and a model's companions; nothing pickled. Subdirectories hold the
# model in other formats.
FILES = ["config.json", *(name for name in COMPANIONS if "/" not in name), "model*.safetensors", INDEX]
NOT_FILES = ["*/*", *(f"*{suffix}" for suffix in PICKLED)]
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(@(?P<revision>[\w./-]+))?", re.ASCII)


def model_directory(model: str | Path, weights: bool = True) -> Path:
    """`model` itself if it is a directory, else the directory of the hub's model with that id, downloaded; without
    `weights` only its config.json is.

    huggingface_hub downloads it into its cache (HF_HOME), with its progress bars, and finds it there the next time,
    offline too (HF_HUB_OFFLINE=1). Raises FileNotFoundError, ValueError or OSError that says in one line what to do if
    there is neither, or the download fails.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix in PICKLED:
            raise ValueError(f"{path}: {UNPICKLE}")
        raise ValueError(f"{path}: expected a directory with config.json and *.safetensors, got a file")
    match = _ID.fullmatch(str(model).replace(os.sep, "/"))
    if match is None:
        raise FileNotFoundError(f"{path}: no such directory (a model on the Hugging Face hub is written org/name)")
    return _download(match["repo"], match["revision"], weights)


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    asked = repo + (f"@{revision}" if revision else "")
    try:
        from huggingface_hub import errors, snapshot_download  # here, as it takes half a second
    except ImportError:
        raise ModuleNotFoundError(
            f"{asked}: no such directory, and huggingface_hub, which downloads models, is not installed"
        ) from None
    elsewhere = f"download it where you can with `hf download {repo} --local-dir DIR` and give DIR"
    try:
        path = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=FILES if weights else ["config.json"],
                ignore_patterns=NOT_FILES,
                repo_type="model",
            )
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"{asked}: the model is gated: ask for access at https://huggingface.co/{repo}, then log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{asked}: no such directory, and no such model on the Hugging Face hub; if it is private, log in with "
            "`hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{asked}: the model has no revision {revision}") from None
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{asked}: not a directory, not in the cache, and the Hugging Face hub cannot be reached: {elsewhere}"
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{asked}: neither a directory nor the id of a model: {_first_line(error)}") from None
    except Exception as error:  # its own errors, those of the library beneath it, and the system's
        raise OSError(f"{asked}: the download failed ({_first_line(error)}): {elsewhere}") from None
    if weights and not any(path.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{asked}: contains no *.safetensors; if you trust its pickled weights, transformers converts them: "
            f'AutoModelForCausalLM.from_pretrained("{repo}").save_pretrained(OUT)'
        )
    return path


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
