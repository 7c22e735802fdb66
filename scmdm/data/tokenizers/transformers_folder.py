"""Folders of `transformers` tokenizers: reads those of versions 4 and 5, and writes one that both versions load.

A class that the installed version knows is loaded by it, because some classes change the pipeline of `tokenizer.json`
by other settings. Version 5 writes the class `TokenizersBackend`, which version 4 does not know; its pipeline is
`tokenizer.json` as it stands. The same holds for classes whose code is not in `transformers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmdm.data.tokenizers.pipeline import load_pipeline, panics_as_errors, require_stated_ids
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import read_json, reading

PIPELINE_FILE, SETTINGS_FILE, MAP_FILE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("mask", "bos", "eos", "pad")
_BERT_ROLES = {"bos": "cls", "eos": "sep"}
_OTHER_ROLES = ("unk", "sep", "cls")
_FILES = {PIPELINE_FILE, SETTINGS_FILE, MAP_FILE, "vocab.json"}
_READ = (*sorted(_FILES), "added_tokens.json", "config.json")  # a checkpoint has further JSON files
_REMEDY = "give another folder"


def read_folder(path: Path, named: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of the tokenizer.json, and the names of the specials by role. Raises UserError.

    `named` is the configuration key of `path`.
    """
    found = [path / name for name in _READ if (path / name).exists()]
    files = {file.name: read_json(file, "JSON file of a tokenizer", remedy=_REMEDY) for file in found}
    if not _FILES & files.keys() and not any(path.glob("*.model")):
        raise UserError(
            f"{named}={path} holds no file of a tokenizer ({', '.join(sorted(_FILES))}, *.model); give another folder"
        )
    settings, names = (_mapping(files.get(name, {}), path / name) for name in (SETTINGS_FILE, MAP_FILE))
    with reading(f"{named}={path}", "folder of a transformers tokenizer", _advice(settings, files)), panics_as_errors():
        if PIPELINE_FILE in files and not _is_known(settings):
            pipeline, roles = _plain(files[PIPELINE_FILE], {**names, **settings})
        else:
            pipeline, roles = _by_transformers(path)
        library = load_pipeline(pipeline)
        added = [{**token, "id": int(id_)} for id_, token in (settings.get("added_tokens_decoder") or {}).items()]
        require_stated_ids(files.get(PIPELINE_FILE, {}), library, f"{named}={path / PIPELINE_FILE}")
        require_stated_ids({"added_tokens": added}, library, f"{named}={path / SETTINGS_FILE}")
        return pipeline, roles


def _mapping(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; {_REMEDY}")
    return content


def _advice(settings: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    if PIPELINE_FILE in files or _is_known(settings):
        return ""
    return (
        f"its class {settings.get('tokenizer_class')!r:.80} needs its own code; give the folder of its base's tokenizer"
    )


def _is_known(settings: Mapping[str, Any]) -> bool:
    """Return whether the installed `transformers` can load a tokenizer as its settings say."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = settings.get("tokenizer_class")
    if isinstance(settings.get("extra_special_tokens"), list) or name == "TokenizersBackend":  # written by version 5
        return False
    return name is None or (isinstance(name, str) and tokenizer_class_from_name(name) is not None)


def _by_transformers(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True, trust_remote_code=False)
    names = {role: getattr(loaded, f"{role}_token") for role in (*ROLES, *_BERT_ROLES.values())}
    return json.loads(loaded.backend_tokenizer.to_str()), _with_bert_roles(names)


def _plain(content: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a pipeline as it stands, with the specials that only the settings name appended, and the roles."""
    if not isinstance(content, dict):
        raise ValueError("tokenizer.json is not a JSON object")
    tokenizer = load_pipeline(content)
    names = {role: _name(settings.get(f"{role}_token")) for role in (*ROLES, *_OTHER_ROLES)}
    missing = [name for name in names.values() if name is not None and tokenizer.token_to_id(name) is None]
    if missing:
        tokenizer.add_special_tokens(missing)
        content = json.loads(tokenizer.to_str())
    return content, _with_bert_roles(names)


def _name(token: Any) -> str | None:
    """Return the name of a token, which is text, or the fields of an `AddedToken`."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{token!r:.60} is not the name of a token")
    return token or None


def _with_bert_roles(names: Mapping[str, str | None]) -> dict[str, str]:
    found = {role: names[role] for role in ROLES}
    for role, other in _BERT_ROLES.items():
        found[role] = found[role] or names[other]
    return {role: str(name) for role, name in found.items() if name is not None}


def write_folder(
    to: Path, pipeline: Mapping[str, Any], specials: Mapping[str, int], chat_template: str | None, length: int
) -> None:
    """Write the files of a tokenizer into the folder `to`; `specials` holds ids by role.

    A special after the vocabulary gets a name, as in `[MASK]`, unless ids before it have no token.
    """
    tokenizer = load_pipeline(pipeline)
    names: dict[str, str] = {}
    for role, id_ in sorted(specials.items(), key=lambda item: item[1]):
        if id_ == max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1:
            tokenizer.add_special_tokens([f"[{role.upper()}]"])
        if (name := tokenizer.id_to_token(id_)) is not None:
            names[role] = name
    content = json.loads(tokenizer.to_str())
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": name for role, name in names.items()},
        "additional_special_tokens": [name for name in special if name not in names.values()],
    }
    unknown = content["model"].get("unk_token")
    if unknown is not None:
        settings["unk_token"] = unknown
    if chat_template is not None:
        settings["chat_template"] = chat_template
    atomic_write_text(to / PIPELINE_FILE, json.dumps(content, ensure_ascii=False) + "\n")
    atomic_write_text(to / SETTINGS_FILE, json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
