"""``python -m session_proxy``."""

import sys

from session_proxy import cli


def main() -> None:
    """Console entry point."""
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
