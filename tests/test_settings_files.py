"""Files that settings name: read as people write them, or refused in one line that says where and why."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.certificates import Authority
from tests.support.memory import peak_of
from worker.core.credentials import ApiKey
from worker.errors import EXIT_CONFIG, SettingsError
from worker.onenet.route import Route
from worker.products_file import read_products
from worker.settings import Settings, load_products, load_settings
from worker.settings_files import MAX_BYTES

KEY = "S3cretKey"
MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
UNMARKED = ["utf-16-le", "utf-16-be", "utf-32-le"]
LINE_ENDS = ["", "\n", "\r\n", "\r", " \t\r\n\r\n"]
TWO_PRODUCTS = '{\n  "heating": {"api_key": "S3cretKey"},\n  "cooling": {"api_key": "other"}\n}\n'

NO_VALUE = "a value is expected: text in double quotes, a number, an object or a list"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolate the test from the machine's environment and from the checkout's .env."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that each test writes."""
    return tmp_path / "a-file"


def the_line() -> str:
    """Load settings and products, and return the one line that says what is wrong with them."""
    with pytest.raises(SettingsError) as caught:
        load_products(load_settings())
    [line] = caught.value.lines
    assert KEY not in line
    assert line.isprintable()
    return line


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
@pytest.mark.parametrize("encoding", MARKED)
def test_a_secret_is_read_in_every_unicode_encoding_that_names_itself(
    encoding: str, end: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(f"{KEY}{end}".encode(encoding))
    monkeypatch.setenv("ONENET_API_KEY_FILE", str(file))
    assert load_settings().onenet_api_key == SecretStr(KEY)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("encoding", MARKED)
def test_a_products_file_is_read_in_every_unicode_encoding_that_names_itself(
    encoding: str, end: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(TWO_PRODUCTS.replace("\n", end).encode(encoding))
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    products = load_products(load_settings())
    assert products["heating"].credentials == ApiKey(api_key=SecretStr(KEY))
    assert set(products) == {"heating", "cooling"}


@pytest.mark.parametrize("encoding", MARKED)
def test_the_first_setting_of_an_env_file_counts_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    """A byte order mark in front of its name would make it an unknown variable, which nobody reads."""
    (tmp_path / ".env").write_bytes("LOG_LEVEL=debug\r\nWORKER_CONCURRENCY=7\r\n".encode(encoding))
    settings = load_settings()
    assert (settings.log_level, settings.worker_concurrency) == ("debug", 7)


@pytest.mark.parametrize("name", ["ONENET_API_KEY_FILE", "ONENET_PRODUCTS_FILE"])
@pytest.mark.parametrize("encoding", UNMARKED)
def test_utf_16_without_a_byte_order_mark_is_refused(
    encoding: str, name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(KEY.encode(encoding))
    monkeypatch.setenv(name, str(file))
    assert the_line() == f"{name}: line 1 contains a NUL character: save the file in UTF-8 ({file})"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \r\n\n", "is empty"),
        (b"\n" + KEY.encode() + b"\n\n# of the product\n", "line 4: the file must contain one line only"),
        (b"\nke\0y", "line 2 contains a NUL character: save the file in UTF-8"),
        (b"\r\n\r\nk\xe9y", "line 3 is not in UTF-8"),
        (b"\xff\xfek\0e", "line 1 is not in UTF-16"),
        (b"k" * (MAX_BYTES + 1), "is larger than 1,048,576 bytes"),
    ],
    ids=["empty", "mark", "blank", "two lines", "NUL", "Latin-1", "half a character", "too large"],
)
def test_an_unusable_file_of_a_secret_is_one_line_with_its_name_and_the_line_in_it(
    content: bytes, reason: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(content)
    monkeypatch.setenv("ONENET_API_KEY_FILE", str(file))
    assert the_line() == f"ONENET_API_KEY_FILE: {reason} ({file})"


def _directory(path: Path) -> None:
    path.mkdir()


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


NOT_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda _: None, "cannot be read: No such file or directory"),
    "directory": (_directory, "is a directory"),
    "FIFO without a writer": (os.mkfifo, "is not a regular file"),
    "socket": (_socket, "is not a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "link to itself": (_link_to_itself, "cannot be read: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize(
    "name",
    ["AMQP_URL_FILE", "ONENET_API_KEY_FILE", "IDEMPOTENCY_URL_FILE", "OTEL_EXPORTER_OTLP_ENDPOINT_FILE",
     "ONENET_PRODUCTS_FILE", "AMQP_CA_FILE", "ONENET_CA_FILE", "AMQP_CERT_FILE", "AMQP_KEY_FILE"],
)  # fmt: skip
def test_what_is_no_readable_file_is_refused_and_not_waited_for(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = NOT_FILES[kind]
    path = tmp_path / "it"
    monkeypatch.chdir("/")  # a socket's path must be short
    monkeypatch.setenv(name, str(path))
    if kind == "socket":
        monkeypatch.chdir(tmp_path)
        make(Path("it"))
    else:
        make(path)
    assert the_line() == f"{name}: {reason} ({path})"


# What a process opens because a library reads the variable.
LIBRARY_FILES = [
    "SSL_CERT_FILE",
    "SSLKEYLOGFILE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NETRC",
]


@pytest.mark.parametrize("kind", ["FIFO without a writer", "endless"])
@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_a_file_of_a_library_that_is_no_regular_one_is_refused_and_not_waited_for(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificates and keys of all TLS connections, so also where the settings name files of their own."""
    issued = Authority().issue("host", tmp_path / "issued")
    monkeypatch.setenv("ONENET_API_KEY", KEY)
    monkeypatch.setenv("AMQP_CA_FILE", str(issued.ca))
    monkeypatch.setenv("IDEMPOTENCY_URL", f"rediss://host?ssl_certfile={issued.cert}&ssl_keyfile={issued.key}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.invalid")
    make, reason = NOT_FILES[kind]
    make(tmp_path / "it")
    monkeypatch.setenv(name, str(tmp_path / "it"))
    assert the_line() == f"{name}: {reason} ({tmp_path / 'it'})"


@pytest.mark.parametrize("name", [*LIBRARY_FILES, "PROMETHEUS_MULTIPROC_DIR"])
def test_what_is_wrong_with_a_file_of_a_library_is_one_line_and_exit_code_78(name: str, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "it"
    path.parent.touch()
    environment = {"ONENET_API_KEY": "k", "HTTP_PORT": "0", "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector.invalid"}
    ended = subprocess.run(
        [sys.executable, "-m", "worker", "run"],
        check=False,
        cwd=tmp_path,
        env=os.environ | environment | {name: str(path)},
        capture_output=True,
        text=True,
    )
    [line] = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (EXIT_CONFIG, "")
    assert line.startswith(f"onenet-worker: {name}: ")


@pytest.mark.parametrize("name", [name for name in LIBRARY_FILES if "SSL" not in name])
def test_the_files_of_an_exporter_that_is_not_used_are_not_looked_at(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONENET_API_KEY", KEY)
    monkeypatch.setenv(name, "/dev/zero")
    load_settings()


def test_a_file_below_a_closed_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked in a process without capabilities, since root may read everything."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    environment = {**os.environ, "AMQP_CA_FILE": str(closed / "ca.pem"), "ONENET_API_KEY": "k"}
    without_capabilities = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    ended = subprocess.run(
        [*without_capabilities, sys.executable, "-m", "worker", "run"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    reason = f"AMQP_CA_FILE: cannot be read: Permission denied ({closed / 'ca.pem'})"
    assert (ended.returncode, ended.stderr, ended.stdout) == (EXIT_CONFIG, f"onenet-worker: {reason}\n", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ONENET_API_KEY_FILE", KEY),
        ("ONENET_ACCESS_KEY_FILE", f"/{KEY}+/aGk="),
        ("AMQP_URL_FILE", f"amqp://user:{KEY}@host/"),
        ("ONENET_PRODUCTS_FILE", json.dumps({"a": {"api_key": KEY}})),
        ("AMQP_KEY_FILE", f"-----BEGIN PRIVATE KEY-----\n{KEY * 1000}\n-----END PRIVATE KEY-----\n"),
        ("ONENET_CA_FILE", f"-----BEGIN CERTIFICATE-----\n{KEY}\n-----END CERTIFICATE-----\n"),
    ],
)
def test_a_secret_in_the_place_of_its_files_name_is_not_quoted(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    line = the_line()
    assert line.startswith(f"{name}: cannot be read: ")
    assert line.endswith("(a path that does not exist, not shown: it may be a secret)")


def test_the_name_of_a_file_cannot_break_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a\nb\x1b[31m\x9b"
    path.touch()
    monkeypatch.setenv("ONENET_API_KEY_FILE", str(path))
    assert the_line() == f"ONENET_API_KEY_FILE: is empty ({tmp_path}/a\\nb\\x1b[31m\\x9b)"


@pytest.mark.parametrize(
    ("name", "value"),
    [("AMQP_URL", f"http://user:{KEY}@host/"), ("ONENET_API_KEY", f"{KEY} {KEY}"), ("ONENET_ACCESS_KEY", f"{KEY}!")],
)
def test_a_wrong_value_in_a_file_is_reported_with_the_file(
    name: str, value: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(value)
    monkeypatch.setenv(f"{name}_FILE", str(file))
    line = the_line()
    assert line.startswith(f"{name}: must be ")
    assert line.endswith(f" ({file})")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("\n[]", "must be a JSON object: product name → credentials"),
        ('{"a":\n {"api_key": "S3cretKey"},\n}',
         'line 3, column 1: is not JSON: a name in double quotes, or }, is expected: "name": …'),
        ("a: {api_key: S3cretKey}", f"line 1, column 1: is not JSON: {NO_VALUE}"),
        ('// products\n{"a": {"api_key": "S3cretKey"}}', f"line 1, column 1: is not JSON: {NO_VALUE}"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' * 100_000, "is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON: a number has too many digits"),
        ('{"a": {"api_key": "S3cretKey"},\n "b": {"api_key": "y"},\n "\\u0061": {"api_key": "z"}}',
         "line 3: product 'a' is there twice, first in line 1"),
        ('{"api_key": {"api_key": "x"},\n "b": {"api_key": "S3cretKey",\n "api_key": "y"}}',
         "line 3: product 'b': api_key is there twice, first in line 2"),
        ('{\n"a": {"api_key":\n "S3cretKey "}}',
         "line 2: product 'a': api_key: must be printable ASCII without blanks, since it travels in a header"),
        ('{"a": {\n"product_id": 7,\n"access_key": "aGk="}}', "line 2: product 'a': product_id: must be a string"),
        ('{\n"a": {"product_id": "7"}}', "line 2: product 'a': access_key: is missing"),
        ('{"a": {"api_key": "S3cretKey",\n"api-key": "y"}}', "line 2: product 'a': api-key: is unknown here"),
        ('{"a": {"api_key": "S3cretKey",\n"api": "v3"}}', "line 2: product 'a': api: must be 'auto', 'v1' or 'v2'"),
        ('\n{"api_key": "S3cretKey"}',
         "line 2: product 'api_key': must be an object with one of api_key, product_id and user_id"),
        ('{"": {"api_key": "x"}}',
         "line 1: product '': its name must be 1 to 100 printable characters, without blanks around them"),
        ('{"a\\ud800\\n": {"api_key": "x"}}',
         "line 1: product 'a\\ud800\\n': its name must be 1 to 100 printable characters, without blanks around them"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_what_is_wrong_in_a_products_file_is_said_with_its_line(
    text: str, reason: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(text)
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    assert the_line() == f"ONENET_PRODUCTS_FILE: {reason} ({file})"


def test_everything_that_is_wrong_in_a_products_file_is_said_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('{"a": 1,\n"b": {"api_key": "ok"},\n"c": {"api_key": ""},\n"a": 2}')
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    with pytest.raises(SettingsError) as caught:
        load_products(load_settings())
    said = [line.removeprefix("ONENET_PRODUCTS_FILE: ").split(": ")[0] for line in caught.value.lines]
    assert said == ["line 4", "line 1", "line 3"]


def test_a_products_file_without_products_needs_other_credentials(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("{}")
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    assert the_line().endswith(", nor ONENET_PRODUCTS_FILE, which names no product")
    monkeypatch.setenv("ONENET_API_KEY", "k")
    assert set(load_products(load_settings())) == {None}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("WORKER_CONCURRENCY=7\nLOG_LEVEL: debug\n", ".env: line 2: must be NAME=value"),
        ("\nLOG_LEVEL debug\n", ".env: line 2: must be NAME=value"),
        ("ONENET_API_KEY='S3cretKey\nLOG_LEVEL=debug\n", ".env: line 1: must be NAME=value"),
        ("LOG_LEVEL=\xff", ".env: line 1 is not in UTF-8 (.env)"),
    ],
)
def test_a_line_of_the_env_file_that_sets_nothing_is_refused(
    text: str, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be left out without a word, and the default would count."""
    (tmp_path / ".env").write_text(text, encoding="latin-1")
    assert the_line() == line
    assert capfd.readouterr() == ("", "")


def test_a_directory_in_the_place_of_the_env_file_is_reported(tmp_path: Path) -> None:
    """Docker makes one where a file that it is to mount is missing."""
    (tmp_path / ".env").mkdir()
    assert the_line() == ".env: is a directory (.env)"


@pytest.mark.parametrize(
    ("kind", "is_authority", "reason"),
    [
        ("empty", True, "is empty"),
        ("text", True, "holds no certificate in PEM form"),
        ("key", True, "holds no certificate in PEM form"),
        ("cert", False, "holds no private key in PEM form"),
        ("mark", True, "line 1 begins with a byte order mark: save the file in ASCII"),
        ("utf-16", True, "line 1 begins with a byte order mark: save the file in ASCII"),
        ("der", True, "is in DER form: convert it to PEM"),
        ("cut", True, "holds a certificate that cannot be read"),
        ("encrypted", False, "holds an encrypted private key: the worker cannot ask for a passphrase"),
        ("encrypted, old form", False, "holds an encrypted private key: the worker cannot ask for a passphrase"),
    ],
)
def test_a_certificate_or_key_that_cannot_be_used_is_refused(
    kind: str, is_authority: bool, reason: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = Authority().issue("host", tmp_path / "tls")
    ca = issued.ca.read_bytes()
    contents = {
        "empty": b" \n",
        "text": b"nothing\n",
        "key": issued.key.read_bytes(),
        "cert": issued.cert.read_bytes(),
        "mark": b"\xef\xbb\xbf" + ca,
        "utf-16": ca.decode().encode("utf-16"),
        "der": b"\x30\x82\x01\x02",
        "cut": ca[:100] + b"\n-----END CERTIFICATE-----\n",
        "encrypted": issued.key.read_bytes().replace(b"BEGIN ", b"BEGIN ENCRYPTED ", 1).replace(b"EC ", b""),
        "encrypted, old form": issued.key.read_bytes().replace(b"-----\n", b"-----\nProc-Type: 4,ENCRYPTED\n", 1),
    }
    file.write_bytes(contents[kind])
    name = "ONENET_CA_FILE" if is_authority else "AMQP_KEY_FILE"
    monkeypatch.setenv(name, str(file))
    if not is_authority:
        monkeypatch.setenv("AMQP_CERT_FILE", str(issued.cert))
    assert the_line() == f"{name}: {reason} ({file})"
    monkeypatch.delenv(name)
    monkeypatch.delenv("AMQP_CERT_FILE", raising=False)
    option = f"ssl_ca_certs={file}" if is_authority else f"ssl_certfile={issued.cert}&ssl_keyfile={file}"
    monkeypatch.setenv("IDEMPOTENCY_URL", f"rediss://host?{option}")
    named = "ssl_ca_certs" if is_authority else "ssl_keyfile"
    assert the_line() == f"IDEMPOTENCY_URL: an option after ? cannot be used: {named}: {reason} ({file})"


def test_a_certificate_for_redis_needs_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issued, other = (Authority().issue("host", tmp_path / name) for name in ("tls", "other"))
    monkeypatch.setenv("IDEMPOTENCY_URL", f"rediss://host?ssl_certfile={issued.cert}&ssl_keyfile={issued.key}")
    load_settings()
    monkeypatch.setenv("IDEMPOTENCY_URL", f"rediss://host?ssl_certfile={issued.cert}&ssl_keyfile={other.key}")
    line = "IDEMPOTENCY_URL: an option after ? cannot be used: ssl_certfile: does not belong to its key"
    assert the_line() == line


def test_certificates_and_keys_may_have_any_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = Authority().issue("host", tmp_path / "tls")
    for name, path in (("AMQP_CA_FILE", issued.ca), ("AMQP_CERT_FILE", issued.cert), ("AMQP_KEY_FILE", issued.key)):
        path.write_bytes(b"# a comment\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
        monkeypatch.setenv(name, str(path))
    assert load_settings().amqp_ca_file == issued.ca


def test_a_file_that_becomes_a_fifo_while_it_is_opened_is_refused_and_not_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(KEY)
    monkeypatch.setenv("ONENET_API_KEY_FILE", str(file))
    open_file = os.open

    def replace_and_open(path: Path, flags: int) -> int:
        file.unlink()
        os.mkfifo(file)
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", replace_and_open)
    assert the_line() == f"ONENET_API_KEY_FILE: is not a regular file ({file})"


def test_a_secret_of_kubernetes_is_a_link_to_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "..2026_08").mkdir()
    (tmp_path / "..2026_08" / "key").write_text(KEY)
    (tmp_path / "..data").symlink_to("..2026_08")
    (tmp_path / "key").symlink_to("..data/key")
    monkeypatch.setenv("ONENET_API_KEY_FILE", str(tmp_path / "key"))
    assert load_settings().onenet_api_key == SecretStr(KEY)


@pytest.mark.parametrize("content", ['{"a":' * 200_000, "[" * 500_000 + "]" * 500_000], ids=["objects", "lists"])
def test_a_deeply_nested_products_file_is_one_line(content: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(content)
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    assert the_line() == f"ONENET_PRODUCTS_FILE: is nested too deeply ({file})"


@pytest.mark.parametrize("unit", [r"\n", r"\"", r"\\", r"\u0041", "{", " ", "a"])
@pytest.mark.parametrize(
    "form", ['{"a": {"api_key": "%s"}}', '{"%s": 1}', '{"a": ["%s"]}'], ids=["value", "name", "list"]
)
def test_a_long_string_in_a_products_file_takes_a_few_times_its_bytes(form: str, unit: str, file: Path) -> None:
    file.write_text(form % (unit * ((MAX_BYTES - 100) // len(unit))))
    assert peak_of(lambda: read_products(file, "https://onenet.invalid", "v1")) < 8 * MAX_BYTES


@pytest.mark.parametrize("depth", [500, 9_900], ids=["for every Python", "for a Python that reads JSON more deeply"])
def test_a_deeply_nested_products_file_takes_a_few_times_its_bytes(
    depth: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names around each name, kept for each, took 375 MiB for 59 KB."""
    names = ", ".join(f'"name-{number}": 0' for number in range(10_000))
    file.write_text('{"p": ' + '{"a": ' * depth + "{" + names + "}" * (depth + 2))
    if depth > 500:
        monkeypatch.setattr(json, "loads", lambda _: {"p": {"a": {}}})
    assert peak_of(lambda: read_products(file, "https://onenet.invalid", "v1")) < 8 * MAX_BYTES
    products, lines = read_products(file, "https://onenet.invalid", "v1")
    assert not products
    assert lines == [f"line 1: product 'p': must be an object with one of api_key, product_id and user_id ({file})"]


def test_of_many_wrong_products_the_first_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(json.dumps({f"product-{number}": 1 for number in range(1234)}))
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    with pytest.raises(SettingsError) as caught:
        load_products(load_settings())
    assert len(caught.value.lines) == 21
    assert caught.value.lines[-1] == f"ONENET_PRODUCTS_FILE: and 1,214 more ({file})"


def test_a_long_or_unprintable_name_makes_no_long_line_and_no_second_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(json.dumps({"n" * 500_000: {}}))
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(file))
    assert len(the_line()) < 1100
    file.write_text(json.dumps({"a": {"api_key": "k", "\x1b[2J\nONENET_API_KEY: forged\u2028": 1}}))
    assert "\\x1b[2J\\nONENET_API_KEY: forged\\u2028" in the_line()


def test_certificate_authorities_of_the_environment_are_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL would wait for the writer of a FIFO, and read /dev/zero without end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
        with pytest.raises(SettingsError) as caught:
            Route("https://onenet.invalid", None)
        assert caught.value.lines == [f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE: is not a regular file ({path})"]


@pytest.mark.parametrize("value", ['"%s"', "'%s'", '"%s', "%s"], ids=ascii)
@pytest.mark.parametrize("unit", ["a", r"\n", r"\""])
def test_the_values_of_an_env_file_take_bounded_memory(unit: str, value: str, tmp_path: Path) -> None:
    """Its library keeps a state for each character of a quoted value."""
    (tmp_path / ".env").write_text("A=" + value % (unit * (65_000 // len(unit))))

    def load() -> None:
        with suppress(SettingsError):
            load_settings()

    assert peak_of(load) < 24 * 1024 * 1024


def test_an_env_file_that_is_too_large_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("#" * 65_537)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.lines[0] == ".env: is larger than 65,536 bytes (.env)"


@pytest.mark.parametrize("kind", ["directory", "FIFO without a writer", "endless"])
def test_an_env_file_that_is_no_readable_file_is_one_line(kind: str, tmp_path: Path) -> None:
    make, reason = NOT_FILES[kind]
    make(tmp_path / ".env")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.lines[0] == f".env: {reason} (.env)"
