"""The proxy's faults, with real sockets on both sides."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from proof.tcp_proxy import Link, TcpProxy, Weather

DEADLINE_S = 20.0


class Echo:
    """Answers each byte with itself, and remembers what it got."""

    def __init__(self, mark: bytes = b"") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = ("127.0.0.1", int(self._listener.getsockname()[1]))
        self._mark = mark
        self.received = bytearray()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # Closing alone would not wake who waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,)).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += data
                    connection.sendall(self._mark or data)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    with TcpProxy() as running:
        yield running


@pytest.fixture
def link(proxy: TcpProxy, echo: Echo) -> Link:
    return proxy.link("client->echo", echo.target)


def connect(link: Link, timeout_s: float = DEADLINE_S) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=timeout_s)


def ask(client: socket.socket, data: bytes = b"hello") -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        more = client.recv(65536)
        if not more:
            break
        answer += more
    return answer


def wait_until(is_so: object) -> None:
    assert callable(is_so)
    end_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(0.01)


def test_bytes_pass_unchanged(link: Link) -> None:
    data = bytes(range(256)) * 4000

    with connect(link) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        answer = bytearray()
        while len(answer) < len(data):
            answer += client.recv(65536)
        sender.join()

    assert answer == data


def test_end_of_one_side_is_the_end_of_the_other(link: Link) -> None:
    with connect(link) as client:
        assert ask(client) == b"hello"
        assert link.connections == 1

    wait_until(lambda: link.connections == 0)


def test_cut_resets_a_connection_and_the_next_one_works(link: Link) -> None:
    with connect(link) as client:
        ask(client)
        link.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    with connect(link) as client:
        assert ask(client) == b"hello"


def test_refused_link_proves_that_nothing_was_sent(link: Link) -> None:
    link.set_weather(Weather(is_refused=True))

    with pytest.raises(ConnectionRefusedError):
        connect(link)

    link.heal()
    with connect(link) as client:
        assert ask(client) == b"hello"


def test_slow_link_delays_both_directions(link: Link) -> None:
    link.set_weather(Weather(delay_s=0.2))

    with connect(link) as client:
        began_s = time.monotonic()
        assert ask(client) == b"hello"

    assert time.monotonic() - began_s >= 0.4


def test_stalled_answer_was_received_by_the_target(link: Link, echo: Echo) -> None:
    with connect(link, timeout_s=0.3) as client:
        link.set_weather(Weather(are_answers_stalled=True))
        client.sendall(b"hello")
        wait_until(lambda: bytes(echo.received) == b"hello")
        with pytest.raises(TimeoutError):
            client.recv(5)

        link.heal()
        client.settimeout(DEADLINE_S)
        assert client.recv(5) == b"hello"


def test_stalled_request_lands_though_its_sender_has_gone(
    link: Link, echo: Echo
) -> None:
    with connect(link) as client:
        ask(client, b"first")
        link.set_weather(Weather(are_requests_stalled=True))
        client.sendall(b"late")
        time.sleep(0.1)
        assert bytes(echo.received) == b"first"

    link.heal()

    wait_until(lambda: bytes(echo.received) == b"firstlate")


def test_other_target_is_tried_when_one_refuses(proxy: TcpProxy, echo: Echo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = ("127.0.0.1", int(gone.getsockname()[1]))
    link = proxy.link("client->pods", dead, echo.target)

    for _ in range(8):
        with connect(link) as client:
            assert ask(client) == b"hello"


def test_link_without_a_living_target_resets(proxy: TcpProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = ("127.0.0.1", int(gone.getsockname()[1]))

    link = proxy.link("client->nobody", dead)

    # In the middle of connecting, or after it.
    with pytest.raises(ConnectionResetError), connect(link) as client:
        client.recv(1)


def test_link_leads_elsewhere_after_a_failover(link: Link) -> None:
    other = Echo(mark=b"other")
    with connect(link) as client:
        ask(client)
        link.lead_to([other.target])
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    with connect(link) as client:
        assert ask(client) == b"other"
    other.close()


def test_closed_proxy_leaves_no_connection_and_no_thread(echo: Echo) -> None:
    with TcpProxy() as proxy:
        client = connect(proxy.link("client->echo", echo.target))
        ask(client)

    with client, pytest.raises(ConnectionResetError):
        client.recv(1)
    names = [thread.name for thread in threading.enumerate()]
    assert "tcp-proxy" not in names
