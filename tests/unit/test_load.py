"""Importing the application: every way to fail says in one line what is wrong and shows the user's own frames only."""

from __future__ import annotations

import asyncio
import functools
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from handoff.worker import load as load_module
from handoff.worker.load import (
    BootFailure,
    failure_of,
    guarded,
    interface_of,
    is_async,
    load_application,
    split_target,
    takes_only_scope,
)

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into a directory that is on the path; what was imported from it is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def failure(target: str, is_factory: bool = False) -> BootFailure:
    with pytest.raises(BootFailure) as caught:
        load_application(target, is_factory)
    reason = caught.value.reason
    assert "\n" not in reason, "a reason is one line"
    assert reason.startswith(f"application {target}: ")
    return caught.value


# --- the target -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("main:app", ("main", "app", False)),
        ("a.b.c:app", ("a.b.c", "app", False)),
        ("main:web.app", ("main", "web.app", False)),
        ("main:create_app()", ("main", "create_app", True)),
        ("main:web.create()", ("main", "web.create", True)),
    ],
)
def test_a_target_is_a_module_and_an_attribute(target: str, parts: tuple[str, str, bool]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize(
    "target",
    ["main", "", ":", "main:", ":app", "main.py:app", "a/b:app", "main:app:x", "main:1", "main:a b", "main:f(1)"],
)
def test_another_form_of_target_is_refused_with_an_example(target: str) -> None:
    if target == "main.py:app":  # a legal name; that there is no such module is said by the import
        assert split_target(target) == ("main.py", "app", False)
        return
    with pytest.raises(BootFailure, match=r"write module:attribute, for example main:app"):
        split_target(target)


def test_the_named_object_is_loaded(write: Write) -> None:
    write("loadable.py", "class Web:\n    def app(scope, receive, send): ...\n    name = 'x'\nweb = Web\n")
    assert load_application("loadable:web.app", False).__name__ == "app"


@pytest.mark.parametrize(
    ("target", "is_factory"), [("made:create()", False), ("made:create", True), ("made:create()", True)]
)
def test_a_factory_is_called_once(write: Write, target: str, is_factory: bool) -> None:
    write(
        "made.py",
        "calls = []\ndef create():\n    calls.append(1)\n    return app\ndef app(scope, receive, send): ...\n",
    )
    assert load_application(target, is_factory).__name__ == "app"
    assert sys.modules["made"].calls == [1]


# --- what goes wrong at the import ----------------------------------------------------------------------------------


def test_a_module_that_is_not_there_is_named_with_the_directory(write: Write, tmp_path: Path) -> None:
    found = failure("nowhere:app")
    assert found.reason == (
        f"application nowhere:app: no module named nowhere in {tmp_path}; check the name, or --chdir"
    )
    assert found.trace == ""


def test_a_missing_part_of_a_dotted_name_is_named(write: Write) -> None:
    write("package/__init__.py", "")
    assert "no module named package.web in" in failure("package.web:app").reason
    assert "no module named nowhere in" in failure("nowhere.deep.down:app").reason


def test_a_missing_dependency_is_not_blamed_on_the_application(write: Write) -> None:
    path = write("needy.py", "import not_installed_here\n")
    found = failure("needy:app")
    assert found.reason == "application needy:app: ModuleNotFoundError: No module named 'not_installed_here'"
    assert f'File "{path}", line 1' in found.trace
    assert "--chdir" not in found.reason


def test_a_name_that_cannot_be_imported_from_a_module_is_told(write: Write) -> None:
    write("wanting.py", "from os import no_such_thing\n")
    assert "ImportError: cannot import name 'no_such_thing' from 'os'" in failure("wanting:app").reason


def test_a_syntax_error_is_told_with_file_and_line(write: Write) -> None:
    path = write("broken.py", "x = 1\ndef app(:\n    pass\n")
    found = failure("broken:app")
    assert f"{path}:2: SyntaxError: " in found.reason
    assert "def app(:" in found.trace


def test_an_indentation_error_is_told_with_file_and_line(write: Write) -> None:
    path = write("crooked.py", "def app():\npass\n")
    assert f"{path}:2: IndentationError: " in failure("crooked:app").reason


@pytest.mark.parametrize(("code", "shown"), [("3", "3"), ("'no database'", "'no database'"), ("", "None")])
def test_an_application_that_exits_while_it_is_imported_is_told(write: Write, code: str, shown: str) -> None:
    path = write("quitting.py", f"import sys\nsys.exit({code})\n")
    found = failure("quitting:app")
    assert found.reason.endswith(f"it called sys.exit({shown}) while it was imported")
    assert f'File "{path}", line 2' in found.trace


def test_a_traceback_shows_the_applications_frames_and_none_of_ours(write: Write) -> None:
    write("layers/__init__.py", "")
    inner = write("layers/inner.py", "def connect():\n    raise OSError('no\\n  database')\nconnect()\n")
    outer = write("layers/outer.py", "import layers.inner\n")
    found = failure("layers.outer:app")
    assert found.reason == "application layers.outer:app: OSError: no database"
    lines = [line.strip() for line in found.trace.splitlines() if line.strip().startswith("File ")]
    assert lines == [
        f'File "{outer}", line 1, in <module>',
        f'File "{inner}", line 3, in <module>',
        f'File "{inner}", line 2, in connect',
    ]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_traceback_of_a_coroutine_begins_at_the_application(write: Write, new_loop: Any) -> None:
    path = write("awaited.py", "async def main():\n    raise OSError('no database')\n")
    main = load_application("awaited:main", False)
    with asyncio.Runner(loop_factory=new_loop) as runner, pytest.raises(OSError, match="no database") as caught:
        runner.run(main())
    trace = caught.value.__traceback__
    assert trace is not None
    caught.value.__traceback__ = trace.tb_next  # the frame of this test
    lines = [line.strip() for line in failure_of("x", caught.value).trace.splitlines()]
    assert [line for line in lines if line.startswith("File ")] == [f'File "{path}", line 2, in main']


def test_an_application_in_a_directory_that_begins_like_ours_keeps_its_frames() -> None:
    package = Path(load_module.__file__).parents[1]
    code = compile("def fail():\n    raise ValueError('x')\n", f"{package}-shop/main.py", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with pytest.raises(BootFailure) as caught:
        guarded("x", names["fail"])
    assert f'File "{package}-shop/main.py", line 2' in caught.value.trace


def test_a_traceback_keeps_the_cause_of_an_error(write: Write) -> None:
    write("chained.py", "try:\n    {}['key']\nexcept KeyError as error:\n    raise ValueError('no key') from error\n")
    found = failure("chained:app")
    assert "ValueError: no key" in found.reason
    assert "KeyError: 'key'" in found.trace
    assert "direct cause" in found.trace


def test_a_port_that_is_taken_says_how_to_keep_it_over_reloads(write: Write) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        write("binding.py", f"import socket\nsocket.create_server(('127.0.0.1', {port}), reuse_port=False)\n")
        assert "handoff.listener(" in failure("binding:app").reason


# --- what goes wrong with the object --------------------------------------------------------------------------------


def test_a_missing_attribute_names_the_nearest(write: Write) -> None:
    write("typing_error.py", "def application(): ...\n")
    found = failure("typing_error:aplication")
    assert found.reason == (
        "application typing_error:aplication: module typing_error has no attribute aplication; "
        "did you mean application?"
    )


def test_a_missing_attribute_without_a_neighbour_gets_no_hint(write: Write) -> None:
    write("lonely.py", "")
    assert failure("lonely:zzzzzz").reason == "application lonely:zzzzzz: module lonely has no attribute zzzzzz"


def test_what_cannot_be_called_is_no_application(write: Write) -> None:
    write("plain.py", "app = {'a': 1}\n")
    assert failure("plain:app").reason == ("application plain:app: a dict is not callable; name the application object")


def test_what_cannot_be_called_is_no_factory(write: Write) -> None:
    write("plain_factory.py", "create = 5\n")
    assert "a int is not callable, so it is no factory" in failure("plain_factory:create()").reason


def test_a_factory_that_makes_no_application_is_told(write: Write) -> None:
    write("empty_factory.py", "def create(): return None\n")
    assert "a NoneType is not callable" in failure("empty_factory:create", True).reason


def test_a_factory_that_fails_is_told_with_its_frames(write: Write) -> None:
    path = write("failing_factory.py", "def create():\n    return 1 / 0\n")
    found = failure("failing_factory:create()")
    assert found.reason.endswith("the factory failed: ZeroDivisionError: division by zero")
    assert f'File "{path}", line 2, in create' in found.trace
    assert "load.py" not in found.trace


def test_a_factory_that_exits_is_told(write: Write) -> None:
    write("quitting_factory.py", "def create():\n    raise SystemExit(4)\n")
    assert failure("quitting_factory:create()").reason.endswith("the factory failed: it called sys.exit(4)")


def test_a_factory_with_parameters_says_so(write: Write) -> None:
    write("greedy_factory.py", "def create(settings): ...\n")
    assert "missing 1 required positional argument" in failure("greedy_factory:create()").reason


def test_what_guards_passes_a_boot_failure_on() -> None:
    original = BootFailure("as it is")

    def fail() -> None:
        raise original

    with pytest.raises(BootFailure) as caught:
        guarded("subject", fail)
    assert caught.value is original


def test_a_reason_has_no_line_breaks() -> None:
    assert failure_of("x", ValueError("a\n\tb")).reason == "x: ValueError: a b"


# --- what kind it is ------------------------------------------------------------------------------------------------


async def asgi_function(scope: Any, receive: Any, send: Any) -> None: ...
async def asgi_by_other_names(s: Any, r: Any, d: Any) -> None: ...
async def asgi_variadic(*arguments: Any) -> None: ...
def asgi_2(scope: Any) -> Any: ...
def wsgi_function(environ: Any, start_response: Any) -> Any: ...
def wsgi_with_default(environ: Any, start_response: Any, extra: int = 1) -> Any: ...
def wsgi_keyword(environ: Any, start_response: Any, *, debug: bool = False) -> Any: ...
def blocking_main(worker: Any) -> None: ...
async def async_main(worker: Any) -> None: ...


class ASGIClass:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class ASGI2Class:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


class WSGIClass:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...


class WSGIGenerator:
    """As in PEP 3333: the class itself is the application."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...


class MainClass:
    def __call__(self, worker: Any) -> None: ...


class Holder:
    async def asgi(self, scope: Any, receive: Any, send: Any) -> None: ...

    def wsgi(self, environ: Any, start_response: Any) -> Any: ...

    @staticmethod
    def static(environ: Any, start_response: Any) -> Any: ...

    @classmethod
    async def class_method(cls, scope: Any, receive: Any, send: Any) -> None: ...


def configured(settings: Any, environ: Any, start_response: Any) -> Any: ...


@functools.wraps(wsgi_function)
def wrapping(*arguments: Any) -> Any: ...


@pytest.mark.parametrize(
    ("application", "interface"),
    [
        (asgi_function, "asgi"),
        (asgi_by_other_names, "asgi"),
        (asgi_variadic, "asgi"),
        (asgi_2, "asgi"),
        (ASGIClass(), "asgi"),
        (ASGI2Class, "asgi"),
        (Holder().asgi, "asgi"),
        (Holder.class_method, "asgi"),
        (functools.partial(asgi_function), "asgi"),
        (wsgi_function, "wsgi"),
        (wsgi_with_default, "wsgi"),
        (wsgi_keyword, "wsgi"),
        (WSGIClass(), "wsgi"),
        (WSGIGenerator, "wsgi"),
        (Holder().wsgi, "wsgi"),
        (Holder.static, "wsgi"),
        (wrapping, "wsgi"),
        (functools.partial(configured, {}), "wsgi"),
        (blocking_main, "handoff"),
        (async_main, "handoff"),
        (MainClass(), "handoff"),
        (functools.partial(async_main), "handoff"),
    ],
    ids=lambda value: getattr(value, "__qualname__", type(value).__name__) if callable(value) else value,
)
def test_the_interface_is_told_by_what_the_callable_takes(application: Any, interface: str) -> None:
    assert interface_of(application) == interface


@pytest.mark.parametrize(
    ("application", "expected"),
    [
        (asgi_2, True),
        (ASGI2Class, True),
        (asgi_function, False),
        (asgi_variadic, False),
        (ASGIClass(), False),
        (functools.partial(asgi_function), False),
        (wsgi_function, False),
    ],
)
def test_asgi_2_is_what_takes_only_the_scope(application: Any, expected: bool) -> None:
    assert takes_only_scope(application) is expected


class AsyncMainClass:
    async def __call__(self, worker: Any) -> None: ...


@pytest.mark.parametrize(
    ("application", "expected"),
    [
        (async_main, True),
        (AsyncMainClass(), True),
        (functools.partial(async_main), True),
        (functools.partial(functools.partial(AsyncMainClass())), True),
        (blocking_main, False),
        (MainClass(), False),
        (MainClass, False),
        (Holder().asgi, True),
    ],
)
def test_whether_a_main_is_async_is_told_for_every_form_of_callable(application: Any, expected: bool) -> None:
    assert is_async(application) is expected


@pytest.mark.parametrize("application", [lambda *arguments: None, lambda a, b, c, d: None])
def test_what_may_be_asgi_or_wsgi_says_which_option_decides(application: Any) -> None:
    with pytest.raises(BootFailure, match="cannot tell ASGI from WSGI; say --interface asgi or wsgi"):
        interface_of(application)


def test_what_takes_nothing_is_taken_for_a_factory() -> None:
    def create_app() -> Any: ...

    with pytest.raises(BootFailure, match=r"create_app: takes nothing; is it a factory\? write it with \(\) behind"):
        interface_of(create_app)
