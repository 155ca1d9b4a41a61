from __future__ import annotations

import pytest

from pshare_jax.core.pages.allocator import PADDING_PAGE, PageAllocator


def test_every_page_but_the_padding_page_is_handed_out_once() -> None:
    allocator = PageAllocator(6)
    assert allocator.num_free == 5
    pages = [allocator.allocate() for _ in range(5)]
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert PADDING_PAGE not in pages
    with pytest.raises(IndexError):
        allocator.allocate()
    allocator.check()


def test_a_page_is_free_when_its_last_reference_goes() -> None:
    allocator = PageAllocator(3)
    page = allocator.allocate()
    allocator.retain(page)
    assert allocator.refs(page) == 2
    assert allocator.release(page) is False
    assert allocator.num_free == 1
    assert allocator.release(page) is True
    assert allocator.num_free == 2
    allocator.check()


def test_a_kept_page_outlives_its_references() -> None:
    allocator = PageAllocator(2)
    page = allocator.allocate()
    allocator.keep(page)
    assert allocator.release(page) is True
    assert allocator.num_free == 0
    allocator.retain(page)
    allocator.unkeep(page)
    assert allocator.num_free == 0, "it is still referenced"
    allocator.release(page)
    assert allocator.num_free == 1
    allocator.check()


def test_misuse_is_refused() -> None:
    allocator = PageAllocator(3)
    page = allocator.allocate()
    allocator.release(page)
    for misuse in (allocator.retain, allocator.release, allocator.keep, allocator.unkeep):
        with pytest.raises(AssertionError, match=f"page {page}"):
            misuse(page)
    with pytest.raises(AssertionError):
        allocator.retain(PADDING_PAGE)
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(1)


def test_check_notices_a_lost_page_and_a_double_one() -> None:
    lost, double = PageAllocator(3), PageAllocator(3)
    lost._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        lost.check()
    double._free.append(double._free[0])
    with pytest.raises(AssertionError, match="twice"):
        double.check()
