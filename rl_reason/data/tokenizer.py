"""Text to token ids and back: one interface (``pieces.Pieces``), and the one place that picks among tokenizers."""

import pathlib

from rl_reason.data.chat import ChatSettings
from rl_reason.data.hf_tokenizer import HFTokenizer
from rl_reason.data.sentencepiece_tokenizer import EMBEDDED, SentencePieceTokenizer
from rl_reason.data.tokenizer_files import MODEL

Tokenizer = SentencePieceTokenizer | HFTokenizer


def load(path: str | pathlib.Path, chat: ChatSettings | None = None) -> Tokenizer:
    """'embedded', a sentencepiece model, or a checkpoint's folder with a tokenizer.json, else with one sentencepiece model.

    With ``chat`` prompts are rendered by the checkpoint's chat template.

    Raises:
        ValueError: nothing there that can be read, or no template, with the cure.
    """
    where = EMBEDDED if path == "embedded" else pathlib.Path(path)
    if where.is_dir():
        if (where / MODEL).is_file():
            return HFTokenizer.load(where, chat)
        models = sorted(where.glob("*.model"))
        if len(models) != 1:
            raise ValueError(
                f"{where} has no {MODEL} and {len(models)} sentencepiece models. Where transformers can load it, "
                f"AutoTokenizer.from_pretrained({str(where)!r}).save_pretrained({str(where)!r}) writes a {MODEL}."
            )
        where = models[0]
    elif not where.is_file():
        raise ValueError(
            f"no file or folder {str(where)!r}; give 'embedded', a sentencepiece model with byte pieces, or a checkpoint's "
            f"folder with its {MODEL}."
        )
    if chat is not None:
        raise ValueError(f"{path}: a sentencepiece model has no chat template; set config.data.chat='plain'.")
    return SentencePieceTokenizer.load(where)
