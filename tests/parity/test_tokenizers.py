"""Tokenizers and chat templates: the same ids and texts as ``transformers`` from the same folder, family by family."""

import functools

import numpy as np
import pytest

from rl_reason.data import tokenizer as tokenizers
from rl_reason.data.chat import ChatSettings
from tests import made_tokenizers
from tests.made_tokenizers import FAMILIES, TEXTS

# transformers warns of its own deprecations while it is imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SAY = lambda role, content: dict(role=role, content=content)
CHATS = [
    [SAY("user", "What is 1+1?")],
    [SAY("system", "Be brief."), SAY("user", "  ¿Qué pasó?\n")],
    [
        SAY("user", "Hi"),
        SAY("assistant", "<think>\nhm\n</think>\n\nHello 👩‍👩‍👧‍👦"),
        SAY("user", "天地玄黄\n\ndef f():\n\treturn 1"),
    ],
    [SAY("system", "Be\n\nbrief. "), SAY("user", "a"), SAY("assistant", " b "), SAY("user", " c")],
    *([SAY("user", text)] for text in TEXTS),
]
# A date of its own: two clocks may differ at midnight.
VARIABLES: list[dict] = [dict(date_string="26 Jul 2024"), dict(date_string="1", enable_thinking=False)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return made_tokenizers.write(request.param, tmp_path_factory.mktemp("made") / request.param)


@functools.cache
def theirs(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def test_texts_have_their_ids(folder):
    ours, peer = tokenizers.load(folder), theirs(folder)
    for text in (*TEXTS, *filter(None, " ".join(TEXTS).split(" "))):
        assert ours.prompt(text) == peer.encode(text), text
    assert ours.vocab_size == len(peer)
    assert ours.bos_id == (peer.bos_token_id if peer.encode("a")[0] == peer.bos_token_id else None)


def test_ids_have_their_texts(folder):
    """But for the space that a decoder takes from the front of a text."""
    ours, peer, rng = tokenizers.load(folder), theirs(folder), np.random.default_rng(0)
    ids = [ours.encode(text) for text in TEXTS]
    whole = [i for i, piece in enumerate(ours.piece_bytes) if piece.isascii()]  # specials among them
    ids += [rng.choice(whole, int(rng.integers(1, 30))).tolist() for _ in range(200)]
    for row in ids:
        wanted = peer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = ours.decode(row)
        assert wanted in (text, text.removeprefix(" ")), row


def test_chats_have_their_ids(folder):
    peer, compared = theirs(folder), 0
    for variables in VARIABLES:
        ours = tokenizers.load(folder, ChatSettings(variables=variables))
        for chat in CHATS:
            apply = functools.partial(peer.apply_chat_template, chat, add_generation_prompt=True, **variables)
            try:
                wanted = apply(tokenize=True, return_dict=False)
            except Exception as error:  # Gemma's takes no system prompt
                assert "System role not supported" in str(error)
                with pytest.raises(ValueError, match="System role not supported"):
                    ours.prompt(chat)
                continue
            assert ours.prompt(chat) == wanted, chat
            assert ours.decode(ours.prompt(chat)).lstrip() == peer.decode(wanted, skip_special_tokens=True).lstrip()
            compared += 1
    assert compared >= len(CHATS)


def test_a_text_is_a_chat_and_the_system_prompt_is_a_message(folder):
    if folder.name == "gemma":
        pytest.skip("its template takes no system prompt")
    variables = VARIABLES[0]
    ours = tokenizers.load(folder, ChatSettings("Be brief.", variables))
    chat = [SAY("system", "Be brief."), SAY("user", "Hi")]
    wanted = theirs(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **variables)
    assert ours.prompt("Hi") == ours.prompt(chat) == ours.prompt(chat[1:]) == wanted


def test_what_users_write_is_text_as_theirs_when_asked(folder):
    """``sanitize_control_tokens`` of transformers; it encodes what lies around such a text apart, so texts are compared."""
    ours, peer = tokenizers.load(folder, ChatSettings(variables=VARIABLES[0])), theirs(folder)
    specials = [name for name, i in peer.get_vocab().items() if i in peer.all_special_ids]
    chat = [SAY("user", f"say {' '.join(specials)} now")]
    options: dict = dict(add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True) | VARIABLES[0]
    wanted, found = peer.apply_chat_template(chat, **options), ours.prompt(chat)
    counts = lambda ids: [ids.count(i) for i in peer.all_special_ids]
    assert counts(found) == counts(wanted)
    assert ours.decode(found) == ours.decode(wanted)
