"""A process's part in a job: meeting the others at process 0, and ending when one of them has."""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Coroutine
from typing import Any, NoReturn

from llama_jax.cluster import Cluster, command_line
from llama_jax.errors import ExitCode, LlamaError, run_command

BEATS = 5  # sent in HEARTBEAT_SECONDS
NOTICE_SECONDS = 10.0  # of waiting, until a line says for whom
RETRY_SECONDS = 0.2
GRACE_SECONDS = 2.0  # for a process to end by its own error when another has: often both found the same mistake
NEWS_SECONDS = 3.0  # for the news that another process has ended, when a collective fails
FAREWELL_SECONDS = 2.0  # for the others to hear how this process ended
LINE = 2**24  # bytes of a message's first line: names of all hosts, a long command
NAMED = 8  # missing processes listed in an error
GONE = (OSError, EOFError, ValueError, KeyError, TypeError)  # what reading from a connection that broke or is not ours raises


class Link:
    """A connection: lines of JSON, each followed by as many bytes as its `size` says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.beats_missed = 0
        self.heard = asyncio.Event()  # the other side knows how this process ended, or has closed

    def send(self, kind: str, payload: bytes = b"", **fields: Any) -> None:
        self.writer.write(json.dumps({"kind": kind, "size": len(payload), **fields}).encode() + b"\n" + payload)

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        line = await self.reader.readline()
        if not line:
            raise EOFError
        message = json.loads(line)
        self.beats_missed = 0
        return message, await self.reader.readexactly(message["size"])


class Job:
    """A process's part in its job: connections with all others in process 0, with process 0 in the others.

    Public methods are the main thread's, coroutines run in a thread of their own; nothing is shared but what is set once.
    """

    def __init__(self, cluster: Cluster, heartbeat_seconds: float):
        self.cluster, self.heartbeat_seconds = cluster, heartbeat_seconds
        self.is_main = cluster.process_id == 0
        self.jax_address = ""  # where jax finds its coordinator: on this machine, there or through a tunnel
        self.hosts = dict(enumerate(cluster.hosts)) | {cluster.process_id: socket.gethostname()}
        self.links: dict[int, Link] = {}
        self.started = self.over = False  # all have come; all have come to the end
        self.at_end: set[int] = set()
        self.changed = asyncio.Event()  # somebody came, or all have ended
        self.values: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.news = ""  # which process has ended, and how
        self.told = threading.Event()  # there is news
        self.ending = threading.Event()  # the main thread ends this process by itself
        self.leaving = threading.Lock()
        self.servers: list[asyncio.Server] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="job", daemon=True)
        self.thread.start()

    def meet(self, timeout_seconds: float) -> None:
        self._run(self._gather(timeout_seconds) if self.is_main else self._come(timeout_seconds))

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            payload = b"b" + value if isinstance(value, bytes) else b"j" + json.dumps(value).encode()
            self._run(self._tell_all("value", payload))
        else:
            payload = self.values.get()
        return payload[1:] if payload[:1] == b"b" else json.loads(payload[1:])

    def finish(self) -> None:
        """Returns when every process has come to its end."""
        self._run(self._finish())

    def close(self) -> None:
        self._run(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others that this process ends by an error, prints it, and ends."""
        import jax

        # A collective fails in the processes that are left: the news, on its way, says because of whom.
        if isinstance(error, jax.errors.JaxRuntimeError) and self.told.wait(NEWS_SECONDS):
            self._leave(ExitCode.PEER_DIED, self.news)
        self.ending.set()
        code = _report(error)
        if code == 1 and self.told.is_set():
            self._leave(ExitCode.PEER_DIED, self.news)
        cause = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
        told = isinstance(cause, LlamaError | SystemExit)
        message = str(cause) if told else traceback.format_exception_only(cause)[-1]
        how = f"ended with exit code {code}: {' '.join(message.split())[:1000]}"
        with contextlib.suppress(Exception):  # whom it cannot tell sees the connection close
            self._run(self._say_farewell(how, code))
        self._leave(code)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def _leave(self, code: int, news: str = "") -> NoReturn:
        """Ends the process wherever its other threads are."""
        if not self.leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        if news:
            os.write(2, f"error: {news}\n".encode())
        flush = threading.Thread(target=_flush, daemon=True)  # may wait for whoever reads our output
        flush.start()
        flush.join(GRACE_SECONDS)
        os._exit(code)

    # Meeting.

    async def _gather(self, timeout_seconds: float) -> None:
        """Process 0 waits for all others."""
        host, port = self.cluster.address
        loopback = host == "localhost" or host.startswith("127.") or host == "::1"
        try:
            self.servers.append(
                await asyncio.start_server(
                    lambda *ends: self._start(self._welcome(*ends)), host if loopback else None, port, limit=LINE
                )
            )
        except OSError as error:
            raise LlamaError(
                ExitCode.NO_COORDINATOR,
                f"process 0 cannot listen on port {port} of this machine ({error.strerror}): another process 0 or another "
                "program has it; end that, or give all processes a --coordinator=HOST:PORT with a free port",
            ) from None
        self._start(self._beat())
        notice = self.loop.call_later(NOTICE_SECONDS, lambda: _say(f"waiting for all processes: {self._who_came()}"))
        try:
            async with asyncio.timeout(timeout_seconds):
                while len(self.links) < self.cluster.num_processes - 1:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            message = (
                f"{self._who_came()} after {timeout_seconds:g} s; {self.cluster.source} says that there are "
                f"{self.cluster.num_processes}, and all have to run: {command_line(self.cluster)}"
            )
            await self._tell_all("refused", code=ExitCode.NO_COORDINATOR, message=message)
            raise LlamaError(ExitCode.NO_COORDINATOR, message) from None
        finally:
            notice.cancel()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.jax_address = f"127.0.0.1:{free.getsockname()[1]}"
        self.started = True
        await self._tell_all("start", hosts=[self.hosts[i] for i in range(self.cluster.num_processes)])

    def _who_came(self) -> str:
        n = self.cluster.num_processes
        missing = [i for i in range(1, n) if i not in self.links]
        names = [f"{i} ({self.hosts[i]})" if i in self.hosts else str(i) for i in missing[:NAMED]]
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        return f"{n - len(missing)} of {n} processes came; missing: process {', '.join(names)}{more}"

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection has come to process 0: another process, its jax, or somebody who is lost."""
        link = Link(reader, writer)
        try:
            hello, _ = await link.receive()
            if hello["kind"] == "tunnel":
                await self._serve_tunnel(link)
            elif problem := self._unfit(hello):
                _say(f"refused a process on {hello['host']}: {problem}")
                link.send("refused", code=ExitCode.BAD_REQUEST, message=problem)
                await writer.drain()
            else:
                index = hello["process_id"]
                self.links[index], self.hosts[index] = link, hello["host"]
                link.send("beat")
                self.changed.set()
                await self._listen(index, link)
        except GONE:
            pass
        finally:
            writer.close()

    def _unfit(self, hello: dict[str, Any]) -> str:
        """Why a process cannot take part; "" when it can."""
        index, n, mine = hello["process_id"], self.cluster.num_processes, importlib.metadata.version("jax")
        if hello["num_processes"] != n:
            return f"it says that there are {hello['num_processes']} processes, process 0 says {n}"
        if hello["jax"] != mine:
            return f"it has jax {hello['jax']}, process 0 has {mine}"
        if self.started or index in self.links:
            return f"process {index} has come already, from {self.hosts[index]}: each needs its own --process_id"
        return ""

    async def _come(self, timeout_seconds: float) -> None:
        """Another process calls process 0 until it answers, and waits until all have come."""
        link = await self._connect(timeout_seconds)
        link.send(
            "hello",
            process_id=self.cluster.process_id,
            num_processes=self.cluster.num_processes,
            host=self.hosts[self.cluster.process_id],
            jax=importlib.metadata.version("jax"),
        )
        self.links[0] = link
        self._start(self._beat())
        notice = self.loop.call_later(NOTICE_SECONDS, lambda: _say("process 0 waits for the others"))
        try:
            message = {"kind": "beat"}
            while message["kind"] == "beat":
                message, _ = await link.receive()
        except GONE as error:
            raise LlamaError(
                ExitCode.NO_COORDINATOR,
                f"process 0 at {self.cluster.coordinator} ended before all processes had come, or what listens there is not "
                f"process 0 of this job ({type(error).__name__}); all have to run: {command_line(self.cluster)}",
            ) from None
        finally:
            notice.cancel()
        if message["kind"] == "refused":
            raise LlamaError(ExitCode(message["code"]), message["message"])
        self.hosts = dict(enumerate(message["hosts"]))
        tunnel = await asyncio.start_server(lambda *ends: self._start(self._open_tunnel(*ends)), "127.0.0.1", 0, limit=LINE)
        self.servers.append(tunnel)
        self.jax_address = f"127.0.0.1:{tunnel.sockets[0].getsockname()[1]}"
        self.started = True
        self._start(self._listen(0, link))

    async def _connect(self, timeout_seconds: float) -> Link:
        where = f"process 0 at {self.cluster.coordinator}"
        me = f"this is process {self.cluster.process_id} of {self.cluster.num_processes}"
        notice = self.loop.call_later(NOTICE_SECONDS, lambda: _say(f"{me}, waiting for {where}"))
        problem = "no answer"
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    try:
                        return Link(*await asyncio.open_connection(*self.cluster.address, limit=LINE))
                    except OSError as error:
                        problem = error.strerror or str(error)
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            raise LlamaError(
                ExitCode.NO_COORDINATOR,
                f"{where} did not answer within {timeout_seconds:g} s ({problem}); {me}, and all have to run: "
                f"{command_line(self.cluster)}",
            ) from None
        finally:
            notice.cancel()

    # While the job runs.

    async def _beat(self) -> None:
        """Sends beats, and counts those that do not come: a machine that stood still itself has counted none meanwhile."""
        while True:
            await asyncio.sleep(self.heartbeat_seconds / BEATS)
            for index, link in list(self.links.items()):
                link.send("beat")
                link.beats_missed += 1
                if link.beats_missed >= BEATS:
                    self._start(self._lost(index, f"has not been heard of for {self.heartbeat_seconds:g} s"))

    async def _listen(self, index: int, link: Link) -> None:
        """Reads what a process sends until its connection ends."""
        try:
            while True:
                message, payload = await link.receive()
                match message["kind"]:
                    case "value":
                        self.values.put(payload)
                    case "lost":
                        link.send("heard")
                        self._start(self._lost(message["process"], message["how"], message["code"]))
                    case "heard":
                        link.heard.set()
                    case "end":
                        await self._count_end(index)
                    case "over":
                        self.over = True
                        self.changed.set()
        except GONE:
            link.heard.set()
            await self._lost(index, "is gone without a word: killed, out of memory, or its machine went down")

    async def _lost(self, index: int, how: str, code: int | None = None) -> None:
        """Another process has ended: tells all others, and ends this one."""
        link = self.links.pop(index, None)
        if not self.started or self.over:
            if link is not None:
                link.writer.close()
            self.changed.set()
            return
        if self.told.is_set():
            return
        self.news = f"process {index} of {self.cluster.num_processes} ({self.hosts[index]}) {how}"
        self.told.set()
        await self._tell_all("lost", process=index, how=how, code=code)
        if code is None or not await asyncio.to_thread(self.ending.wait, GRACE_SECONDS):
            self._leave(*((0,) if code == 0 else (ExitCode.PEER_DIED, self.news)))  # 0: its reader left, as in `| head`

    async def _tell_all(self, kind: str, payload: bytes = b"", **fields: Any) -> None:
        for link in self.links.values():
            link.send(kind, payload, **fields)
        with contextlib.suppress(OSError):
            await asyncio.gather(*(link.writer.drain() for link in self.links.values()))

    async def _say_farewell(self, how: str, code: int) -> None:
        links = list(self.links.values())
        await self._tell_all("lost", process=self.cluster.process_id, how=how, code=code)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await asyncio.gather(*(link.heard.wait() for link in links))

    async def _finish(self) -> None:
        if self.is_main:
            await self._count_end(0)
        else:
            await self._tell_all("end")
        while not self.over:
            self.changed.clear()
            await self.changed.wait()

    async def _count_end(self, index: int) -> None:
        self.at_end.add(index)
        if len(self.at_end) == self.cluster.num_processes:
            self.over = True
            self.changed.set()
            await self._tell_all("over")

    async def _close(self) -> None:
        """Process 0 closes last: the others' jax ends through it."""
        if self.is_main and self.over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.heartbeat_seconds):
                    while self.links:
                        self.changed.clear()
                        await self.changed.wait()
        for link in self.links.values():
            link.writer.close()
        for server in self.servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # jax's own connection.

    async def _open_tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """jax of another process connects. Should process 0 die, jax is not told: it would end the process its own way."""
        try:
            far = Link(*await asyncio.open_connection(*self.cluster.address, limit=LINE))
            far.send("tunnel")
            incoming = self._start(_pump(far.reader, writer))
            await _pump(reader, far.writer)
            incoming.cancel()
            far.writer.close()
        except OSError:
            pass
        finally:
            if self.over:
                writer.close()

    async def _serve_tunnel(self, link: Link) -> None:
        host, _, port = self.jax_address.rpartition(":")
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                break
            except OSError:  # jax has not got that far
                await asyncio.sleep(RETRY_SECONDS / 10)
        pumps = [self._start(_pump(link.reader, writer)), self._start(_pump(reader, link.writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        writer.close()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)  # the loop alone would let it be collected
        task.add_done_callback(self.tasks.discard)
        return task


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def _report(error: BaseException) -> int:
    """Prints an error as run_command does; returns the exit code."""
    trace = error.__traceback__

    def again() -> None:
        raise error

    try:
        run_command(again)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            _say(leaving.code)
        return 1 if isinstance(leaving.code, str) else int(leaving.code or 0)
    except BaseException:
        traceback.print_exception(type(error), error, trace)
    return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
