"""The ``rodimus-mlx`` command: parse, import late, call one function, print."""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPT = 130  # 128 + SIGINT, as shells report it
