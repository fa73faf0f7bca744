"""Binds: what can be typed, what it means, and what is refused."""

from __future__ import annotations

import pytest

from handoff.addresses import Bind, absolute_bind, check_binds, listener_names, parse_bind
from handoff.errors import ExitCode, UsageError


def _message(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_bind(text)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("127.0.0.1:8000", Bind(kind="tcp", host="127.0.0.1", port=8000)),
        ("web=127.0.0.1:8000", Bind(name="web", kind="tcp", host="127.0.0.1", port=8000)),
        ("Example.ORG:80", Bind(kind="tcp", host="example.org", port=80)),
        (":9000", Bind(kind="tcp", host="0.0.0.0", port=9000)),
        ("web=:0", Bind(name="web", kind="tcp", host="0.0.0.0", port=0)),
        ("[::1]:8000", Bind(kind="tcp", host="::1", port=8000)),
        ("v6=[0:0::0001]:8000", Bind(name="v6", kind="tcp", host="::1", port=8000)),
        ("[fe80::1%eth0]:8000", Bind(kind="tcp", host="fe80::1%eth0", port=8000)),
        ("[::ffff:10.0.0.1]:80", Bind(kind="tcp", host="10.0.0.1", port=80)),
        ("unix:/run/web.sock", Bind(kind="unix", path="/run/web.sock", mode=0o600)),
        ("unix:///run/web.sock", Bind(kind="unix", path="/run/web.sock")),
        ("unix:web.sock?mode=0660", Bind(kind="unix", path="web.sock", mode=0o660)),
        ("api=unix:/run/a=b.sock?mode=666", Bind(name="api", kind="unix", path="/run/a=b.sock", mode=0o666)),
        ("unix:/run/a=b.sock", Bind(kind="unix", path="/run/a=b.sock")),
        ("fd://3", Bind(kind="fd", fd=3)),
        ("web=fd://17", Bind(name="web", kind="fd", fd=17)),
    ],
)
def test_each_form_of_an_address_is_read(text: str, bind: Bind) -> None:
    assert parse_bind(text) == bind


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web=[::1]:80", "[::1]:80"),
        (":80", "0.0.0.0:80"),
        ("unix:/a?mode=0660", "unix:/a"),
        ("fd://3", "fd://3"),
    ],
)
def test_an_address_is_shown_as_it_could_be_typed(text: str, shown: str) -> None:
    assert str(parse_bind(text)) == shown


def test_the_key_knows_an_address_again_whatever_its_name_spelling_or_mode() -> None:
    assert parse_bind("a=[::1]:80").key == parse_bind("b=[0:0:0:0:0:0:0:1]:80").key
    assert parse_bind("LOCALHOST:80").key == parse_bind("localhost:80").key
    assert parse_bind("unix:/a?mode=0660").key == parse_bind("unix:/a").key
    keys = [parse_bind(text).key for text in (":80", ":81", "[::]:80", "unix:/a", "unix:/b", "fd://3", "fd://4")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("127.0.0.1", "bind 127.0.0.1: has no port; write 127.0.0.1:8000"),
        ("web=localhost:", "bind web=localhost:: has no port; write web=localhost:8000"),
        ("[::1]", "bind [::1]: has no port; write [::1]:8000"),
    ],
)
def test_a_bind_without_port_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":65536", "bind :65536: port 65536 is out of range; write 0 to 65535"),
        (":http", "bind :http: port http is not a number; write 0 to 65535"),
        (":-1", "bind :-1: port -1 is not a number; write 0 to 65535"),
        (":٣", "bind :٣: port ٣ is not a number; write 0 to 65535"),
    ],
)
def test_a_port_that_is_none_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=:80", "bind =:80: the name before = is empty; write web=:80 or leave = out"),
        ("a b=:80", "bind a b=:80: name a b has other characters than A-Z a-z 0-9 _ . -; leave them out"),
        ("a/b=:80", "bind a/b=:80: name a/b has other characters than A-Z a-z 0-9 _ . -; leave them out"),
        (f"{'n' * 65}=:80", f"bind {'n' * 65}=:80: the name has 65 characters; at most 64 are taken"),
    ],
)
def test_a_name_that_is_none_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


