"""A server at the other end: what crosses the network, how, and what is done when it does not arrive."""
