"""What the JSON files beside a tokenizer say: tokenizer_config.json and its older and newer neighbours."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.errors import ExitCode, LlamaError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Side files of a tokenizer, each optional.

    Attributes:
        bos, eos: the tokens' texts, or "".
        stop_ids: eos_token_id of generation_config.json.
        added: tokens beyond the model's own vocabulary, text -> id.
        legacy: Hugging Face's flag: SentencePiece's leading space after every control token.
        add_bos: whether plain text gets a BOS, None when nobody says.
        chat_template: Jinja text; of several named ones, "default".
        files: the tokenizer's own file and the side files that were read.
    """

    bos: str = ""
    eos: str = ""
    stop_ids: tuple[int, ...] = ()
    added: dict[str, int] = dataclasses.field(default_factory=dict)
    legacy: bool = True
    add_bos: bool | None = None
    chat_template: str | None = None
    files: tuple[Path, ...] = ()


def as_path(path: str | Path) -> Path:
    """A path on disk, or on a bucket when the text says so (gs://...)."""
    if isinstance(path, str) and "://" in path:
        from etils import epath

        return epath.Path(path)
    return Path(path) if isinstance(path, str) else path


def read_settings(tokenizer_file: Path) -> Settings:
    """Settings from the folder that holds the tokenizer's file."""
    folder = tokenizer_file.parent
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
    config, special, added, generation = (read_json(folder / name) for name in names)
    files = [folder / name for name in names if (folder / name).exists()]
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        template = template_file.read_text(encoding="utf-8")
        files.append(template_file)
    else:
        template = _template(config.get("chat_template"))
    legacy = config.get("legacy")
    return Settings(
        bos=_text(config.get("bos_token")) or _text(special.get("bos_token")),
        eos=_text(config.get("eos_token")) or _text(special.get("eos_token")),
        stop_ids=_stop_ids(generation.get("eos_token_id"), folder / names[3]),
        added=_added(added, config.get("added_tokens_decoder"), folder),
        legacy=True if legacy is None else bool(legacy),
        add_bos=config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None,
        chat_template=template,
        files=(tokenizer_file, *files),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as e:
        raise _bad(path, f"is not JSON ({e})") from e
    if not isinstance(value, dict):
        raise _bad(path, "does not hold a JSON object")
    return value


def components(node: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json and all inside it."""
    if isinstance(node, dict) and isinstance(node.get("type"), str):
        yield node
        for key in ("normalizers", "pretokenizers", "decoders"):
            children = node.get(key)
            for child in children if isinstance(children, list) else ():
                yield from components(child)


def _text(token: Any) -> str:
    """A token is written as its text or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _stop_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise _bad(path, f"has eos_token_id {value!r}, expected a token id or a list of them")
    return tuple(ids)


def _added(listed: dict[str, Any], decoder: Any, folder: Path) -> dict[str, int]:
    by_id = decoder.items() if isinstance(decoder, dict) else ()
    try:
        tokens = {_text(token): int(i) for i, token in by_id} | {text: int(i) for text, i in listed.items()}
    except (TypeError, ValueError) as e:
        raise _bad(folder / "tokenizer_config.json", "or added_tokens.json gives an added token no id") from e
    if len(set(tokens.values())) != len(tokens) or min(tokens.values(), default=0) < 0:
        raise _bad(folder / "tokenizer_config.json", "or added_tokens.json gives two added tokens one id")
    return {text: i for text, i in tokens.items() if text}


def _template(value: Any) -> str | None:
    if isinstance(value, list):  # several, by name
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _bad(path: Path, what: str) -> LlamaError:
    return LlamaError(ExitCode.BAD_TOKENIZER, f"{path} {what}: download it again, or delete it")
