"""When pages had better come coded: by price at first, then by what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from pshare_jax.kernels.kv_codec.codebook import Codebook
from pshare_jax.kv.coding import Coding
from pshare_jax.kv.links import AVOID_SECONDS, LEAST_BYTES, TRY_AGAIN, Links, price

CODING = Coding("planes", "b00c", encode=8e9, decode=9e9, ratio=1.4)
PAGE = 1_500_000
URL = "http://prefill0"


def links(setting: str = "auto", clock: list[float] | None = None) -> Links:
    now = clock or [0.0]
    return Links(setting, ["planes", "top16"], lambda: now[0])  # type: ignore[arg-type]


def measured(links: Links, link: float, *, pages: int = 16, coded: bool = False) -> None:
    """Transfers at a rate; the first one does not count."""
    for rate in (1.0, link):
        links.measured(URL, pages * PAGE, pages * PAGE / rate, coded=coded, decoding=0.001)


def coded(links: Links, pages: int = 16) -> bool:
    wanted = links.wanted(URL, pages, PAGE)
    assert wanted is not None
    return wanted.coded


def test_pages_come_as_they_are_until_the_link_is_known() -> None:
    way = links()
    assert not coded(way)
    way.heard(URL, CODING)
    assert not coded(way)
    for _ in range(2):
        way.measured(URL, LEAST_BYTES - 1, 1.0, coded=False)
    assert not coded(way), "so little says nothing"
    way.measured(URL, 16 * PAGE, 1000.0, coded=False)
    assert not coded(way), "the first one has to connect"
    way.measured(URL, 16 * PAGE, 16 * PAGE / 1e8, coded=False)
    assert coded(way)


@pytest.mark.parametrize(
    ("link", "pages", "pays"),
    [(1e8, 1, True), (8e8, 1, True), (1.4e9, 1, False), (5e9, 16, True), (9e9, 16, False)],
)
def test_the_price_decides(link: float, pages: int, pays: bool) -> None:
    """A page alone is coded, sent and decoded one after the other; of many the slowest counts."""
    way = links()
    way.heard(URL, CODING)
    measured(way, link)
    assert coded(way, pages) is pays


def test_what_a_transfer_costs() -> None:
    coding = Coding("planes", "", encode=4e6, decode=2e6, ratio=2.0)
    piped = price(3, 1_000_000, 1e6, coding, 1e6, piped=True)
    assert piped == pytest.approx((0.25 + 0.5 + 1.0) + 2 * 1.0)
    serial = price(3, 1_000_000, 1e6, coding, 1e6, piped=False)
    assert serial == pytest.approx(3 * (0.25 + 0.5 + 1.0))


def test_what_was_measured_counts_and_both_ways_are_tried_again() -> None:
    """The price was wrong, say since the processors are busy: 1 in 32 still finds that out."""
    way = links()
    way.heard(URL, CODING)
    measured(way, 1e9)
    assert coded(way)
    measured(way, 5e8, coded=True)
    asked = [coded(way) for _ in range(2 * TRY_AGAIN)]
    assert asked.count(True) == 2
    for _ in range(30):
        way.measured(URL, 16 * PAGE, 16 * PAGE / 1.3e9, coded=True, decoding=0.001)
    asked = [coded(way) for _ in range(2 * TRY_AGAIN)]
    assert asked.count(False) == 2


def test_large_transfers_count_more() -> None:
    way = links()
    way.heard(URL, CODING)
    measured(way, 1e8, pages=64)
    way.measured(URL, PAGE, PAGE / 1e11, coded=False)
    assert coded(way)


def test_slow_decoding_counts() -> None:
    way = links()
    way.heard(URL, CODING)
    for _ in range(2):
        way.measured("http://other", 16 * PAGE, 1.0, coded=True, decoding=16 * PAGE / 1e8)
    measured(way, 5e8)
    assert not coded(way)


def test_a_codec_by_name_is_always_asked_for_and_who_has_none_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    way = links("planes")
    assert coded(way)
    way.heard(URL, None)
    way.heard(URL, None)
    assert caplog.text.count(f"{URL} sends pages as they are, though cluster.codec is planes") == 1
    assert coded(way)


def test_after_a_failure_pages_come_as_they_are_for_a_while() -> None:
    clock = [0.0]
    way = links("planes", clock)
    way.keep_book(URL, CODING, Codebook("planes", np.zeros(1, np.uint8)))
    assert way.book(URL, CODING) is not None
    way.failed(URL)
    assert not coded(way)
    assert way.book(URL, CODING) is None, "perhaps it was the codebook"
    clock[0] = AVOID_SECONDS
    assert coded(way)


def test_nothing_is_asked_for_that_cannot_be_decoded() -> None:
    assert Links("auto", []).wanted(URL, 16, PAGE) is None
