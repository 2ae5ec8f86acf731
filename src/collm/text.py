"""Text where it enters: UTF-8 whatever the locale, and nothing that is no text."""

from __future__ import annotations

from pathlib import Path

from collm.errors import CollmError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, whatever the locale; a byte order mark at its beginning is no part of it.

    Raises:
        CollmError: the file cannot be read, or is not UTF-8.
    """
    try:
        return decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise CollmError(f"{path}: cannot be read: {error.strerror}") from None


def decoded(data: bytes, where: str) -> str:
    """Bytes as UTF-8 text, without a byte order mark.

    Raises:
        CollmError: naming `where` and the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CollmError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}): convert it to UTF-8"
        ) from None


def require_text(text: str, where: str) -> str:
    r"""`text`, if it is Unicode text: JSON's "\ud83d" and arguments that are not UTF-8 make strings that are not.

    Raises:
        CollmError: naming `where` and the character.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CollmError(
                f"{where}: character {error.start} is half a surrogate pair (U+{ord(text[error.start]):04X}), as text "
                "cut in the middle of an emoji or read in the wrong encoding has it: no tokenizer can read it"
            ) from None
    return text


class Lines:
    """The lines of UTF-8 bytes that come piece by piece; what ends a line is a line feed, as in server-sent events.

    `str.splitlines` and httpx end lines at U+0085, U+2028 and U+2029, too, which JSON may have inside texts.
    """

    def __init__(self) -> None:
        self._held = b""

    def push(self, data: bytes) -> list[str]:
        """The lines that are complete, without their ends."""
        *whole, self._held = (self._held + data).split(b"\n")
        return [_line(each) for each in whole]

    def flush(self) -> list[str]:
        """What was left without an end."""
        rest, self._held = self._held, b""
        return [_line(rest)] if rest else []


def _line(data: bytes) -> str:
    return data.removesuffix(b"\r").decode(errors="replace")
