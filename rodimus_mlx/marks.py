"""What a token's mark says: marks are [B, T] uint8, and no marks mean that every token is one of one text."""

PADDING = 0  # no token: it neither changes a state nor is seen
TOKEN = 1
START = 2  # the first token of a document that is packed behind another
