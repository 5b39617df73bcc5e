"""Several processes, on one host or many, that run one model together.

jax runs a program on devices of several processes once each of them starts it. Which
program comes next depends on requests, on finished texts and on measured times, which
no two processes see alike. Therefore process 0 alone decides: it has the requests, and
sends every call that touches the shared devices to the others, which repeat it
(`repeated`, `follow`). The calls go over TCP connections of their own, since a message
between devices would wait for the dispatch under way.

    from treespec_jax import LLM, distributed

    distributed.initialize("10.0.0.1:8476", 2, process_id)   # the same in each process
    llm = LLM("path", mesh="tensor:8")
    if distributed.is_follower():
        distributed.follow()                          # until process 0 ends
    else:
        print(llm.generate("once upon a time")[0].text)

Connections are authenticated by a random key that jax distributes; messages are
pickles, so that the network between the processes must be trusted, as for jax's own.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from treespec_jax.errors import UserError

# Bytes of the message that tells where process 0 listens.
_WHERE = 1024
# Seconds that jax may wait longer than we do.
_LATER = 30
_END, _FAILED = "end", "failed"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that belong together.

    Attributes:
      coordinator: HOST:PORT of process 0, at a free port; None: jax finds all three by
        itself (Cloud TPU, Slurm, Kubernetes, Open MPI).
      num_processes: how many there are.
      process_id: which of them this one is, from 0.
      timeout: seconds to wait for all of them.

    Raises:
      UserError: some of the first three only, or one that cannot be.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self):
        names = "coordinator", "num_processes", "process_id"
        given = [name for name in names if getattr(self, name) is not None]
        if given and len(given) < len(names):
            missing = " and ".join(f"--{name}" for name in names if name not in given)
            raise UserError(
                f"--{given[0]} does not say all: give {missing} too, or none of the "
                "three where jax finds the cluster by itself"
            )
        if self.timeout < 1:
            raise UserError(f"--join_timeout={self.timeout}: give 1 second or more")
        if not given:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(
                f"--coordinator={self.coordinator}: give HOST:PORT, such as "
                "10.0.0.1:8476"
            )
        if self.num_processes < 1:
            raise UserError(f"--num_processes={self.num_processes}: give 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id}: {self.num_processes} processes are "
                f"numbered from 0 to {self.num_processes - 1}"
            )


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    settings: str = "",
) -> None:
    """Joins this process with the others; before jax runs anything.

    Args:
      coordinator: see `Cluster`, as the three that follow.
      num_processes: likewise.
      process_id: likewise.
      timeout: likewise.
      settings: must be the same text in all processes; what they were started with.

    Raises:
      UserError: no cluster was found, a process did not come in time, or one was
        started with other settings.
    """
    global _team
    cluster = Cluster(coordinator, num_processes, process_id, timeout)
    if _team is not None:
        raise UserError("this process has joined its cluster already; join once")
    import jax

    if cluster.process_id:
        _wait_for(cluster)
    # Where a process does not come, jax aborts this one, and not in words for people.
    give_up = threading.Timer(cluster.timeout, _give_up, [cluster])
    give_up.daemon = True
    give_up.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            initialization_timeout=cluster.timeout + _LATER,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(_reason(cluster, error)) from None
    finally:
        give_up.cancel()
    if jax.process_count() > 1:
        lead = jax.process_index() == 0
        _team = (_Leader if lead else _Follower)(settings, cluster.timeout)


def is_follower() -> bool:
    """Whether this process repeats what process 0 does."""
    return isinstance(_team, _Follower)


def is_multiprocess() -> bool:
    """Whether several processes have joined."""
    return _team is not None


def repeated(thing: Any, names: Sequence[str], mesh: Any = None) -> Any:
    """An object of whose methods some run in every process when process 0 calls them.

    Every process must pass its own, in the same order. Arguments are pickled: NumPy
    arrays and plain values.

    Args:
      thing: the object.
      names: of the methods.
      mesh: `jax.sharding.Mesh` that they compute on; None: of all processes.

    Returns:
      In process 0 something that stands in for `thing`. In others the same, whose
      methods `names` raise UserError; `follow` runs them. `thing` itself, where there
      is one process, or the mesh has devices of this one only.
    """
    lone = mesh is not None and len({d.process_index for d in mesh.devices.flat}) == 1
    return thing if _team is None or lone else _team.add(thing, tuple(names))


def follow() -> None:
    """Repeats what process 0 does until it ends.

    Raises:
      UserError: this process follows nobody.
      SystemExit: process 0 was lost, or a call failed here and not there.
    """
    if not is_follower():
        raise UserError("this process follows nobody; process 0 makes the requests")
    _team.serve()


def to_host(tree: Any) -> Any:
    """Arrays of a tree as NumPy arrays, whole; all processes must call it together.

    What is cut along devices of other processes is exchanged.
    """
    import jax

    if _team is None:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


class _Standing:
    """Stands in for an object; its repeated methods are others'."""

    def __init__(self, thing: Any, calls: dict[str, Callable]):
        vars(self).update(_thing=thing, _calls=calls)

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._thing, name)


