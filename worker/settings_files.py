"""Reads the files that settings name, and says what is wrong with one that cannot be used.

People write these files on all systems, with all editors, and other programs mount them. So a text may be in UTF-8 with
or without a byte order mark, or in UTF-16 or UTF-32 with one, and its lines may end as they like.
"""

import codecs
import os
import re
import stat
from pathlib import Path

MAX_BYTES = 1024 * 1024
_UTF_8 = "utf-8"
_ENCODINGS = (  # UTF-32 first: in little endian its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_CERTIFICATE = re.compile(rb"^-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----", re.MULTILINE)
_KEY = re.compile(rb"^-----BEGIN (?:[A-Z0-9]+ )?PRIVATE KEY-----", re.MULTILINE)
_ENCRYPTED_KEY = re.compile(rb"^(?:-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED)", re.MULTILINE)
_DER = b"\x30\x82"


class UnusableFile(ValueError):
    """A file that a setting names cannot be used.

    Args:
        reason: what is wrong and, if it is about one line, in which; it quotes nothing of the file.
        path: the file.
    """

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(f"{reason} ({_shown(path)})")


class MissingFile(UnusableFile):
    """There is no such file."""


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    r"""Return the text of a regular file of at most so many bytes; its lines end with ``\n``.

    Raises:
        UnusableFile: it cannot be read, or holds no text.
    """
    data = _read(path, max_bytes)
    encoding = next((encoding for mark, encoding in _ENCODINGS if data.startswith(mark)), _UTF_8)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as exc:
        valid = data[: exc.start].decode(encoding, errors="ignore")
        name = encoding.removesuffix("-sig").upper()
        raise UnusableFile(f"line {_line(valid)} is not in {name}", path) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    before, nul, _ = text.partition("\0")
    if nul:  # UTF-16 without a byte order mark looks like this too
        raise UnusableFile(f"line {_line(before)} contains a NUL character: save the file in UTF-8", path)
    return text


def read_secret(path: Path) -> str:
    """Return the one line of a file, without white space around it.

    Raises:
        UnusableFile: the file cannot be read, or holds no line or several.
    """
    text = read_text(path)
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UnusableFile("is empty", path)
    if len(lines) > 1:
        raise UnusableFile(f"line {lines[1][0]}: the file must contain one line only", path)
    return lines[0][1]


def check_certificates(path: Path) -> None:
    """Check that a file holds certificates in PEM form.

    Raises:
        UnusableFile: it does not, or cannot be read.
    """
    if not _CERTIFICATE.search(_read_pem(path)):
        raise UnusableFile("holds no certificate in PEM form", path)


def check_writable(path: Path) -> None:
    """Check that a file can be written, or that it can be made.

    Raises:
        UnusableFile: it cannot.
    """
    try:
        _check_kind(path.stat().st_mode, path)
        is_writable = os.access(path, os.W_OK)
    except FileNotFoundError:
        is_writable = os.access(path.parent, os.W_OK)
    except OSError as exc:
        raise UnusableFile(f"cannot be written: {exc.strerror}", path) from None
    if not is_writable:
        raise UnusableFile("cannot be written", path)


def check_private_key(path: Path) -> None:
    """Check that a file holds a private key in PEM form, without a passphrase.

    Raises:
        UnusableFile: it does not, or cannot be read.
    """
    data = _read_pem(path)
    if _ENCRYPTED_KEY.search(data):
        raise UnusableFile("holds an encrypted private key: the worker cannot ask for a passphrase", path)
    if not _KEY.search(data):
        raise UnusableFile("holds no private key in PEM form", path)


def _read_pem(path: Path) -> bytes:
    data = _read(path)
    if not data.strip():
        raise UnusableFile("is empty", path)
    if any(data.startswith(mark) for mark, _ in _ENCODINGS):  # OpenSSL would skip the block behind it
        raise UnusableFile("line 1 begins with a byte order mark: save the file in ASCII", path)
    if data.startswith(_DER):
        raise UnusableFile("is in DER form: convert it to PEM", path)
    return data


def _read(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    try:
        _check_kind(path.stat().st_mode, path)  # first: opening a device may do something
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO would wait for its writer
            _check_kind(os.fstat(file.fileno()).st_mode, path)  # it may have been replaced meanwhile
            data = file.read(max_bytes + 1) or b""  # None: a file of the kernel without data
    except OSError as exc:
        kind = MissingFile if isinstance(exc, FileNotFoundError) else UnusableFile
        raise kind(f"cannot be read: {exc.strerror}", path) from None
    if len(data) > max_bytes:
        raise UnusableFile(f"is larger than {max_bytes:,} bytes", path)
    return data


def _check_kind(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise UnusableFile("is a directory" if stat.S_ISDIR(mode) else "is not a regular file", path)


def _line(text_before: str) -> int:
    return text_before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1


def _shown(path: Path) -> str:
    """Return the path, unless it may be the secret itself, set where the name of its file was expected."""
    folder = path.parent
    try:
        is_path = path.exists() or (folder.is_dir() and folder not in (Path(), Path("/")))
    except PermissionError:
        is_path = True  # below a folder that may not be entered
    except OSError:
        is_path = False  # such as a name that is too long
    return str(path) if is_path else "a path that does not exist, not shown: it may be a secret"
