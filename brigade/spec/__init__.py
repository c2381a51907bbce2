"""What is it? Models, parameters and what a caller may ask: frozen data, no torch, no I/O beyond one config.json."""
