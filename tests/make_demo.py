"""The old name of make_tiny.py."""

from make_tiny import make as make
