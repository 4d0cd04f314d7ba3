"""What the user can put right: one exception and one warning, whose message is the whole answer."""


class RodimusError(Exception):
    """A mistake in the input, said in one line that names the file, key or option and what to do.

    The command line prints it as ``Error: ...`` without a traceback; libraries may catch it.
    """


class RodimusWarning(UserWarning):
    """Something in the input that is odd but not fatal; the command line prints it as ``Warning: ...``."""
