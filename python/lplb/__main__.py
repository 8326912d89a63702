"""`python -m lplb`: see lplb.cli."""

from .cli.main import main
from .cli.terminal import end

if __name__ == "__main__":
    end(main())
