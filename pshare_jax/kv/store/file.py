"""The file of a pool: its format, and how it is created, adopted after a restart, or wiped.

All integers are little-endian. Regions begin at multiples of 64 bytes, the records at a multiple of
4096:

| region | contents |
|---|---|
| head, 4096 bytes | magic, version, length and xxh3 of what follows; the `PoolSpec` as JSON; |
| | at 3072 the words `dirty`, `clock`, `buried`, `rebuilt` (int64) |
| codebook | its table (uint8) |
| headers | one `HEADER` a slot: the truth of what is in the slot |
| pins | uint16 `[members, slots]`: how often each member is reading each slot |
| totals | uint32 a slot: the sum of its pins |
| table | int32, open addressing from a key's first 8 bytes: a slot, or -1 |
| records | `slot_bytes` a slot: the page's tokens (int32, one page of them, -1 after the last), |
| | then the page as its codec writes it |

Pins, totals and table are derived: they are built anew from headers and living members whenever
somebody has died while he was changing them.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from pshare_jax.errors import ConfigError
from pshare_jax.kernels.kv_codec.codebook import CODECS, Codebook
from pshare_jax.kv.store import locking
from pshare_jax.kv.store.members import MAX_MEMBERS, Members
from pshare_jax.kv.store.private import NotPrivateError, open_private

MAGIC = b"PSHAREKV"
BEING_MADE = b"PSHARE.."
"""What a file begins with until it is a pool."""

VERSION = 1
BLOCK = 4096
"""What offsets and lengths of direct I/O are multiples of."""

OPEN_SECONDS = 120.0
"""How long another server is waited for that makes the file; it calibrates, too."""

FREE, WRITING, READY = 0, 1, 2

HEADER = np.dtype(
    [
        ("state", "u1"),
        ("owner", "u1"),
        ("codec", "u1"),
        ("reserved", "u1"),
        ("num_tokens", "<u4"),
        ("length", "<u4"),
        ("uses", "<u4"),
        ("generation", "<u8"),
        ("used", "<i8"),
        ("checksum", "<u8"),
        ("key0", "<u8"),
        ("key1", "<u8"),
    ]
)
"""Of a slot: `owner` is the member that writes it, `generation` grows whenever it is given away,
`used` is the clock at its last use, `checksum` is xxh3 of the record, seeded by the rest."""

ESCAPES = 0.04
"""Exponents without a code that a slot has room for, of all."""

_HEAD = struct.Struct("<8sIIQ")
_WORDS = 3072


class PoolDamagedError(Exception):
    """The file is not what it was made as; says in what way. Nothing of it may be used."""


class PoolSpec(msgspec.Struct, frozen=True):
    """What a pool is made for.

    Args:
        shape: of a page, `[L, 2, kv_heads, page_size, head_dim]`.
        dtype: of its values, as numpy names it.
        codec: `raw`, `planes` or `top16`.
        slots: how many there are.
        slot_bytes: of a record at most, a multiple of 4096.
    """

    shape: tuple[int, ...]
    dtype: str
    codec: str
    slots: int
    slot_bytes: int

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.shape[-2]


@dataclass(frozen=True)
class PoolRequest:
    """What is wanted of a pool.

    Args:
        shape: of a page.
        dtype: of its values.
        page_bytes: of a page as it is.
        num_bytes: of the file at most.
        codecs: those that a pool that exists may have.
        codebook: makes the codebook of a new pool, or None for `raw`.
        direct: whether records bypass the page cache, for a disk.
    """

    shape: tuple[int, ...]
    dtype: str
    page_bytes: int
    num_bytes: int
    codecs: tuple[str, ...]
    codebook: Callable[[], Codebook | None]
    direct: bool = False

    def spec(self, codec: str) -> PoolSpec:
        """The pool of a codec that is as large as may be."""
        values = int(np.prod(self.shape))
        record = self.page_bytes
        if codec != "raw":
            planes = 3 if codec == "planes" else 4
            record = values + planes * values // 8 + int(ESCAPES * values)
        slot_bytes = _up(4 * self.shape[-2] + record, BLOCK)
        slots, beyond = 0, self.num_bytes // slot_bytes + 1
        while beyond - slots > 1:
            middle = (slots + beyond) // 2
            fits = Regions(self._with(codec, middle, slot_bytes)).size <= self.num_bytes
            slots, beyond = (middle, beyond) if fits else (slots, middle)
        return self._with(codec, slots, slot_bytes)

    def _with(self, codec: str, slots: int, slot_bytes: int) -> PoolSpec:
        return PoolSpec(self.shape, self.dtype, codec, slots, slot_bytes)


class Regions:
    """Where everything is in the file of a pool, in bytes."""

    def __init__(self, spec: PoolSpec):
        layers, _, heads, _, head_dim = spec.shape
        book = {"raw": 0, "planes": layers * 2 * heads * head_dim, "top16": 15}[spec.codec]
        self.table_size = 1 << (2 * spec.slots - 1).bit_length()
        sizes = {
            "head": BLOCK,
            "book": book,
            "headers": HEADER.itemsize * spec.slots,
            "pins": 2 * MAX_MEMBERS * spec.slots,
            "totals": 4 * spec.slots,
            "table": 4 * self.table_size,
        }
        self.at: dict[str, tuple[int, int]] = {}
        end = 0
        for name, size in sizes.items():
            self.at[name] = end, end + size
            end = _up(end + size, 64)
        self.records = _up(end, BLOCK)
        self.size = self.records + spec.slots * spec.slot_bytes


@dataclass(frozen=True)
class PoolFile:
    """An open pool file: descriptors of headers, of records and of locks, who uses it, this process
    among them, and what it holds."""

    path: str
    headers: int
    records: int
    lock: int
    members: Members
    spec: PoolSpec
    book: Codebook | None
    warm: bool

    def close(self) -> None:
        """Leaves the pool, and closes the descriptors, which gives up the locks."""
        self.members.leave()
        for descriptor in (self.headers, self.records, self.lock):
            os.close(descriptor)


def open_file(path: str, request: PoolRequest) -> PoolFile:
    """Joins the pool at `path`, or makes a new one where there is none, or none that fits.

    Raises:
        ConfigError: no room, no such folder, a file that is no pool or that others may use, a pool
            that does not fit but is in use, or one that has too many users.
    """
    with contextlib.ExitStack() as opened:
        try:
            lock = _lock(path)
            opened.callback(os.close, lock)
            found = read_head(lock, request)
            warm = not isinstance(found, str)
            members = Members(lock)
            if isinstance(found, str):
                _check_replaceable(path, lock, members, found)
                found = _create(path, lock, request)
            headers = _reopen(path, lock)
            opened.callback(os.close, headers)
            records = _reopen(path, lock, os.O_DIRECT if request.direct else 0)
            opened.callback(os.close, records)
            # While the books are locked, so that nobody takes it for a pool that nobody uses.
            if not members.join(_reopen(path, lock)):
                raise ConfigError(f"kv_store: {path} has {MAX_MEMBERS} users already")
        except NotPrivateError as error:
            raise ConfigError(f"kv_store: {path} {error.strerror}") from error
        except OSError as error:
            raise ConfigError(f"kv_store: {path}: {error.strerror}") from error
        except locking.PoolBusyError as error:
            raise ConfigError(f"kv_store: {path}: {error}") from error
        locking.unlock(lock)
        opened.pop_all()
    return PoolFile(path, headers, records, lock, members, *found, warm)


def _lock(path: str) -> int:
    """A descriptor of the file, which is made if need be, with the lock of its books."""
    while True:
        descriptor = open_private(path, os.O_CREAT)
        try:
            locking.lock(descriptor, OPEN_SECONDS)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody has removed it meanwhile


def _reopen(path: str, lock: int, flags: int = 0) -> int:
    """One more open file description of a file; `flags` as far as its file system has them."""
    try:
        descriptor = open_private(path, flags)
    except OSError:
        if not flags:
            raise
        descriptor = open_private(path)  # without direct I/O, as tmpfs was for long
    if not os.path.samestat(os.fstat(descriptor), os.fstat(lock)):
        os.close(descriptor)
        raise ConfigError(f"kv_store: {path} was replaced while it was opened; start again")
    return descriptor


def _check_replaceable(path: str, lock: int, members: Members, why: str) -> None:
    """Whether a file that cannot be used as it is may be made anew."""
    start = os.pread(lock, len(MAGIC), 0)
    if start and start not in (MAGIC, BEING_MADE):
        raise ConfigError(
            f"kv_store: {path} holds something else than a pool of KV; it is not overwritten: "
            "give another path, or remove it"
        )
    if members.anybody():
        raise ConfigError(
            f"kv_store: {path} is being used by another process, and cannot be used here: "
            f"{why}; give this server a path of its own"
        )


def read_head(descriptor: int, request: PoolRequest) -> tuple[PoolSpec, Codebook | None] | str:
    """What a file says it is, or why it cannot be used for a request."""
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, BLOCK, 0)
    if size == 0:
        return "it is empty"
    if len(head) < BLOCK or head[:8] != MAGIC:
        return "it is no pool"
    _, version, length, checksum = _HEAD.unpack_from(head)
    if version != VERSION:
        return f"its format has version {version}, not {VERSION}"
    try:
        spec = msgspec.json.decode(head[_HEAD.size :][:length], type=PoolSpec)
    except msgspec.DecodeError:
        return "its head is damaged"
    if spec.codec not in request.codecs or spec != request.spec(spec.codec):
        return f"it was made as {spec}"
    regions = Regions(spec)
    if size != regions.size:
        return f"it has {size} bytes, not {regions.size}"
    first, end = regions.at["book"]
    table = os.pread(descriptor, end - first, first)
    if checksum != _head_checksum(head[_HEAD.size :][:length], table):
        return "its head is damaged"
    return spec, _codebook(spec, table)


def _create(path: str, descriptor: int, request: PoolRequest) -> tuple[PoolSpec, Codebook | None]:
    """Makes the file anew, its magic last."""
    book = request.codebook()
    spec = request.spec("raw" if book is None else book.codec)
    regions = Regions(spec)
    if not spec.slots:
        raise ConfigError(
            f"kv_store: {path}: {request.num_bytes} bytes do not hold one page, which takes "
            f"{spec.slot_bytes}"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, BEING_MADE, 0)
    room = os.fstatvfs(descriptor)
    if room.f_bavail * room.f_frsize < regions.size:
        raise ConfigError(
            f"kv_store: {path}: {regions.size} bytes are wanted, but only "
            f"{room.f_bavail * room.f_frsize} are free there"
        )
    try:
        os.posix_fallocate(descriptor, 0, regions.size)
    except OSError as error:
        os.ftruncate(descriptor, 0)
        raise ConfigError(f"kv_store: {path}: {error.strerror}") from error
    table = b"" if book is None else book.table.tobytes()
    os.pwrite(descriptor, table, regions.at["book"][0])
    first, end = regions.at["table"]
    os.pwrite(descriptor, b"\xff" * (end - first), first)
    text = msgspec.json.encode(spec)
    os.pwrite(descriptor, text, _HEAD.size)
    checksum = _head_checksum(text, table)
    os.pwrite(descriptor, _HEAD.pack(MAGIC, VERSION, len(text), checksum), 0)
    return spec, book


def words_at() -> tuple[int, int]:
    """Where the words `dirty`, `clock`, `buried` and `rebuilt` are."""
    return _WORDS, _WORDS + 32


def _codebook(spec: PoolSpec, table: bytes) -> Codebook | None:
    if spec.codec == "raw":
        return None
    values = np.frombuffer(table, np.uint8)
    layers, two, heads, _, head_dim = spec.shape
    if spec.codec == "planes":
        values = values.reshape(layers, two, heads, head_dim)
    return Codebook(spec.codec, values)


def _head_checksum(spec: bytes, table: bytes) -> int:
    return xxhash.xxh3_64_intdigest(table, seed=xxhash.xxh3_64_intdigest(spec))


def codec_number(codec: str) -> int:
    """How headers write a codec."""
    return CODECS.index(codec)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
