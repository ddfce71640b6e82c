"""Builds the embedded tokenizer from the tasks' own texts: ``python -m experiments.build_tokenizer [--check]``.

The same code gives the same bytes everywhere: texts are drawn by key, and training is counting characters in one
thread. ``--check`` rebuilds in memory and compares with the file instead of writing it.
"""

import argparse
import io
import pathlib
import sys
from collections.abc import Iterable, Iterator

import sentencepiece

from rl_reason.data.sentencepiece_tokenizer import EMBEDDED, SPACE, SentencePieceTokenizer
from rl_reason.tasks import TASKS
from rl_reason.tasks.base import ANSWER_MARK, draw

TEXTS_PER_LEVEL = 16


def corpus() -> Iterator[str]:
    """Prompts with their worked solutions, of every task and level."""
    for task in TASKS.values():
        for level in task.levels:
            for index in range(TEXTS_PER_LEVEL):
                problem = draw(task, level, seed=0, split="train", index=index)
                yield task.prompt(problem) + task.solve(problem).completion


def build(names: Iterable[str] = TASKS) -> bytes:
    """The model: four specials, the answer mark, the tasks' names, 256 bytes, and the characters of the corpus."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="char",
        vocab_size=512,  # a bound: characters stop short of it
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        # A name takes its space along, so that letters to reverse never hit one by chance.
        user_defined_symbols=[ANSWER_MARK, *(f"{name}{SPACE}" for name in names)],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 when ``--check`` finds other bytes than the file's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=EMBEDDED, help="the model file (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with the file; write nothing")
    options = parser.parse_args(arguments)
    built = build()
    tokenizer = SentencePieceTokenizer(built)
    if not options.check:
        options.out.write_bytes(built)
    elif not options.out.exists() or options.out.read_bytes() != built:
        print(
            f"{options.out} is not what the tasks give; run `python -m experiments.build_tokenizer`.", file=sys.stderr
        )
        return 1
    done = "checked" if options.check else "written"
    print(f"{options.out} {done}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
