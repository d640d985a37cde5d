"""The cosmos-launch command."""


def main() -> None:
    """To be written."""
