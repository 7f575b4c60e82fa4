"""Rate, slots and the buffer between a command and its reader."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from session_proxy.errors import RateLimitedError, TooManyExecsError
from session_proxy.limits import OUTPUT_BUFFER_BYTES, SLOT_RETRY_SECONDS, OutputBuffer, RateLimit, Slots

PATIENCE = 5.0


async def test_a_burst_is_admitted_and_the_next_request_refused() -> None:
    rate = RateLimit(per_second=0.01, burst=3)
    for _ in range(3):
        await rate.admit()
    with pytest.raises(RateLimitedError, match="EXEC_RATE_PER_SECOND") as refusal:
        await rate.admit()
    assert refusal.value.retry_after == 100


async def test_a_refused_request_costs_nothing_and_after_retry_after_one_is_admitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    rate = RateLimit(per_second=4, burst=2)
    await rate.admit()
    await rate.admit()
    for _ in range(10):
        with pytest.raises(RateLimitedError) as refusal:
            await rate.admit()
    assert refusal.value.retry_after == 0.25
    now += 0.25
    await rate.admit()
    with pytest.raises(RateLimitedError):
        await rate.admit()
    now += 60
    await rate.admit()
    await rate.admit()
    with pytest.raises(RateLimitedError):
        await rate.admit()


async def test_admission_never_waits() -> None:
    rate = RateLimit(per_second=0.001, burst=1)
    admission = rate.admit()
    with pytest.raises(StopIteration):
        admission.send(None)  # a coroutine that suspends would return here instead


def test_slots_refuse_when_all_are_taken() -> None:
    slots = Slots(2)
    slots.take()
    slots.take()
    with pytest.raises(TooManyExecsError, match="all 2 slots") as refusal:
        slots.take()
    assert refusal.value.retry_after == SLOT_RETRY_SECONDS
    slots.release()
    slots.take()


@settings(max_examples=50)
@given(st.integers(1, 4), st.lists(st.booleans(), max_size=40))
def test_slots_never_leak(count: int, steps: list[bool]) -> None:
    slots = Slots(count)
    taken = 0
    for take in steps:
        if take:
            try:
                slots.take()
                taken += 1
            except TooManyExecsError:
                assert taken == count
        elif taken:
            slots.release()
            taken -= 1
        assert slots.taken == taken <= count


async def test_neighbours_of_one_stream_are_joined_and_the_order_is_kept() -> None:
    buffer = OutputBuffer()
    for stream, data in [("stdout", b"a"), ("stdout", b"b"), ("stderr", b"c"), ("stdout", b"d"), ("stdout", b"e")]:
        assert buffer.put(stream, data)
    assert buffer.size == 5
    assert await buffer.take() == [("stdout", b"ab"), ("stderr", b"c"), ("stdout", b"de")]
    assert buffer.size == 0


async def test_a_single_chunk_is_handed_on_without_a_copy() -> None:
    buffer = OutputBuffer()
    data = b"x" * 1000
    buffer.put("stdout", data)
    [(_, taken)] = await buffer.take()
    assert taken is data


async def test_the_buffer_says_when_it_is_full() -> None:
    buffer = OutputBuffer(limit=4)
    assert buffer.put("stdout", b"abc")
    assert not buffer.put("stderr", b"d")
    assert buffer.size == 4


async def test_the_default_bound_is_the_named_one() -> None:
    buffer = OutputBuffer()
    assert buffer.put("stdout", b"x" * (OUTPUT_BUFFER_BYTES - 1))
    assert not buffer.put("stdout", b"x")


async def test_a_waiting_writer_is_woken_by_the_reader() -> None:
    buffer = OutputBuffer(limit=1)
    assert not buffer.put("stdout", b"x")
    writer = asyncio.create_task(buffer.room())
    await asyncio.sleep(0)
    assert not writer.done()
    await buffer.take()
    await asyncio.wait_for(writer, PATIENCE)


@pytest.mark.parametrize("end", ["discard", "close"])
async def test_a_waiting_writer_is_woken_by_the_end(end: str) -> None:
    buffer = OutputBuffer(limit=1)
    buffer.put("stdout", b"x")
    writer = asyncio.create_task(buffer.room())
    await asyncio.sleep(0)
    assert not writer.done()
    getattr(buffer, end)()
    await asyncio.wait_for(writer, PATIENCE)


async def test_a_waiting_reader_is_woken_by_output() -> None:
    buffer = OutputBuffer()
    reader = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not reader.done()
    buffer.put("stderr", b"x")
    assert await asyncio.wait_for(reader, PATIENCE) == [("stderr", b"x")]


async def test_a_waiting_reader_is_woken_by_the_end() -> None:
    buffer = OutputBuffer()
    reader = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not reader.done()
    buffer.close()
    assert await asyncio.wait_for(reader, PATIENCE) == []


async def test_after_close_what_is_left_comes_before_the_end() -> None:
    buffer = OutputBuffer()
    buffer.put("stdout", b"last")
    buffer.close()
    assert buffer.put("stdout", b"too late")
    assert await buffer.take() == [("stdout", b"last")]
    assert await buffer.take() == []
    assert await buffer.take() == []


async def test_an_empty_take_is_only_ever_the_end() -> None:
    buffer = OutputBuffer()
    buffer.put("stdout", b"x")
    await buffer.take()
    reader = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not reader.done()
    reader.cancel()
    await asyncio.wait({reader})


async def test_what_is_discarded_is_gone_and_takes_no_room() -> None:
    buffer = OutputBuffer(limit=2)
    assert not buffer.put("stdout", b"xy")
    buffer.discard()
    assert buffer.size == 0
    for _ in range(10):
        assert buffer.put("stdout", b"xyz")
    assert buffer.size == 0
    buffer.close()
    assert await buffer.take() == []


async def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    buffer = OutputBuffer()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await buffer.take()
    buffer.put("stdout", b"x")
    assert await buffer.take() == [("stdout", b"x")]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=9)), max_size=40),
    st.integers(1, 20),
)
async def test_a_slow_reader_gets_everything_and_the_buffer_stays_bounded(
    chunks: list[tuple[str, bytes]], limit: int
) -> None:
    buffer = OutputBuffer(limit)
    longest = max((len(data) for _, data in chunks), default=0)
    seen: list[tuple[str, bytes]] = []

    async def write() -> None:
        for stream, data in chunks:
            full = not buffer.put(stream, data)
            assert full == (buffer.size >= limit)
            assert buffer.size < limit + longest
            if full:
                await buffer.room()
        buffer.close()

    async def read() -> None:
        while batch := await buffer.take():
            assert all(left[0] != right[0] for left, right in itertools.pairwise(batch))
            seen.extend(batch)
            await asyncio.sleep(0)

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(write())
        group.create_task(read())

    def bytewise(pairs: list[tuple[str, bytes]]) -> list[tuple[str, int]]:
        return [(stream, byte) for stream, data in pairs for byte in data]

    assert bytewise(seen) == bytewise(chunks)
