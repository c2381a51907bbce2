"""How the KV cache of a prompt gets from the rank that computed it to the rank that goes on with it."""
