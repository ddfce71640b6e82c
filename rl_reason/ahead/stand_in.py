"""What a ``:paper`` config names and this machine need not have: weights, a tokenizer and rows of data.

None of it decides a shape of the compiled programs: vocabularies are the model's, lengths the config's. In what stands in
for it special tokens have other ids, and stop strings other tokens.
"""

import json
import pathlib
import typing
from collections.abc import Sequence

from configs.common import Config

SOURCES = ("mathematics", "open_ended", "science")  # what rows say that they are of: Intern-S1's reward goes by it
EMBEDDED = "embedded"
ROWS = "three rows of sums"


def stand_in(config: Config, folder: pathlib.Path) -> tuple[Config, list[str]]:
    """A copy of the config in which whatever is missing here is replaced, and what that was, a line each.

    Files are written to ``folder``. What is here is left alone.
    """
    config = config.copy_and_resolve_references()
    said: list[str] = []
    with config.unlocked():
        for where, own in (
            ("config", config),
            *((f"config.cohort.{name}", own) for name, own in config.cohort.items()),
        ):
            if own.get("weights") and not pathlib.Path(own.weights).exists():
                said.append(f"{where}.weights={own.weights!r}: the shapes of config.model")
                own.weights = ""
            if own.get("tokenizer", EMBEDDED) != EMBEDDED and not pathlib.Path(own.tokenizer).exists():
                said.append(f"{where}.tokenizer={own.tokenizer!r}: the embedded tokenizer, without chat templates")
                own.tokenizer = EMBEDDED
                config.data.update(chat="plain", system_prompt="", template_variables=None)
        if not all(pathlib.Path(path).exists() for path in (*config.data.files, *config.data.heldout_files)):
            said.append(f"config.data.files={_short(config.data.files)}: {ROWS}")
            column = config.data.demonstration_key or "worked"
            paths = [_write(folder / f"{split}.jsonl", _rows(number, column)) for number, split in enumerate(_SPLITS)]
            config.data.update(files=(paths[0],), heldout_files=(paths[1],), answer_key="answer")
        if not all(
            pathlib.Path(path).exists() for path in (*config.preference.files, *config.preference.heldout_files)
        ):
            said.append(f"config.preference.files={_short(config.preference.files)}: one pair")
            pair = dict(prompt="1+1=", chosen="2", rejected="3")
            config.preference.update(files=(_write(folder / "pairs.jsonl", [pair]),), heldout_files=())
    return config, said


_SPLITS = ("train", "heldout")


def _rows(number: int, column: str) -> list[dict[str, typing.Any]]:
    return [
        {
            "prompt": f"{number}+{k}=",
            "answer": "1",
            "data_source": source,
            "extra_info": dict(split="train"),
            column: f"{number}+1####1",
        }
        for k, source in enumerate(SOURCES)
    ]


def _write(path: pathlib.Path, rows: list[dict[str, typing.Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _short(paths: Sequence[str]) -> str:
    return repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