def test_the_longest_name_is_taken() -> None:
    assert parse_bind(f"{'n' * 64}=:80").name == "n" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("::1:8000", "bind ::1:8000: IPv6 address without brackets; write [::1]:8000"),
        ("web=::1", "bind web=::1: IPv6 address without brackets; write [::1]:8000"),
        ("fe80::a", "bind fe80::a: IPv6 address without brackets; write [fe80::a]:8000"),
        ("a:b:80", "bind a:b:80: more than one colon; write HOST:PORT or [V6]:PORT"),
        ("[::1:80", "bind [::1:80: bracket [ is not closed; write [::1]:8000"),
        ("[::1]80", "bind [::1]80: 80 follows the bracket; write [::1]:8000"),
        ("[1.2.3.4]:80", "bind [1.2.3.4]:80: 1.2.3.4 is not an IPv6 address; write [::1]:8000"),
    ],
)
def test_an_ipv6_address_needs_brackets_and_to_be_one(text: str, message: str) -> None:
    assert _message(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300.1.1.1:80", "bind 300.1.1.1:80: 300.1.1.1 is not an IPv4 address; write 127.0.0.1:8000"),
        ("127.1:80", "bind 127.1:80: 127.1 is not an IPv4 address; write 127.0.0.1:8000"),
        ("a host:80", "bind a host:80: host a host has other characters than A-Z a-z 0-9 _ . -; leave them out"),
        ("http://x:80", "bind http://x:80: unknown scheme http; write HOST:PORT, udp:HOST:PORT, unix:PATH or fd://N"),
        ("w=tcp://x:80", "bind w=tcp://x:80: unknown scheme tcp; write HOST:PORT, udp:HOST:PORT, unix:PATH or fd://N"),
        ("", "bind '': is not an address; write HOST:PORT, unix:PATH or fd://N"),
        ("a\nb:80", "bind 'a\\nb:80': is not an address; write HOST:PORT, unix:PATH or fd://N"),
    ],
)
def test_a_host_or_a_scheme_that_is_none_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unix:", "bind unix:: has no path of a socket; write unix:/run/web.sock"),
        ("unix:/run/", "bind unix:/run/: has no path of a socket; write unix:/run/web.sock"),
        ("unix:/a?mode=9", "bind unix:/a?mode=9: mode=9 after ? is not a mode; write ?mode=0660"),
        ("unix:/a?mode=1777", "bind unix:/a?mode=1777: mode=1777 after ? is not a mode; write ?mode=0660"),
        ("unix:/a?", "bind unix:/a?: nothing after ? is not a mode; write ?mode=0660"),
    ],
)
def test_a_unix_address_that_is_none_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


def test_a_unix_path_of_107_bytes_is_taken_and_one_of_108_is_refused() -> None:
    path = "/" + "é" * 53  # 107 bytes in 54 characters
    assert parse_bind(f"unix:{path}").path == path
    message = f"bind unix:{path}x: path has 108 bytes; at most 107 fit, choose a shorter one"
    assert _message(f"unix:{path}x") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fd:3", "bind fd:3: fd is not a number; write fd://3"),
        ("fd://x", "bind fd://x: fd is not a number; write fd://3"),
        ("fd://-1", "bind fd://-1: fd is not a number; write fd://3"),
        ("fd://2", "bind fd://2: fd 2 is standard input or output; the first that can be passed is fd://3"),
        ("fd://2147483648", "bind fd://2147483648: fd 2147483648 is no fd of any process; write fd://3"),
    ],
)
def test_an_fd_that_is_none_is_refused(text: str, message: str) -> None:
    assert _message(text) == message


def test_a_relative_unix_path_is_made_absolute_and_its_length_checked_again() -> None:
    assert absolute_bind(parse_bind("w=unix:./web.sock?mode=0660"), "/srv/app/") == Bind(
        name="w", kind="unix", path="/srv/app/web.sock", mode=0o660
    )
    for text in ("unix:/web.sock", ":80", "fd://3"):
        assert absolute_bind(parse_bind(text), "/srv") == parse_bind(text)
    with pytest.raises(UsageError, match="path has 115 bytes; at most 107 fit"):
        absolute_bind(parse_bind("unix:web.sock"), "/" + "d" * 105)


def test_a_name_or_an_address_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        check_binds([parse_bind("web=:80"), parse_bind("web=:81")])
    assert caught.value.message == ("bind web=0.0.0.0:81: name web is there twice; give each bind a name of its own")
    with pytest.raises(UsageError) as caught:
        check_binds([parse_bind("a=:80"), parse_bind("b=0.0.0.0:80")])
    assert caught.value.message == "bind 0.0.0.0:80: is there twice; leave one out"


def test_port_0_may_be_there_twice() -> None:
    check_binds([parse_bind("a=127.0.0.1:0"), parse_bind("b=127.0.0.1:0"), parse_bind("127.0.0.1:0")])


def test_listeners_without_a_name_get_a_default_that_nobody_else_has() -> None:
    binds = [parse_bind(text) for text in (":1", "web=:2", ":3", "default-3=:4", ":5")]
    assert listener_names(binds) == ["default", "web", "default-2", "default-3", "default-4"]


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("udp:127.0.0.1:53", "127.0.0.1", 53, "udp:127.0.0.1:53"),
        ("dns=udp:[::1]:53", "::1", 53, "udp:[::1]:53"),
        ("udp://:0", "0.0.0.0", 0, "udp:0.0.0.0:0"),
    ],
)
def test_datagrams_have_addresses_too(text: str, host: str, port: int, shown: str) -> None:
    bind = parse_bind(text)
    assert (bind.kind, bind.host, bind.port, str(bind)) == ("udp", host, port, shown)
    assert bind.key == shown


def test_udp_and_tcp_may_have_the_same_port() -> None:
    check_binds([parse_bind("127.0.0.1:53"), parse_bind("udp:127.0.0.1:53")])
    check_binds([parse_bind("udp::0"), parse_bind("udp::0")])
    with pytest.raises(UsageError, match=r"bind udp:127\.0\.0\.1:53: is there twice; leave one out"):
        check_binds([parse_bind("udp:127.0.0.1:53"), parse_bind("udp:127.0.0.1:53")])
