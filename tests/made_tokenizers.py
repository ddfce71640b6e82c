"""Folders of tiny tokenizers as five families of checkpoints have them, trained here, and templates of the same features."""

import functools
import json
import pathlib
import typing

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rl_reason.tasks import TASKS
from rl_reason.tasks.base import draw

# Several scripts, their digits and marks; code; emoji of several code points; blanks of all kinds; what imitates pieces.
TEXTS = (
    "The quick brown fox can't jump over 12,345 lazy dogs; it'll try again at 07:30, won't it?",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich. Où est l'élève naïf? ¿Qué pasó, señor?",
    "Съешь ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. שפן אכל קצת גזר. صِف خَلقَ خَودٍ",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。 いろはにほへと ちりぬるを。 다람쥐 헌 쳇바퀴에 타고파. ऋषियों को सताने वाले दुष्ट",
    "cafe\u0301 is café, Å is A\u030a; ﬁ ² ① Ⅷ; zero\u200bwidth, no\u00a0break, \ufeffmark, \u2028line",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 e🙂e 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9d1\U0001f3fd‍\U0001f680",
    "def f(xs: list[int]) -> int:\n\treturn sum(x ** 2 for x in xs if x % 2 == 0)  # even\n\n\nclass A:\n    pass\n",
    'for (int i = 0; i < n; ++i) { printf("%d\\n", a[i]); }\r\n\r\n#include <stdio.h>\r\n',
    "SELECT * FROM t WHERE a <> 'x' AND b IS NOT NULL;\n{\"k\": [2.5e-3, null]}\n$\\frac{a}{b} \\le \\sum_{i=1}^n x_i$",
    "   three before, two  between, trailing   ",
    "\n\n\t\n  mixed \r blanks\n",
    "#### add 47+85=132 ####",
)
CHATML = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
HEADERS = """{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}
    {%- set content = content + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + 'Today: ' + date_string + '\n' + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
INST = """{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"


@functools.cache
def _corpus() -> tuple[str, ...]:
    """The texts above, and some problems of every task with their solutions."""
    problems = [
        (task, draw(task, task.levels[0], seed=0, split="train", index=i)) for task in TASKS.values() for i in range(8)
    ]
    return (*TEXTS, *(task.prompt(problem) + task.solve(problem).completion for task, problem in problems))


def _byte_level(split: str, *, ignore_merges: bool = False, nfc: bool = False) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.normalizer = normalizers.NFC() if nfc else None  # type: ignore[assignment]
    pieces = [
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_corpus(), trainer)
    return made


def _byte_fallback(specials: tuple[str, ...], space: str) -> tokenizers.Tokenizer:
    """Sentencepiece's kind: pieces of the few letters that training saw, bytes for all others."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*specials, *byte_pieces], limit_alphabet=90, show_progress=False
    )
    made.train_from_iterator(_corpus(), trainer)
    layout = json.loads(made.to_str())
    layout["added_tokens"] = [token for token in layout["added_tokens"] if token["content"] in specials]
    layout["added_tokens"][-1] |= dict(lstrip=True, rstrip=True)  # as Phi 3's: the last swallows the blanks around it
    replace = dict(type="Replace", pattern=dict(String=" "), content=SPACE)
    if space == "always":
        prepend = dict(type="Prepend", prepend=SPACE)
        layout["normalizer"] = dict(type="Sequence", normalizers=[prepend, replace])
    elif space == "first":
        layout["normalizer"] = None
        layout["pre_tokenizer"] = dict(type="Metaspace", replacement=SPACE, prepend_scheme="first", split=False)
    else:
        layout["pre_tokenizer"] = dict(
            type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False
        )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if space == "never" else [decoders.Strip(" ", 1, 0)]
    made = tokenizers.Tokenizer.from_str(json.dumps(layout))
    made.decoder = decoders.Sequence([*steps, *strip])
    return made


def _with_bos(made: tokenizers.Tokenizer, bos: str) -> None:
    special = [(bos, made.token_to_id(bos))]
    made.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", special)


def _qwen() -> tuple[tokenizers.Tokenizer, dict, typing.Any]:
    made = _byte_level(QWEN_SPLIT, nfc=True)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"])
    made.add_tokens([AddedToken(name, normalized=False) for name in ("<tool_call>", "<think>", "</think>")])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    config = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False, chat_template=CHATML)
    return made, config, ["<|im_end|>", "<|endoftext|>"]


def _llama3() -> tuple[tokenizers.Tokenizer, dict, typing.Any]:
    made = _byte_level(QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"), ignore_merges=True)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "finetune_right_pad_id")
    made.add_special_tokens([f"<|{name}|>" for name in names])
    _with_bos(made, "<|begin_of_text|>")
    config = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return made, config | dict(chat_template=HEADERS), ["<|end_of_text|>", "<|eot_id|>"]


def _gemma() -> tuple[tokenizers.Tokenizer, dict, typing.Any]:
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    made = _byte_fallback(specials, "never")
    _with_bos(made, "<bos>")
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return made, names | dict(chat_template=TURNS), ["<eos>", "<end_of_turn>"]


def _llama2(space: str = "always") -> tuple[tokenizers.Tokenizer, dict, typing.Any]:
    made = _byte_fallback(("<unk>", "<s>", "</s>"), space)
    _with_bos(made, "<s>")
    bos = dict(__type="AddedToken", content="<s>", lstrip=False, rstrip=False, normalized=False, single_word=False)
    names = dict(bos_token=bos, eos_token="</s>", unk_token="<unk>", pad_token=None)
    named = [dict(name="tool_use", template="no"), dict(name="default", template=INST)]
    return made, names | dict(chat_template=named), "</s>"


FAMILIES = {
    "qwen": _qwen,
    "llama3": _llama3,
    "gemma": _gemma,
    "llama2": _llama2,
    "mistral": functools.partial(_llama2, "first"),
}


def write(family: str, folder: pathlib.Path) -> pathlib.Path:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a family, in a folder that is made."""
    made, config, stops = FAMILIES[family]()
    ids = [made.token_to_id(name) for name in stops] if isinstance(stops, list) else made.token_to_id(stops)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    config |= dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ids)), encoding="utf-8")
    return folder
