"""Who drives a rank? The worker process, its one loop, and the client that owns it. Must not know HTTP."""
