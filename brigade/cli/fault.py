"""Expected errors of the command line, and text that is safe to show. Must not print or exit by itself."""


class Fault(Exception):
    """An error that a person can act on. Shown as one line; `code` is the exit code: 2 for bad input, 1 otherwise."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """Text from a model or a server that cannot steer the terminal.

    Takes out the C0 controls but newline and tab (so ESC too), DEL, the C1 controls (one of them starts escape
    sequences on some terminals), and replaces lone surrogates, which no terminal can encode.
    """
    return "".join(_shown(ch) for ch in text)


def one_line(text: str) -> str:
    """`printable` text with every run of white space as one space."""
    return " ".join(printable(text).split())


def _shown(ch: str) -> str:
    if ch in "\n\t" or " " <= ch <= "~":
        return ch
    if ch < " " or "\x7f" <= ch <= "\x9f":
        return ""
    return "�" if "\ud800" <= ch <= "\udfff" else ch
