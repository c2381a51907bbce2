"""How do bytes move? Typed messages between processes. Must not know what the messages mean."""
