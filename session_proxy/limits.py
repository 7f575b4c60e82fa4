"""What bounds the work: the request rate, the concurrency slots, the buffer between a command and its reader."""

import asyncio

from aiolimiter import AsyncLimiter

from session_proxy.errors import RateLimitedError, TooManyExecsError

OUTPUT_BUFFER_BYTES = 131_072
"""Output held for one reader; a reader slower than the command makes the command wait, not this grow."""

SLOT_RETRY_SECONDS = 1.0
"""``Retry-After`` of too_many_execs; when a slot frees up cannot be known."""


class RateLimit:
    """Admits ``per_second`` requests a second with bursts of ``burst``; never waits."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._limiter = AsyncLimiter(max_rate=burst, time_period=burst / per_second)
        self._interval = 1 / per_second

    async def admit(self) -> None:
        """Count one request. Raises RateLimitedError when the bucket is full."""
        if not self._limiter.has_capacity():
            raise RateLimitedError(
                "more requests than EXEC_RATE_PER_SECOND and EXEC_BURST allow", retry_after=self._interval
            )
        await self._limiter.acquire()


class Slots:
    """``MAX_CONCURRENT_EXECS``, of execs and of large bodies that are read at a time.

    Kills need none: each running exec brings the right to its own reaper.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0

    def take(self) -> None:
        """Take a slot. Raises TooManyExecsError when all are taken."""
        if self.taken >= self.count:
            raise TooManyExecsError(
                f"all {self.count} slots are taken (MAX_CONCURRENT_EXECS)", retry_after=SLOT_RETRY_SECONDS
            )
        self.taken += 1

    def release(self) -> None:
        """Give a slot back."""
        self.taken -= 1


class OutputBuffer:
    """The bounded buffer between one command and its one reader.

    The writer calls ``put`` and, when told that it is full, awaits ``room``. The reader awaits ``take``. Whatever has
    arrived since the last ``take`` comes as one batch, so many small frames cost one write.
    """

    def __init__(self, limit: int = OUTPUT_BUFFER_BYTES) -> None:
        self._limit = limit
        self._chunks: list[tuple[str, bytes]] = []
        self._size = 0
        self._closed = False
        self._discarding = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._size

    def put(self, stream: str, data: bytes) -> bool:
        """Add output. Returns False when the buffer is now full."""
        if self._discarding or self._closed:
            return True
        self._chunks.append((stream, data))
        self._size += len(data)
        self._readable.set()
        if self._size < self._limit:
            return True
        self._writable.clear()
        return False

    async def room(self) -> None:
        """Wait until the buffer is not full."""
        await self._writable.wait()

    @property
    def readable(self) -> bool:
        """Whether ``take`` would not have to wait."""
        return self._readable.is_set()

    async def take(self) -> list[tuple[str, bytes]]:
        """Wait for output and return all of it, neighbours of one stream joined; an empty list is the end."""
        await self._readable.wait()
        chunks, self._chunks = self._chunks, []
        self._size = 0
        self._writable.set()
        if not self._closed:
            self._readable.clear()
        joined: list[tuple[str, bytes]] = []
        start = 0
        for at in range(1, len(chunks) + 1):
            if at == len(chunks) or chunks[at][0] != chunks[start][0]:
                stream = chunks[start][0]
                parts = [data for _, data in chunks[start:at]]
                joined.append((stream, parts[0] if len(parts) == 1 else b"".join(parts)))
                start = at
        return joined

    def discard(self) -> None:
        """Drop what is held and all that comes: nobody reads any more."""
        self._discarding = True
        self._chunks.clear()
        self._size = 0
        self._writable.set()

    def close(self) -> None:
        """No more output comes; ``take`` returns what is left, then the empty list."""
        self._closed = True
        self._writable.set()
        self._readable.set()
