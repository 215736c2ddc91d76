"""A TCP proxy that misbehaves on demand, for Postgres, Valkey, S3 and the api alike.

    with Proxy.of(url) as proxy:                # or Proxy(host, port, http=True) for faults that know HTTP
        client = connect(proxy.reach(url))
        proxy.set(latency(0.2, jitter_s=0.1))
        proxy.set(http_error(503, SLOW_DOWN, fraction=0.5))
        with proxy.fault(blackhole("replies")): ...
        proxy.did["answered"]                   # what it did, by name

The Host header passes untouched, so that an S3 signature, made for the proxy's address, is verified against it.
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self, TypeVar
from urllib.parse import urlsplit

from tests.chaos.faults import PASS, Fault, Ways

T = TypeVar("T")
_BLOCK = 64 * 1024
_BROKEN = (OSError, EOFError, asyncio.LimitOverrunError)


class Proxy:
    """One listening port on loopback for one target, on a thread of its own. Safe to use from any thread."""

    def __init__(self, target_host: str, target_port: int, *, http: bool = False, seed: int = 0) -> None:
        self.target = (target_host, target_port)
        self.http = http
        self.did: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._fault, self._left = PASS, None
        self._open: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.port}", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, url: str, *, http: bool = False) -> Self:
        parts = urlsplit(url)
        assert parts.hostname and parts.port, "a URL with a host and a port"
        return cls(parts.hostname, parts.port, http=http)

    def reach(self, url: str) -> str:
        """The same URL, by way of this proxy."""
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}").geturl()

    def set(self, fault: Fault = PASS) -> None:
        """From now on; returns once it holds."""
        self._call(lambda: self._set(fault))

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        self.set(fault)
        try:
            yield
        finally:
            self.set(PASS)

    def cut(self) -> int:
        """Reset every open connection; how many there were."""
        return self._call(self._cut)

    def close(self) -> None:
        if self._thread.is_alive():
            self._call(self._cut)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- on the loop's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, sock=self._listener, limit=1 << 20))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _call(self, what: Callable[[], T]) -> T:
        async def do() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(10)

    def _set(self, fault: Fault) -> None:
        self._fault, self._left = fault, fault.times
        self._changed.set()
        self._changed = asyncio.Event()
        for connection in list(self._open):
            if fault.refuse or (connection.lossy and not fault.blackhole):
                connection.abort()

    def _cut(self) -> int:
        cut = list(self._open)
        for connection in cut:
            connection.abort()
        return len(cut)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.did["connections"] += 1
        connection = _Connection(self, reader, writer)
        if self._fault.refuse:
            self.did["refused"] += 1
            connection.abort()
            return
        self._open.add(connection)
        try:
            await (connection.exchanges() if self.http else connection.stream())
        except (*_BROKEN, asyncio.CancelledError):
            pass  # cancelled: the proxy closes; asyncio would log every connection
        finally:
            self._open.discard(connection)
            connection.close()

    @property
    def now(self) -> Fault:
        return self._fault

    async def change(self) -> None:
        await self._changed.wait()

    def choose(self, request: bytes) -> Fault:
        """The fault of the exchange that this request begins; PASS if it is spared."""
        fault = self._fault
        if not fault.of_exchange or self._left == 0:
            return PASS
        if fault.on and not re.search(fault.on.encode(), request):
            return PASS
        if self._random.random() >= fault.fraction:
            return PASS
        if self._left is not None:
            self._left -= 1
        return fault

    def pause(self, size: int) -> float:
        fault = self._fault
        late = max(0.0, fault.latency_s + self._random.uniform(-fault.jitter_s, fault.jitter_s))
        return late + (size / fault.bytes_per_s if fault.bytes_per_s else 0)


class _Connection:
    """One client and its connection to the target."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._up: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.lossy = False
        self._fault, self._replied = PASS, 0

    def abort(self) -> None:
        """RST to the client."""
        with suppress(OSError, AttributeError):
            end = self._writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        self.close()

    def close(self) -> None:
        self._writer.close()
        if self._up is not None:
            self._up[1].close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self._proxy.target, limit=1 << 20)

    # ---- any protocol ------------------------------------------------------------------------------------------

    async def stream(self) -> None:
        self._up = await self._connect()
        pumps = [asyncio.create_task(self._requests(*self._up)), asyncio.create_task(self._replies(self._up[0]))]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in done:
                pump.result()
        finally:
            for pump in pumps:
                pump.cancel()

    async def _requests(self, _: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        while data := await _read(self._reader):
            if self._fault is PASS or self._replied:
                self._fault, self._replied = self._proxy.choose(data), 0
            await self._send(up, data, "requests")
        await self._farewell("requests")

    async def _replies(self, up: asyncio.StreamReader) -> None:
        while data := await _read(up):
            if not await self._reply(data):
                return
        await self._farewell("replies")

    async def _farewell(self, way: Ways) -> None:
        """The end of a connection does not pass a partition either."""
        while _acts(self._proxy.now.blackhole, way) or _acts(self._proxy.now.hold, way):
            await self._proxy.change()

    async def _send(self, to: asyncio.StreamWriter, data: bytes, way: Ways) -> None:
        if pause := self._proxy.pause(len(data)):
            self._proxy.did["delayed"] += 1
            await asyncio.sleep(pause)
        while _acts(self._proxy.now.hold, way):
            self._proxy.did["held"] += 1
            await self._proxy.change()
        if _acts(self._proxy.now.blackhole, way):
            self._proxy.did["swallowed"] += len(data)
            self.lossy = True
            return
        to.write(data)
        await to.drain()

    async def _reply(self, data: bytes) -> bool:
        """Pass a piece of the reply on. False if the fault of this exchange ended the connection."""
        fault = self._fault
        if fault.drop_reply:
            self._proxy.did["replies_dropped"] += 1
            self.abort()
            return False
        limit = fault.reset_after if fault.reset_after is not None else fault.truncate_after
        if limit is None or self._replied + len(data) <= limit:
            self._replied += len(data)
            await self._send(self._writer, data, "replies")
            return True
        await self._send(self._writer, data[: limit - self._replied], "replies")
        if fault.reset_after is not None:
            self._proxy.did["resets"] += 1
            self.abort()
        else:
            self._proxy.did["truncated"] += 1
            self._writer.close()
        return False

    # ---- HTTP/1.1 ------------------------------------------------------------------------------------------------

    async def exchanges(self) -> None:
        while True:
            head = await self._reader.readuntil(b"\r\n\r\n")
            self._fault, self._replied = self._proxy.choose(head), 0
            self._proxy.did["requests"] += 1
            if re.search(rb"(?i)\r\nexpect: *100-continue", head):
                await self._send(self._writer, b"HTTP/1.1 100 Continue\r\n\r\n", "replies")
            if (limit := self._fault.reset_request_after) is not None:
                await self._break_off(head, limit)
                return
            request = head + b"".join([piece async for piece, _ in _body(self._reader, head)])
            if self._fault.answer is not None:
                await self._answer(*self._fault.answer, is_head=request.startswith(b"HEAD "))
                continue
            for _ in range(self._fault.requests - 1):
                await self._extra(request)
            if self._up is None:
                self._up = await self._connect()
            await self._send(self._up[1], request, "requests")
            corrupted = False
            async for piece, is_body in _response(self._up[0], is_head=request.startswith(b"HEAD ")):
                sent = piece
                if self._fault.corrupt and not corrupted:
                    sent, corrupted = _spoil(piece, is_body=is_body), is_body
                    self._proxy.did["corrupted"] += is_body
                if not await self._reply(sent):
                    return

    async def _break_off(self, head: bytes, limit: int) -> None:
        _, up = self._up = self._up or await self._connect()
        await self._send(up, head, "requests")
        async for piece, _ in _body(self._reader, head):
            await self._send(up, piece[:limit], "requests")
            if (limit := limit - len(piece)) <= 0:
                break
        self._proxy.did["resets"] += 1
        self.abort()

    async def _answer(self, status: int, body: bytes, *, is_head: bool) -> None:
        self._proxy.did["answered"] += 1
        head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        await self._send(self._writer, head.encode() + (b"" if is_head else body), "replies")

    async def _extra(self, request: bytes) -> None:
        reader, writer = await self._connect()
        try:
            writer.write(request)
            async for _ in _response(reader, is_head=request.startswith(b"HEAD ")):
                pass
            self._proxy.did["replayed"] += 1
        finally:
            writer.close()


def _spoil(piece: bytes, *, is_body: bool) -> bytes:
    if is_body:
        return bytes([piece[0] ^ 0x01]) + piece[1:]
    return re.sub(rb"(?i)\r\nx-amz-checksum-[^\r]*", b"", piece)


async def _read(reader: asyncio.StreamReader) -> bytes:
    """A reset is an end like any other: what it does to the other side depends on the fault."""
    try:
        return await reader.read(_BLOCK)
    except OSError:
        return b""


def _acts(ways: Ways | None, way: Ways) -> bool:
    return ways in ("both", way)


async def _response(reader: asyncio.StreamReader, *, is_head: bool) -> AsyncIterator[tuple[bytes, bool]]:
    """Head and pieces of one response; interim ones are left out, because the proxy has said its own."""
    head = await reader.readuntil(b"\r\n\r\n")
    while (status := int(head.split(b" ", 2)[1])) < 200:
        head = await reader.readuntil(b"\r\n\r\n")
    yield head, False
    if is_head or status in (204, 304):
        return
    async for piece in _body(reader, head, to_the_end=True):
        yield piece


async def _body(
    reader: asyncio.StreamReader, head: bytes, *, to_the_end: bool = False
) -> AsyncIterator[tuple[bytes, bool]]:
    """Pieces of a message's body, and whether each is content (framing is not)."""
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        while size := int((line := await reader.readline()).split(b";")[0] or b"0", 16):
            yield line, False
            yield await reader.readexactly(size), True
            yield await reader.readexactly(2), False
        yield line, False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            yield line, False
        yield line, False
        return
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    left = int(found[1]) if found else (1 << 62 if to_the_end else 0)
    while left and (piece := await reader.read(min(left, _BLOCK))):
        left -= len(piece)
        yield piece, True
    if found and left:
        raise EOFError("the body ended early")
