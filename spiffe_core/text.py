"""How long a text is as UTF-8, for limits that count bytes."""


def utf8_bytes(text: str) -> int | None:
    """
    Return how many bytes *text* has as UTF-8; None when it cannot be written so.

    Half a surrogate pair is such a text: JSON escapes and undecodable file names bring it,
    and it would fail later, where it is sent or stored.
    """
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None
