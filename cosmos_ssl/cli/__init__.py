"""The cosmos-ssl command."""


def main() -> None:
    """To be written."""
