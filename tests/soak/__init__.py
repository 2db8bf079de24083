"""Many clients for a while with random calls, cancels, kills and bad input: nothing wrong, nothing lost, nothing left.

`cases` are calls whose answers are known beforehand; `client` is a process of clients that make them and misbehave;
`run` is the server, the killing and the counting; `report` says what came of it. `make soak` runs it for ten minutes
with fifty clients and writes docs/soak.md; tests/test_soak.py is its short form.
"""
