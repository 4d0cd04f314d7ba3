"""The ``rodimus-mlx`` command: parse, import late, call one function, print."""