class _Leader:
    """Process 0: sends calls to all others, then makes them itself."""

    def __init__(self, settings: str, timeout: int):
        import jax

        key = os.urandom(32)
        self._lock = threading.Lock()
        self._things = 0
        self._others: dict[int, Connection] = {}
        with Listener(("", 0), authkey=key, backlog=jax.process_count()) as listener:
            port = listener.address[1]
            _broadcast(pickle.dumps((_addresses(), port, key)))
            wrong = None
            while len(self._others) < jax.process_count() - 1:
                # Others than our processes may knock.
                with contextlib.suppress(OSError, EOFError, AuthenticationError):
                    connection = listener.accept()
                    _send_at_once(connection)
                    index, theirs = connection.recv()
                    self._others[index] = connection
                    wrong = wrong if theirs == settings else index
        for connection in self._others.values():
            connection.send(wrong)
        if wrong is not None:
            raise UserError(_other_settings(wrong))
        self._ended = False
        threading.Thread(target=self._watch, daemon=True).start()
        atexit.register(self.end)

    def add(self, thing: Any, names: Sequence[str]) -> _Standing:
        number, self._things = self._things, self._things + 1
        calls = {
            name: functools.partial(self._call, number, getattr(thing, name), name)
            for name in names
        }
        return _Standing(thing, calls)

    def _call(self, number: int, method: Callable, name: str, *args, **kwargs) -> Any:
        self._tell((number, name, args, kwargs))
        try:
            return method(*args, **kwargs)
        except Exception:
            self._tell(_FAILED)
            raise

    def _tell(self, message: Any) -> None:
        try:
            data = pickle.dumps(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"other processes cannot be sent what a request asks for: {error}; "
                "functions must be those of a module that all can import"
            ) from None
        with self._lock:
            for index, connection in self._others.items():
                try:
                    connection.send_bytes(data)
                except OSError:
                    raise UserError(
                        f"process {index} has ended; its stderr says why"
                    ) from None

    def _watch(self) -> None:
        """Ends this process once another is gone, whose part of a program it awaits."""
        gone = wait(list(self._others.values()))
        if not self._ended:
            index = next(i for i, other in self._others.items() if other in gone)
            _leave(f"process {index} is gone; its stderr says why")

    def end(self) -> None:
        """Lets the others end."""
        self._ended = True
        with contextlib.suppress(UserError):
            self._tell(_END)


class _Follower:
    """Any other process."""

    def __init__(self, settings: str, timeout: int):
        import jax

        self._things: list[Any] = []
        addresses, port, key = pickle.loads(_broadcast(b""))
        self._lead = _connect(addresses, port, key, timeout)
        self._lead.send((jax.process_index(), settings))
        wrong = self._lead.recv()
        if wrong is not None:
            raise UserError(_other_settings(wrong))
        # Whatever ends this process: jax would wait for the others first.
        atexit.register(self._lead.close)

    def add(self, thing: Any, names: Sequence[str]) -> _Standing:
        self._things.append(thing)

        def refuse(*_, **__):
            raise UserError(
                "process 0 makes the requests; call distributed.follow() in the others"
            )

        return _Standing(thing, dict.fromkeys(names, refuse))

    def serve(self) -> None:
        while (message := self._next()) != _END:
            if message == _FAILED:
                # And not here: should its state be lost, process 0 makes a new one.
                continue
            number, name, args, kwargs = message
            try:
                getattr(self._things[number], name)(*args, **kwargs)
            except Exception as error:
                if self._next() != _FAILED:
                    _leave(f"{name} failed here and not in process 0: {error!r:.300}")

    def _next(self) -> Any:
        try:
            return pickle.loads(self._lead.recv_bytes())
        except (EOFError, OSError):
            _leave("process 0 is gone")


_team: _Leader | _Follower | None = None


def _leave(reason: str) -> None:
    """Ends a process whose cluster is broken; jax would wait for the others."""
    import jax

    print(f"error: process {jax.process_index()}: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _wait_for(cluster: Cluster) -> None:
    """Waits for process 0 to answer: jax would end this process where it does not."""
    host, _, port = cluster.coordinator.rpartition(":")
    until = time.monotonic() + cluster.timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 2).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > until:
            raise UserError(
                f"no process 0 answers at {cluster.coordinator} within "
                f"{cluster.timeout} s ({reason}); start it, or correct --coordinator"
            )
        time.sleep(0.2)


def _give_up(cluster: Cluster) -> None:
    """Ends this process, which waits inside jax for others."""
    count = cluster.num_processes or "the"
    print(
        f"error: not all {count} processes came within {cluster.timeout} s; start the "
        "missing ones, or correct --num_processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _reason(cluster: Cluster, error: Exception) -> str:
    """What jax's failure to join means."""
    if cluster.coordinator is None:
        return (
            "jax finds no cluster of processes here; give --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I in each of them"
        )
    return f"cannot join {cluster.coordinator}: {str(error).splitlines()[0]}"


def _other_settings(index: int) -> str:
    return (
        f"process {index} was started with other settings than process 0; give all the "
        "same flags but --process_id"
    )


def _broadcast(message: bytes) -> bytes:
    """Process 0's message, up to zeros, in all."""
    import numpy as np
    from jax.experimental import multihost_utils

    row = np.zeros(_WHERE, np.uint8)
    row[: len(message)] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(row)).tobytes()


def _send_at_once(connection: Connection) -> None:
    """Turns off the wait for more to send, of 40 ms where a message is long."""
    with socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _addresses() -> list[str]:
    """Where other hosts may reach this one."""
    found = []
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        # Sends nothing; the system chooses the interface that leads out.
        probe.connect(("192.0.2.1", 9))
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys([*found, "127.0.0.1"]))[:8]


def _connect(addresses: Sequence[str], port: int, key: bytes, timeout: int):
    """A connection to process 0; whoever else listens there lacks the key."""
    until = time.monotonic() + timeout
    while True:
        for address in addresses:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):
                # The client itself would wait for minutes.
                socket.create_connection((address, port), 2).close()
                return Client((address, port), authkey=key)
        if time.monotonic() > until:
            raise UserError(
                f"process 0 cannot be reached at {' or '.join(addresses)}, port "
                f"{port}; let the processes' hosts connect to one another"
            )
        time.sleep(0.2)
