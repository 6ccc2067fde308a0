"""The type of a token on disk."""

UINT16_VOCABULARY = 1 << 16


def token_type(vocabulary_size: int) -> str:
    """Name the smallest unsigned integer type that holds every token.

    Args:
        vocabulary_size: number of tokens.
    """
    return "uint16" if vocabulary_size <= UINT16_VOCABULARY else "uint32"
