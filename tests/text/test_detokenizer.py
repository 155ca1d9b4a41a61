import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.text.detokenizer import StopMatcher
from pshare_jax.text.token_bytes import byte_alphabet

VOCAB = 402
ids = st.lists(st.integers(0, VOCAB + 3), max_size=40)
# Everything that is hard to cut: joined emoji, combining marks, right-to-left, long encodings.
texts = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            ["👩‍👩‍👧‍👦", "e\u0301", "🏳️‍🌈", "\u202eאב", "𝔘", "a b", "日本", "\x00", "\ufffd", " "]
        )
    ).map("".join),
)


def stream(tokenizer, token_ids, skip_special_tokens=True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@given(token_ids=ids, skip=st.booleans())
def test_streaming_adds_up_to_the_librarys_full_decode(byte_level, token_ids, skip):
    whole = byte_level._fast.decode(token_ids, skip_special_tokens=skip)
    assert byte_level.decode(token_ids, skip) == whole
    assert "".join(stream(byte_level, token_ids, skip)) == whole


@given(text=texts)
def test_text_survives_the_round_trip_token_by_token(byte_level, text):
    token_ids = byte_level.encode(text)
    pieces = stream(byte_level, token_ids, skip_special_tokens=False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(text=texts)
def test_sentencepiece_text_survives_the_round_trip(sentencepiece, text):
    token_ids = sentencepiece.encode(text, add_special_tokens=False)
    whole = sentencepiece._fast.decode(token_ids, skip_special_tokens=False)
    assert "".join(stream(sentencepiece, token_ids, skip_special_tokens=False)) == whole
    # The tokenizer itself spells a space as U+2581, so that this one character is lost.
    assert whole == text.replace("\u2581", " ")


def test_half_a_character_waits_for_the_rest(byte_level):
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    token_ids = [byte_level._fast.token_to_id(alphabet[byte]) for byte in "€!".encode()]
    assert stream(byte_level, token_ids) == ["", "", "€", "!", ""]
    assert stream(byte_level, token_ids[:2]) == ["", "", "\ufffd"]
    # An interrupted character gives one replacement, and what follows is intact.
    assert stream(byte_level, [*token_ids[:2], token_ids[3]]) == ["", "", "\ufffd!", ""]


def test_sentencepiece_strips_the_first_space_only(sentencepiece):
    vocab = sentencepiece._fast.get_vocab()
    hi, space, eos = vocab["\u2581hi"], vocab["\u2581"], vocab["</s>"]
    assert stream(sentencepiece, [eos, hi, hi]) == ["", "hi", " hi", ""]
    assert stream(sentencepiece, [space, hi]) == ["", " hi", ""]


def test_special_tokens_are_text_only_when_asked_for(byte_level):
    token_ids = byte_level.encode("hello<|im_end|>world")
    assert byte_level.decode(token_ids) == "helloworld"
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "hello<|im_end|>world"


stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def reference_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the shortest prefix that ends with a stop string; the longest of those."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=stop_strings,
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces, stops, include):
    matcher = StopMatcher(stops, include)
    released = [matcher.push(piece) for piece in pieces]
    result = "".join(released) + matcher.finish()
    assert (result, matcher.matched) == reference_stop("".join(pieces), stops, include)


@given(
    early=st.text("ab", max_size=8),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=stop_strings,
    include=st.booleans(),
)
def test_a_stop_string_counts_where_its_last_character_may_end_the_text(
    early, pieces, stops, include
):
    matcher = StopMatcher(stops, include)
    released = [matcher.push(char, may_end=False) for char in early]
    assert matcher.matched is None
    released += [matcher.push(piece) for piece in pieces]
    text, expected = early + "".join(pieces), (early + "".join(pieces), None)
    for end in range(len(early) + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            expected = text[: end if include else end - len(stop)], stop
            break
    assert ("".join(released) + matcher.finish(), matcher.matched) == expected


@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stops=stop_strings)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(pieces, stops):
    matcher = StopMatcher(stops)
    text = released = ""
    for piece in pieces:
        text += piece
        released += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = text[len(released) :]
        assert text.startswith(released)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stops", "include", "expected", "matched"),
    [
        (["STOP"], False, "one ", "STOP"),
        (["STOP"], True, "one STOP", "STOP"),
        (["never"], False, "one STOP two", None),
        (["TOP", "STOP"], False, "one ", "STOP"),
        (["two", "O"], False, "one ST", "O"),
        (["🙂"], False, "one STOP two", None),
    ],
)
def test_stop_strings_across_pieces(stops, include, expected, matched):
    matcher = StopMatcher(stops, include)
    text = "".join(matcher.push(piece) for piece in ["one S", "T", "OP", " tw", "o"])
    assert text + matcher.finish() == expected
    assert matcher.matched == matched
    if matched is not None:
        assert matcher.push("more") == ""
