"""HTTP requests that end at their deadline, whatever the server does.

A client's own time-outs are of one read: a server that sends a byte before each of them holds a request for ever. Here
a request is a task of an event loop, which is cancelled as a whole, from looking up the name to the last byte.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx


class TooLong(Exception):
    """An answer is longer than may be."""


class Packed(Exception):
    """An answer cannot be decompressed, or is compressed as nobody asked for."""


class Late(Exception):
    """The time is over.

    Attributes:
        began: an answer had begun.
    """

    def __init__(self, began: bool) -> None:
        super().__init__()
        self.began = began


class Sender:
    """Sends requests; threads may share it.

    Args:
        connections: at once. seconds: for one request, from its start to the end of its answer.
        largest: bytes of an answer, once it is decompressed.
        local: a host on this machine, to which no proxy of the environment is asked to go.
    """

    def __init__(self, connections: int, seconds: float, largest: int, local: str | None = None) -> None:
        import httpx

        self.seconds, self.largest = seconds, largest
        direct = {f"all://{f'[{local}]' if ':' in local else local}": None} if local else {}
        self._client = httpx.AsyncClient(
            timeout=None, limits=httpx.Limits(max_connections=connections), follow_redirects=False, mounts=direct,
            headers={"accept-encoding": "gzip"},
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), daemon=True, name="counterlens-http").start()
        weakref.finalize(self, _close, self._loop, self._client).atexit = False

    def send(
        self, method: str, address: str, content: bytes | None, headers: Mapping[str, str]
    ) -> tuple[httpx.Response, bytes]:
        """The response, and its body decompressed.

        Raises:
            Late: the time is over. TooLong: see `largest`. Packed: it cannot be decompressed. httpx.RequestError: it
                failed.
        """
        began = threading.Event()
        asked = self._ask(method, address, content, headers, began)
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(asked, self.seconds), self._loop)
        try:
            return future.result()
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise Late(began.is_set()) from error
        finally:
            future.cancel()  # where somebody interrupts

    async def _ask(
        self, method: str, address: str, content: bytes | None, headers: Mapping[str, str], began: threading.Event
    ) -> tuple[httpx.Response, bytes]:
        async with self._client.stream(method, address, content=content, headers=headers) as response:
            began.set()
            packed, parts, size = response.headers.get("content-encoding", "identity").strip().lower(), [], 0
            if packed not in ("", "identity", "gzip", "x-gzip"):
                raise Packed(f"{packed[:40]!r} is not what was asked for")
            unpack = zlib.decompressobj(wbits=31) if "gzip" in packed else None
            # httpx would decompress a part as a whole before anybody can count it.
            async for part in response.aiter_raw():
                try:
                    more = part if unpack is None else unpack.decompress(part, self.largest + 1 - size)
                except zlib.error as error:
                    raise Packed(str(error)) from error
                size += len(more)
                parts.append(more)
                if size > self.largest:
                    raise TooLong
            if unpack is not None and size and not unpack.eof:
                raise Packed("it ends too early")
        return response, b"".join(parts)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    async def close() -> None:
        await client.aclose()
        await asyncio.sleep(0)  # sockets close in the loop's next turn
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
